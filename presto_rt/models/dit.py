"""Diffusion transformer over latent frames: the plain definition, which also trains.

One block (Peebles & Xie 2023, AdaLN-zero, with cross-attention to text):

    x = x + gate_a * SelfAttention(norm(x) * (1 + scale_a) + shift_a)      QK-norm, rotary positions in fp32
    x = x + CrossAttention(norm(x), text states)
    x = x + gate_m * MLP(norm(x) * (1 + scale_m) + shift_m)

(shift, scale, gate) come from one vector per clip: noise level + pooled text + clip length + key + layer budget. Blocks
are skipped by leaving them out of `blocks`; the network is also conditioned on the share of blocks that run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..conditioning.keys import KEY_CHANNELS
from ..conditioning.ports import Conditioning
from ..conditioning.tempo import BEAT_CHANNELS
from ..conditioning.text_conditioner import VectorFields, pack_vector, unpack_vector
from ..diffusion.precond import sigma_of
from ..errors import InvalidInputError
from .config import ModelConfig
from .rotary import rotary_angles, rotate

KEY_SIGMA = 4.0  # the key is decided at higher noise; below, the latents themselves show it
NORM_EPS = 1e-6  # of layer norms and of the RMS norms of queries and keys


@dataclass
class Condition:
    """Conditioning of B clips under the names that training uses; `ports` has the runtime's form.

    Args:
        text: (B, L, text_dim) token states.
        text_mask: (B, L) bool, True for valid tokens.
        pooled: (B, text_dim) mean token state.
        seconds: (B,) clip length.
        beat: (B, T, 5) beat-phase features (`conditioning.tempo`), zeros without a tempo.
        key: (B, 24) key features (`conditioning.keys`), zeros without a key.
    """

    text: Tensor
    text_mask: Tensor
    pooled: Tensor
    seconds: Tensor
    beat: Tensor
    key: Tensor

    @classmethod
    def from_ports(cls, ports: Conditioning) -> Condition:
        """Return the named fields of a conditioning by ports."""
        vector = unpack_vector(ports.vector)
        return cls(ports.cross, ports.cross_mask, vector.pooled, vector.seconds, ports.local, vector.key)

    def ports(self) -> Conditioning:
        """Return the conditioning by ports. Raises InvalidInputError if valid tokens do not come first."""
        lengths = self.text_mask.sum(1, dtype=torch.int32)
        ports = Conditioning(self.text, lengths, self.vector(), self.beat)
        if not torch.equal(ports.cross_mask, self.text_mask.bool()):
            raise InvalidInputError("text_mask has holes: the valid tokens of each clip must come first")
        return ports

    def vector(self) -> Tensor:
        """Return the vector port (B, text_dim + 25)."""
        return pack_vector(VectorFields(self.pooled, self.seconds, self.key))

    def take(self, index: Tensor) -> Condition:
        """Return the clips at `index`."""
        return Condition(*(getattr(self, f.name)[index] for f in fields(self)))

    def cat(self, other: Condition) -> Condition:
        """Stack two batches of equal T; shorter texts are padded."""
        length = max(self.text.shape[1], other.text.shape[1])
        first, second = self._padded(length), other._padded(length)
        return Condition(*(torch.cat([getattr(first, f.name), getattr(second, f.name)]) for f in fields(self)))

    def _padded(self, length: int) -> Condition:
        missing = length - self.text.shape[1]
        if not missing:
            return self
        mask = F.pad(self.text_mask, (0, missing), value=False)
        return replace(self, text=F.pad(self.text, (0, 0, 0, missing)), text_mask=mask)

    def to(self, device: torch.device | str) -> Condition:
        """Return the same condition on another device."""
        return Condition(*(getattr(self, f.name).to(device) for f in fields(self)))


def fourier(x: Tensor, dim: int, max_period: float = 1000.0) -> Tensor:
    """Sinusoidal features (B, dim) of scalars (B,), in fp32."""
    frequencies = torch.exp(-math.log(max_period) * torch.arange(dim // 2, device=x.device) / (dim // 2))
    angles = x.float()[:, None] * frequencies * 100.0
    return torch.cat([angles.cos(), angles.sin()], -1)


class QKNorm(nn.Module):
    """RMS norm over the head dimension in fp32, with a weight per channel."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), NORM_EPS)


class Block(nn.Module):
    """Self-attention and MLP, modulated by the condition, with cross-attention to the text between them."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        d = c.width
        self.heads, self.head_dim = c.heads, c.head_dim
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.q_norm, self.k_norm = QKNorm(c.head_dim), QKNorm(c.head_dim)
        self.out = nn.Linear(d, d)
        self.cross_q = nn.Linear(d, d, bias=False)
        self.cross_kv = nn.Linear(c.text_dim, 2 * d, bias=False)
        self.cross_q_norm, self.cross_k_norm = QKNorm(c.head_dim), QKNorm(c.head_dim)
        self.cross_out = nn.Linear(d, d)
        self.up = nn.Linear(d, c.mlp_ratio * d)
        self.down = nn.Linear(c.mlp_ratio * d, d)
        self.modulation = nn.Linear(d, 6 * d)
        for layer in (self.modulation, self.cross_out):  # AdaLN-zero: an untrained block is the identity
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, cond: Tensor, text: Tensor, text_mask: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(cond)[:, None].chunk(6, -1)
        x = x + gate_a * self.attention(norm(x) * (1 + scale_a) + shift_a, rope)
        x = x + self.cross_attention(norm(x), text, text_mask)
        h = norm(x) * (1 + scale_m) + shift_m
        result: Tensor = x + gate_m * self.down(F.gelu(self.up(h), approximate="tanh"))
        return result

    def split(self, x: Tensor) -> Tensor:
        result: Tensor = x.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        return result

    def attention(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = (self.split(t) for t in self.qkv(x).chunk(3, -1))
        q, k = rotate(self.q_norm(q), *rope), rotate(self.k_norm(k), *rope)
        result: Tensor = self.out(attend(q.to(v.dtype), k.to(v.dtype), v).transpose(1, 2).flatten(2))
        return result

    def cross_attention(self, x: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        q = self.cross_q_norm(self.split(self.cross_q(x)))
        k, v = (self.split(t) for t in self.cross_kv(text).chunk(2, -1))
        y = attend(q.to(v.dtype), self.cross_k_norm(k).to(v.dtype), v, text_mask[:, None, None])
        result: Tensor = self.cross_out(y.transpose(1, 2).flatten(2))
        return result


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v on (B, H, T, D); mask: bool, True where a key may be seen.

    While training on a CPU it is written out: there the backward pass of torch's fused attention takes 2 to 6 times
    as long as these three products (128 to 689 tokens).
    """
    if q.device.type != "cpu" or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e4)
    result: Tensor = scores.softmax(-1).to(v.dtype) @ v
    return result


def norm(x: Tensor) -> Tensor:
    """Layer norm over the last axis without weights; the modulation that follows supplies them."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


class DiT(nn.Module):
    """Raw network F(c_in x; c_noise, condition); `diffusion.precond` turns it into the denoiser D(x; sigma)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d = config.width
        self.config = config
        self.input = nn.Linear(config.latent_channels, d)
        self.beat = nn.Linear(BEAT_CHANNELS, d, bias=False)
        self.noise = nn.Sequential(nn.Linear(256, d), nn.SiLU(), nn.Linear(d, d))
        self.length = nn.Linear(256, d)
        self.budget = nn.Linear(256, d)
        self.pooled = nn.Linear(config.text_dim, d)
        self.key = nn.Linear(KEY_CHANNELS, d, bias=False)
        self.null_text = nn.Parameter(torch.zeros(1, 1, config.text_dim))
        self.null_pooled = nn.Parameter(torch.zeros(1, config.text_dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.modulation = nn.Linear(d, 2 * d)
        self.output = nn.Linear(d, config.latent_channels)
        for layer in (self.modulation, self.output, self.budget):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.key.weight)
        nn.init.normal_(self.null_text, std=0.02)

    def condition_vector(self, c_noise: Tensor, condition: Condition, budget: Tensor) -> Tensor:
        """Return the (B, width) input of every modulation row. budget: (B,) share of the blocks that run."""
        return self.embed(c_noise, condition.vector(), budget)

    def embed(self, c_noise: Tensor, vector: Tensor, budget: Tensor) -> Tensor:
        """Return `condition_vector` from the vector port (B, text_dim + 25)."""
        return F.silu(self.embedding_sum(c_noise, vector, budget))

    def embedding_sum(self, c_noise: Tensor, vector: Tensor, budget: Tensor) -> Tensor:
        """Return `embed` before its SiLU: the sum of one embedding for each input."""
        dtype = self.length.weight.dtype
        pooled, seconds, key = unpack_vector(vector)
        total = self.noise(fourier(c_noise, 256).to(dtype))
        total = total + self.length(fourier(seconds.clamp_min(0.1).log() / 5, 256).to(dtype))
        total = total + self.budget(fourier(budget, 256).to(dtype))
        # Gated to high noise; low-noise gradients would otherwise dominate this input's training.
        sigma = sigma_of(c_noise.float(), self.config.network, self.config.sigma_data)
        gate = (1 / (1 + (KEY_SIGMA / sigma) ** 2))[:, None]
        result: Tensor = total + self.pooled(pooled.to(dtype)) + self.key((gate * key).to(dtype))
        return result

    @torch.no_grad()
    def reset_budget_embedding(self) -> None:
        """Make the output independent of the budget input, keeping the output at budget 1.

        A network trained at budget 1 alone has learned one column of the embedding; at other budgets its output is
        arbitrary (half of the blocks, sigma 24: the base model's error rose by a quarter).
        """
        full = fourier(torch.ones(1, device=self.budget.weight.device), 256)[0].to(self.budget.weight.dtype)
        self.budget.bias.add_(self.budget.weight @ full)
        self.budget.weight.zero_()

    def null(self, like: Condition) -> Condition:
        """Return the condition without text and key: the unconditional branch of guidance."""
        b = like.text.shape[0]
        mask = torch.ones(b, 1, dtype=torch.bool, device=like.text.device)
        text = self.null_text.to(like.text.dtype).expand(b, -1, -1)
        pooled = self.null_pooled.to(like.pooled.dtype).expand(b, -1)
        return replace(like, text=text, text_mask=mask, pooled=pooled, key=torch.zeros_like(like.key))

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        condition: Condition,
        blocks: Sequence[int] | None = None,
        budget: float | Tensor | None = None,
    ) -> Tensor:
        """Return the raw output (B, T, C).

        Args:
            x: (B, T, C), scaled by c_in.
            c_noise: (B,) noise-level input.
            condition: of the B clips.
            blocks: indices of the blocks that run, in order; None for all.
            budget: layer-budget input, one for all clips or (B,); None takes the share of the blocks that run.
        """
        run = range(len(self.blocks)) if blocks is None else blocks
        h, cond = self.trunk(x, c_noise, condition, run, len(run) / len(self.blocks) if budget is None else budget)
        shift, scale = self.modulation(cond)[:, None].chunk(2, -1)
        result: Tensor = self.output(norm(h) * (1 + scale) + shift)
        return result

    def raw(self, x: Tensor, time: Tensor, conditioning: Conditioning, blocks: Sequence[int], budget: float) -> Tensor:
        """See `runtime.backend.Network.raw`."""
        result: Tensor = self(x, time, Condition.from_ports(conditioning), blocks, budget)
        return result

    def hidden(
        self, x: Tensor, c_noise: Tensor, condition: Condition, depth: int, budget: float | Tensor = 1.0
    ) -> Tensor:
        """Return the activations (B, T, width) after the first `depth` blocks.

        Args:
            x: (B, T, C), scaled by c_in.
            c_noise: (B,) noise-level input.
            condition: of the B clips.
            depth: number of blocks that run.
            budget: layer-budget input.
        """
        return self.trunk(x, c_noise, condition, range(depth), budget)[0]

    def trunk(
        self, x: Tensor, c_noise: Tensor, condition: Condition, blocks: Sequence[int], budget: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the activations (B, T, width) after `blocks`, and the condition vector (B, width).

        Args:
            x: (B, T, C), scaled by c_in.
            c_noise: (B,) noise-level input.
            condition: of the B clips.
            blocks: indices of the blocks that run, in order.
            budget: layer-budget input.
        """
        dtype = self.input.weight.dtype
        budgets = budget * torch.ones_like(c_noise, dtype=torch.float32)
        cond = self.condition_vector(c_noise, condition, budgets)
        rope = rotary_angles(x.shape[1], self.config.head_dim, x.device)
        text = condition.text.to(dtype)
        h = self.input(x.to(dtype)) + self.beat(condition.beat.to(dtype))
        for index in blocks:
            h = self.blocks[index](h, cond, text, condition.text_mask, rope)
        return h, cond


def drop_text(model: DiT, condition: Condition, dropped: Tensor) -> Condition:
    """Drop text and key of the clips where `dropped` (B,) is True, as `DiT.null` does: dropout in training."""
    null_text = F.pad(model.null_text, (0, 0, 0, condition.text.shape[1] - 1)).to(condition.text.dtype)
    null_mask = torch.zeros_like(condition.text_mask)
    null_mask[:, 0] = True
    return replace(
        condition,
        text=torch.where(dropped[:, None, None], null_text, condition.text),
        text_mask=torch.where(dropped[:, None], null_mask, condition.text_mask),
        pooled=torch.where(dropped[:, None], model.null_pooled.to(condition.pooled.dtype), condition.pooled),
        key=condition.key * ~dropped[:, None],
    )
