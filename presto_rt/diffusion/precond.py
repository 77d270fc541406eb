"""Preconditioners: one denoiser D(x; sigma) = E[x_0 | x_0 + sigma n = x], whatever kind of network is inside.

EDM (Karras et al. 2022, table 1):

    D = c_skip x + c_out F(c_in x; c_noise)        c_noise = ln(sigma) / 4
    c_skip = sd^2 / (s^2 + sd^2)   c_out = s sd / sqrt(s^2 + sd^2)   c_in = 1 / sqrt(s^2 + sd^2)

v-prediction (Salimans & Ho 2022) on data scaled to unit variance, z = cos(t) x_0/sd + sin(t) n, tan(t) = s/sd:
the network sees z and predicts v = cos(t) n - sin(t) x_0/sd, hence x_0/sd = cos(t) z - sin(t) v. This is EDM's
table with the sign of F turned around.

Rectified flow (Liu et al. 2023), z = (1 - t) x_0 + t n with t = s / (1 + s), z = x / (1 + s): the network predicts
u = n - x_0, hence x_0 = z - t u.

The time that each network is given: ln(sigma)/4 for "edm", 2 t / pi for "v" (0 clean, 1 noise), t for "rf".
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import InvalidInputError

#: coefficients of D = c_skip x + c_out F(c_in x; time), each shaped like sigma
Coefficients = tuple[Tensor, Tensor, Tensor, Tensor]


def coefficients(sigma: Tensor, network: str, sigma_data: float) -> Coefficients:
    """Return (c_skip, c_out, c_in, time) of noise levels `sigma` (any shape, fp32 or fp64)."""
    s, sd = sigma, sigma_data
    if network == "edm":
        total = (s**2 + sd**2).sqrt()
        return sd**2 / total**2, s * sd / total, 1 / total, s.log() / 4
    if network == "v":
        total = (s**2 + sd**2).sqrt()
        return sd**2 / total**2, -s * sd / total, 1 / total, torch.atan2(s, torch.full_like(s, sd)) * (2 / math.pi)
    if network == "rf":
        t = s / (1 + s)
        return 1 - t, -t, 1 - t, t
    raise InvalidInputError(f'unknown network kind {network!r}; there are "edm", "v" and "rf"')


def sigma_of(time: Tensor, network: str, sigma_data: float) -> Tensor:
    """Return the noise level of a time input: the inverse of `coefficients`."""
    if network == "edm":
        return (4 * time).exp()
    if network == "v":
        return sigma_data * torch.tan(time * (math.pi / 2))
    return time / (1 - time)


def precondition(
    network: Callable[..., Tensor], x: Tensor, sigma: Tensor, *args: object, kind: str, sigma_data: float
) -> Tensor:
    """Return the denoiser D(x; sigma, *args), combined in x's dtype.

    Args:
        network: the raw network, called with (c_in x, time, *args).
        x: (B, T, C), fp32 in practice.
        sigma: (B,) noise levels.
        args: further arguments of the network.
        kind: prediction type of the network.
        sigma_data: standard deviation of the data.
    """
    c_skip, c_out, c_in, time = coefficients(sigma, kind, sigma_data)
    column = (-1,) + (1,) * (x.dim() - 1)
    raw = network(c_in.view(column) * x, time, *args)
    return c_skip.view(column) * x + c_out.view(column) * raw.to(x.dtype)


def loss_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """lambda(sigma) = (s^2 + sd^2) / (s sd)^2: makes the loss of an untrained EDM network 1 at every level."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
