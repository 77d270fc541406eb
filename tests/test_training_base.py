"""The base trainer and its data on a small synthetic set of latents: learning, resuming, kills, bad data."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from presto_rt.conditioning.tempo import beat_features
from presto_rt.diffusion.precond import precondition
from presto_rt.errors import InvalidInputError
from presto_rt.lab.training import settings
from presto_rt.lab.training.base import BaseTrainer, BaseTraining, draw_batch, train_base
from presto_rt.lab.training.checkpoint import checkpoint_meta, load_checkpoint, save_checkpoint
from presto_rt.lab.training.conditions import FRAME_SECONDS, LatentSet
from presto_rt.lab.training.synthetic import write_latents
from presto_rt.models.config import preset

FRAMES = 200
OPTIONS = {"tokens": 256, "frames": ((32, 1.0),), "checkpoint_minutes": 0.02}


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latents(tmp_path_factory.mktemp("data") / "set", frames=FRAMES)


def make_trainer(data_root: Path, run: Path) -> BaseTrainer:
    return BaseTrainer(data_root, run, preset("tiny"), BaseTraining(minutes=1, learning_rate=3e-3, **OPTIONS), "cpu")


def test_latent_set_batches_have_documented_shapes_and_repeat(data_root: Path) -> None:
    latents = LatentSet(data_root, "val")
    x, c = latents.batch(np.random.default_rng(0), 6, 50, control_dropout=0.5)
    assert x.shape == (6, 50, 64)
    assert c.beat.shape == (6, 50, 5)
    assert c.text.shape[::2] == (6, 384)
    assert {float(b) for b in c.beat[:, 0, 4]} == {0.0, 1.0}
    assert torch.allclose(c.pooled[0], c.text[0][c.text_mask[0]].mean(0), atol=1e-4)
    repeated, _ = LatentSet(data_root, "val").batch(np.random.default_rng(0), 6, 50, control_dropout=0.5)
    assert torch.equal(x, repeated)
    with pytest.raises(InvalidInputError, match="201"):
        latents.batch(np.random.default_rng(0), 1, 201)


def test_latent_set_crops_have_the_beats_and_captions_of_their_piece(data_root: Path) -> None:
    """Batches are gathered in one indexing operation; the reference computes each clip from its piece."""
    latents = LatentSet(data_root, "val")
    for i, piece in enumerate(latents.pieces):
        piece.bpm, piece.beats_per_bar, piece.beat_offset = 90.0 + i, 3 + i, 0.1 * i
    x, c = latents.batch(np.random.default_rng(3), 8, 40, control_dropout=0.0)
    for clip, beats, text, mask in zip(x, c.beat, c.text, c.text_mask, strict=True):
        found = [
            (piece, start)
            for piece in latents.pieces
            for start in range(FRAMES - 39)
            if torch.equal(latents.latents[piece.start + start : piece.start + start + 40].float(), clip)
        ]
        assert len(found) == 1
        piece, start = found[0]
        expected = beat_features(
            40, FRAME_SECONDS, piece.bpm, piece.beats_per_bar, piece.beat_offset, start * FRAME_SECONDS
        )
        assert torch.allclose(beats, expected, atol=1e-6)
        number = latents.pieces.index(piece)
        captions = range(latents.first_caption[number], latents.first_caption[number + 1])
        tokens = [latents.tokens[latents.offsets[k] : latents.offsets[k + 1]].float() for k in captions]
        assert any(len(t) == mask.sum() and torch.equal(t, text[mask]) for t in tokens)
        assert not text[~mask].any()


def test_base_trainer_learns_the_text_condition(data_root: Path, tmp_path: Path) -> None:
    trainer = make_trainer(data_root, tmp_path)
    first = float(np.mean([trainer.train_step(0.3)["loss"] for _ in range(5)]))
    for _ in range(120):
        trainer.train_step(0.3)
    last = float(np.mean([trainer.train_step(0.3)["loss"] for _ in range(5)]))
    assert last < 0.5 * first
    # at high noise the latents' sign is known from the text only
    x, c = trainer.val_set.batch(np.random.default_rng(0), 8, 32, 0.0)
    noise, sigma = 20 * torch.randn(x.shape), torch.full((8,), 20.0)
    with torch.inference_mode():
        x0 = precondition(trainer.model, noise, sigma, c, kind="edm", sigma_data=0.5)
    assert (x0.mean((1, 2)).sign() == x.mean((1, 2)).sign()).all()


def test_base_trainer_resumed_run_equals_the_uninterrupted(data_root: Path, tmp_path: Path) -> None:
    straight = make_trainer(data_root, tmp_path / "a")
    for _ in range(6):
        straight.train_step(0.5)
    first = make_trainer(data_root, tmp_path / "b")
    for _ in range(3):
        first.train_step(0.5)
    first.save(12.0)
    second = make_trainer(data_root, tmp_path / "b")
    second.resume()
    assert (second.step, second.used_seconds) == (3, 12.0)
    for _ in range(3):
        second.train_step(0.5)
    for a, b in zip(straight.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_trainer_update_discards_gradients_that_are_not_finite(data_root: Path, tmp_path: Path) -> None:
    trainer = make_trainer(data_root, tmp_path)
    trainer.train_step(0.5)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    for p in trainer.model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    trainer.update("model", 1e-3, 0.5, 1.0)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    trainer.train_step(0.5)
    assert not torch.equal(trainer.model.output.weight, before["output.weight"])


def test_base_trainer_checkpoints_keep_the_keys_of_older_versions(data_root: Path, tmp_path: Path) -> None:
    trainer = make_trainer(data_root, tmp_path)
    trainer.save(0.0)
    meta = checkpoint_meta(trainer.checkpoint)
    assert meta.keys() == {
        "step",
        "used_seconds",
        "frames_seen",
        "optimizers",
        "ema_updates",
        "rng",
        "config",
        "options",
    }
    assert meta["options"]["slow_weight"] == trainer.options.window_mean_weight
    assert "window_mean_weight" not in meta["options"]


def test_train_base_resumes_after_a_kill(data_root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    call = f"train_base({str(data_root)!r}, {str(run)!r}, 30, device='cpu', model='tiny', **{OPTIONS!r})"
    code = f"from presto_rt.lab.training.base import train_base; {call}"
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
    with pytest.raises(InvalidInputError, match="--resume"):
        train_base(data_root, run, minutes, device="cpu", model="tiny", **OPTIONS)
    figures = train_base(data_root, run, minutes, device="cpu", model="tiny", resume=True, **OPTIONS)
    assert load_checkpoint(checkpoint)[1]["step"] > meta["step"]
    assert all(np.isfinite(v) for v in figures.values())


def test_latent_set_without_latents_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="presto-rt lab train encode"):
        LatentSet(tmp_path, "train")


def test_latent_set_rejects_another_data_set_and_splits_without_captions(data_root: Path, tmp_path: Path) -> None:
    root = tmp_path / "set"
    shutil.copytree(data_root, root)
    manifest = json.loads((root / "manifest.json").read_text())
    kept = [item for item in manifest["items"] if item["id"] != "val0"]
    (root / "manifest.json").write_text(json.dumps({**manifest, "items": kept}))
    with pytest.raises(InvalidInputError, match="another data set"):
        LatentSet(root, "val")
    (root / "manifest.json").write_text(json.dumps(manifest))
    np.save(root / "latents" / "val.npy", np.load(root / "latents" / "val.npy")[:-1])
    with pytest.raises(InvalidInputError, match="another data set"):
        LatentSet(root, "val")
    (root / "latents" / "val.json").write_text('{"items": []}')
    with pytest.raises(InvalidInputError, match="larger data set"):
        LatentSet(root, "val")


def test_latent_set_encodes_captions_again_if_their_cache_is_truncated(data_root: Path, tmp_path: Path) -> None:
    root = tmp_path / "set"
    shutil.copytree(data_root, root)
    expected = LatentSet(root, "val").tokens.clone()  # a copy, as the tensor is mapped from the file
    cache = root / "latents" / "val.captions.safetensors"
    cache.write_bytes(cache.read_bytes()[:500])
    assert torch.equal(LatentSet(root, "val").tokens, expected)
    assert sorted(p.name for p in cache.parent.glob("val.captions*")) == [cache.name]


def test_draw_batch_uses_only_lengths_that_fit_a_piece(data_root: Path) -> None:
    latents = LatentSet(data_root, "val")
    for seed in range(4):
        x, _ = draw_batch(latents, np.random.default_rng(seed), 64, ((32, 0.1), (FRAMES + 1, 0.9)), 0.3)
        assert x.shape[:2] == (2, 32)
    with pytest.raises(InvalidInputError, match=str(FRAMES + 1)):
        draw_batch(latents, np.random.default_rng(0), 64, ((FRAMES + 9, 0.5), (FRAMES + 1, 0.5)), 0.3)


def test_base_trainer_refuses_to_resume_a_distillation(data_root: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "checkpoint.safetensors", {}, {"options": {"minutes": 1, "gan_weight": 0.1}})
    with pytest.raises(InvalidInputError, match=r"gan_weight.*--run"):
        make_trainer(data_root, tmp_path).start(resume=True)


def test_settings_read_checks_types_against_the_defaults() -> None:
    known = {"clip": 1.0, "compile": False, "frames": ((1, 1.0),), "tokens": 8}
    values = ["clip=2", "compile=true", "frames=[[128, 1]]", "tokens=4"]
    assert settings.read(values, known) == {"clip": 2, "compile": True, "frames": ([128, 1],), "tokens": 4}
    for bad in ("clip=high", "clip=true", "compile=1", "frames=128", "tokens=4.5", "tokens=null", "root=x", "clip"):
        with pytest.raises(InvalidInputError, match="--set"):
            settings.read([bad], known)
    with pytest.raises(InvalidInputError, match="tokens"):
        BaseTraining(1.0, tokens=0)
