"""BERT (Devlin et al. 2019) in plain torch: a post-norm transformer over token, position and type embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-12  # of every layer norm


class BertLayer(nn.Module):
    """A post-norm transformer layer (Devlin et al. 2019)."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width, eps=EPS), nn.LayerNorm(width, eps=EPS)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return the states after the layer; x (B, L, width), mask (B, 1, 1, L) bool, True for real tokens."""
        projections = (self.query, self.key, self.value)
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in projections)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x = self.attention_norm(x + self.output(attended))
        x = self.mlp_norm(x + self.down(F.gelu(self.up(x))))
        return x


class BertEncoder(nn.Module):
    """Token ids to token states.

    Args:
        vocabulary: number of token ids.
        max_positions: longest sequence.
        token_types: number of token types; the first is used.
        width: channels of a state.
        heads: attention heads.
        layers: number of layers.
        hidden: hidden width of the MLPs.
    """

    def __init__(
        self,
        vocabulary: int,
        max_positions: int,
        token_types: int,
        *,
        width: int,
        heads: int,
        layers: int,
        hidden: int,
    ) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(max_positions, width)
        self.type_embedding = nn.Embedding(token_types, width)
        self.embedding_norm = nn.LayerNorm(width, eps=EPS)
        self.layers = nn.ModuleList(BertLayer(width, heads, hidden) for _ in range(layers))

    def embed(self, ids: Tensor) -> Tensor:
        """Return the sum of the three embeddings, before its norm, (B, L, width), for token ids (B, L) int64."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        embedded: Tensor = (
            self.token_embedding(ids) + self.position_embedding(positions) + self.type_embedding.weight[0]
        )
        return embedded

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return token states (B, L, width) for token ids (B, L) int64 and their mask (B, L) bool."""
        x: Tensor = self.embedding_norm(self.embed(ids))
        for layer in self.layers:
            x = layer(x, mask[:, None, None])
        return x
