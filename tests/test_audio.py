"""Audio clips: validation, files on disk, reading back, resampling."""

from __future__ import annotations

import base64
import io
import os
import re
import wave
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from presto_rt.audio import Audio, check_writable, load
from presto_rt.audio.resample import resample
from presto_rt.errors import InvalidInputError, OutputError, PrestoError

FORMATS = [
    ("a.wav", None),
    ("a.wav", "pcm24"),
    ("a.wav", "float32"),
    ("a.flac", None),
    ("a.flac", "pcm24"),
    ("a.ogg", None),
]


def clip(frames: int = 4410, channels: int = 2) -> np.ndarray:
    time = np.arange(frames) / 44100
    return np.stack([0.5 * np.sin(2 * np.pi * 440 * (k + 1) * time) for k in range(channels)]).astype(np.float32)


def test_audio_keeps_samples_and_origin() -> None:
    audio = Audio(clip(), seed=7, prompt="calm piano", timings={"decode": 0.1})
    assert (audio.sample_rate, audio.seed, audio.prompt, audio.timings) == (44100, 7, "calm piano", {"decode": 0.1})
    assert audio.samples.dtype == np.float32
    assert audio.seconds == pytest.approx(0.1)
    assert "0.10 s, stereo" in repr(audio)
    assert np.array_equal(np.asarray(audio), clip())
    assert np.asarray(audio, dtype=np.float64).dtype == np.float64
    assert np.array_equal(Audio(torch.from_numpy(clip())).samples, clip())


@pytest.mark.parametrize(
    ("samples", "rate", "message"),
    [
        (np.zeros((2, 8), np.int32), 44100, "floating point .* or int16, got int32"),
        (np.zeros((2, 8), np.uint16), 44100, "floating point"),
        (np.zeros((2, 8), bool), 44100, "floating point"),
        (np.zeros((8, 2), np.int16), 44100, "shape"),
        (np.zeros(8, np.float32), 44100, "shape"),
        (np.zeros((8, 2), np.float32), 44100, "shape"),
        (np.zeros((2, 0), np.float32), 44100, "shape"),
        (np.zeros((2, 8), np.float32), 0, "sample_rate"),
        (np.zeros((2, 8), np.float32), 44100.0, "sample_rate"),
        (np.zeros((2, 8), np.float32), True, "sample_rate"),
    ],
)
def test_audio_rejects_bad_samples_and_rates(samples: np.ndarray, rate: int, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        Audio(samples, rate)


def test_audio_keeps_latents_and_rejects_other_shapes() -> None:
    latents = torch.randn(3, 64)
    assert Audio(clip(), latents=latents).latents is latents
    for bad in (latents[None], latents.double(), latents.long()):
        with pytest.raises(InvalidInputError, match=r"latents must be float32 \(T, C\)"):
            Audio(clip(), latents=bad)


def test_audio_rejects_bad_seed() -> None:
    with pytest.raises(InvalidInputError, match="seed"):
        Audio(clip(), seed=-1)


@pytest.mark.parametrize(("name", "subtype"), FORMATS)
@pytest.mark.parametrize("channels", [1, 2])
def test_save_reads_back(tmp_path: Path, name: str, subtype: str | None, channels: int) -> None:
    audio = Audio(clip(70_001, channels), seed=3, prompt="ünïcode – prompt")
    path = audio.save(tmp_path / name, subtype)
    back = load(path)
    assert back.samples.shape == audio.samples.shape
    error = np.abs(back.samples - audio.samples).max()
    bound = {"float32": 0.0, "pcm24": 2.0**-24, None: 1.5 / 32768 if name != "a.ogg" else 0.1}[subtype]
    assert error <= bound
    with soundfile.SoundFile(path) as file:
        wanted = {"pcm24": "PCM_24", "float32": "FLOAT", None: "VORBIS" if name == "a.ogg" else "PCM_16"}[subtype]
        assert (file.subtype, file.samplerate, file.channels) == (wanted, 44100, channels)
        assert file.comment == "ünïcode – prompt; seed 3"
        assert file.software.startswith("Presto-RT")
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg"])
def test_save_accepts_prompt_that_is_not_utf8(tmp_path: Path, name: str) -> None:
    with soundfile.SoundFile(Audio(clip(), prompt="caf\udce9").save(tmp_path / name)) as file:
        assert file.comment == "caf?"


@pytest.mark.parametrize(("name", "subtype"), FORMATS[:5])
def test_save_is_reproducible_to_the_byte(tmp_path: Path, name: str, subtype: str | None) -> None:
    one, two = tmp_path / f"1{name}", tmp_path / f"2{name}"
    Audio(clip(), seed=3).save(one, subtype)
    Audio(clip(), seed=3).save(two, subtype)
    assert one.read_bytes() == two.read_bytes()
    if subtype is None:
        Audio(clip(), seed=4).save(two, subtype)
        assert np.abs(load(one).samples - load(two).samples).max() > 0  # another dither


def test_save_wav_agrees_with_the_standard_library(tmp_path: Path) -> None:
    audio = Audio(clip(1001), seed=5)
    with wave.open(str(audio.save(tmp_path / "a.wav"))) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate(), file.getnframes()) == (2, 2, 44100, 1001)
        data = np.frombuffer(file.readframes(1001), "<i2").reshape(-1, 2)
    assert np.array_equal(data, audio.to_int16())


def test_to_int16_is_interleaved_and_dithered_by_the_seed() -> None:
    audio = Audio(clip(), seed=1)
    integers = audio.to_int16()
    assert integers.shape == (4410, 2)
    assert integers.dtype == np.int16
    assert np.array_equal(audio.to_int16(dither=False), np.round(clip().T.astype(float) * 32768))
    assert 0 < np.abs(integers - audio.to_int16(dither=False)).max() <= 2
    assert not np.array_equal(integers, Audio(clip(), seed=2).to_int16())


def int16_clip() -> np.ndarray:
    """Stereo int16 samples whose channels differ, both ends of the range among them."""
    samples = np.round(clip() * 32768).astype(np.int16)
    samples[:, :3] = [[-32768, 32767, 1], [32767, -32768, -1]]
    return samples


def test_audio_keeps_int16_samples() -> None:
    samples = int16_clip()
    audio = Audio(samples, seed=1)
    assert audio.samples.dtype == np.int16
    assert np.array_equal(audio.samples, samples)
    assert audio.seconds == pytest.approx(0.1)
    for dither in (True, False):  # the samples are integers already
        integers = audio.to_int16(dither)
        assert (integers.dtype, integers.shape) == (np.int16, (4410, 2))
        assert np.array_equal(integers, samples.T)
        assert integers.flags.c_contiguous
    assert np.asarray(audio).dtype == np.int16
    assert np.array_equal(Audio(torch.from_numpy(samples)).samples, samples)
    interleaved = np.ascontiguousarray(samples.T)
    assert Audio(interleaved.swapaxes(0, 1)).samples.flags.c_contiguous


def test_to_float32_divides_int16_samples_by_full_scale() -> None:
    samples = int16_clip()
    converted = Audio(samples).to_float32()
    assert converted.dtype == np.float32
    assert np.array_equal(converted * 32768.0, samples)
    assert converted[0, :2].tolist() == [-1.0, 32767 / 32768]
    audio = Audio(clip())
    assert audio.to_float32() is audio.samples


@pytest.mark.parametrize(("name", "subtype"), FORMATS)
def test_save_writes_int16_samples_exactly(tmp_path: Path, name: str, subtype: str | None) -> None:
    """PCM and float files hold the very integers, without dither; Vorbis is as close as for float32 samples."""
    samples = int16_clip()
    path = Audio(samples, seed=3, prompt="piano").save(tmp_path / name, subtype)
    back = load(path).samples
    if name == "a.ogg":
        assert back.shape == samples.shape
        assert np.abs(back - samples / 32768)[:, 100:].max() <= 0.1
    else:
        assert np.array_equal(back * 32768.0, samples)
    with soundfile.SoundFile(path) as file:
        wanted = {"pcm24": "PCM_24", "float32": "FLOAT", None: "VORBIS" if name == "a.ogg" else "PCM_16"}[subtype]
        assert (file.subtype, file.comment) == (wanted, "piano; seed 3")


def test_save_of_int16_samples_equals_save_of_the_clip_they_were_dithered_from(tmp_path: Path) -> None:
    audio = Audio(clip(), seed=3)
    integers = Audio(audio.to_int16().T, seed=3)
    for name in ("a.wav", "a.flac"):
        one, two = audio.save(tmp_path / f"1{name}"), integers.save(tmp_path / f"2{name}")
        assert one.read_bytes() == two.read_bytes()
    assert audio._repr_html_() == integers._repr_html_()


def test_array_without_copy_refuses_another_dtype() -> None:
    for samples in (clip(), int16_clip()):
        audio = Audio(samples)
        assert audio.__array__(samples.dtype, copy=False) is audio.samples
        assert audio.__array__(copy=True) is not audio.samples
        with pytest.raises(ValueError, match=f"samples are {samples.dtype}"):
            audio.__array__(np.float64, copy=False)


def test_save_clamps_loud_samples_and_silences_nan(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = np.array([[np.nan, 2.0, -2.0, np.inf, 0.25]], np.float32)
    audio = Audio(samples)
    back = load(audio.save(tmp_path / "a.wav", "pcm24")).samples[0]
    assert np.allclose(back, [0, 1, -1, 1, 0.25], atol=2.0**-23)
    assert load(audio.save(tmp_path / "a.wav", "float32")).samples[0].tolist() == [0, 2, -2, np.inf, 0.25]
    assert load(audio.save(tmp_path / "a.flac")).samples[0, 1] == 32767 / 32768
    audio.save(tmp_path / "a.ogg")
    assert "NaN" in caplog.text


@pytest.mark.parametrize("name", ["a", "a.mp4", "a.txt", "wav"])
def test_check_writable_rejects_unknown_suffix(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match=re.escape(".wav, .flac, .ogg")):
        check_writable(tmp_path / name)
    with pytest.raises(OutputError):
        Audio(clip()).save(tmp_path / name)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("name", "subtype"), [("a.flac", "float32"), ("a.ogg", "pcm16"), ("a.wav", "pcm8")])
def test_check_writable_rejects_subtype_of_another_format(tmp_path: Path, name: str, subtype: str) -> None:
    with pytest.raises(OutputError, match="cannot hold"):
        check_writable(tmp_path / name, subtype)


def test_check_writable_rejects_unwritable_places(tmp_path: Path) -> None:
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "file").write_text("x")
    cases = {"folder.wav": "is a folder", "missing/a.wav": "does not exist", "file/a.wav": "does not exist"}
    for name, message in cases.items():
        with pytest.raises(OutputError, match=message):
            check_writable(tmp_path / name)
    if Path("/proc/self").is_dir():  # nobody can create files there, root included
        with pytest.raises(OutputError, match="cannot write"):
            check_writable("/proc/a.wav")


def test_check_writable_changes_nothing_on_disk(tmp_path: Path) -> None:
    target = tmp_path / "a.wav"
    assert check_writable(target) == target.resolve()
    assert os.listdir(tmp_path) == []
    target.write_text("precious")
    check_writable(target)
    assert target.read_text() == "precious"


def test_save_failure_keeps_the_old_file_and_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.wav"
    target.write_text("precious")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        Audio(clip()).save(target)
    assert target.read_text() == "precious"
    assert os.listdir(tmp_path) == ["a.wav"]


def test_save_through_a_link_keeps_the_link(tmp_path: Path) -> None:
    (tmp_path / "real.wav").write_bytes(b"old")
    (tmp_path / "link.wav").symlink_to("real.wav")
    Audio(clip()).save(tmp_path / "link.wav")
    assert (tmp_path / "link.wav").is_symlink()
    assert load(tmp_path / "real.wav").samples.shape == (2, 4410)


def test_load_names_the_fault(tmp_path: Path) -> None:
    text, empty, wide = tmp_path / "text.wav", tmp_path / "empty.wav", tmp_path / "wide.wav"
    text.write_text("this is not audio")
    soundfile.write(empty, np.zeros((0, 2)), 44100)
    soundfile.write(wide, np.zeros((10, 3)), 44100)
    cases = [
        (tmp_path / "no.wav", "no such file"),
        (tmp_path, "no such file"),
        (text, "as audio"),
        (empty, "no samples"),
        (wide, "3 channels"),
    ]
    for path, message in cases:
        with pytest.raises(InvalidInputError, match=message) as caught:
            load(path)
        assert "\n" not in str(caught.value)
        assert isinstance(caught.value, PrestoError)


@pytest.mark.parametrize("rate", [8000, 22050, 32000, 44100, 48000, 96000])
def test_load_resamples_to_44100(tmp_path: Path, rate: int) -> None:
    time = np.arange(rate) / rate
    soundfile.write(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 1000 * time), rate, subtype="FLOAT")
    audio = load(tmp_path / "a.wav")
    assert (audio.sample_rate, audio.samples.shape) == (44100, (1, 44100))
    wanted = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(44100) / 44100)
    assert np.abs(audio.samples[0] - wanted)[1000:-1000].max() < 2e-5


def test_resample_keeps_the_band_and_removes_aliases() -> None:
    time = torch.arange(48000, dtype=torch.float64) / 48000
    middle = slice(500, -500)
    kept = resample(torch.sin(2 * np.pi * 19_500 * time).float().reshape(1, -1), 48000, 44100)[0, middle]
    gone = resample(torch.sin(2 * np.pi * 22_500 * time).float().reshape(1, -1), 48000, 44100)[0, middle]
    assert kept.abs().max() == pytest.approx(1.0, abs=1e-3)
    assert gone.abs().max() < 1e-4  # 80 dB down
    constant = resample(torch.ones(1, 5000), 44100, 16000)[0, middle]
    assert (constant - 1).abs().max() < 1e-4


def test_resample_handles_coprime_rates_and_short_clips() -> None:
    for count, a, b in ((1, 44100, 48000), (7, 44101, 44100), (3000, 12345, 44100)):
        out = resample(torch.randn(2, count), a, b)
        assert out.shape == (2, -(-count * b // a))
        assert torch.isfinite(out).all()
    same = torch.randn(2, 5)
    assert resample(same, 44100, 44100) is same
    with pytest.raises(InvalidInputError, match="sample rates"):
        resample(same, 0, 44100)


def test_repr_html_embeds_the_wav_and_escapes_the_prompt() -> None:
    audio = Audio(clip(), seed=2, prompt='<script>"x"</script>')
    page = audio._repr_html_()
    assert "<script>" not in page
    data = re.search(r'src="data:audio/wav;base64,([^"]+)"', page)
    assert data is not None
    with wave.open(io.BytesIO(base64.b64decode(data[1]))) as file:
        assert file.readframes(9999) == audio.to_int16().tobytes()
