"""Weights folders: whole or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from presto_rt.checkpoints import folder as weights
from presto_rt.errors import InvalidInputError, OutputError, WeightsError
from presto_rt.lab.training.codec import write_codec
from presto_rt.lab.training.pack import pack
from presto_rt.models.codec import Codec
from tests.support.models import CODEC, write_tiny_model


def test_round_trip_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "SHARD_BYTES", 1_000)
    state = {f"layer.{i}": torch.randn(10, 20) for i in range(7)} | {"step": torch.tensor(3), "bias": torch.randn(5)}
    weights.save(tmp_path / "m", {"model": {"a": 1}}, {"dit": state, "codec": {"w": torch.ones(2)}})
    loaded = weights.load(tmp_path / "m")
    assert loaded.config["model"] == {"a": 1}
    assert loaded.parts["dit"].keys() == state.keys()
    assert all(torch.equal(loaded.parts["dit"][k], v) for k, v in state.items())
    assert len(list((tmp_path / "m").glob("dit-*.safetensors"))) > 3


def test_narrow_storage_keeps_vectors_exact(tmp_path: Path) -> None:
    state = {"w": torch.randn(4, 4), "b": torch.randn(4)}
    weights.save(tmp_path / "m", {}, {"dit": weights.narrow(state, torch.bfloat16)})
    loaded = weights.load(tmp_path / "m").parts["dit"]
    assert torch.equal(loaded["b"], state["b"])
    assert torch.equal(loaded["w"], state["w"].bfloat16())


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damaged_shard_is_named(tmp_path: Path, damage: str) -> None:
    folder = write_tiny_model(tmp_path / "m")
    victim = sorted(folder.glob("dit-*.safetensors"))[0]
    data = bytearray(victim.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    elif damage == "truncate":
        victim.write_bytes(data[:-100])
    else:
        victim.unlink()
    with pytest.raises(WeightsError, match=victim.name):
        weights.load(folder)


def test_damaged_config_and_unknown_model(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text[:50])
    with pytest.raises(WeightsError, match=r"config\.json"):
        weights.load(folder)
    (folder / "config.json").write_text(json.dumps({**json.loads(text), "format": 99}))
    with pytest.raises(WeightsError, match="format 99"):
        weights.load(folder)
    with pytest.raises(WeightsError, match="shipped models are"):
        weights.load("no-such-model")


def test_unwritable_target(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        weights.save(tmp_path / "file" / "m", {}, {"dit": {"w": torch.ones(1)}})


def test_only_weights_are_replaced(tmp_path: Path) -> None:
    """A folder of anything else, runs or whole models in it, would be gone."""
    music = tmp_path / "music"
    music.mkdir()
    weights.save(music, {}, {"dit": {"w": torch.ones(1)}})  # an empty folder is as good as none
    weights.save(music, {}, {"dit": {"w": torch.zeros(1)}})
    assert weights.load(music).parts["dit"]["w"] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["music"]
    (music / "config.json").write_text("[]")
    with pytest.raises(OutputError, match="would be lost"):
        weights.save(music, {}, {"dit": {"w": torch.ones(1)}})
    with pytest.raises(OutputError, match="would be lost"):
        weights.save(tmp_path, {}, {"dit": {"w": torch.ones(1)}})
    assert len(list(music.iterdir())) == 2
    with pytest.raises(WeightsError, match="damaged"):
        weights.load(music)


def test_a_model_does_not_share_with_itself(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "a")
    with pytest.raises(WeightsError, match="with itself"):
        pack(folder, codec_run=folder, base_run=folder, defaults={}, share_codec=True)
    assert weights.load(folder).parts.keys() == {"dit", "codec"}


def test_defaults_and_figures_that_nobody_would_read_are_refused(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "a")
    for bad in ({"defaults": {"step": 4}}, {"defaults": []}, {"quality": [{"steps": 4}]}, {"quality": {"steps": 4}}):
        with pytest.raises(InvalidInputError, match=r"(defaults|quality) must be"):
            pack(tmp_path / "b", **{"codec_run": folder, "base_run": folder, "defaults": {}, **bad})
    assert not (tmp_path / "b").exists()
    good = {"defaults": {"steps": 4}, "quality": [{"steps": 4, "layers": "100%", "kid": 0.1}]}
    pack(tmp_path / "b", codec_run=folder, base_run=folder, **good)
    assert weights.load(tmp_path / "b").config["defaults"]["steps"] == 4


def test_a_codec_is_packed_from_its_run_and_from_the_final_folder_in_it(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "a")
    write_codec(Codec(CODEC), tmp_path / "run" / "final")
    for run in (tmp_path / "run", tmp_path / "run" / "final"):
        pack(tmp_path / "b", codec_run=run, base_run=folder, defaults={})
        assert weights.load(tmp_path / "b").config["codec"] == CODEC.to_dict()


def test_two_models_share_a_codec(tmp_path: Path) -> None:
    """The second holds no copy, is checked against the same hashes, and the pair can be moved together."""
    first = write_tiny_model(tmp_path / "here" / "a")
    own = weights.load(first)
    weights.save(tmp_path / "here" / "b", own.config, {"dit": own.parts["dit"]}, shared={"codec": first})
    assert not list((tmp_path / "here" / "b").glob("codec-*"))
    (tmp_path / "here").rename(tmp_path / "there")
    both = weights.load(tmp_path / "there" / "b")
    assert both.parts.keys() == {"dit", "codec"}
    assert all(torch.equal(both.parts["codec"][k], v) for k, v in own.parts["codec"].items())
    next((tmp_path / "there" / "a").glob("codec-*")).unlink()
    with pytest.raises(WeightsError, match=r"a/codec-.*missing"):
        weights.load(tmp_path / "there" / "b")
    with pytest.raises(WeightsError, match="of its own"):
        weights.save(tmp_path / "c", {}, {}, shared={"codec": tmp_path / "there" / "b"})


def test_a_taken_codec_keeps_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing a model again, codec and all, leaves what shares the codec with it whole."""
    monkeypatch.setattr(weights, "SHARD_BYTES", 1_000)
    first, other = write_tiny_model(tmp_path / "a"), tmp_path / "b"
    pack(other, codec_run=first, base_run=first, defaults={}, share_codec=True)
    pack(tmp_path / "a.again", codec_run=first, base_run=other, defaults={})
    shutil.rmtree(first)
    (tmp_path / "a.again").rename(first)
    assert weights.load(other).parts["codec"].keys() == weights.load(first).parts["codec"].keys()
    pack(tmp_path / "c", codec_run=other, base_run=other, defaults={})  # through the folder that shares it
    assert weights.load(tmp_path / "c").parts["codec"].keys() == weights.load(first).parts["codec"].keys()
