"""A small random model in a weights folder: quick to run, every parameter random so that its output is not zero."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from presto_rt.checkpoints import save_folder
from presto_rt.models.codec import Codec, CodecConfig
from presto_rt.models.config import preset
from presto_rt.models.dit import DiT
from presto_rt.pipeline import Pipeline
from presto_rt.runtime.backend import Job, OnStep, Result

CODEC = CodecConfig(
    encoder_width=32,
    encoder_blocks=1,
    decoder_width=32,
    decoder_blocks=1,
    frame_width=16,
    frame_blocks=1,
    griffin_lim=0,
)


def write_tiny_model(folder: Path) -> Path:
    """Write the model of preset "tiny" with a small codec, and return its folder."""
    torch.manual_seed(0)
    dit, codec = DiT(preset("tiny")), Codec(CODEC)
    for p in dit.parameters():
        torch.nn.init.normal_(p, std=0.05)
    config = {
        "model": dit.config.to_dict(),
        "codec": CODEC.to_dict(),
        "defaults": {"steps": 4, "sampler": "heun", "guidance": 2.0},
    }
    save_folder(folder, config, {"dit": dit.state_dict(), "codec": codec.state_dict()})
    return folder


def change_config(folder: Path, **changes: dict[str, Any]) -> None:
    """Update sections of a model's config.json: change_config(folder, defaults={"steps": 5})."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for section, values in changes.items():
        config[section] = {**config.get(section, {}), **values}
    path.write_text(json.dumps(config))


def count_runs(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Return a list that receives every job that the pipeline's backend runs from now on."""
    jobs: list[Job] = []
    original = pipeline.backend.run

    def run(job: Job, on_step: OnStep | None = None) -> Result:
        jobs.append(job)
        return original(job, on_step)

    monkeypatch.setattr(pipeline.backend, "run", run)
    return jobs
