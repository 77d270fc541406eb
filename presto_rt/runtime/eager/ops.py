"""The table of operators in plain torch: what the other tables must equal."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...diffusion import noise
from ...models.dit import norm, rotate

EPS = 1e-6
ACTIVATIONS = {
    "none": lambda x: x,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "silu": F.silu,
}


class ReferenceOps:
    """Plain torch in any dtype and on any device, one formula after another. See `forward.Ops`."""

    allocates_matmul_output = False

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype

    def pack(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight.to(self.dtype), None if bias is None else bias.to(self.dtype)

    def linear(self, x: Tensor, weights: tuple[Tensor, Tensor | None], out: Tensor, activation: str = "none") -> Tensor:
        return out.copy_(ACTIVATIONS[activation](F.linear(x, *weights)))

    def adaln(
        self, source: Tensor, branch: Tensor, table: Tensor, gate: int | None, shift: int | None, scale: int | None,
        residual: Tensor, out: Tensor,
    ) -> None:  # fmt: skip
        gated = branch.float() if gate is None else table[:, gate, None] * branch.float()
        residual.copy_(source + gated)
        y = norm(residual)
        if shift is not None and scale is not None:
            y = y * (1 + table[:, scale, None]) + table[:, shift, None]
        out.copy_(y)

    def qk_norm_rope(self, qkv: Tensor, angles: tuple[Tensor, Tensor], weights: tuple[Tensor, Tensor], q: Tensor,
                     k: Tensor) -> Tensor:  # fmt: skip
        parts = qkv.unflatten(-1, (3, q.shape[1], q.shape[3])).permute(2, 0, 3, 1, 4)
        for part, weight, out in zip(parts, weights, (q, k), strict=False):
            out.copy_(rotate(F.rms_norm(part.float(), weight.shape, weight, EPS), *angles))
        return parts[2]

    def attention(self, q: Tensor, k: Tensor, v: Tensor, scratch: Tensor | None, out: Tensor,
                  lengths: Tensor | None = None) -> Tensor:  # fmt: skip
        mask = None
        if lengths is not None:
            mask = (torch.arange(k.shape[2], device=k.device) < lengths[:, None])[:, None, None]
        return out.copy_(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))

    def cross_attention(self, q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor | None, lengths: Tensor,
                        scratch: Tensor | None, out: Tensor) -> Tensor:  # fmt: skip
        split = q.unflatten(-1, (k.shape[1], k.shape[3])).transpose(1, 2)
        normed = split
        if q_weight is not None:
            normed = F.rms_norm(split.float(), q_weight.shape, q_weight, EPS).to(q.dtype)
        mask = torch.arange(k.shape[2], device=q.device) < lengths[:, None]
        y = F.scaled_dot_product_attention(normed, k, v, attn_mask=mask[:, None, None])
        return out.copy_(y.transpose(1, 2).flatten(2))

    def residual_mix_norm(
        self, source: Tensor | None, branch: Tensor | None, mix: Tensor | None, norm: tuple[Tensor, Tensor] | None,
        residual: Tensor | None, out: Tensor, eps: float = 1e-5, after: bool = False,
    ) -> Tensor:  # fmt: skip
        wide = torch.promote_types(self.dtype, torch.float32)
        y = sum(x.to(wide) for x in (source, branch) if x is not None)
        if residual is not None and not after:
            residual.copy_(y)
        if mix is not None:
            count, half = y.shape[1], len(mix) // 2
            padded = F.pad(y, (0, 0, half, half))
            y = sum(padded[:, k : k + count] * row for k, row in enumerate(mix))
        if norm is not None:
            y = F.layer_norm(y, y.shape[-1:], *(w.to(wide) for w in norm), eps)
        if residual is not None and after:
            residual.copy_(y)
        return out.copy_(y)

    def features(self, head: Tensor, linear: Tensor, mean: Tensor, ceiling: Tensor, scale: float,
                 out: Tensor) -> Tensor:  # fmt: skip
        wide, bands = torch.promote_types(self.dtype, torch.float32), out.shape[3]
        y = (head.to(wide) + linear.to(wide))[..., : 3 * bands].unflatten(-1, (3, bands))
        out[:, :, :2] = torch.minimum(y[:, :, :2] * scale + mean, ceiling)
        out[:, :, 2] = torch.tanh(y[:, :, 2])
        return out

    def scratch_bytes(self, batch: int, heads: int, keys: int, dim: int) -> int:
        return 0

    def normal(self, seeds: list[int] | Tensor, stream: int, out: Tensor) -> Tensor:
        for clip, seed in zip(out, seeds, strict=True):
            if isinstance(seed, Tensor) and seed.is_cuda:  # not looked at: a graph may be recording
                drawn = noise.normal_torch(seed, clip.numel(), stream=stream, device=out.device)
                clip.copy_(drawn.view(clip.shape))
            else:
                clip.copy_(noise.normal(int(seed) % 2**64, clip.shape, stream=stream, device=out.device))
        return out

    def step(self, x: Tensor, history: Tensor, conditional: Tensor, unconditional: Tensor | None, noise: Tensor | None,
             update: Tensor, copies: int, network_input: Tensor) -> None:  # fmt: skip
        a, b, c, h, s, p, q, r, c_in = update
        after, kept = a * x + b * conditional.float(), p * x + q * conditional.float()
        if unconditional is not None:
            after, kept = after + c * unconditional.float(), kept + r * unconditional.float()
        after = after + h * history
        x.copy_(after if noise is None else after + s * noise)
        history.copy_(kept)
        for copy in range(copies):
            network_input[copy * len(x) : (copy + 1) * len(x)].copy_(c_in * x)
