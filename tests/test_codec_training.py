"""Training of the codec, and encoding of data sets: learning, freezing, resuming, kills, bad input."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from presto_rt.checkpoints import load_folder
from presto_rt.checkpoints.house import load_codec
from presto_rt.errors import BackendUnavailableError, InvalidInputError, WeightsError
from presto_rt.lab.evaluation.codec import evaluate_codec, markdown, measure
from presto_rt.lab.training import codec as codec_training
from presto_rt.lab.training import latents as latents_module
from presto_rt.lab.training.checkpoint import load_checkpoint, save_checkpoint
from presto_rt.lab.training.codec import CodecTrainer, CodecTraining, train_codec, write_codec
from presto_rt.lab.training.codec_data import FeatureStore
from presto_rt.lab.training.codec_loss import CodecLoss, LossParts, start_from_pca
from presto_rt.lab.training.latents import encode_dataset, load_latents
from presto_rt.lab.training.time_budget import TimeBudget, learning_rate_factor
from presto_rt.lab.training.train_log import TrainLog
from presto_rt.models.codec import Codec, CodecConfig
from presto_rt.models.spectral import LATENT_HOP, SAMPLE_RATE

SMALL = CodecConfig(
    encoder_width=48, encoder_blocks=1, decoder_width=48, decoder_blocks=1, frame_width=32, frame_blocks=1
)
QUICK = CodecTraining(
    batch=2, latents=8, compile=False, pca_frames=2000, log_every=2, gain_clips=2, checkpoint_minutes=0.02
)


def chord(seconds: float, seed: int) -> np.ndarray:
    """Decaying notes at random pitches and times, with noise at -60 dB: (2, n) float32."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    out = 1e-3 * rng.normal(size=(2, len(time)))
    for _ in range(int(6 * seconds)):
        since = time - rng.uniform(0, seconds)
        note = np.where(since > 0, np.exp(-3 * since.clip(0)) * np.sin(2 * np.pi * rng.uniform(80, 2000) * since), 0.0)
        out += 0.15 * rng.uniform(0.3, 1.0, (2, 1)) * note
    return out.clip(-1, 1).astype(np.float32)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    records = []
    for number in range(8):
        kind = "solo" if number % 2 == 0 else "recording"
        split = ("train", "train", "train", "train", "val", "val", "test", "test")[number]
        name = f"item-{number}"
        soundfile.write(root / f"{name}.wav", chord(6.0 + 0.1 * number, number).T, SAMPLE_RATE, subtype="PCM_16")
        records.append(
            {"id": name, "kind": kind, "split": split, "path": f"{name}.wav", "seconds": 6.0 + 0.1 * number}
            | {"composition": name, "content": name, "source": "synthetic", "licence": "Apache-2.0"}
        )
    manifest = {"version": 1, "seed": 0, "complete": True, "items": records}
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root


def test_codec_loss_falls_below_the_pca_start_on_one_batch(data: Path) -> None:
    torch.manual_seed(0)
    codec = Codec(SMALL)
    store = FeatureStore(data, codec.frames)
    store.refresh()
    rng = np.random.default_rng(0)
    start_from_pca(codec, store.spread(4000, rng))
    loss = CodecLoss(codec, kl_weight=0.0)
    batch = store.sample(2, 12, rng, augment=False)
    noise = torch.zeros(2, 12, 64)
    optimizer = torch.optim.AdamW(codec.parameters(), lr=2e-3)
    first = float(loss(codec, batch, noise).total.detach())
    for _ in range(60):
        optimizer.zero_grad()
        parts = loss(codec, batch, noise)
        parts.total.backward()
        optimizer.step()
    assert float(loss(codec, batch, noise).total.detach()) < 0.75 * first


def test_start_from_pca_gives_standard_normal_latents(data: Path) -> None:
    codec = Codec(SMALL)
    store = FeatureStore(data, codec.frames)
    store.refresh()
    runs = store.spread(4000, np.random.default_rng(0))
    assert 0.7 < start_from_pca(codec, runs) <= 1.0
    with torch.no_grad():
        latents = codec.encoder(codec.normalize(runs[:, :, :2]))[0].flatten(0, 1)
    assert torch.allclose(latents.mean(0), torch.zeros(64), atol=0.02)
    assert torch.allclose(torch.cov(latents.T), torch.eye(64), atol=0.05)


def test_train_codec_writes_a_codec_and_continues_with_a_frozen_encoder(data: Path, tmp_path: Path) -> None:
    codec = train_codec(data, tmp_path / "a", 0.1, "cpu", config=SMALL, settings=QUICK, progress=False)
    samples = torch.from_numpy(chord(3.0, 99))[None]
    latents = codec.encode(samples)
    assert 0.2 < float(latents.std()) < 1.0
    shipped = load_codec(tmp_path / "a" / "final")
    assert torch.equal(shipped.encode(samples), latents)
    more = train_codec(
        data,
        tmp_path / "b",
        0.1,
        "cpu",
        settings=QUICK,
        freeze_encoder=True,
        start_from=tmp_path / "a" / "final",
        progress=False,
    )
    assert torch.equal(more.encode(samples), latents)
    before = codec.decoder.state_dict()
    moved = [name for name, value in more.decoder.state_dict().items() if not torch.equal(value, before[name])]
    assert moved


def test_feature_store_loudest_is_the_maximum_of_all_audio(data: Path) -> None:
    store = FeatureStore(data, Codec(SMALL).frames, hours=(1.0, 1.0), seed=0)
    store.refresh(progress=False)
    parts = [part for group in store.groups.values() for part in group]
    loudest = store.loudest()
    assert loudest.shape == (2, parts[0].shape[-1])
    features = torch.cat([part[:, :2].float() for part in parts])
    assert torch.equal(loudest, features.max(0).values)


def test_train_codec_rejects_freezing_or_resuming_without_a_codec(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="start_from"):
        train_codec(data, tmp_path, 0.1, freeze_encoder=True, settings=QUICK, progress=False)
    with pytest.raises(WeightsError, match="no checkpoint"):
        train_codec(data, tmp_path, 0.1, resume=True, settings=QUICK, progress=False)


def test_train_codec_keeps_existing_runs_and_explains_bad_arguments(data: Path, tmp_path: Path) -> None:
    (tmp_path / "last.safetensors").write_bytes(b"existing run")
    with pytest.raises(InvalidInputError, match="--resume"):
        train_codec(data, tmp_path, 0.1, settings=QUICK, progress=False)
    assert (tmp_path / "last.safetensors").read_bytes() == b"existing run"
    with pytest.raises(WeightsError, match="no model"):
        train_codec(data, tmp_path / "b", 0.1, start_from=tmp_path / "none", settings=QUICK, progress=False)
    with pytest.raises(InvalidInputError, match="choose from: auto, cpu, cuda"):
        train_codec(data, tmp_path / "b", 0.1, "tpu", settings=QUICK, progress=False)
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailableError, match="needs a CUDA GPU"):
            train_codec(data, tmp_path / "b", 0.1, "cuda", settings=QUICK, progress=False)


def test_train_codec_resumes_with_the_arguments_of_the_first_call(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call that resumes repeats neither start_from nor freeze_encoder; the latents must not change."""
    torch.manual_seed(0)
    first = Codec(SMALL).eval()
    write_codec(first, tmp_path / "a")
    monkeypatch.setattr(codec_training, "fit_synthesis_gain", lambda *_: None)
    run = tmp_path / "b"
    train_codec(data, run, 0.01, "cpu", settings=QUICK, freeze_encoder=True, start_from=tmp_path / "a", progress=False)
    more = train_codec(data, run, 0.02, "cpu", resume=True, settings=QUICK, progress=False)
    samples = torch.from_numpy(chord(1.0, 99))[None]
    assert torch.equal(more.encode(samples), first.encode(samples))


def test_codec_trainer_logs_means_over_the_steps_since_a_resume(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run resumed at step 48 logs at step 50 the mean of two steps, and then of 50 steps each."""
    settings = CodecTraining(batch=1, latents=2, log_every=50, checkpoint_minutes=1e9, compile=False)
    codec = Codec(SMALL)
    trainer = CodecTrainer(codec, settings, torch.device("cpu"))
    trainer.step = 48

    def constant_loss(*_: object) -> LossParts:
        trainer.step += 1
        return LossParts(*[torch.tensor(3.0)] * 7)

    monkeypatch.setattr(trainer, "train", constant_loss)
    budget, log, store = TimeBudget(1.0), TrainLog(tmp_path), FeatureStore(data, codec.frames)
    store.refresh()
    monkeypatch.setattr(budget, "should_stop", lambda: trainer.step == 150)
    trainer.run(store, np.random.default_rng(0), budget, log, tmp_path / "last.safetensors", progress=False)
    log.close()
    with open(tmp_path / "log.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["total"]) for row in rows] == [("50", "3"), ("100", "3"), ("150", "3")]


KILLED = """
import sys
from presto_rt.models.codec import CodecConfig
from presto_rt.lab.training.codec import CodecTraining, train_codec
config = CodecConfig.from_dict({config!r})
sizes = dict(batch=2, latents=8, pca_frames=2000, log_every=2, gain_clips=2)
settings = CodecTraining(compile=False, checkpoint_minutes=0.005, **sizes)
train_codec({data!r}, {run!r}, 10.0, "cpu", config=config, settings=settings, progress=False)
"""


def test_train_codec_resumes_after_a_kill(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    code = KILLED.format(config=SMALL.to_dict(), data=str(data), run=str(run))
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})
    checkpoint = run / "last.safetensors"
    deadline = time.monotonic() + 180.0
    while not checkpoint.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.7)  # most likely during a later checkpoint
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, before = load_checkpoint(checkpoint)
    assert before["step"] > 0
    minutes = before["used_seconds"] / 60.0 + 0.05
    train_codec(data, run, minutes, "cpu", resume=True, settings=QUICK, progress=False)
    _, after = load_checkpoint(checkpoint)
    assert after["step"] > before["step"]
    steps = [int(line.split(",")[0]) for line in (run / "log.csv").read_text().splitlines()[1:]]
    assert steps == sorted(set(steps))
    assert not list(run.glob("*.tmp*"))


def test_load_checkpoint_names_damaged_files(tmp_path: Path) -> None:
    (tmp_path / "last.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0not json")
    with pytest.raises(WeightsError, match="damaged"):
        load_checkpoint(tmp_path / "last.safetensors")


def test_learning_rate_factor_warms_up_and_reaches_its_final_value() -> None:
    assert learning_rate_factor(0.0) < 0.01
    assert learning_rate_factor(0.02) == pytest.approx(1.0)
    assert learning_rate_factor(0.51) == pytest.approx(0.51)  # halfway between 1 and 0.02
    assert learning_rate_factor(1.0) == pytest.approx(0.02)


def test_time_budget_counts_earlier_use_and_stops_on_signals() -> None:
    with pytest.raises(InvalidInputError, match="minutes"):
        TimeBudget(0.0)
    assert TimeBudget(1.0, used_seconds=60.0).should_stop()
    assert TimeBudget(1.0, used_seconds=30.0, limit=0.0).should_stop()
    handler = signal.getsignal(signal.SIGTERM)
    with TimeBudget(1.0, used_seconds=30.0) as budget:
        assert not budget.should_stop()
        assert budget.progress() == pytest.approx(0.5, abs=0.1)
        signal.raise_signal(signal.SIGTERM)
        assert budget.should_stop()
    assert signal.getsignal(signal.SIGTERM) is handler


def test_encode_dataset_resumes_to_the_same_latents(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    codec = Codec(SMALL).eval()
    totals = encode_dataset(data, codec, tmp_path / "a", progress=False)
    latents, index = load_latents(tmp_path / "a", "train")
    assert latents.dtype == np.float16
    assert latents.shape == (totals["train"], 64)
    assert [item["id"] for item in index["items"]] == ["item-0", "item-2"]
    assert index["complete"]
    item = index["items"][1]
    alone = codec.encode(torch.from_numpy(soundfile.read(data / "item-2.wav", dtype="float32")[0].T.copy()))[0]
    assert np.array_equal(latents[item["start"] : item["start"] + item["frames"]], alone.numpy().astype(np.float16))
    expected = (tmp_path / "a" / "train.npy").read_bytes()
    # the state after a kill behind the first item, whose latents are marked here and must be reused
    array = np.load(tmp_path / "a" / "train.npy")
    array[0], array[item["start"] :] = 7.0, 0.0
    np.save(tmp_path / "a" / "train.part.npy", array)
    kept = json.loads((tmp_path / "a" / "train.json").read_text()) | {"done": 1, "complete": False}
    (tmp_path / "a" / "train.part.json").write_text(json.dumps(kept))
    for name in ("train.npy", "train.json"):
        (tmp_path / "a" / name).unlink()
    encode_dataset(data, codec, tmp_path / "a", progress=False)
    resumed = np.load(tmp_path / "a" / "train.npy")
    assert (resumed[0] == 7.0).all()
    assert np.array_equal(resumed[1:], latents[1:])
    assert len((tmp_path / "a" / "train.npy").read_bytes()) == len(expected)
    assert not list((tmp_path / "a").glob("*.part*"))
    with pytest.raises(InvalidInputError, match="no latents"):
        load_latents(tmp_path, "train")


def test_encode_dataset_survives_a_kill_of_a_resumed_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run empties the partial array; a kill there must not leave the first run's index beside it."""
    torch.manual_seed(0)
    codec = Codec(SMALL).eval()
    encode_dataset(data, codec, tmp_path / "whole", progress=False)
    monkeypatch.setattr(latents_module, "SAVE_EVERY", 1)
    encode, encoded = codec.encode, []

    def interrupted_encode(samples: torch.Tensor) -> torch.Tensor:
        if len(encoded) == 1:
            raise KeyboardInterrupt
        encoded.append(samples)
        return encode(samples)

    with monkeypatch.context() as patch:
        patch.setattr(codec, "encode", interrupted_encode)
        with pytest.raises(KeyboardInterrupt):
            encode_dataset(data, codec, tmp_path / "a", progress=False)
    assert json.loads((tmp_path / "a" / "train.part.json").read_text())["done"] == 1
    with monkeypatch.context() as patch:
        open_memmap = np.lib.format.open_memmap

        def interrupted_open(*args: object, **options: object) -> None:
            open_memmap(*args, **options)
            raise KeyboardInterrupt

        patch.setattr(np.lib.format, "open_memmap", interrupted_open)
        with pytest.raises(KeyboardInterrupt):
            encode_dataset(data, codec, tmp_path / "a", progress=False)
    encode_dataset(data, codec, tmp_path / "a", progress=False)
    assert np.array_equal(np.load(tmp_path / "a" / "train.npy"), np.load(tmp_path / "whole" / "train.npy"))


def test_codec_measures_are_zero_for_a_copy_and_grow_with_damage() -> None:
    clip = chord(2.0, 5)
    same = measure(clip, clip.copy())
    assert same["mel_db"] == same["stft"] == same["high_db"] == same["side_db"] == 0.0
    quieter = measure(clip, clip * 10 ** (-6 / 20))
    assert quieter["mel_db"] == pytest.approx(6.0, abs=0.5)
    assert quieter["si_sdr_db"] > 60.0
    mono = np.repeat(clip.mean(0, keepdims=True), 2, 0)
    assert measure(clip, mono)["side_db"] > 10.0
    with pytest.raises(InvalidInputError):
        measure(clip, clip[:, :-1])


def test_load_codec_reads_half_precision_and_names_damaged_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    codec = Codec(SMALL).eval()
    write_codec(codec, tmp_path)
    state = {name: value.bfloat16() if value.ndim > 1 else value for name, value in codec.state_dict().items()}
    save_checkpoint(tmp_path / "codec.safetensors", state, {})
    shipped = load_codec(tmp_path)
    for name in ("config.json", "codec.safetensors"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:100])
        with pytest.raises(WeightsError, match="damaged"):
            load_codec(tmp_path)
        (tmp_path / name).write_bytes(content)
    clip = chord(1.0, 7)[:, : 20 * LATENT_HOP]
    report = evaluate_codec(shipped, {"synthetic": [clip]}, griffin_lim=(0,), opus_rates=(), noise=(), progress=False)
    assert report["systems"]["codec, 0 Griffin-Lim"]["synthetic"]["mel_db"] > 0.0
    assert "codec, 0 Griffin-Lim" in markdown(report)


def test_load_codec_reads_shipped_models(tmp_path: Path) -> None:
    """Data sets can be encoded without the codec's run: `presto-rt lab train encode --codec nano`."""
    codec = load_codec("nano")
    assert torch.equal(codec.latent_scale, load_folder("nano").parts["codec"]["latent_scale"].float())
    with pytest.raises(InvalidInputError, match="run folder"):
        load_codec(tmp_path)
