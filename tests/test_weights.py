"""Weights folders: saving, sharing, verification."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from presto_rt import checkpoints
from presto_rt.checkpoints import cast_matrices, load_folder, save_folder
from presto_rt.errors import InvalidInputError, OutputError, WeightsError
from presto_rt.lab.training.codec import write_codec
from presto_rt.lab.training.pack import pack
from presto_rt.models.codec import Codec
from tests.support.models import CODEC, write_tiny_model


def test_save_folder_divides_into_shards_that_load_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints.folder, "SHARD_BYTES", 1_000)
    state = {f"layer.{i}": torch.randn(10, 20) for i in range(7)} | {"step": torch.tensor(3), "bias": torch.randn(5)}
    save_folder(tmp_path / "m", {"model": {"a": 1}}, {"dit": state, "codec": {"w": torch.ones(2)}})
    loaded = load_folder(tmp_path / "m")
    assert loaded.config["model"] == {"a": 1}
    assert loaded.parts["dit"].keys() == state.keys()
    assert all(torch.equal(loaded.parts["dit"][k], v) for k, v in state.items())
    assert len(list((tmp_path / "m").glob("dit-*.safetensors"))) > 3


def test_cast_matrices_keeps_vectors_exact(tmp_path: Path) -> None:
    state = {"w": torch.randn(4, 4), "b": torch.randn(4)}
    save_folder(tmp_path / "m", {}, {"dit": cast_matrices(state, torch.bfloat16)})
    loaded = load_folder(tmp_path / "m").parts["dit"]
    assert torch.equal(loaded["b"], state["b"])
    assert torch.equal(loaded["w"], state["w"].bfloat16())


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_load_folder_names_a_damaged_shard(tmp_path: Path, damage: str) -> None:
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
        load_folder(folder)


def test_load_folder_rejects_damaged_config_and_unknown_model(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text[:50])
    with pytest.raises(WeightsError, match=r"config\.json"):
        load_folder(folder)
    (folder / "config.json").write_text(json.dumps({**json.loads(text), "format": 99}))
    with pytest.raises(WeightsError, match="format 99"):
        load_folder(folder)
    with pytest.raises(WeightsError, match="shipped models are"):
        load_folder("no-such-model")


def test_save_folder_rejects_unwritable_target(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        save_folder(tmp_path / "file" / "m", {}, {"dit": {"w": torch.ones(1)}})


def test_save_folder_replaces_nothing_but_weights(tmp_path: Path) -> None:
    """A folder of runs or of whole models must survive."""
    music = tmp_path / "music"
    music.mkdir()
    save_folder(music, {}, {"dit": {"w": torch.ones(1)}})  # an empty folder is as good as none
    save_folder(music, {}, {"dit": {"w": torch.zeros(1)}})
    assert load_folder(music).parts["dit"]["w"] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["music"]
    (music / "config.json").write_text("[]")
    with pytest.raises(OutputError, match="would be lost"):
        save_folder(music, {}, {"dit": {"w": torch.ones(1)}})
    with pytest.raises(OutputError, match="would be lost"):
        save_folder(tmp_path, {}, {"dit": {"w": torch.ones(1)}})
    assert len(list(music.iterdir())) == 2
    with pytest.raises(WeightsError, match="damaged"):
        load_folder(music)


def test_save_folder_rejects_sharing_with_itself(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "a")
    with pytest.raises(WeightsError, match="with itself"):
        pack(folder, codec_run=folder, base_run=folder, defaults={}, share_codec=True)
    assert load_folder(folder).parts.keys() == {"dit", "codec"}


def test_pack_rejects_unknown_defaults_and_incomplete_quality(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "a")
    for bad in ({"defaults": {"step": 4}}, {"defaults": []}, {"quality": [{"steps": 4}]}, {"quality": {"steps": 4}}):
        with pytest.raises(InvalidInputError, match=r"(defaults|quality) must be"):
            pack(tmp_path / "b", **{"codec_run": folder, "base_run": folder, "defaults": {}, **bad})
    assert not (tmp_path / "b").exists()
    good = {"defaults": {"steps": 4}, "quality": [{"steps": 4, "layers": "100%", "kid": 0.1}]}
    pack(tmp_path / "b", codec_run=folder, base_run=folder, **good)
    assert load_folder(tmp_path / "b").config["defaults"]["steps"] == 4


def test_pack_accepts_a_codec_run_and_its_final_folder(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "a")
    write_codec(Codec(CODEC), tmp_path / "run" / "final")
    for run in (tmp_path / "run", tmp_path / "run" / "final"):
        pack(tmp_path / "b", codec_run=run, base_run=folder, defaults={})
        assert load_folder(tmp_path / "b").config["codec"] == CODEC.to_dict()


def test_save_folder_shares_a_codec_between_two_models(tmp_path: Path) -> None:
    """The second model holds no copy, is verified by the same hashes, and the pair can be moved together."""
    first = write_tiny_model(tmp_path / "here" / "a")
    own = load_folder(first)
    save_folder(tmp_path / "here" / "b", own.config, {"dit": own.parts["dit"]}, shared={"codec": first})
    assert not list((tmp_path / "here" / "b").glob("codec-*"))
    (tmp_path / "here").rename(tmp_path / "there")
    both = load_folder(tmp_path / "there" / "b")
    assert both.parts.keys() == {"dit", "codec"}
    assert all(torch.equal(both.parts["codec"][k], v) for k, v in own.parts["codec"].items())
    next((tmp_path / "there" / "a").glob("codec-*")).unlink()
    with pytest.raises(WeightsError, match=r"a/codec-.*missing"):
        load_folder(tmp_path / "there" / "b")
    with pytest.raises(WeightsError, match="of its own"):
        save_folder(tmp_path / "c", {}, {}, shared={"codec": tmp_path / "there" / "b"})


def test_pack_copies_a_codec_byte_by_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a model was packed again with its codec, a model that shares this codec still loads."""
    monkeypatch.setattr(checkpoints.folder, "SHARD_BYTES", 1_000)
    first, other = write_tiny_model(tmp_path / "a"), tmp_path / "b"
    pack(other, codec_run=first, base_run=first, defaults={}, share_codec=True)
    pack(tmp_path / "a.again", codec_run=first, base_run=other, defaults={})
    shutil.rmtree(first)
    (tmp_path / "a.again").rename(first)
    assert load_folder(other).parts["codec"].keys() == load_folder(first).parts["codec"].keys()
    pack(tmp_path / "c", codec_run=other, base_run=other, defaults={})  # through the folder that shares it
    assert load_folder(tmp_path / "c").parts["codec"].keys() == load_folder(first).parts["codec"].keys()
