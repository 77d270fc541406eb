"""The text encoder over fused operators: `text.TextEncoder` once more, as it runs.

A post-norm layer adds to what was normalised, so `residual_mix_norm` keeps its result in fp32 as well. Queries, keys
and values are one product. A prompt has few tokens: reading the weights is what takes the time, and bf16 halves it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..conditioning.minilm import EPS, BertLayer, TextEncoder
from .codec import Linear, NetworkOps, _norm, pack_linear
from .cpu.threads import thread_limit
from .memory import Arena, Buffer
from .pool import Pool

EMBED, QKV, ATTEND, OUT, NORM1, UP, DOWN, NORM2 = range(8)


@dataclass(frozen=True)
class TextLayer:
    """One layer's weights."""

    qkv: Linear
    out: Linear
    up: Linear
    down: Linear
    attention_norm: tuple[Tensor, Tensor]
    mlp_norm: tuple[Tensor, Tensor]


class TextEngine:
    """A text encoder ready to run: called like `TextEncoder.forward`. Any number of threads may call it."""

    def __init__(self, encoder: TextEncoder, ops: NetworkOps, threads: int | None = None) -> None:
        self.ops, self.encoder = ops, encoder
        self.threads = torch.get_num_threads() if threads is None else threads
        self.heads, self.width = encoder.layers[0].heads, encoder.embedding_norm.weight.shape[0]
        self.hidden = encoder.layers[0].up.out_features
        self.layers = [self._layer(layer) for layer in encoder.layers]
        self.norm = _norm(encoder.embedding_norm)
        self.pool = Pool()

    def _layer(self, layer: BertLayer) -> TextLayer:
        projections = (layer.query, layer.key, layer.value)
        weights, biases = ([getattr(x, name).detach() for x in projections] for name in ("weight", "bias"))
        qkv = self.ops.pack(torch.cat(weights).float(), torch.cat(biases).float())
        rest = (pack_linear(self.ops, x) for x in (layer.output, layer.up, layer.down))
        return TextLayer(qkv, *rest, _norm(layer.attention_norm), _norm(layer.mlp_norm))

    def buffers(self, batch: int, tokens: int) -> list[Buffer]:
        """Everything that a pass writes, with the time that it is alive."""
        dtype, shape, always = self.ops.dtype, (batch, tokens, self.width), ((EMBED, NORM2),)
        out = [
            Buffer("residual", shape, torch.float32, always),
            Buffer("normed", shape, dtype, ((EMBED, QKV), (NORM1, UP), (NORM2, NORM2))),
            Buffer("attended", shape, dtype, ((ATTEND, OUT),)),
        ]
        scratch = self.ops.scratch_bytes(batch, self.heads, tokens, self.width // self.heads)
        if scratch:
            out.append(Buffer("scratch", (scratch,), torch.uint8, ((ATTEND, ATTEND),)))
        if not self.ops.allocates_matmul_output:
            out += [
                Buffer("qkv", (batch, tokens, 3 * self.width), dtype, ((QKV, ATTEND),)),
                Buffer("branch", shape, dtype, ((OUT, NORM1), (DOWN, NORM2))),
                Buffer("hidden", (batch, tokens, self.hidden), dtype, ((UP, DOWN),)),
            ]
        return out

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids (B, L) int64, mask (B, L) bool, real tokens first. Returns token states (B, L, width) fp32."""
        listed = lambda: self.buffers(*ids.shape)  # noqa: E731
        with torch.inference_mode(), thread_limit(self.threads), self.pool.arena(tuple(ids.shape), listed) as arena:
            return self._run(arena, ids, mask).clone()

    def _run(self, arena: Arena, ids: Tensor, mask: Tensor) -> Tensor:
        ops, e = self.ops, self.encoder
        place = {name: arena.tensor(name) for name in arena.buffers}
        residual, normed, attended = place["residual"], place["normed"], place["attended"]
        branch = place.get("branch")
        lengths = mask.sum(1, dtype=torch.int32)
        embedded = e.token_embedding(ids) + e.position_embedding.weight[: ids.shape[1]] + e.type_embedding.weight[0]
        ops.residual_mix_norm(embedded, None, None, self.norm, residual, normed, EPS, after=True)
        for layer in self.layers:
            qkv = ops.linear(normed, layer.qkv, place.get("qkv"))
            q, k, v = qkv.chunk(3, -1)
            k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (k, v))
            ops.cross_attention(q, k, v, None, lengths, place.get("scratch"), attended)
            y = ops.linear(attended, layer.out, branch)
            ops.residual_mix_norm(residual, y, None, layer.attention_norm, residual, normed, EPS, after=True)
            hidden = ops.linear(normed, layer.up, place.get("hidden"), "gelu")
            y = ops.linear(hidden, layer.down, branch)
            ops.residual_mix_norm(residual, y, None, layer.mlp_norm, residual, normed, EPS, after=True)
        return residual
