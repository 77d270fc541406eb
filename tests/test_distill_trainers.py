"""The distillation trainers with a tiny model on a small synthetic set of latents."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from presto_rt.diffusion.precond import precondition
from presto_rt.diffusion.schedule import LayerSchedule
from presto_rt.errors import InvalidInputError, WeightsError
from presto_rt.lab.distill import layers, step_options
from presto_rt.lab.distill.fake_score import FakeScore
from presto_rt.lab.distill.run import distill_both, distill_layers, distill_steps, saved_schedules, used_minutes
from presto_rt.lab.distill.steps import StepTrainer
from presto_rt.lab.distill.trainer import DistillationTrainer
from presto_rt.lab.training.checkpoint import load_checkpoint
from presto_rt.lab.training.networks import load_network
from presto_rt.lab.training.synthetic import write_latents
from presto_rt.models.config import preset
from presto_rt.models.dit import DiT
from tests.support.models import write_tiny_model

SMALL: dict[str, Any] = {"tokens": 96, "frames": ((24, 1.0),)}


def random_network(network: str = "edm") -> DiT:
    torch.manual_seed(0)
    model = DiT(replace(preset("tiny"), network=network))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return model


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latents(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def teacher() -> DiT:
    return random_network()


def layer_trainer(data: Path, run: Path, teacher: DiT, method: str = "presto-l", **changes: Any) -> layers.LayerTrainer:
    return layers.LayerTrainer(data, run, teacher, layers.settings(method, 1.0, **SMALL | changes), "cpu")


def step_trainer(data: Path, run: Path, teacher: DiT, method: str = "presto-s", **changes: Any) -> StepTrainer:
    chosen = {"fake_updates": 2, **SMALL, **changes}
    return StepTrainer(data, run, teacher, step_options.settings(method, 1.0, **chosen), "cpu")


def parameters(trainer: DistillationTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for m in trainer.modules.values() for p in m.parameters()])


def largest_change(before: DiT, after: torch.nn.Module) -> float:
    old = dict(before.named_parameters())
    return max(float((p - old[name]).abs().max().detach()) for name, p in after.named_parameters() if name in old)


@pytest.mark.parametrize("method", layers.METHODS)
def test_layer_trainer_trains_with_every_method(method: str, data_root: Path, tmp_path: Path, teacher: DiT) -> None:
    trainer, seen = layer_trainer(data_root, tmp_path, teacher, method, budgets=(0.5,)), set[str]()
    for _ in range(3):
        logged = trainer.train_step(0.5)
        assert all(math.isfinite(v) for v in logged.values())
        seen |= set(logged) - {"loss"}
    assert largest_change(teacher, trainer.model) > 0
    expected = {"ase": {"denoising"}, "no-self-teacher": {"denoising"}, "generator": {"generator"}}
    assert seen == expected.get(method, {"denoising", "self_teacher"})
    assert trainer.step == 3
    assert trainer.frames_seen == 3 * 96
    for name, schedule in trainer.schedules().items():
        shifted = trainer.options.shifted
        assert schedule.budget_input is trainer.options.budget_input
        for _, blocks in schedule.rows:
            assert blocks == ((*range(len(blocks) - 1), 2) if shifted else tuple(range(len(blocks)))), name


@pytest.mark.parametrize("method", step_options.METHODS)
def test_step_trainer_trains_with_every_method(method: str, data_root: Path, tmp_path: Path, teacher: DiT) -> None:
    trainer = step_trainer(data_root, tmp_path, teacher, method)
    for _ in range(2):
        logged = trainer.train_step(0.5)
        assert all(math.isfinite(v) for v in logged.values())
    assert largest_change(teacher, trainer.model) > 0
    assert (largest_change(teacher, trainer.fake_model) > 0) == (method != "consistency")
    assert largest_change(teacher, trainer.teacher) == 0
    assert not any(p.grad is not None for m in trainer.modules.values() for p in m.parameters())
    expected = {"consistency": {"consistency"}, "no-gan": {"matching", "fake_score"}}
    default = {"matching", "gan", "fake_score", "discriminator"}
    assert set(logged) - {"loss"} == expected.get(method, default)


@pytest.mark.parametrize("kind", ["layers", "steps"])
def test_distillation_trainer_resumed_run_equals_the_uninterrupted(
    kind: str, data_root: Path, tmp_path: Path, teacher: DiT
) -> None:
    make = layer_trainer if kind == "layers" else step_trainer
    straight = make(data_root, tmp_path / "a", teacher)
    for _ in range(4):
        straight.train_step(0.5)
    first = make(data_root, tmp_path / "b", teacher)
    for _ in range(2):
        first.train_step(0.5)
    first.save(12.0)
    second = make(data_root, tmp_path / "b", teacher)
    with pytest.raises(InvalidInputError, match="--resume"):
        second.start(resume=False)
    second.start(resume=True)
    assert (second.step, second.used_seconds) == (2, 12.0)
    for _ in range(2):
        second.train_step(0.5)
    assert torch.equal(parameters(straight), parameters(second))
    assert all(torch.equal(v, second.ema.shadow[k]) for k, v in straight.ema.shadow.items())
    reseeded = make(data_root, tmp_path / "b", teacher, seed=1)
    with pytest.raises(InvalidInputError, match="seed"):
        reseeded.start(resume=True)


def test_step_trainer_checkpoints_keep_the_option_names_of_older_versions(
    data_root: Path, tmp_path: Path, teacher: DiT
) -> None:
    trainer = step_trainer(data_root, tmp_path, teacher, "fake-unconditioned")
    options = trainer.describe()["options"]
    assert options["fake_told"] is False
    assert "condition_on_origin" not in options


def test_distill_steps_resumes_after_a_kill(data_root: Path, tmp_path: Path, teacher: DiT) -> None:
    layer_trainer(data_root, tmp_path / "teacher", teacher).save(0.0)
    run, options = tmp_path / "run", {**SMALL, "fake_updates": 1, "checkpoint_minutes": 0.01}
    call = f"({str(data_root)!r}, {str(run)!r}, 30, {str(tmp_path / 'teacher')!r}, device='cpu', **{options!r})"
    code = f"from presto_rt.lab.distill.run import distill_steps; distill_steps{call}"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    checkpoint = run / "checkpoint.safetensors"
    deadline = time.time() + 180
    while not checkpoint.is_file() and process.poll() is None and time.time() < deadline:
        time.sleep(0.2)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, meta = load_checkpoint(checkpoint)
    assert meta["step"] > 0
    minutes = meta["used_seconds"] / 60 + 0.02
    errors = distill_steps(data_root, run, minutes, tmp_path / "teacher", device="cpu", resume=True, **options)
    assert load_checkpoint(checkpoint)[1]["step"] > meta["step"]
    assert all(np.isfinite(v) for v in errors.values())
    assert (run / "log.csv").read_text().startswith("step,loss,")


def test_trainers_start_as_the_teacher_at_full_budget(data_root: Path, tmp_path: Path, teacher: DiT) -> None:
    trainer = layer_trainer(data_root, tmp_path, teacher)
    x, condition = trainer.val_set.batch(np.random.default_rng(0), 3, 24, 0.0)
    sigma = torch.tensor([0.1, 1.0, 10.0])
    options = step_options.settings("presto-s", 1.0, **SMALL)
    generator = StepTrainer(data_root, tmp_path / "s", teacher, options, "cpu")
    with torch.no_grad():
        full = trainer.denoise(x, sigma[:1].expand(3), condition, trainer.schedule(1.0))
        expected = precondition(teacher, x, sigma[:1].expand(3), condition, kind="edm", sigma_data=0.5)
        half = trainer.denoise(x, sigma[2:].expand(3), condition, trainer.schedule(0.5))
        all_blocks = trainer.denoise(x, sigma[2:].expand(3), condition, trainer.schedule(1.0))
        few_step = generator.generate(x, sigma, condition)
        fake = generator.fake(x, sigma, condition, torch.tensor([0.01, 1.0, 80.0]))
        each_clip = precondition(teacher, x, sigma, condition, kind="edm", sigma_data=0.5)
    assert (full - expected).abs().max() <= 1e-6
    assert (half - all_blocks).abs().max() > 1e-4
    assert (few_step - each_clip).abs().max() <= 1e-5
    assert (fake - each_clip).abs().max() <= 1e-6


def test_layer_trainer_resets_the_budget_embedding(data_root: Path, tmp_path: Path) -> None:
    """A teacher trained at budget 1 only has a random output at other budgets; the student must start without it."""
    teacher = random_network()
    torch.nn.init.normal_(teacher.budget.weight, std=0.3)
    trainer = layer_trainer(data_root, tmp_path, teacher)
    x, condition = trainer.val_set.batch(np.random.default_rng(0), 2, 24, 0.0)
    time = torch.zeros(2)
    with torch.no_grad():
        full, half = (teacher(x, time, condition, (0, 2), budget) for budget in (1.0, 0.5))
        assert (full - half).abs().max() > 1e-2
        for budget in (1.0, 0.5):
            assert (trainer.model(x, time, condition, (0, 2), budget) - full).abs().max() < 1e-5


def test_layer_trainer_draws_sigmas_with_equal_blocks(data_root: Path, tmp_path: Path, teacher: DiT) -> None:
    trainer = layer_trainer(data_root, tmp_path, teacher)
    schedule = trainer.schedule(0.6)
    seen = set()
    for _ in range(200):
        sigmas = trainer.sigmas_with_equal_blocks(schedule, 16)
        blocks = {schedule.blocks(s) for s in sigmas.tolist()}
        assert len(blocks) == 1
        seen |= blocks
    assert len(seen) > 1


def test_layer_trainer_drops_layers_of_a_generator(data_root: Path, tmp_path: Path, teacher: DiT) -> None:
    """Its output approaches that of the frozen generator, and it is described as a few-step model of fewer layers."""
    trainer = layer_trainer(data_root, tmp_path, teacher, "generator", learning_rate=2e-3, budgets=(0.5,))
    x, condition = trainer.val_set.batch(np.random.default_rng(0), 4, 24, 0.0)
    sigma = torch.full((4,), 20.0)

    def distance() -> float:
        with torch.no_grad():
            short = trainer.denoise(x, sigma, condition, trainer.schedule(0.5))
            target = precondition(teacher, x, sigma, condition, kind="edm", sigma_data=0.5)
        return float((short - target).square().mean())

    before = distance()
    for _ in range(60):
        trainer.train_step(0.5)
    assert distance() < 0.5 * before
    assert largest_change(teacher, trainer.teacher) == 0
    defaults = trainer.describe()["defaults"]
    assert defaults == {"steps": 4, "sampler": "few_step", "guidance": 1.0, "layers": "70%"}
    with pytest.raises(InvalidInputError, match="self_teacher=false"):
        layers.settings("presto-l", 1.0, generator=True)


def test_step_trainer_runs_each_clip_with_the_blocks_of_its_sigma(
    data_root: Path, tmp_path: Path, teacher: DiT
) -> None:
    """A batch over several rows of the schedule equals its clips one by one."""
    schedule = LayerSchedule(3, ((0.5, (0, 1, 2)), (5.0, (0, 2)), (math.inf, (2,))))
    options = step_options.settings("presto-s", 1.0, **SMALL)
    trainer = StepTrainer(data_root, tmp_path, teacher, options, "cpu", schedule, budget="60%")
    x, condition = trainer.val_set.batch(np.random.default_rng(0), 5, 24, 0.0)
    sigma = torch.tensor([20.0, 0.1, 1.0, 0.2, 60.0])
    with torch.no_grad():
        together = trainer.generate(x, sigma, condition)
        for i, s in enumerate(sigma.tolist()):
            clip, blocks = condition.take(torch.tensor([i])), schedule.blocks(s)
            alone = trainer.denoise(trainer.model, x[i : i + 1], sigma[i : i + 1], clip, blocks)
            assert (together[i] - alone[0]).abs().max() < 1e-5
    assert math.isfinite(trainer.train_step(0.5)["loss"])
    assert trainer.describe()["defaults"] == {"steps": 4, "sampler": "few_step", "guidance": 1.0, "layers": "60%"}


def test_fake_score_depends_on_the_generators_sigma_if_conditioned_on_it(
    teacher: DiT, data_root: Path, tmp_path: Path
) -> None:
    for method, differs in (("presto-s", True), ("fake-unconditioned", False)):
        trainer = step_trainer(data_root, tmp_path / method, teacher, method)
        assert isinstance(trainer.fake_model, FakeScore)
        torch.nn.init.normal_(trainer.fake_model.origin.weight, std=0.1)
        x, condition = trainer.val_set.batch(np.random.default_rng(0), 2, 24, 0.0)
        with torch.no_grad():
            low, high = (trainer.fake(x, torch.ones(2), condition, torch.full((2,), s)) for s in (0.01, 40.0))
        assert bool((low - high).abs().max() > 1e-4) is differs


@pytest.mark.parametrize("network", ["v", "rf"])
def test_trainers_distill_teachers_of_other_prediction_types(network: str, data_root: Path, tmp_path: Path) -> None:
    """The teacher's denoiser is x_0 = z cos - v sin for v-prediction, and x_0 = z - t u for rectified flow."""
    teacher = random_network(network)
    trainer = step_trainer(data_root, tmp_path / "s", teacher, guidance=1.0)
    x, condition = trainer.val_set.batch(np.random.default_rng(0), 3, 24, 0.0)
    sigma = torch.tensor([0.05, 1.0, 20.0])
    column = sigma[:, None, None]
    with torch.no_grad():
        real = trainer.real(x, sigma, condition)
        if network == "v":
            angle = torch.atan2(column, torch.tensor(0.5))
            z = x * angle.cos() / 0.5
            expected = 0.5 * (angle.cos() * z - angle.sin() * teacher(z, angle[:, 0, 0] * 2 / math.pi, condition))
        else:
            t = column / (1 + column)
            expected = (1 - t) * x - t * teacher((1 - t) * x, t[:, 0, 0], condition)
    assert (real - expected).abs().max() < 1e-5
    for each in (trainer, layer_trainer(data_root, tmp_path / "l", teacher)):
        assert all(math.isfinite(v) for v in each.train_step(0.5).values())
        assert largest_change(teacher, each.modules["model"]) > 0


def test_distill_both_continues_after_its_limit(data_root: Path, tmp_path: Path, teacher: DiT) -> None:
    """Layers, then steps from them with the layer schedule of the budget."""
    layer_trainer(data_root, tmp_path / "teacher", teacher).save(0.0)
    run = tmp_path / "both"
    call = {"device": "cpu", "budget": "70%", "fake_updates": 1, **SMALL}
    assert distill_both(data_root, run, 0.06, tmp_path / "teacher", limit=0.005, **call) == {}
    assert used_minutes(run / "layers") > 0
    assert not (run / "checkpoint.safetensors").exists()
    errors = distill_both(data_root, run, 0.06, tmp_path / "teacher", resume=True, **call)
    assert all(math.isfinite(v) for v in errors.values())
    meta = load_checkpoint(run / "checkpoint.safetensors")[1]
    assert meta["defaults"]["layers"] == "70%"
    assert saved_schedules(run)["70%"] == saved_schedules(run / "layers")["70%"]


def test_load_network_reads_runs_checkpoints_and_weights_folders(data_root: Path, tmp_path: Path, teacher: DiT) -> None:
    trainer = layer_trainer(
        data_root, tmp_path / "run", teacher, "ase"
    )  # the method that does not reset the budget embedding
    trainer.save(0.0)
    for source in (tmp_path / "run", tmp_path / "run" / "checkpoint.safetensors"):
        assert largest_change(teacher, load_network(source)) == 0
    assert load_network(write_tiny_model(tmp_path / "weights")).config == preset("tiny")
    with pytest.raises(WeightsError, match="no model"):
        load_network(tmp_path / "nothing")


def test_settings_reject_unknown_methods_options_and_values(data_root: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="presto-l"):
        layers.settings("magic", 1.0)
    with pytest.raises(InvalidInputError, match="budgets"):
        layers.settings("presto-l", 1.0, budgets=(0.1,))
    with pytest.raises(InvalidInputError, match="learning_rate"):
        distill_layers(data_root, tmp_path, 1.0, "nano", speed=3)
    with pytest.raises(InvalidInputError, match="normalize"):
        step_options.settings("presto-s", 1.0, normalize="never")
