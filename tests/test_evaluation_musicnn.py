"""The tagger: checkpoint reader, front-end against librosa, the port against a plain numpy evaluation, behaviour."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

from presto_rt.errors import InvalidInputError, WeightsError
from presto_rt.lab.evaluation import musicnn, tf_checkpoint

needs_weights = pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("musicnn") is None, reason="the musicnn package is not installed"
)


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    return tf_checkpoint.read_checkpoint(musicnn.package_folder() / "MTT_musicnn")


@pytest.fixture(scope="module")
def tagger() -> musicnn.Tagger:
    torch.set_num_threads(1)
    return musicnn.Tagger()


# ---- checkpoint reader


def _varint(n: int) -> bytes:
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def _write_checkpoint(folder, tensors: dict[str, np.ndarray], restart: int = 2) -> None:
    """A tensor bundle with two table blocks and shared key prefixes, written from the format's description."""
    data = b"".join(t.astype("<f4").tobytes() for t in tensors.values())
    (folder / ".data-00000-of-00001").write_bytes(data)
    entries, offset = {b"": b"\x08\x01"}, 0
    for name, t in tensors.items():
        shape = b"".join(b"\x12" + _varint(len(d)) + d for d in (b"\x08" + _varint(n) for n in t.shape))
        message = b"\x08\x01\x12" + _varint(len(shape)) + shape + b"\x20" + _varint(offset) + b"\x28"
        entries[name.encode()] = message + _varint(t.nbytes) + b"\x35" + struct.pack("<I", 7)
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
            out += _varint(shared) + _varint(len(key) - shared) + _varint(len(value)) + key[shared:] + value
            last = key
        return out + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))

    table, handles = b"", []
    pairs = sorted(entries.items())
    for part in (pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]):
        body = block(part)
        handles.append((part[-1][0], _varint(len(table)) + _varint(len(body))))
        table += body + b"\0" + b"crc."
    places = []
    for body in (block([]), block(handles)):
        places.append(_varint(len(table)) + _varint(len(body)))
        table += body + b"\0" + b"crc."
    footer = b"".join(places).ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)
    (folder / ".index").write_bytes(table + footer)


def test_reader_returns_what_was_written(tmp_path):
    rng = np.random.default_rng(1)
    names = ["conv2d/bias", "conv2d/kernel", "conv2d/kernel/Adam", "conv2d_1/bias", "dense/kernel", "scalar"]
    shapes = [(3,), (2, 5, 1, 3), (2, 5, 1, 3), (200,), (7, 300), ()]
    written = {n: rng.standard_normal(s).astype(np.float32) for n, s in zip(names, shapes, strict=True)}
    _write_checkpoint(tmp_path, written)
    read = tf_checkpoint.read_checkpoint(tmp_path)
    assert set(read) == set(names) - {"conv2d/kernel/Adam"}
    for name, value in read.items():
        assert value.shape == written[name].shape
        np.testing.assert_array_equal(value, written[name])


def test_reader_refuses_truncated_data_and_other_files(tmp_path):
    _write_checkpoint(tmp_path, {"a": np.ones(10, np.float32), "b": np.ones(4, np.float32)})
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
def test_checkpoint_has_the_layers_in_order(tensors):
    assert tensors["conv2d/kernel"].shape == (7, 38, 1, 204)
    assert tensors["conv2d_5/kernel"].shape == (7, 561, 1, 64)
    assert tensors["dense_1/bias"].shape == (50,)
    assert all(np.isfinite(t).all() for t in tensors.values())
    assert all((t > 0).all() for name, t in tensors.items() if name.endswith("moving_variance"))


# ---- front-end


def test_mel_and_logmel_against_librosa():
    librosa = pytest.importorskip("librosa")
    np.testing.assert_allclose(musicnn.mel_matrix(), librosa.filters.mel(sr=16000, n_fft=512, n_mels=96), atol=1e-8)
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(20000) * np.hanning(20000) * 0.3).astype(np.float32)
    power = librosa.feature.melspectrogram(y=x, sr=16000, n_fft=512, hop_length=256, n_mels=96, pad_mode="reflect").T
    np.testing.assert_allclose(musicnn.logmel(x).numpy(), np.log10(1 + 10000 * power), atol=1e-5)


def test_windows_cut_and_repeat():
    frames = torch.arange(400.0)[:, None].expand(400, 96)
    assert musicnn.windows(frames)[:, 0, 0].tolist() == [0, 187]
    assert musicnn.windows(frames, hop=100)[:, 0, 0].tolist() == [0, 100, 200]
    short = musicnn.windows(frames[:100])
    assert short.shape == (1, 187, 96)
    assert short[0, [99, 100, 186], 0].tolist() == [99, 0, 86]
    with pytest.raises(InvalidInputError, match="mono signal"):
        musicnn.logmel(np.zeros(100, np.float32))


# ---- the network against numpy, from TensorFlow's own definitions (NHWC, layer by layer, float64)


def _bn(t, i, x):
    p = {k: t[f"batch_normalization{f'_{i}' if i else ''}/{k}"].astype(np.float64) for k in ("gamma", "beta")}
    q = {k: t[f"batch_normalization{f'_{i}' if i else ''}/moving_{k}"].astype(np.float64) for k in ("mean", "variance")}
    return (x - q["mean"]) / np.sqrt(q["variance"] + 0.001) * p["gamma"] + p["beta"]


def _conv(t, i, x, pad):
    """x (T, F) or (T, F, 1): relu(conv) over all (T', F') positions -> (T', F', out)."""
    kernel = t[f"conv2d{f'_{i}' if i else ''}/kernel"][:, :, 0].astype(np.float64)
    bias = t[f"conv2d{f'_{i}' if i else ''}/bias"].astype(np.float64)
    x = np.pad(x, (pad, (0, 0)))
    patches = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2])
    return np.maximum(np.einsum("tfhw,hwo->tfo", patches, kernel, optimize=True) + bias, 0)


def _numpy_musicnn(t, logmel):
    x = _bn(t, 0, logmel[..., None].astype(np.float64))[..., 0]
    pads = [(3, 3), (3, 3), (63, 64), (31, 32), (15, 16)]
    front = np.concatenate([_bn(t, i + 1, _conv(t, i, x, pads[i])).max(1) for i in range(5)], 1)
    m1 = _bn(t, 6, _conv(t, 5, front, (3, 3)))[:, 0]
    m2 = _bn(t, 7, _conv(t, 6, m1, (3, 3)))[:, 0] + m1
    m3 = _bn(t, 8, _conv(t, 7, m2, (3, 3)))[:, 0] + m2
    features = np.concatenate([front, m1, m2, m3], 1)
    pooled = np.stack([features.max(0), features.mean(0)], -1).reshape(-1)
    dense = np.maximum(_bn(t, 9, pooled) @ t["dense/kernel"].astype(np.float64) + t["dense/bias"], 0)
    penultimate = _bn(t, 10, dense)
    return penultimate @ t["dense_1/kernel"].astype(np.float64) + t["dense_1/bias"], penultimate


@needs_weights
@pytest.mark.parametrize("frames", [187, 130])
def test_port_equals_a_plain_evaluation(tensors, tagger, frames):
    rng = np.random.default_rng(frames)
    logmel = rng.gamma(2.0, 0.8, (frames, 96)).astype(np.float32)
    want_logits, want_penultimate = _numpy_musicnn(tensors, logmel)
    with torch.inference_mode():
        logits, penultimate, pooled = tagger.net(torch.from_numpy(logmel)[None])
    assert pooled.shape == (1, 1506)
    np.testing.assert_allclose(logits[0].numpy(), want_logits, atol=2e-4)
    np.testing.assert_allclose(penultimate[0].numpy(), want_penultimate, atol=2e-4)


@needs_weights
def test_batches_and_clips_do_not_mix(tagger):
    rng = np.random.default_rng(3)
    clips = [(rng.standard_normal((2, n)) * 0.1).astype(np.float32) for n in (44100 * 7, 44100 * 3 + 300, 30000)]
    together = tagger.hear(clips, batch=3)
    assert together.clip.tolist() == [0, 0, 1, 2]
    alone = tagger.hear([clips[1]])
    np.testing.assert_allclose(together.tags[2], alone.tags[0], atol=1e-5)
    np.testing.assert_allclose(together.clip_tags()[0], together.tags[:2].mean(0), atol=1e-6)


# ---- behaviour


def _plucked(frequencies: list[float], seconds: float = 4.0, rate: int = 44100) -> np.ndarray:
    """Karplus-Strong strings (1983), two notes a second: a sound that any listener calls plucked."""
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
def test_a_plucked_string_is_tagged_guitar(tagger):
    notes = [196.0, 246.94, 293.66, 392.0, 329.63, 246.94, 220.0, 293.66]
    p = tagger.hear([_plucked(notes)]).clip_tags()[0]
    best = [tagger.tags[i] for i in np.argsort(-p)[:3]]
    assert "guitar" in best, best


@needs_weights
def test_unknown_tagger_and_empty_input_are_refused(tagger):
    with pytest.raises(InvalidInputError, match="no such tagger"):
        musicnn.Tagger("MTT_vgg")
    with pytest.raises(InvalidInputError, match="no clips"):
        tagger.hear([])
    assert len(set(musicnn.Tagger("MSD_musicnn").tags)) == len(set(tagger.tags)) == 50
