"""The base trainer on a small synthetic set of latents: it learns, it resumes, a kill corrupts nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from presto_rt.errors import InvalidInput
from presto_rt.models.dit import beat_features
from presto_rt.training.base import BaseTrainer, BaseTraining, train_base
from presto_rt.training.common import load_checkpoint
from presto_rt.training.conditions import FRAME_SECONDS, LatentSet
from presto_rt.training.synthetic import write_latents

FRAMES = 200
OPTIONS = {"tokens": 256, "frames": ((32, 1.0),), "checkpoint_minutes": 0.02}


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latents(tmp_path_factory.mktemp("data") / "set", frames=FRAMES)


def trainer(data_root: Path, run: Path) -> BaseTrainer:
    from presto_rt.config import preset

    return BaseTrainer(data_root, run, preset("tiny"), BaseTraining(minutes=1, learning_rate=3e-3, **OPTIONS), "cpu")


def test_batches(data_root: Path) -> None:
    held = LatentSet(data_root, "val")
    x, c = held.batch(np.random.default_rng(0), 6, 50, control_dropout=0.5)
    assert x.shape == (6, 50, 64)
    assert c.beat.shape == (6, 50, 5)
    assert c.text.shape[::2] == (6, 384)
    assert {float(b) for b in c.beat[:, 0, 4]} == {0.0, 1.0}
    assert torch.allclose(c.pooled[0], c.text[0][c.text_mask[0]].mean(0), atol=1e-4)
    again, _ = LatentSet(data_root, "val").batch(np.random.default_rng(0), 6, 50, control_dropout=0.5)
    assert torch.equal(x, again)
    with pytest.raises(InvalidInput, match="201"):
        held.batch(np.random.default_rng(0), 1, 201)


def test_crops_carry_their_own_beats_and_captions(data_root: Path) -> None:
    """A batch is gathered at once; each clip in it must be what the plain functions give for its piece."""
    held = LatentSet(data_root, "val")
    for i, piece in enumerate(held.pieces):
        piece.bpm, piece.beats_per_bar, piece.beat_offset = 90.0 + i, 3 + i, 0.1 * i
    x, c = held.batch(np.random.default_rng(3), 8, 40, control_dropout=0.0)
    for clip, beats, text, mask in zip(x, c.beat, c.text, c.text_mask, strict=True):
        found = [
            (piece, start)
            for piece in held.pieces
            for start in range(FRAMES - 39)
            if torch.equal(held.latents[piece.start + start : piece.start + start + 40].float(), clip)
        ]
        assert len(found) == 1
        piece, start = found[0]
        expected = beat_features(40, FRAME_SECONDS, piece.bpm, piece.beats_per_bar, piece.beat_offset,
                                 start * FRAME_SECONDS)  # fmt: skip
        assert torch.allclose(beats, expected, atol=1e-6)
        number = held.pieces.index(piece)
        captions = range(held.first_caption[number], held.first_caption[number + 1])
        tokens = [held.tokens[held.offsets[k] : held.offsets[k + 1]].float() for k in captions]
        assert any(len(t) == mask.sum() and torch.equal(t, text[mask]) for t in tokens)
        assert not text[~mask].any()


def test_learns_what_the_text_says(data_root: Path, tmp_path: Path) -> None:
    t = trainer(data_root, tmp_path)
    first = float(np.mean([t.train_step(0.3)["loss"] for _ in range(5)]))
    for _ in range(120):
        t.train_step(0.3)
    last = float(np.mean([t.train_step(0.3)["loss"] for _ in range(5)]))
    assert last < 0.5 * first
    # at high noise only the text tells the sign
    from presto_rt.diffusion.precond import precondition

    x, c = t.val_set.batch(np.random.default_rng(0), 8, 32, 0.0)
    with torch.inference_mode():
        x0 = precondition(t.model, 20 * torch.randn(x.shape), torch.full((8,), 20.0), c, kind="edm", sigma_data=0.5)
    assert (x0.mean((1, 2)).sign() == x.mean((1, 2)).sign()).all()


def test_resumed_run_equals_the_uninterrupted(data_root: Path, tmp_path: Path) -> None:
    straight = trainer(data_root, tmp_path / "a")
    for _ in range(6):
        straight.train_step(0.5)
    first = trainer(data_root, tmp_path / "b")
    for _ in range(3):
        first.train_step(0.5)
    first.save(12.0)
    second = trainer(data_root, tmp_path / "b")
    second.resume()
    assert (second.step, second.used_seconds) == (3, 12.0)
    for _ in range(3):
        second.train_step(0.5)
    for a, b in zip(straight.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_kill_and_resume(data_root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    call = f"train_base({str(data_root)!r}, {str(run)!r}, 30, device='cpu', model='tiny', **{OPTIONS!r})"
    code = f"from presto_rt.training.base import train_base; {call}"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    checkpoint = run / "checkpoint.safetensors"
    deadline = time.time() + 120
    while not checkpoint.is_file() and time.time() < deadline:
        time.sleep(0.2)
    time.sleep(1.0)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, meta = load_checkpoint(checkpoint)
    assert meta["step"] > 0
    minutes = meta["used_seconds"] / 60 + 0.03
    with pytest.raises(InvalidInput, match="--resume"):
        train_base(data_root, run, minutes, device="cpu", model="tiny", **OPTIONS)
    figures = train_base(data_root, run, minutes, device="cpu", model="tiny", resume=True, **OPTIONS)
    assert load_checkpoint(checkpoint)[1]["step"] > meta["step"]
    assert all(np.isfinite(v) for v in figures.values())


def test_missing_latents(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="presto-rt train encode"):
        LatentSet(tmp_path, "train")
