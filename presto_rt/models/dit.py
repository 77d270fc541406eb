"""Diffusion transformer over latent frames: the plain definition, which also trains.

One block (Peebles & Xie 2023, AdaLN-zero, with cross-attention to text):

    x = x + gate_a * SelfAttention(norm(x) * (1 + scale_a) + shift_a)      QK-norm, rotary positions in fp32
    x = x + CrossAttention(norm(x), text states)
    x = x + gate_m * MLP(norm(x) * (1 + scale_m) + shift_m)

(shift, scale, gate) come from one vector per clip: noise level + pooled text + clip length + layer budget. Blocks are
skipped by leaving them out of `blocks`; the budget input tells the network how many will run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..conditioning.keys import KEY_CHANNELS
from ..diffusion.precond import sigma_of
from .config import ModelConfig

KEY_SIGMA = 4.0  # the key is decided above; below it is in the latents themselves
BEAT_CHANNELS = 5  # sin, cos of beat phase; sin, cos of bar phase; 1 where a tempo is given


@dataclass
class Condition:
    """What a clip is conditioned on, for a batch of B clips.

    text: (B, L, text_dim) token states; text_mask: (B, L) bool, True for real tokens; pooled: (B, text_dim);
    seconds: (B,) clip length; beat: (B, T, 5) beat-phase features, zeros where no tempo is asked; key: (B, 24) of
    `keys.key_features`, zeros where no key is asked.
    """

    text: Tensor
    text_mask: Tensor
    pooled: Tensor
    seconds: Tensor
    beat: Tensor
    key: Tensor

    def take(self, index: Tensor) -> Condition:
        """The clips at `index`."""
        return Condition(*(getattr(self, k)[index] for k in self.__dataclass_fields__))

    def cat(self, other: Condition) -> Condition:
        """Stack two batches of conditions with equal T (texts are padded to the longer)."""
        length = max(self.text.shape[1], other.text.shape[1])
        a, b = self._padded(length), other._padded(length)
        return Condition(*(torch.cat([getattr(a, k), getattr(b, k)]) for k in self.__dataclass_fields__))

    def _padded(self, length: int) -> Condition:
        extra = length - self.text.shape[1]
        if not extra:
            return self
        return replace(
            self, text=F.pad(self.text, (0, 0, 0, extra)), text_mask=F.pad(self.text_mask, (0, extra), value=False)
        )

    def to(self, device: torch.device | str) -> Condition:
        return Condition(*(getattr(self, k).to(device) for k in self.__dataclass_fields__))


def beat_features(frames: int, frame_seconds: float, bpm: float | Tensor | None, beats_per_bar: int | Tensor = 4,
                  offset: float | Tensor = 0.0, start: float | Tensor = 0.0) -> Tensor:  # fmt: skip
    """(frames, 5) beat-phase input: phases of beat and bar at each latent frame's centre; zeros when `bpm` is None.

    offset: time in seconds of the first downbeat; start: time of frame 0 (for crops). With (B, 1) fp64 tensors in
    place of the numbers: (B, frames, 5).
    """
    if bpm is None:
        return torch.zeros(frames, BEAT_CHANNELS)
    seconds = start + (torch.arange(frames, dtype=torch.float64) + 0.5) * frame_seconds - offset
    beat = 2 * math.pi * seconds * bpm / 60
    bar = beat / beats_per_bar
    return torch.stack([beat.sin(), beat.cos(), bar.sin(), bar.cos(), torch.ones_like(beat)], -1).float()


def fourier(x: Tensor, dim: int, max_period: float = 1000.0) -> Tensor:
    """Sinusoidal features (B, dim) of scalars (B,), in fp32."""
    frequencies = torch.exp(-math.log(max_period) * torch.arange(dim // 2, device=x.device) / (dim // 2))
    angles = x.float()[:, None] * frequencies * 100.0
    return torch.cat([angles.cos(), angles.sin()], -1)


def rotary_table(frames: int, head_dim: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """cos and sin, each (frames, head_dim / 2) fp32 (RoFormer, Su et al. 2021)."""
    inverse = 10_000.0 ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angles = torch.arange(frames, device=device, dtype=torch.float32)[:, None] * inverse
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on (B, H, T, D), first half against second half, in fp32."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class QKNorm(nn.Module):
    """RMS norm over the head dimension in fp32, with a weight per channel."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), 1e-6)


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
        return x + gate_m * self.down(F.gelu(self.up(h), approximate="tanh"))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)

    def attention(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = (self.split(t) for t in self.qkv(x).chunk(3, -1))
        q, k = rotate(self.q_norm(q), *rope), rotate(self.k_norm(k), *rope)
        return self.out(attend(q.to(v.dtype), k.to(v.dtype), v).transpose(1, 2).flatten(2))

    def cross_attention(self, x: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        q = self.cross_q_norm(self.split(self.cross_q(x)))
        k, v = (self.split(t) for t in self.cross_kv(text).chunk(2, -1))
        y = attend(q.to(v.dtype), self.cross_k_norm(k).to(v.dtype), v, text_mask[:, None, None])
        return self.cross_out(y.transpose(1, 2).flatten(2))


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
    return scores.softmax(-1).to(v.dtype) @ v


def norm(x: Tensor) -> Tensor:
    """Layer norm over the last axis without weights; the modulation that follows supplies them."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class DiT(nn.Module):
    """The raw network F(c_in x; c_noise, condition); `diffusion.precond.Denoiser` turns it into D(x; sigma)."""

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
        """(B, width) vector that every modulation row is made from. budget: (B,) fraction of blocks that run."""
        return F.silu(self.condition_sum(c_noise, condition, budget))

    def condition_sum(self, c_noise: Tensor, condition: Condition, budget: Tensor) -> Tensor:
        """`condition_vector` before its SiLU: the sum of one embedding for each input."""
        dtype = self.noise[0].weight.dtype
        vector = self.noise(fourier(c_noise, 256).to(dtype))
        vector = vector + self.length(fourier(condition.seconds.clamp_min(0.1).log() / 5, 256).to(dtype))
        vector = vector + self.budget(fourier(budget, 256).to(dtype))
        # Only where it matters, or else its few useful gradients drown in the noise of all others.
        sigma = sigma_of(c_noise.float(), self.config.network, self.config.sigma_data)
        gate = (1 / (1 + (KEY_SIGMA / sigma) ** 2))[:, None]
        return vector + self.pooled(condition.pooled.to(dtype)) + self.key((gate * condition.key).to(dtype))

    @torch.no_grad()
    def reset_budget_embedding(self) -> None:
        """Answer to every budget as to 1, which stays as it was.

        A network that was only ever told 1 has learned that one column of the embedding; what it says to others is
        chance (at half of the blocks and sigma 24 it raised nano-base's error by a quarter).
        """
        full = fourier(torch.ones(1, device=self.budget.weight.device), 256)[0].to(self.budget.weight.dtype)
        self.budget.bias += self.budget.weight @ full
        self.budget.weight.zero_()

    def null(self, like: Condition) -> Condition:
        """The condition with its text and key dropped: the unconditional branch of guidance."""
        b = like.text.shape[0]
        mask = torch.ones(b, 1, dtype=torch.bool, device=like.text.device)
        text = self.null_text.to(like.text.dtype).expand(b, -1, -1)
        pooled = self.null_pooled.to(like.pooled.dtype).expand(b, -1)
        return replace(like, text=text, text_mask=mask, pooled=pooled, key=torch.zeros_like(like.key))

    def forward(self, x: Tensor, c_noise: Tensor, condition: Condition, blocks: Sequence[int] | None = None,
                budget: float | Tensor | None = None) -> Tensor:  # fmt: skip
        """x: (B, T, C) scaled by c_in; c_noise: (B,); blocks: which run, in order (None: all). Returns (B, T, C).

        budget: the share of blocks that the network is told will run, one for all clips or (B,); None tells the truth.
        """
        run = range(len(self.blocks)) if blocks is None else blocks
        h, cond = self.trunk(x, c_noise, condition, run, len(run) / len(self.blocks) if budget is None else budget)
        shift, scale = self.modulation(cond)[:, None].chunk(2, -1)
        return self.output(norm(h) * (1 + scale) + shift)

    def hidden(self, x: Tensor, c_noise: Tensor, condition: Condition, depth: int,
               budget: float | Tensor = 1.0) -> Tensor:  # fmt: skip
        """Activations (B, T, width) after the first `depth` blocks of a run that is told `budget`."""
        return self.trunk(x, c_noise, condition, range(depth), budget)[0]

    def trunk(self, x: Tensor, c_noise: Tensor, condition: Condition, blocks: Sequence[int],
              budget: float | Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Activations after `blocks`, and the condition vector."""
        dtype = self.input.weight.dtype
        told = budget * torch.ones_like(c_noise, dtype=torch.float32)
        cond = self.condition_vector(c_noise, condition, told)
        rope = rotary_table(x.shape[1], self.config.head_dim, x.device)
        text = condition.text.to(dtype)
        h = self.input(x.to(dtype)) + self.beat(condition.beat.to(dtype))
        for index in blocks:
            h = self.blocks[index](h, cond, text, condition.text_mask, rope)
        return h, cond


def drop_text(model: DiT, condition: Condition, dropped: Tensor) -> Condition:
    """Training's condition dropout: clips where `dropped` (B,) is True lose their text and key, as `DiT.null` would."""
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
