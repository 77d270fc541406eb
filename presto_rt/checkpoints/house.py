"""The house's folders: config.json and safetensors shards -> `Model`, with weights under neutral names."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..conditioning.text_conditioner import TextConditioner
from ..diffusion.schedule import LayerSchedule, parse_layers
from ..errors import InvalidInputError, WeightsError
from ..models.codec import Codec, CodecConfig
from ..models.config import MAX_SECONDS, ModelConfig, preset
from ..models.dit import NORM_EPS, DiT
from ..models.random_weights import SUFFIX, RandomTextEncoder, random_codec, random_dit
from ..models.spectral import LATENT_HOP, SAMPLE_RATE
from ..request import Defaults
from ..runtime.spec import NetworkSpec
from ..runtime.weights import BlockWeights, LinearWeights, TransformerWeights
from .folder import Checkpoint, load_folder
from .model import Model


def network_spec(config: ModelConfig) -> NetworkSpec:
    """Return the shape of a diffusion transformer over the codec's latents."""
    return NetworkSpec(
        width=config.width,
        blocks=config.blocks,
        heads=config.heads,
        head_dim=config.head_dim,
        hidden=config.mlp_ratio * config.width,
        channels=config.latent_channels,
        max_cross_tokens=config.text_tokens,
        prediction_type=config.network,
        sigma_data=config.sigma_data,
        sigma_min=config.sigma_min,
        sigma_max=config.sigma_max,
        rho=config.rho,
        hop=LATENT_HOP,
        sample_rate=SAMPLE_RATE,
        max_seconds=MAX_SECONDS,
        norm_eps=NORM_EPS,
    )


def transformer_weights(dit: DiT, device: torch.device | str = "cpu") -> TransformerWeights:
    """Return a transformer's weights in fp32 on a device, under neutral names."""
    state = {name: value.detach().to(device, torch.float32) for name, value in dit.state_dict().items()}
    # The same formulas as in training: a network without blocks keeps everything that makes the condition vector.
    with torch.device(device):
        head = DiT(replace(dit.config, blocks=0)).eval().requires_grad_(False)
    head.load_state_dict({name: value for name, value in state.items() if not name.startswith("blocks.")})

    def linear(name: str) -> LinearWeights:
        return LinearWeights(state[f"{name}.weight"], state.get(f"{name}.bias"))

    def block(index: int) -> BlockWeights:
        prefix = f"blocks.{index}."
        names = ("qkv", "out", "cross_q", "cross_kv", "cross_out", "up", "down", "modulation")
        norms = ("q_norm", "k_norm", "cross_q_norm", "cross_k_norm")
        layers = {name: linear(prefix + name) for name in names}
        weights = {name: state[f"{prefix}{name}.weight"] for name in norms}
        tensors: dict[str, Any] = {**layers, **weights}
        return BlockWeights(**tensors)

    blocks = tuple(block(index) for index in range(dit.config.blocks))
    local = state["beat.weight"]
    return TransformerWeights(linear("input"), linear("output"), local, linear("modulation"), head.embed, blocks)


def build_model(
    name: str,
    dit: DiT,
    codec: Codec,
    *,
    checkpoint: Checkpoint | None = None,
    device: torch.device | str = "cpu",
    encoder: RandomTextEncoder | None = None,
) -> Model:
    """Return the model of two networks.

    Args:
        name: of the model.
        dit: transformer, fp32.
        codec: fp32.
        checkpoint: gives defaults, schedules, figures and digest; None for none.
        device: where the conditioner computes.
        encoder: text encoder; None for the packaged one.

    Raises:
        InvalidInputError: where schedules are of another depth.
    """
    config = checkpoint.config if checkpoint else {}
    saved = {budget: LayerSchedule.from_json(rows) for budget, rows in config.get("layers", {}).items()}
    depth = dit.config.blocks
    conditioner = TextConditioner(
        dit.null_text,
        dit.null_pooled,
        max_tokens=dit.config.text_tokens,
        hop=LATENT_HOP,
        sample_rate=SAMPLE_RATE,
        encoder=encoder,
        device=device,
    )
    return Model(
        name=name,
        spec=network_spec(dit.config),
        conditioner=conditioner,
        autoencoder=codec.eval().requires_grad_(False),
        network=dit.eval().requires_grad_(False),
        transformer=lambda target: transformer_weights(dit, target),
        defaults=Defaults.from_dict(config.get("defaults", {})),
        schedules={budget: parse_layers(schedule, depth) for budget, schedule in saved.items()},
        quality=config.get("quality", ()),
        digest=checkpoint.digest if checkpoint else "",
    )


def load_model(name: str | os.PathLike[str], device: torch.device | str = "cpu") -> Model:
    """Return a shipped model by name, a folder's model, or a preset with random weights ("small-random").

    The transformer is in fp32; a random one is made on the device. Raises WeightsError and InvalidInputError.
    """
    text = str(name)
    if text.endswith(SUFFIX):
        config = preset(text.removesuffix(SUFFIX))
        checkpoint = Checkpoint({"defaults": {"steps": 4, "sampler": "few_step", "guidance": 1.0}})
        checkpoint.digest = f"random {config.name}"
        encoder = RandomTextEncoder().to(device)
        codec = random_codec()
        return build_model(
            text, random_dit(config, device), codec, checkpoint=checkpoint, device=device, encoder=encoder
        )
    checkpoint = load_folder(name)
    try:
        dit = DiT(ModelConfig.from_dict(checkpoint.config["model"]))
        codec = Codec(CodecConfig.from_dict(checkpoint.config["codec"]))
        load_state(dit, checkpoint, "dit")
        load_state(codec, checkpoint, "codec")
        model = build_model(Path(name).name, dit, codec, checkpoint=checkpoint, device=device)
    except (InvalidInputError, KeyError, RuntimeError) as error:
        raise WeightsError(
            f"the weights of {name} do not fit their configuration: {str(error).splitlines()[0]}"
        ) from error
    model.folder = os.fspath(name)
    return model


def load_state(module: nn.Module, checkpoint: Checkpoint, part: str) -> None:
    """Load a part's tensors into a module, floating-point ones in fp32, and free them."""
    tensors = checkpoint.parts.pop(part)
    module.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in tensors.items()})


def load_codec(where: str | os.PathLike[str]) -> Codec:
    """Return a codec on the CPU, fp32, from a codec trainer's run folder or its final/, a weights folder or a shipped
    model.

    Raises InvalidInputError where there is none of these, WeightsError where its files are damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(where)
    if (folder / "final").is_dir():
        folder = folder / "final"
    if (folder / "codec.safetensors").is_file() and (folder / "config.json").is_file():
        try:
            config, state = json.loads((folder / "config.json").read_text()), load_file(folder / "codec.safetensors")
        except (SafetensorError, ValueError) as error:
            raise WeightsError(f"{folder} is damaged: {error}") from error
    elif folder.is_dir() and not (folder / "config.json").is_file():
        raise InvalidInputError(f"{folder} has no config.json and codec.safetensors: give a codec trainer's run folder")
    else:
        checkpoint = load_folder(where)
        config, state = checkpoint.config["codec"], checkpoint.parts["codec"]
    codec = Codec(CodecConfig.from_dict(config))
    codec.load_state_dict({name: value.float() for name, value in state.items()})
    return codec.eval()
