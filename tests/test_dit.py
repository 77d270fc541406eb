"""The diffusion transformer."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from presto_rt.errors import InvalidInputError
from presto_rt.models.config import PRESETS, ModelConfig, preset
from presto_rt.models.dit import Condition, DiT, beat_features, drop_text, rotary_table, rotate


def random_dit(seed: int = 0) -> DiT:
    """A tiny network with every parameter random: at its real initialisation the output is zero."""
    torch.manual_seed(seed)
    model = DiT(preset("tiny")).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return model


def condition(b: int = 2, t: int = 9, length: int = 5) -> Condition:
    mask = torch.ones(b, length, dtype=torch.bool)
    text, pooled = torch.randn(b, length, 384), torch.randn(b, 384)
    return Condition(text, mask, pooled, torch.full((b,), 3.0), torch.randn(b, t, 5), torch.randn(b, 24))


@torch.inference_mode()
def test_every_input_matters() -> None:
    model, c = random_dit(), condition()
    x, s = torch.randn(2, 9, 64), torch.zeros(2)
    base = model(x, s, c)
    changed = [
        model(x + 0.1, s, c),
        model(x, s + 0.3, c),
        model(x, s, model.null(c)),
        model(x, s, replace(c, seconds=c.seconds * 4)),
        model(x, s, replace(c, beat=c.beat * 0)),
        model(x, s, replace(c, key=c.key * 0)),
        model(x, s, replace(c, pooled=c.pooled * 0)),
        model(x, s, replace(c, text=c.text * 0)),
        model(x, s, c, blocks=(0, 2)),
    ]
    assert all((base - other).abs().max() > 1e-4 for other in changed)


@torch.inference_mode()
def test_batch_item_equals_single_and_padding_is_ignored() -> None:
    model, c = random_dit(), condition()
    x, s = torch.randn(2, 9, 64), torch.tensor([-0.3, 0.4])
    both = model(x, s, c._padded(11))
    for i in range(2):
        one = Condition(*(getattr(c, k)[i : i + 1] for k in c.__dataclass_fields__))
        assert torch.allclose(both[i], model(x[i : i + 1], s[i : i + 1], one)[0], atol=1e-5)


def test_training_attention_equals_inference_attention() -> None:
    model, c = random_dit(), condition()._padded(8)
    x, s = torch.randn(2, 9, 64), torch.zeros(2)
    with torch.inference_mode():
        fused = model(x, s, c)
    assert torch.allclose(model(x, s, c), fused, atol=1e-5)


def test_untrained_network_is_zero_and_budget_is_an_input() -> None:
    model, c = DiT(preset("tiny")), condition()
    assert model(torch.randn(2, 9, 64), torch.zeros(2), c).abs().max() == 0
    model = random_dit()
    full, half = (model.condition_vector(torch.zeros(2), c, torch.full((2,), b)) for b in (1.0, 0.5))
    assert (full - half).abs().max() > 1e-3


def test_the_key_is_heard_where_it_is_decided() -> None:
    """At high noise; at low noise the latents tell it themselves, and training it there would only add noise."""
    model, c = DiT(preset("tiny")), condition()
    torch.nn.init.normal_(model.key.weight)

    def heard(sigma: float) -> float:
        c_noise = torch.full((2,), math.log(sigma) / 4)
        with_key, without = (
            model.condition_sum(c_noise, replace(c, key=key), torch.ones(2)) for key in (torch.ones(2, 24), c.key * 0)
        )
        return float((with_key - without).norm())

    assert heard(0.1) < 1e-3 * heard(40.0)
    assert heard(4.0) == pytest.approx(0.5 * heard(4000.0), rel=1e-3)


def test_dropped_text_is_the_null_condition() -> None:
    model, c = random_dit(), condition()
    x, s = torch.randn(2, 9, 64), torch.zeros(2)
    with torch.inference_mode():
        dropped = model(x, s, drop_text(model, c, torch.tensor([True, False])))
        assert torch.allclose(dropped[0], model(x, s, model.null(c))[0], atol=1e-5)
        assert torch.allclose(dropped[1], model(x, s, c)[1], atol=1e-5)


def test_rotary_is_relative_and_fp32() -> None:
    cos, sin = rotary_table(4_000, 64)
    q, k = torch.randn(64), torch.randn(64)

    def score(i: int, j: int) -> float:
        a = rotate(q.view(1, 1, 1, 64), cos[i : i + 1], sin[i : i + 1])
        b = rotate(k.view(1, 1, 1, 64), cos[j : j + 1], sin[j : j + 1])
        return float((a * b).sum())

    assert score(3, 10) == pytest.approx(score(3_900, 3_907), abs=2e-3)
    assert cos.dtype == torch.float32


def test_beat_features() -> None:
    beats = beat_features(100, 0.05, 120.0, beats_per_bar=4, offset=0.025, start=0.0)
    assert beats[0].tolist() == pytest.approx([0, 1, 0, 1, 1], abs=1e-6)  # frame 0 is centred on the first downbeat
    assert beats[10].tolist() == pytest.approx([0, 1, 1, 0, 1], abs=1e-5)  # 0.5 s later: one beat, a quarter of a bar
    later = beat_features(50, 0.05, 120.0, offset=0.025, start=2.5)
    assert torch.allclose(later, beats[50:], atol=1e-5)
    assert beat_features(7, 0.05, None).abs().max() == 0


def test_presets() -> None:
    sizes = {n: sum(p.numel() for p in DiT(c).parameters()) for n, c in PRESETS.items() if n in ("tiny", "nano")}
    assert sizes["nano"] <= 40e6
    assert (PRESETS["small"].blocks, PRESETS["small"].width) == (20, 1024)
    assert (PRESETS["medium"].blocks, PRESETS["medium"].width) == (24, 1536)
    for c in PRESETS.values():
        assert ModelConfig.from_dict(c.to_dict()) == c
    with pytest.raises(InvalidInputError, match="nano"):
        preset("huge")
    with pytest.raises(InvalidInputError, match="wide"):
        ModelConfig.from_dict({"wide": 3})
    with pytest.raises(InvalidInputError, match="multiple"):
        ModelConfig(width=100)
