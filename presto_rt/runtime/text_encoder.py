"""Inference implementation of the text encoder over fused operators and preallocated buffers.

A post-norm layer adds to what was normalized, so `mix_norm` keeps its result in fp32 as well. Queries, keys and
values are one product. A prompt has few tokens: reading the weights takes most of the time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..conditioning.bert import EPS, BertEncoder, BertLayer
from .codec import layer_norm_weights, pack_linear
from .memory import Arena, Buffer, Pool
from .ops import Ops, PackedLinear

EMBED, QKV, ATTEND, OUT, NORM1, UP, DOWN, NORM2 = range(8)


@dataclass(frozen=True)
class PackedTextLayer:
    """One layer's weights, packed for a table of operators."""

    qkv: PackedLinear
    out: PackedLinear
    up: PackedLinear
    down: PackedLinear
    attention_norm: tuple[Tensor, Tensor]
    mlp_norm: tuple[Tensor, Tensor]


class TextProgram:
    """A text encoder, ready to run; called like `BertEncoder.forward`. Any number of threads may call it."""

    def __init__(self, encoder: BertEncoder, ops: Ops) -> None:
        self.ops, self.encoder = ops, encoder
        layers = [layer for layer in encoder.layers if isinstance(layer, BertLayer)]
        self.heads, self.width = layers[0].heads, encoder.embedding_norm.weight.shape[0]
        self.hidden = layers[0].up.out_features
        self.layers = [self._layer(layer) for layer in layers]
        self.norm = layer_norm_weights(encoder.embedding_norm, ops.device)
        self.pool: Pool[Arena] = Pool()

    def _layer(self, layer: BertLayer) -> PackedTextLayer:
        projections = (layer.query, layer.key, layer.value)
        weights, biases = ([getattr(x, name).detach() for x in projections] for name in ("weight", "bias"))
        qkv = self.ops.pack(torch.cat(weights).float(), torch.cat(biases).float())
        out, up, down = (pack_linear(self.ops, x) for x in (layer.output, layer.up, layer.down))
        norms = (layer_norm_weights(norm, self.ops.device) for norm in (layer.attention_norm, layer.mlp_norm))
        return PackedTextLayer(qkv, out, up, down, *norms)

    def buffers(self, batch: int, tokens: int) -> list[Buffer]:
        """Return every buffer that a pass writes, with its life time."""
        dtype, shape = self.ops.dtype, (batch, tokens, self.width)
        listed = [
            Buffer("residual", shape, torch.float32, ((EMBED, NORM2),)),
            Buffer("normed", shape, dtype, ((EMBED, QKV), (NORM1, UP), (NORM2, NORM2))),
            Buffer("attended", shape, dtype, ((ATTEND, OUT),)),
        ]
        scratch = self.ops.scratch_bytes(batch, self.heads, tokens, self.width // self.heads)
        if scratch:
            listed.append(Buffer("scratch", (scratch,), torch.uint8, ((ATTEND, ATTEND),)))
        if not self.ops.capabilities.allocates_matmul_output:
            listed += [
                Buffer("qkv", (batch, tokens, 3 * self.width), dtype, ((QKV, ATTEND),)),
                Buffer("branch", shape, dtype, ((OUT, NORM1), (DOWN, NORM2))),
                Buffer("hidden", (batch, tokens, self.hidden), dtype, ((UP, DOWN),)),
            ]
        return listed

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return token states (B, L, width) fp32 of ids (B, L) int64, mask (B, L) bool, valid tokens first."""
        batch, tokens = ids.shape
        create = lambda: Arena(self.buffers(batch, tokens), self.ops.device)  # noqa: E731
        with torch.inference_mode(), self.pool.take((batch, tokens), create) as arena:
            return self._run(arena, ids, mask).clone()

    def _run(self, arena: Arena, ids: Tensor, mask: Tensor) -> Tensor:
        ops = self.ops
        residual, normed, attended = (arena.tensor(name) for name in ("residual", "normed", "attended"))
        branch, scratch = arena.find("branch"), arena.find("scratch")
        lengths = mask.sum(1, dtype=torch.int32)
        ops.mix_norm(self.encoder.embed(ids), None, None, self.norm, residual, normed, EPS, after=True)
        for layer in self.layers:
            qkv = ops.linear(normed, layer.qkv, arena.find("qkv"))
            q, k, v = qkv.chunk(3, -1)
            k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (k, v))
            ops.cross_attention(q, k, v, None, lengths, scratch, attended)
            y = ops.linear(attended, layer.out, branch)
            ops.mix_norm(residual, y, None, layer.attention_norm, residual, normed, EPS, after=True)
            hidden = ops.linear(normed, layer.up, arena.find("hidden"), "gelu")
            y = ops.linear(hidden, layer.down, branch)
            ops.mix_norm(residual, y, None, layer.mlp_norm, residual, normed, EPS, after=True)
        return residual
