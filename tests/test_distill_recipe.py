"""The chain of trainings: it runs dry, stops at its limit, goes on, and skips what is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from presto_rt.cli.main import main
from presto_rt.errors import InvalidInputError
from presto_rt.lab.distill import recipe
from presto_rt.lab.distill.run import used_minutes
from presto_rt.lab.training import settings
from presto_rt.lab.training.common import checkpoint_meta
from presto_rt.lab.training.synthetic import write_latents

SMALL: dict[str, Any] = {"device": "cpu", "tokens": 48, "frames": ((24, 1.0),)}


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latents(tmp_path_factory.mktemp("data") / "set")


def test_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert recipe.main(["--dry-run"]) == 0
    told = capsys.readouterr().out
    assert all(f"{name}: 0.0 minutes" in told for name in recipe.CHAIN)


def test_chain_goes_on_and_skips(data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "WORTHWHILE", 0.0)
    names, minutes = ("base", "ase"), {"base": 5.0, "ase": 0.01}
    call = {"model": "tiny", **SMALL}
    assert not recipe.chain(names, data_root, tmp_path, minutes, 1e-6, **call)
    began = used_minutes(tmp_path / "base")
    assert not (tmp_path / "ase").exists()
    minutes["base"] = began + 0.01
    assert recipe.chain(names, data_root, tmp_path, minutes, None, **call)
    assert used_minutes(tmp_path / "base") > began
    step = checkpoint_meta(tmp_path / "base" / "checkpoint.safetensors")["step"]
    assert recipe.chain(names, data_root, tmp_path, minutes, None, **call)
    assert checkpoint_meta(tmp_path / "base" / "checkpoint.safetensors")["step"] == step
    other = recipe.run_folder(tmp_path, "ase", seed=2)
    assert recipe.train("ase", data_root, tmp_path, minutes=0.01, seed=2, **SMALL)
    assert checkpoint_meta(other / "checkpoint.safetensors")["options"]["seed"] == 2


def test_unknown_names(data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InvalidInputError, match="presto-ls"):
        recipe.train("magic", data_root, tmp_path)
    assert recipe.main(["magic", "--data", str(data_root), "--runs", str(tmp_path)]) == 1
    assert "unknown training" in capsys.readouterr().err


@pytest.mark.usefixtures("entry_points")
def test_distill_on_the_command_line(data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.train("base", data_root, tmp_path, minutes=0.01, model="tiny", **SMALL)
    run = tmp_path / "steps"
    call = ["lab", "distill", "steps", "--teacher", str(tmp_path / "base"), "--data", str(data_root), "--run", str(run),
            "--device", "cpu", "--minutes", "0.01", "--method", "no-gan", "--tokens", "48", "--seed", "3",
            "--set", "frames=[[24, 1.0]]", "--set", "p_gen=ladder:2", "--set", "fake_updates=1"]  # fmt: skip
    assert main(call) == 0
    assert "held-out error" in capsys.readouterr().out
    meta = checkpoint_meta(run / "checkpoint.safetensors")
    expected = {"p_gen": "ladder:2", "fake_updates": 1, "gan_weight": 0.0, "seed": 3, "tokens": 48}
    assert {name: meta["options"][name] for name in expected} == expected
    assert main(call) == 1
    assert "--resume" in capsys.readouterr().err
    assert main([*call[:-2], "--set", "speed=3", "--resume"]) == 1
    assert "unknown settings speed" in capsys.readouterr().err
    with pytest.raises(InvalidInputError, match="OPTION=VALUE"):
        settings.read(["fast"])
