"""`Model`: a checkpoint's networks, and what the pipeline needs to know about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..conditioning.ports import Conditioner
from ..diffusion.schedule import LayerSchedule
from ..request import Defaults
from ..runtime.backend import Autoencoder, Network
from ..runtime.spec import NetworkSpec
from ..runtime.weights import TransformerWeights


@dataclass
class Model:
    """A model on one device, before or after a backend has packed its networks.

    Args:
        name: for messages and files.
        spec: shape of the network and of its signal.
        conditioner: from prompts to conditioning.
        autoencoder: between samples and latents; its decoder is freed once a backend has packed it.
        network: the raw network in plain torch; None once a backend has packed it.
        transformer: weights for the fused backends, on a device; None for a network that only runs eagerly.
        defaults: sampling settings of the weights.
        schedules: layer schedules that the weights were trained for, by budget.
        quality: measured figures of plans, each {"steps", "layers", "kid"}, for deadlines.
        digest: names the weights.
        folder: name or folder that the model was loaded from.
    """

    name: str
    spec: NetworkSpec
    conditioner: Conditioner
    autoencoder: Autoencoder
    network: Network | None = None
    transformer: Callable[[torch.device], TransformerWeights] | None = None
    defaults: Defaults = field(default_factory=Defaults)
    schedules: Mapping[str, LayerSchedule] = field(default_factory=dict)
    quality: Sequence[Mapping[str, Any]] = ()
    digest: str = ""
    folder: str = ""
