"""Tests of the data set: build, resume, hashes, splits, rendered ground truth, recordings, reading, errors."""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from presto_rt.errors import InvalidInputError, MissingDependencyError, OutputError, PrestoError
from presto_rt.lab.data import grooves, recordings, render
from presto_rt.lab.data.dataset import SAMPLE_RATE, frames_of, items, load_manifest, read_audio
from presto_rt.lab.data.manifest import Item, Manifest, collect, split_of, write_item
from presto_rt.lab.data.midi import Note, Score
from tests.support.pitches import PITCH_CLASSES

soundfile = pytest.importorskip("soundfile")


def have_soundfont() -> bool:
    try:
        return bool(render.soundfont())
    except MissingDependencyError:
        return False


HAVE_FONT = have_soundfont()
HAVE_SYNTH = importlib.util.find_spec("tinysoundfont") is not None
HAVE_ALL = HAVE_FONT and HAVE_SYNTH and shutil.which("mma") and importlib.util.find_spec("music21")
needs_sound = pytest.mark.skipif(
    not (HAVE_FONT and HAVE_SYNTH), reason="needs musescore-general-soundfont-small (Debian) and tinysoundfont (pip)"
)
needs_all = pytest.mark.skipif(
    not HAVE_ALL, reason="needs mma and musescore-general-soundfont-small (Debian), tinysoundfont and music21 (pip)"
)
HOURS = 0.03


def make(root: Path, workers: int = 1, seed: int = 0) -> Manifest:
    """Build 0.03 hours without recordings."""
    from presto_rt.lab.data.build import build

    return build(root, hours=HOURS, seed=seed, workers=workers, recordings=False, progress=False)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small built data set."""
    root = tmp_path_factory.mktemp("data")
    make(root)
    return root


def recording(root: Path, samples: np.ndarray) -> Item:
    """Write a data set of one recording with samples (2, frames)."""
    (root / "recordings").mkdir(parents=True, exist_ok=True)
    soundfile.write(root / "recordings" / "a.wav", samples.T, SAMPLE_RATE, subtype="PCM_16")
    seconds = samples.shape[1] / SAMPLE_RATE
    item = Item("a", "recording", "test", "recordings/a.wav", seconds, "song", "hash", "package", "GPL-2+")
    write_item(root, item)
    Manifest(root, 0, [item]).save()
    return item


@needs_all
def test_build_writes_audio_that_matches_the_manifest(small: Path) -> None:
    manifest = load_manifest(small)
    assert manifest.complete
    assert manifest.hours() >= HOURS
    for item in manifest.items:
        samples = read_audio(item, root=small)
        assert samples.shape == (2, frames_of(item))
        assert 0.03 < samples.std() < 0.5
        assert np.abs(samples).max() < 0.98
        assert (samples[0] - samples[1]).std() > 1e-3  # real stereo
        first = np.argmax(np.abs(samples).max(axis=0) > 0.003) / SAMPLE_RATE
        assert first < 0.3
        assert len(item.captions) >= 6
        assert item.split == split_of(item.composition)
        assert item.bpm is not None
        assert 60 <= item.bpm <= 180


@needs_all
def test_build_hash_depends_on_seed_not_on_workers(small: Path, tmp_path: Path) -> None:
    assert make(tmp_path / "two", workers=2).hash == load_manifest(small).hash
    assert make(tmp_path / "seed1", seed=1).hash != load_manifest(small).hash


@needs_all
def test_build_resumes_after_sigkill(small: Path, tmp_path: Path) -> None:
    """A killed build resumes: partial files are ignored, complete ones are kept unchanged."""
    root = tmp_path / "killed"
    command = [
        sys.executable,
        "-m",
        "presto_rt.cli",
        "lab",
        "data",
        "build",
        "--root",
        str(root),
        "--hours",
        str(HOURS),
    ]
    command += ["--workers", "1", "--no-recordings"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    limit = time.monotonic() + 300  # an idle machine needs five seconds
    while not list(root.glob("rendered/*/*.json")) and time.monotonic() < limit:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {item.id: (root / item.path).stat().st_mtime_ns for item in collect(root)}
    assert before
    whole = load_manifest(small)
    assert len(before) < len(whole.items)
    assert make(root).hash == whole.hash
    assert all((root / f"rendered/000/{name}.wav").stat().st_mtime_ns == when for name, when in before.items())


@needs_all
def test_build_retries_failed_pieces(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from presto_rt.cli import main
    from presto_rt.lab.data import build

    def fails(root: Path, seed: int, index: int) -> Item:
        if index == 1:
            raise PrestoError("the disk is full")
        return make_item(root, seed, index)

    make_item = build.make_item
    command = [
        "lab",
        "data",
        "build",
        "--root",
        str(tmp_path),
        "--hours",
        str(HOURS),
        "--workers",
        "1",
        "--no-recordings",
    ]
    monkeypatch.setattr(build, "make_item", fails)
    assert main(command) == 1
    errors = capsys.readouterr().err
    assert "piece 1: the disk is full" in errors
    assert "1 pieces failed" in errors
    assert not load_manifest(tmp_path).complete
    monkeypatch.undo()
    assert main(command) == 0
    assert load_manifest(tmp_path).complete
    assert load_manifest(tmp_path).hash == load_manifest(small).hash


@needs_all
def test_build_rejects_root_of_another_seed(small: Path) -> None:
    with pytest.raises(InvalidInputError, match="seed 0"):
        make(small, seed=7)


@needs_sound
def test_render_places_tempo_downbeat_and_pitch_exactly() -> None:
    """An A4 on each beat at 97 bpm after 0.2 s: onsets lie on the grid and the spectrum peaks at 440 Hz."""
    bpm, offset, count = 97, 0.2, 24
    score = Score([Note(float(b), 0, 69, 0.5, 100) for b in range(count)], {0: 0})
    samples = render.render(score, bpm, offset, offset + count * 60 / bpm + 1, seed=5)
    mono = samples.mean(axis=0)
    beat = 60 / bpm
    for number in range(count):
        onset = round((offset + number * beat) * SAMPLE_RATE)
        before = np.abs(mono[max(0, onset - 441) : onset]).mean()
        after = np.abs(mono[onset : onset + 1323]).mean()
        assert after > 2 * before, number
    assert np.abs(mono[: round(offset * SAMPLE_RATE) - 8]).max() < 1e-3
    spectrum = np.abs(np.fft.rfft(mono[: 8 * SAMPLE_RATE] * np.hanning(8 * SAMPLE_RATE)))
    peak = np.argmax(spectrum) / 8
    assert abs(12 * np.log2(peak / 440)) < 0.2


@needs_sound
def test_synthesize_does_not_ring_into_the_next_piece() -> None:
    loud = Score([Note(0.0, c, 48 + 3 * c, 8.0, 120) for c in range(6)], dict.fromkeys(range(6), 19))
    render.synthesize(loud, 120, 0.0, 1.0)
    after = render.synthesize(Score([Note(4.0, 0, 69, 1.0, 100)], {0: 0}), 120, 0.0, 1.5)
    assert np.abs(after).max() < 1e-4


@needs_all
def test_build_key_labels_agree_with_the_audio(small: Path) -> None:
    """Over the pieces with a key, scale tones carry clearly more than their 7/12 share of the chroma."""
    steps = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}
    shares = []
    for item in load_manifest(small).items:
        if item.key is None or item.mode is None:
            continue
        mono = read_audio(item, 0, 20 * SAMPLE_RATE, root=small).mean(axis=0)
        spectrum = np.abs(np.fft.rfft(mono.reshape(20, -1) * np.hanning(SAMPLE_RATE), axis=1)).mean(axis=0)
        frequencies = np.arange(130, 1500)
        pitch = np.round(69 + 12 * np.log2(frequencies / 440)).astype(int) % 12
        chroma = np.bincount(pitch, spectrum[130:1500] ** 2 * frequencies**0.5, minlength=12)
        inside = chroma[[(PITCH_CLASSES[item.key] + s) % 12 for s in steps[item.mode]]].sum() / chroma.sum()
        shares.append(inside)
    assert len(shares) >= 2
    assert np.mean(shares) > 0.75


@needs_all
def test_arrange_is_deterministic_and_starts_at_the_downbeat() -> None:
    from presto_rt.lab.data.theory import Key

    key = Key(2, "minor")
    chords = [key.chord(d) for d in (0, 3, 4, 0)]
    first, second = (grooves.arrange("BossaNova", chords, flats=True, bpm=120, seed=4) for _ in range(2))
    assert first.notes == second.notes
    assert abs(first.notes[0].start) < 0.05
    assert 12 <= max(n.start for n in first.notes) < 16


def test_missing_programs_raise_errors_that_name_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PRESTO_RT_SOUNDFONT", str(tmp_path / "none.sf3"))
    with pytest.raises(MissingDependencyError, match="apt-get install musescore-general-soundfont-small"):
        render.soundfont()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependencyError, match="apt-get install mma"):
        grooves.check_mma()
    with pytest.raises(MissingDependencyError, match="--no-recordings"):
        next(recordings.songs("nexuiz-music", tmp_path))


@pytest.mark.parametrize("hours", [float("nan"), float("inf"), -1.0])
def test_build_rejects_invalid_hours(tmp_path: Path, hours: float) -> None:
    from presto_rt.lab.data.build import build

    with pytest.raises(InvalidInputError, match="hours"):
        build(tmp_path / "data", hours=hours, recordings=False, progress=False)
    assert not (tmp_path / "data").exists()


def test_load_manifest_rejects_damaged_files(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"version": 1}', '{"version": 1, "seed": 0, "items": [3]}'):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(InvalidInputError, match=r"manifest\.json is damaged.*presto-rt lab data build"):
            load_manifest(tmp_path)


def program(folder: Path, name: str, script: str) -> None:
    """Write a shell script that stands in for a program on the PATH."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_fetch_package_discards_partial_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools, downloads = tmp_path / "bin", tmp_path / "it's here"
    tools.mkdir()
    downloads.mkdir()
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    program(tools, "dpkg-deb", "exit 2")
    program(tools, "apt-get", 'echo half > "$3_1_all.deb"; exit 100')
    with pytest.raises(OutputError, match="cannot fetch x"):
        recordings.fetch_package("x", downloads)
    assert not list(downloads.iterdir())
    program(tools, "apt-get", 'echo whole > "$3_1_all.deb"')
    assert recordings.fetch_package("x", downloads).read_text() == "whole\n"
    assert [path.name for path in downloads.iterdir()] == ["x_1_all.deb"]
    with pytest.raises(OutputError, match=r"x_1_all\.deb; delete it"):
        next(recordings.songs("x", downloads))


def test_arrange_times_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from presto_rt.lab.data.theory import Chord

    program(tmp_path, "mma", "exec sleep 60")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(grooves, "MMA_SECONDS", 0.2)
    with pytest.raises(PrestoError, match="did not finish"):
        grooves.arrange("Swing", [Chord(0, "", 0)], flats=False, bpm=120, seed=0)


def test_data_command_prints_one_line_of_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from presto_rt.cli import main

    assert main(["lab", "data", "info", "--root", str(tmp_path)]) == 1
    assert "presto-rt lab data build" in capsys.readouterr().err


def test_manifest_round_trips_and_hashes_content(tmp_path: Path) -> None:
    item = recording(tmp_path, np.zeros((2, 100), np.float32))
    piece = Item(
        "b", "solo", "train", "b.wav", 1.0, "c", "h", "s", "l", ["x"], ["piano"], None, 90.0, 4, 0.1, "D", "minor"
    )
    manifest = Manifest(tmp_path, 3, [item, piece])
    manifest.save()
    back = load_manifest(tmp_path)
    assert back == manifest
    assert back.hash == Manifest(tmp_path, 9, [piece, item]).hash
    piece.content = "changed"
    assert back.hash != Manifest(tmp_path, 3, [item, piece]).hash
    assert items(back, "train") == items(back, kinds="solo") == [back.items[1]]
    with pytest.raises(InvalidInputError, match="unknown split"):
        items(back, "training")
    with pytest.raises(InvalidInputError, match="presto-rt lab data build"):
        load_manifest(tmp_path / "nowhere")


def test_split_of_depends_on_the_composition() -> None:
    """The split is a function of the composition alone, about 90/5/5."""
    counts = {"train": 0, "val": 0, "test": 0}
    for number in range(4000):
        counts[split_of(f"tune:{number}")] += 1
    assert counts["train"] / 4000 == pytest.approx(0.9, abs=0.02)
    assert counts["val"] / 4000 == pytest.approx(0.05, abs=0.015)


def test_read_audio_crops_exactly_and_rejects_invalid_ranges(tmp_path: Path) -> None:
    ramp = np.stack([np.linspace(-0.5, 0.5, 5000), np.linspace(0.5, -0.5, 5000)]).astype(np.float32)
    item = recording(tmp_path, ramp)
    assert np.abs(read_audio(item, 1000, 300, root=tmp_path) - ramp[:, 1000:1300]).max() < 1e-4
    whole = read_audio(item, root=tmp_path)
    assert whole.dtype == np.float32
    assert whole.shape == (2, 5000)
    with pytest.raises(InvalidInputError, match="5000 frames"):
        read_audio(item, 4900, 200, root=tmp_path)
    (tmp_path / item.path).unlink()
    with pytest.raises(InvalidInputError, match="rebuild"):
        read_audio(item, root=tmp_path)


def test_add_song_decodes_cuts_and_splits(tmp_path: Path) -> None:
    """A mono 48 kHz Opus song becomes equal 44.1 kHz stereo pieces near 45 s; silence is dropped."""
    time_axis = np.arange(70 * 48000) / 48000
    tone = 0.3 * np.sin(2 * np.pi * 330 * time_axis)
    encoded = io.BytesIO()
    soundfile.write(encoded, tone, 48000, format="OGG", subtype="OPUS")
    song = recordings.Song("marsshooter-data", "music/x.opus", [encoded.getvalue()], "CC-BY-SA-3.0")
    pieces = recordings.add_song(tmp_path, song)
    assert [round(i.seconds) for i in pieces] == [35, 35]
    assert {i.split for i in pieces} == {"test"}
    samples = read_audio(pieces[1], 0, 2 * SAMPLE_RATE, root=tmp_path)
    assert np.argmax(np.abs(np.fft.rfft(samples[0]))) / 2 == pytest.approx(330, abs=1)
    assert recordings.cut(np.zeros((2, SAMPLE_RATE * 60), np.float32)) == []


def test_license_of_takes_the_last_matching_paragraph() -> None:
    text = "Format: x\n\nFiles: *\nLicense: GPL-2+\n\n"
    text += "Files:\n base/music/David01.ogg\n base/sound/*\nLicense: CC-BY-3.0\n text\n"
    rules = recordings.license_rules(text)
    assert recordings.license_of(rules, "usr/base/0music.pk3/music/David01.ogg") == "CC-BY-3.0"
    assert recordings.license_of(rules, "usr/base/0music.pk3/music/other.ogg") == "GPL-2+"
    assert recordings.license_of([], "x.ogg") is None
