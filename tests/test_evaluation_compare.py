"""Tests of comparing models and settings: rows, latencies, tables, plots, variance curves and bench/distillation.py."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from presto_rt.checkpoints.folder import load_folder
from presto_rt.diffusion.schedule import LayerSchedule, keep_last
from presto_rt.errors import InvalidInputError
from presto_rt.lab.data.manifest import Item, Manifest
from presto_rt.lab.distill import recipe
from presto_rt.lab.evaluation import compare as comparison
from presto_rt.lab.evaluation.compare import ComparisonRow, compare, markdown, parse_row, plan_cost, plot
from presto_rt.lab.evaluation.variance import curves, hidden_variance
from presto_rt.lab.training.conditions import LatentSet
from presto_rt.lab.training.synthetic import write_latents
from presto_rt.loading import load
from presto_rt.models.codec import Codec
from presto_rt.models.config import preset
from presto_rt.models.dit import DiT
from tests.support.models import CODEC, write_tiny_model

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        spec = importlib.util.spec_from_file_location("bench_distillation", ROOT / "bench" / "distillation.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(ROOT / "bench"))


def measured(kid: float, nfe: int, total: float) -> dict[str, Any]:
    """Make a row in the form of `compare`."""
    value = {"value": kid, "low": kid - 0.01, "high": kid + 0.01, "n": 9}
    measures = {
        "kid": value,
        "mmd": value,
        "probe": {"mean": value},
        "tempo": value,
        "key": {"exact": value},
        "prdc": {"recall": 0.5, "density": 0.25, "coverage": 0.75},
        "diversity": value,
    }
    return {
        "plan": {"nfe": nfe, "passes": 2 * nfe, "blocks": 0.7},
        "measures": measures,
        "latency": {"seconds": 32.0, "total": total},
        "environment": {"gpu": None, "cpu": "a processor", "cores": 2},
    }


def test_parse_row_reads_options_and_rejects_invalid_text() -> None:
    row = parse_row("Presto-S, 4 steps=out/presto-s,steps=4,guidance=1,layers=70%,sampler=few_step")
    assert row == ComparisonRow(
        "Presto-S, 4 steps", "out/presto-s", {"steps": 4, "guidance": 1.0, "layers": "70%", "sampler": "few_step"}
    )
    assert parse_row("real=real") == ComparisonRow("real", "real")
    for text in ("", "a", "=b", "a=", "a=b,steps", "a=b,speed=3", "a=b,steps=x"):
        with pytest.raises(InvalidInputError, match="row"):
            parse_row(text)


def test_plan_cost_counts_evaluations_passes_and_blocks(tmp_path: Path) -> None:
    model = load(write_tiny_model(tmp_path / "tiny"), dtype="float32")
    heun = plan_cost(model, {"steps": 40, "sampler": "heun", "guidance": 2.0}, 1.0)
    assert (heun["nfe"], heun["passes"], heun["blocks"]) == (79, 158, 1.0)
    few = plan_cost(model, {"steps": 4, "sampler": "few_step", "guidance": 1.0, "layers": 2}, 1.0)
    assert (few["nfe"], few["passes"]) == (4, 4)
    assert few["blocks"] == pytest.approx(2 / 3)


def test_markdown_marks_missing_rows() -> None:
    table = {"settings": {}, "rows": {"a": measured(0.02, 4, 0.5)}}
    lines = markdown(table, ["a", "b"]).splitlines()
    assert lines[2].startswith("| a | 4 | 8 | 70 | 20.0 (10.0 to 30.0) |")
    assert lines[2].endswith("| 0.500 | 64.0 |")
    assert lines[3].startswith("| b | not measured |")
    assert len({line.count("|") for line in lines}) == 1


def test_bench_report_writes_tables_and_plots(bench: ModuleType, tmp_path: Path) -> None:
    empty, file = tmp_path / "none.json", tmp_path / "some.json"
    bench.report(empty, tmp_path / "empty.md")
    text = (tmp_path / "empty.md").read_text()
    assert text.count("not measured") == 2 + sum(len(entries) for _, entries in bench.TABLES.values())
    assert not list(tmp_path.glob("*.png"))
    settings = {"count": 5, "seconds": 2.0, "reference": 9, "seed": 0}
    rows = {
        "Presto-S, 4 steps": measured(0.02, 4, 0.5),
        "Presto-S, 4 steps (training seed 1)": measured(0.03, 4, 0.5),
        bench.TEACHER: measured(0.01, 79, 9.0),
    }
    file.write_text(json.dumps({"settings": settings, "rows": rows}))
    bench.report(file, tmp_path / "some.md")
    text = (tmp_path / "some.md").read_text()
    assert "| Presto-S, 4 steps (training seed 1) | 4 |" in text
    assert "a processor, 2 cores" in text
    assert {p.name for p in tmp_path.glob("*.png")} == {"quality-nfe.png", "quality-latency.png"}
    assert plot({"rows": {}}, {"x": ["y"]}, "nfe", tmp_path / "x.png") is False


def test_bench_latency_times_all_rows_in_one_run(bench: ModuleType, tmp_path: Path) -> None:
    """Rows of the same plan share a latency, other plans have their own, and nothing else of a row changes."""
    file, tiny = tmp_path / "some.json", str(write_tiny_model(tmp_path / "tiny"))
    names = ["Presto-S, 4 steps", "no GAN, 4 steps", "Presto-S, 1 step (training seed 1)", "ASE, 50%"]
    before = {"settings": {}, "rows": {name: measured(0.02, 4, 0.5) for name in names}}
    file.write_text(json.dumps(before))
    bench.main(
        [
            "latency",
            "--results",
            str(file),
            "--timed",
            tiny,
            tiny,
            "--latency-seconds",
            "0.4",
            "--repeats",
            "3",
            "--device",
            "cpu",
        ]
    )
    rows = comparison.read(file)["rows"]
    first, same, one_step, layers = (rows[name].pop("latency") for name in names)
    assert first == same
    assert len({first["total"], one_step["total"], layers["total"]}) == 3
    assert all(0 < t["decode"] < t["total"] <= t["p90"] for t in (first, one_step, layers))
    assert rows == {name: {k: v for k, v in measured(0.02, 4, 0.5).items() if k != "latency"} for name in names}


def test_bench_commands_are_documented(bench: ModuleType) -> None:
    from presto_rt.lab.distill.recipe import TRAININGS

    text = (ROOT / "docs" / "distillation.md").read_text()
    assert bench.commands() in text
    assert {entry.training for entry in bench.ENTRIES.values()} <= set(TRAININGS) | {bench.SHIPPED}
    for _, entries in bench.TABLES.values():
        for entry in entries:
            assert bench.ENTRIES[entry.name] == entry  # a name has the same meaning in all tables


def test_bench_row_trains_and_evaluates(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Presto-LS trains Presto-L first; the packed model is evaluated, with its own schedule and defaults."""
    evaluated: list[ComparisonRow] = []

    def record(rows: list[ComparisonRow], *_: Any, **__: Any) -> dict[str, Any]:
        evaluated.extend(rows)
        return {"settings": {}, "rows": {rows[0].name: measured(0.1, 4, 1.0)}}

    monkeypatch.setattr(comparison, "compare", record)
    data, tiny = write_latents(tmp_path / "data", pieces=4, frames=700), str(write_tiny_model(tmp_path / "tiny"))
    name = "Presto-LS 70%, 4 steps"
    monkeypatch.setitem(recipe.TRAININGS, "presto-l", recipe.Training("layers", "presto-l", 0.001))
    folders = ["--data", str(data), "--runs", str(tmp_path / "runs"), "--packed", str(tmp_path / "out")]
    settings = ["--teacher", tiny, "--codec", tiny, "--device", "cpu", "--minutes", "0.001", "--seed", "1"]
    bench.main(["row", name, *folders, *settings])
    assert evaluated == [
        ComparisonRow(
            f"{name} (training seed 1)",
            str(tmp_path / "out" / "presto-ls-seed1"),
            {"sampler": "few_step", "guidance": 1.0, "steps": 4, "layers": "70%"},
        )
    ]
    assert (tmp_path / "runs" / "presto-l-seed1" / "checkpoint.safetensors").is_file()
    model = load(evaluated[0].model, dtype="float32")
    defaults = model.model.defaults
    assert (defaults.steps, defaults.sampler, defaults.layers) == (4, "few_step", "70%")
    assert model.plan(1.0).layers == model.model.schedules["70%"]
    with pytest.raises(SystemExit, match="unknown row 'magic'; choose from: full depth"):
        bench.main(["row", "magic"])


def test_hidden_variance_is_that_of_the_activations(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = DiT(preset("tiny")).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    held_out = LatentSet(write_latents(tmp_path / "data"), "val")
    x, condition = held_out.batch(np.random.default_rng(0), 3, 20, 0.0)
    full = hidden_variance(model, x, 1.0, condition, LayerSchedule.full(3))
    assert list(full) == [0, 1, 2]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        scaled = (x + noise) / (1 + 0.5**2) ** 0.5
        for depth in (1, 2, 3):
            hidden = model.hidden(scaled, torch.zeros(3), condition, depth)
            assert full[depth - 1] == pytest.approx(float(hidden.var()), rel=1e-5)
    short = LayerSchedule(3, ((float("inf"), keep_last(3, 2)),))
    records = curves({"full": (model, LayerSchedule.full(3)), "short": (model, short)}, held_out, (0.5, 4.0), 2, 20)
    assert [r["blocks"] for r in records] == [[0, 1, 2], [0, 1, 2], [0, 2], [0, 2]]
    assert records[0]["variance"][0] == pytest.approx(records[2]["variance"][0], rel=0.2)  # another budget embedding


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("musicnn", "basic_pitch", "onnxruntime", "prdc")),
    reason="the packages of the metrics are not installed",
)
def test_compare_accumulates_rows_in_one_file(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    rng, items = np.random.default_rng(0), []
    for i in range(12):
        soundfile.write(tmp_path / f"{i}.wav", 0.1 * rng.standard_normal((3 * 44_100, 2)), 44_100)
        caption, instrument = ("piano, 90 bpm", "piano") if i % 2 else ("guitar, 120 bpm", "guitar")
        items.append(
            Item(
                f"i{i}",
                "solo",
                "test" if i < 4 else "train",
                f"{i}.wav",
                3.0,
                f"c{i}",
                str(i),
                "",
                "",
                [caption],
                [instrument],
            )
        )
    Manifest(tmp_path, 0, items).save()
    folder = write_tiny_model(tmp_path / "tiny")
    call: dict[str, Any] = {
        "count": 4,
        "seconds": 2.0,
        "reference_count": 8,
        "latency_seconds": 0.5,
        "repeats": 2,
        "workers": 1,
    }
    row = ComparisonRow("tiny, 2", str(folder), {"steps": 2, "guidance": 1.0, "layers": "70%"})
    compare([row], tmp_path, tmp_path / "out", **call)
    table = compare([ComparisonRow("real", "real")], tmp_path, tmp_path / "out", **call)
    assert list(table["rows"]) == ["tiny, 2", "real"]
    first = table["rows"]["tiny, 2"]
    assert first["plan"]["nfe"] == 3  # the model's own sampler is Heun
    assert 0 < first["latency"]["decode"] < first["latency"]["total"] <= first["latency"]["p90"] * 1.001
    assert first["measures"]["clips"] == table["rows"]["real"]["measures"]["clips"] == 4
    assert str(tmp_path) not in json.dumps(table)
    assert comparison.read(tmp_path / "out" / "comparison.json") == table
    assert markdown(table).count("\n") == 3
    with pytest.raises(InvalidInputError, match="other settings"):
        compare([row], tmp_path, tmp_path / "out", **{**call, "seconds": 1.0})


def test_pack_takes_the_codec_from_a_model(tmp_path: Path) -> None:
    """A run's network and another model's codec form a model; a network alone can be packed again."""
    from presto_rt.lab.training.pack import pack, pack_network

    folder = write_tiny_model(tmp_path / "tiny")
    pack_network(tmp_path / "network", folder)
    assert set(load_folder(tmp_path / "network").parts) == {"dit"}
    pack(
        tmp_path / "whole",
        codec_run=folder,
        base_run=tmp_path / "network",
        defaults={"steps": 2, "layers": "70%"},
        quality=[{"steps": 2, "layers": "70%", "kid": 0.1}],
    )
    model = load(tmp_path / "whole", dtype="float32")
    defaults = model.model.defaults
    assert (defaults.steps, defaults.sampler, defaults.layers) == (2, "heun", "70%")
    assert model.model.quality == [{"steps": 2, "layers": "70%", "kid": 0.1}]
    codec = model.model.autoencoder
    assert isinstance(codec, Codec)
    assert codec.config == CODEC
    a, b = (
        m.generate("x", seconds=0.3, seed=1, steps=2, layers=3).samples for m in (model, load(folder, dtype="float32"))
    )
    assert np.array_equal(a, b)
