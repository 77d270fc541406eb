"""The diffusion transformer, its condition, rotary positions and beat features."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from presto_rt.conditioning.tempo import beat_features
from presto_rt.errors import InvalidInputError
from presto_rt.models.config import PRESETS, ModelConfig, preset
from presto_rt.models.dit import Condition, DiT, drop_text
from presto_rt.models.rotary import rotary_angles, rotate


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


def padded(c: Condition, length: int) -> Condition:
    """The same condition with token states of noise behind the valid ones."""
    missing = length - c.text.shape[1]
    noise = torch.randn(len(c.text), missing, c.text.shape[2])
    return replace(c, text=torch.cat([c.text, noise], 1), text_mask=F.pad(c.text_mask, (0, missing)))


@torch.inference_mode()
def test_dit_depends_on_every_input() -> None:
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
        model(x, s, c, budget=0.5),
    ]
    assert all((base - other).abs().max() > 1e-4 for other in changed)


@torch.inference_mode()
def test_dit_ignores_padding_and_the_rest_of_the_batch() -> None:
    model, c = random_dit(), condition()
    x, s = torch.randn(2, 9, 64), torch.tensor([-0.3, 0.4])
    both = model(x, s, padded(c, 11))
    for i in range(2):
        one = Condition(*(getattr(c, k)[i : i + 1] for k in c.__dataclass_fields__))
        assert torch.allclose(both[i], model(x[i : i + 1], s[i : i + 1], one)[0], atol=1e-5)


def test_dit_attention_while_training_equals_attention_at_inference() -> None:
    model, c = random_dit(), padded(condition(), 8)
    x, s = torch.randn(2, 9, 64), torch.zeros(2)
    with torch.inference_mode():
        fused = model(x, s, c)
    assert torch.allclose(model(x, s, c), fused, atol=1e-5)


def test_dit_without_training_returns_zero() -> None:
    model, c = DiT(preset("tiny")), condition()
    assert model(torch.randn(2, 9, 64), torch.zeros(2), c).abs().max() == 0


def test_condition_vector_depends_on_the_budget() -> None:
    model, c = random_dit(), condition()
    full, half = (model.condition_vector(torch.zeros(2), c, torch.full((2,), b)) for b in (1.0, 0.5))
    assert (full - half).abs().max() > 1e-3


def test_condition_vector_depends_on_the_key_at_high_noise() -> None:
    """At low noise the latents show the key, and training it there would only add noise."""
    model, c = DiT(preset("tiny")), condition()
    torch.nn.init.normal_(model.key.weight)

    def effect(sigma: float) -> float:
        c_noise = torch.full((2,), math.log(sigma) / 4)
        with_key, without = (
            model.embedding_sum(c_noise, replace(c, key=key).vector(), torch.ones(2))
            for key in (torch.ones(2, 24), c.key * 0)
        )
        return float((with_key - without).detach().norm())

    assert effect(0.1) < 1e-3 * effect(40.0)
    assert effect(4.0) == pytest.approx(0.5 * effect(4000.0), rel=1e-3)


def test_drop_text_gives_the_null_condition() -> None:
    model, c = random_dit(), condition()
    x, s = torch.randn(2, 9, 64), torch.zeros(2)
    with torch.inference_mode():
        dropped = model(x, s, drop_text(model, c, torch.tensor([True, False])))
        assert torch.allclose(dropped[0], model(x, s, model.null(c))[0], atol=1e-5)
        assert torch.allclose(dropped[1], model(x, s, c)[1], atol=1e-5)


@torch.inference_mode()
def test_dit_raw_equals_forward_through_the_ports() -> None:
    """Texts of different lengths, blocks and a budget included; the ports keep every field."""
    model, c = random_dit(), condition()
    c = replace(c, text_mask=torch.arange(5) < torch.tensor([[5], [3]]))
    ports = c.ports()
    assert ports.cross_lengths.tolist() == [5, 3]
    assert torch.equal(ports.cross_mask, c.text_mask)
    back = Condition.from_ports(ports)
    assert all(torch.equal(getattr(back, name), getattr(c, name)) for name in c.__dataclass_fields__)
    x, s = torch.randn(2, 9, 64), torch.tensor([-0.3, 0.4])
    assert torch.equal(model.raw(x, s, ports, (0, 2), 0.5), model(x, s, c, (0, 2), 0.5))
    assert torch.equal(model.raw(x, s, ports, (0, 1, 2), 1.0), model(x, s, c))


@torch.inference_mode()
def test_condition_cat_pads_the_shorter_texts() -> None:
    model, a, b = random_dit(), condition(length=7), condition(length=4)
    x, s = torch.randn(4, 9, 64), torch.zeros(4)
    for first, second in ((a, b), (b, a)):
        both = first.cat(second)
        assert both.text.shape == (4, 7, 384)
        assert both.text_mask.sum(1).tolist() == [first.text.shape[1]] * 2 + [second.text.shape[1]] * 2
        apart = torch.cat([model(x[:2], s[:2], first), model(x[2:], s[2:], second)])
        assert torch.allclose(model(x, s, both), apart, atol=1e-5)


@torch.inference_mode()
def test_reset_budget_embedding_keeps_the_output_at_budget_one() -> None:
    model, c = random_dit(), condition()
    x, s = torch.randn(2, 9, 64), torch.zeros(2)
    full, half = model(x, s, c, budget=1.0), model(x, s, c, budget=0.5)
    assert (full - half).abs().max() > 1e-3
    model.reset_budget_embedding()
    for budget in (1.0, 0.5, 0.25):
        assert torch.allclose(model(x, s, c, budget=budget), full, atol=1e-5)


def test_rotary_positions_are_relative_and_fp32() -> None:
    cos, sin = rotary_angles(4_000, 64)
    q, k = torch.randn(64), torch.randn(64)

    def score(i: int, j: int) -> float:
        a = rotate(q.view(1, 1, 1, 64), cos[i : i + 1], sin[i : i + 1])
        b = rotate(k.view(1, 1, 1, 64), cos[j : j + 1], sin[j : j + 1])
        return float((a * b).sum())

    assert score(3, 10) == pytest.approx(score(3_900, 3_907), abs=2e-3)
    assert cos.dtype == torch.float32


def test_beat_features_follow_beat_and_bar() -> None:
    beats = beat_features(100, 0.05, 120.0, beats_per_bar=4, offset=0.025, start=0.0)
    assert beats[0].tolist() == pytest.approx([0, 1, 0, 1, 1], abs=1e-6)  # frame 0 is centered on the first downbeat
    assert beats[10].tolist() == pytest.approx([0, 1, 1, 0, 1], abs=1e-5)  # 0.5 s later: one beat, a quarter of a bar
    later = beat_features(50, 0.05, 120.0, offset=0.025, start=2.5)
    assert torch.allclose(later, beats[50:], atol=1e-5)
    assert beat_features(7, 0.05, None).abs().max() == 0


def test_presets_have_their_sizes_and_survive_json() -> None:
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
