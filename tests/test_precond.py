"""Preconditioners: three prediction types, one denoiser."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from presto_rt.diffusion.precond import coefficients, loss_weight, precondition, sigma_of
from presto_rt.errors import InvalidInputError

SD = 0.5


def truth(x: Tensor, sigma: Tensor) -> Tensor:
    """Posterior mean of x_0 ~ N(0.3, 0.4^2): a denoiser that is no multiple of x."""
    s = sigma[:, None, None]
    return (0.3 * s**2 + x * 0.4**2) / (s**2 + 0.4**2)


def edm_network(z: Tensor, c_noise: Tensor) -> Tensor:
    """F of the EDM table (Karras et al. 2022) that makes D equal to `truth`, written from the paper's formulas."""
    s = (4 * c_noise).exp()[:, None, None]
    x = z * (s**2 + SD**2).sqrt()
    return (truth(x, s[:, 0, 0]) - SD**2 / (s**2 + SD**2) * x) * (s**2 + SD**2).sqrt() / (s * SD)


def v_network(z: Tensor, time: Tensor) -> Tensor:
    """v = cos(t) n - sin(t) x_0 / sd at the posterior mean; z is a unit-variance variance-preserving sample."""
    t = (time * torch.pi / 2)[:, None, None]
    x = z * SD / t.cos()
    x0 = truth(x, SD * t[:, 0, 0].tan())
    n = (z - t.cos() * x0 / SD) / t.sin()
    return t.cos() * n - t.sin() * x0 / SD


def rf_network(z: Tensor, time: Tensor) -> Tensor:
    """u = n - x_0 at the posterior mean; z = (1 - t) x_0 + t n."""
    t = time[:, None, None]
    x0 = truth(z / (1 - t), (t / (1 - t))[:, 0, 0])
    return (z - (1 - t) * x0) / t - x0


@pytest.mark.parametrize(("kind", "network"), [("edm", edm_network), ("v", v_network), ("rf", rf_network)])
def test_precondition_gives_the_same_denoiser_for_every_prediction_type(kind: str, network: object) -> None:
    x = torch.randn(7, 5, 3, dtype=torch.float64)
    sigma = torch.tensor([0.002, 0.05, 0.3, 0.5, 1.0, 8.0, 80.0], dtype=torch.float64)
    x = x * (SD**2 + sigma**2).sqrt()[:, None, None]
    got = precondition(network, x, sigma, kind=kind, sigma_data=SD)
    assert (got - truth(x, sigma)).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["edm", "v"])
def test_coefficients_give_unit_variance_in_and_out(kind: str) -> None:
    sigma = torch.logspace(-3, 2, 20, dtype=torch.float64)
    c_skip, c_out, c_in, _ = coefficients(sigma, kind, SD)
    assert torch.allclose(c_in**2 * (sigma**2 + SD**2), torch.ones_like(sigma))
    # effective target (x_0 - c_skip x) / c_out has unit variance
    target = ((1 - c_skip) ** 2 * SD**2 + c_skip**2 * sigma**2) / c_out**2
    assert torch.allclose(target, torch.ones_like(sigma))
    assert torch.allclose(loss_weight(sigma, SD) * c_out**2, torch.ones_like(sigma))


@pytest.mark.parametrize("kind", ["edm", "v", "rf"])
def test_sigma_of_inverts_the_time_input(kind: str) -> None:
    sigma = torch.logspace(-2.7, 1.9, 20, dtype=torch.float64)
    assert torch.allclose(sigma_of(coefficients(sigma, kind, SD)[3], kind, SD), sigma)


def test_coefficients_reject_an_unknown_prediction_type() -> None:
    with pytest.raises(InvalidInputError, match="rf"):
        coefficients(torch.ones(1), "x0", SD)
