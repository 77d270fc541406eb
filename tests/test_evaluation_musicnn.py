"""Tests of the tagger: checkpoint reader, front-end against librosa, network against a numpy reference, tags."""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from presto_rt.errors import InvalidInputError, MissingDependencyError, WeightsError
from presto_rt.lab.evaluation import musicnn, tf_checkpoint

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("musicnn") is None, reason="the musicnn package is not installed"
)


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    return tf_checkpoint.read_checkpoint(musicnn.package_folder() / "MTT_musicnn")


@pytest.fixture(scope="module")
def tagger() -> musicnn.Tagger:
    torch.set_num_threads(1)
    return musicnn.Tagger()


# ---- checkpoint reader


def varint(n: int) -> bytes:
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def write_checkpoint(folder: Path, tensors: dict[str, np.ndarray], restart: int = 2) -> None:
    """Write a tensor bundle with two table blocks and shared key prefixes, after the description of the format."""
    data = b"".join(t.astype("<f4").tobytes() for t in tensors.values())
    (folder / ".data-00000-of-00001").write_bytes(data)
    entries, offset = {b"": b"\x08\x01"}, 0
    for name, t in tensors.items():
        shape = b"".join(b"\x12" + varint(len(d)) + d for d in (b"\x08" + varint(n) for n in t.shape))
        message = b"\x08\x01\x12" + varint(len(shape)) + shape + b"\x20" + varint(offset) + b"\x28"
        entries[name.encode()] = message + varint(t.nbytes) + b"\x35" + struct.pack("<I", 7)
        offset += t.nbytes

    def block(pairs: list[tuple[bytes, bytes]]) -> bytes:
        out, restarts, last = b"", [], b""
        for i, (key, value) in enumerate(pairs):
            shared = 0
            if i % restart == 0:
                restarts.append(len(out))
            else:
                while shared < min(len(key), len(last)) and key[shared] == last[shared]:
                    shared += 1
            out += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
            last = key
        return out + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))

    table, handles = b"", []
    pairs = sorted(entries.items())
    for part in (pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]):
        body = block(part)
        handles.append((part[-1][0], varint(len(table)) + varint(len(body))))
        table += body + b"\0" + b"crc."
    places = []
    for body in (block([]), block(handles)):
        places.append(varint(len(table)) + varint(len(body)))
        table += body + b"\0" + b"crc."
    footer = b"".join(places).ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)
    (folder / ".index").write_bytes(table + footer)


def test_read_checkpoint_returns_the_written_tensors(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    names = ["conv2d/bias", "conv2d/kernel", "conv2d/kernel/Adam", "conv2d_1/bias", "dense/kernel", "scalar"]
    shapes = [(3,), (2, 5, 1, 3), (2, 5, 1, 3), (200,), (7, 300), ()]
    written = {n: rng.standard_normal(s).astype(np.float32) for n, s in zip(names, shapes, strict=True)}
    write_checkpoint(tmp_path, written)
    tensors = tf_checkpoint.read_checkpoint(tmp_path)
    assert set(tensors) == set(names) - {"conv2d/kernel/Adam"}
    for name, value in tensors.items():
        assert value.shape == written[name].shape
        np.testing.assert_array_equal(value, written[name])


def test_read_checkpoint_rejects_damaged_files(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"a": np.ones(10, np.float32), "b": np.ones(4, np.float32)})
    data = tmp_path / ".data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:-4])
    with pytest.raises(WeightsError, match="does not fit"):
        tf_checkpoint.read_checkpoint(tmp_path)
    (tmp_path / ".index").write_bytes(b"no table" * 20)
    with pytest.raises(WeightsError, match="not a TensorFlow checkpoint"):
        tf_checkpoint.read_checkpoint(tmp_path)
    data.unlink()
    with pytest.raises(WeightsError, match="missing"):
        tf_checkpoint.read_checkpoint(tmp_path)


@needs_weights
def test_checkpoint_has_the_expected_layers(tensors: dict[str, np.ndarray]) -> None:
    assert tensors["conv2d/kernel"].shape == (7, 38, 1, 204)
    assert tensors["conv2d_5/kernel"].shape == (7, 561, 1, 64)
    assert tensors["dense_1/bias"].shape == (50,)
    assert all(np.isfinite(t).all() for t in tensors.values())
    assert all((t > 0).all() for name, t in tensors.items() if name.endswith("moving_variance"))


# ---- front-end


def test_mel_matrix_and_logmel_match_librosa() -> None:
    librosa = pytest.importorskip("librosa")
    np.testing.assert_allclose(musicnn.mel_matrix(), librosa.filters.mel(sr=16000, n_fft=512, n_mels=96), atol=1e-8)
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(20000) * np.hanning(20000) * 0.3).astype(np.float32)
    power = librosa.feature.melspectrogram(y=x, sr=16000, n_fft=512, hop_length=256, n_mels=96, pad_mode="reflect").T
    np.testing.assert_allclose(musicnn.logmel(x).numpy(), np.log10(1 + 10000 * power), atol=1e-5)


def test_windows_are_adjacent_and_short_inputs_repeat() -> None:
    frames = torch.arange(400.0)[:, None].expand(400, 96)
    assert musicnn.windows(frames)[:, 0, 0].tolist() == [0, 187]
    short = musicnn.windows(frames[:100])
    assert short.shape == (1, 187, 96)
    assert short[0, [99, 100, 186], 0].tolist() == [99, 0, 86]
    with pytest.raises(InvalidInputError, match="mono signal"):
        musicnn.logmel(np.zeros(100, np.float32))


# ---- the network against a numpy reference, after TensorFlow's definitions (NHWC, layer by layer, float64)


def batch_norm(t: dict[str, np.ndarray], i: int, x: np.ndarray) -> np.ndarray:
    p = {k: t[f"batch_normalization{f'_{i}' if i else ''}/{k}"].astype(np.float64) for k in ("gamma", "beta")}
    q = {k: t[f"batch_normalization{f'_{i}' if i else ''}/moving_{k}"].astype(np.float64) for k in ("mean", "variance")}
    return (x - q["mean"]) / np.sqrt(q["variance"] + 0.001) * p["gamma"] + p["beta"]


def convolve(t: dict[str, np.ndarray], i: int, x: np.ndarray, pad: tuple[int, int]) -> np.ndarray:
    """Apply relu(conv) to x (T, F) at all positions: (T', F', out)."""
    kernel = t[f"conv2d{f'_{i}' if i else ''}/kernel"][:, :, 0].astype(np.float64)
    bias = t[f"conv2d{f'_{i}' if i else ''}/bias"].astype(np.float64)
    x = np.pad(x, (pad, (0, 0)))
    patches = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2])
    return np.maximum(np.einsum("tfhw,hwo->tfo", patches, kernel, optimize=True) + bias, 0)


def reference_musicnn(t: dict[str, np.ndarray], logmel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return logits (50,) and the penultimate layer (200,) of one window (T, 96)."""
    x = batch_norm(t, 0, logmel[..., None].astype(np.float64))[..., 0]
    pads = [(3, 3), (3, 3), (63, 64), (31, 32), (15, 16)]
    front = np.concatenate([batch_norm(t, i + 1, convolve(t, i, x, pads[i])).max(1) for i in range(5)], 1)
    m1 = batch_norm(t, 6, convolve(t, 5, front, (3, 3)))[:, 0]
    m2 = batch_norm(t, 7, convolve(t, 6, m1, (3, 3)))[:, 0] + m1
    m3 = batch_norm(t, 8, convolve(t, 7, m2, (3, 3)))[:, 0] + m2
    features = np.concatenate([front, m1, m2, m3], 1)
    pooled = np.stack([features.max(0), features.mean(0)], -1).reshape(-1)
    dense = np.maximum(batch_norm(t, 9, pooled) @ t["dense/kernel"].astype(np.float64) + t["dense/bias"], 0)
    penultimate = batch_norm(t, 10, dense)
    return penultimate @ t["dense_1/kernel"].astype(np.float64) + t["dense_1/bias"], penultimate


@needs_weights
@pytest.mark.parametrize("frames", [187, 130])
def test_network_matches_the_numpy_reference(
    tensors: dict[str, np.ndarray], tagger: musicnn.Tagger, frames: int
) -> None:
    rng = np.random.default_rng(frames)
    logmel = rng.gamma(2.0, 0.8, (frames, 96)).astype(np.float32)
    expected_logits, expected_penultimate = reference_musicnn(tensors, logmel)
    with torch.inference_mode():
        logits, penultimate = tagger.net(torch.from_numpy(logmel)[None])
    np.testing.assert_allclose(logits[0].numpy(), expected_logits, atol=2e-4)
    np.testing.assert_allclose(penultimate[0].numpy(), expected_penultimate, atol=2e-4)


@needs_weights
def test_tag_is_independent_of_the_batch_size(tagger: musicnn.Tagger) -> None:
    rng = np.random.default_rng(3)
    clip = (rng.standard_normal((2, 44100 * 16)) * 0.1).astype(np.float32)
    batched, single = tagger.tag(clip, batch=3), tagger.tag(clip, batch=1)
    assert batched.tags.shape == (5, 50)
    assert batched.penultimate.shape == (5, 200)
    np.testing.assert_allclose(batched.tags, single.tags, atol=1e-5)
    np.testing.assert_allclose(batched.penultimate, single.penultimate, atol=1e-4)
    assert tagger.tag(clip[:, :30000]).tags.shape == (1, 50)


# ---- tags


def plucked(frequencies: list[float], seconds: float = 4.0, rate: int = 44100) -> np.ndarray:
    """Synthesize plucked strings, two notes a second (Karplus and Strong 1983)."""
    rng = np.random.default_rng(0)
    out = np.zeros(int(seconds * rate))
    for n, f in enumerate(frequencies):
        delay, start = round(rate / f), int(n * rate / 2)
        buffer = rng.uniform(-1, 1, delay)
        tone = np.empty(rate)
        for i in range(0, rate, delay):
            tone[i : i + delay] = buffer[: len(tone[i : i + delay])]
            buffer = 0.498 * (buffer + np.roll(buffer, 1))
        stop = min(start + rate, len(out))
        out[start:stop] += 0.3 * tone[: stop - start]
    return np.stack([out, out]).astype(np.float32)


@needs_weights
def test_tag_recognizes_a_plucked_string_as_guitar(tagger: musicnn.Tagger) -> None:
    notes = [196.0, 246.94, 293.66, 392.0, 329.63, 246.94, 220.0, 293.66]
    probabilities = tagger.tag(plucked(notes)).tags.mean(0)
    best = [musicnn.TAGS[i] for i in np.argsort(-probabilities)[:3]]
    assert "guitar" in best, best


def test_tags_are_distinct() -> None:
    assert len(set(musicnn.TAGS)) == len(musicnn.TAGS) == 50


def test_tagger_without_its_package_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install --no-deps musicnn"):
        musicnn.Tagger()
