"""The chain of trainings and the command `presto-rt lab distill`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from presto_rt.cli.main import main
from presto_rt.errors import InvalidInputError
from presto_rt.lab.distill import recipe
from presto_rt.lab.distill.run import used_minutes
from presto_rt.lab.training import settings
from presto_rt.lab.training.checkpoint import checkpoint_meta
from presto_rt.lab.training.synthetic import write_latents

SMALL: dict[str, Any] = {"device": "cpu", "tokens": 48, "frames": ((24, 1.0),)}


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latents(tmp_path_factory.mktemp("data") / "set")


def test_recipe_dry_run_trains_the_whole_chain(capsys: pytest.CaptureFixture[str]) -> None:
    assert recipe.main(["--dry-run"]) == 0
    output = capsys.readouterr().out
    assert all(f"{name}: 0.0 minutes" in output for name in recipe.CHAIN)


def test_chain_stops_at_its_limit_continues_and_skips_finished_runs(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "SHORTEST_MINUTES", 0.0)
    names, minutes = ("base", "ase"), {"base": 5.0, "ase": 0.01}
    call = {"model": "tiny", **SMALL}
    assert not recipe.chain(names, data_root, tmp_path, minutes, 1e-6, **call)
    used = used_minutes(tmp_path / "base")
    assert not (tmp_path / "ase").exists()
    minutes["base"] = used + 0.01
    assert recipe.chain(names, data_root, tmp_path, minutes, None, **call)
    assert used_minutes(tmp_path / "base") > used
    step = checkpoint_meta(tmp_path / "base" / "checkpoint.safetensors")["step"]
    assert recipe.chain(names, data_root, tmp_path, minutes, None, **call)
    assert checkpoint_meta(tmp_path / "base" / "checkpoint.safetensors")["step"] == step
    seeded = recipe.run_folder(tmp_path, "ase", seed=2)
    assert recipe.train("ase", data_root, tmp_path, minutes=0.01, seed=2, **SMALL)
    assert checkpoint_meta(seeded / "checkpoint.safetensors")["options"]["seed"] == 2


def test_recipe_rejects_unknown_trainings(data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InvalidInputError, match="presto-ls"):
        recipe.train("magic", data_root, tmp_path)
    assert recipe.main(["magic", "--data", str(data_root), "--runs", str(tmp_path)]) == 1
    assert "unknown training" in capsys.readouterr().err


def test_distill_command_trains_and_reports_bad_options(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.train("base", data_root, tmp_path, minutes=0.01, model="tiny", **SMALL)
    run = tmp_path / "steps"
    paths = f"--teacher {tmp_path / 'base'} --data {data_root} --run {run}".split()
    options = ["--device", "cpu", "--minutes", "0.01", "--method", "no-gan", "--tokens", "48", "--seed", "3"]
    changes = ["frames=[[24, 1.0]]", "p_gen=ladder:2", "fake_updates=1"]
    call = ["lab", "distill", "steps", *paths, *options, *(word for change in changes for word in ("--set", change))]
    assert main(call) == 0
    assert "held-out error" in capsys.readouterr().out
    meta = checkpoint_meta(run / "checkpoint.safetensors")
    expected = {"p_gen": "ladder:2", "fake_updates": 1, "gan_weight": 0.0, "seed": 3, "tokens": 48}
    assert {name: meta["options"][name] for name in expected} == expected
    assert main(call) == 1
    assert "--resume" in capsys.readouterr().err
    assert main([*call[:-2], "--set", "speed=3", "--resume"]) == 1
    assert "unknown options speed" in capsys.readouterr().err
    with pytest.raises(InvalidInputError, match="OPTION=VALUE"):
        settings.read(["fast"])
