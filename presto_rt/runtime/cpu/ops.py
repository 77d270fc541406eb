"""Table of operators for CPUs: matrix products by oneDNN over packed weights, everything between them in C++
(csrc/simd).

`threads` goes with every call, so two models of one process may use different numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import native
from ...diffusion import noise
from ...errors import BackendUnavailableError
from ...models.spectral import SpectralFrames
from ..eager.ops import keep_latents
from ..ops import Capabilities, Modulation, PackedLinear, SamplerBuffers, Seeds
from ..plan import LatentEdit, PlannedCall
from .products import INT8_MIN_INPUTS, Int8Linear, int8_is_exact, pack_int8, pack_linear
from .threads import reduce_openmp_spinning

DTYPES = (torch.float32, torch.bfloat16)
GELU_TANH, SILU, SWIGLU, NONE = 0, 1, 2, 3
KINDS = {"none": NONE, "gelu_tanh": GELU_TANH, "silu": SILU}


def unsupported_reason(dtype: torch.dtype = torch.float32) -> str | None:
    """Return why this table is not available here, in one line, or None."""
    if native.lib is None:
        return f"no C++ operators: {native.why}"
    if dtype not in DTYPES:
        return f"it computes in float32 or bfloat16, not {str(dtype).removeprefix('torch.')}"
    return None


def check(x: Tensor, *shape: int, dtype: torch.dtype) -> int:
    """Return the address of a contiguous CPU tensor of this shape and dtype. Raises ValueError for any other."""
    if x.shape != shape or x.dtype != dtype or not x.is_contiguous() or x.device.type != "cpu":
        raise ValueError(f"expected {dtype} {shape}, contiguous, on the CPU; got {x.dtype} {tuple(x.shape)}")
    return x.data_ptr()


class CpuOps:
    """C++ and oneDNN. See `runtime.ops.Ops`.

    Args:
        dtype: of the activations, float32 or bfloat16.
        threads: of every operator; None for torch's number.
        int8: products of at least INT8_MIN_INPUTS inputs are computed in 8-bit integers, with a scale for each token and
            output channel.
        exact_int8: int8 products in fp64 arithmetic, exact and slow, on any processor; else oneDNN's, which need VNNI.

    Raises:
        BackendUnavailableError: where `unsupported_reason` has a reason, and for int8 products that are not available.
    """

    capabilities = Capabilities(allocates_matmul_output=True, masks_keys=False)
    device = torch.device("cpu")

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        threads: int | None = None,
        int8: bool = False,
        exact_int8: bool = False,
    ) -> None:
        if (reason := unsupported_reason(dtype)) is not None:
            raise BackendUnavailableError(f"the CPU backend is not available: {reason}")
        if int8 and not exact_int8 and not int8_is_exact():
            raise BackendUnavailableError(
                "int8 needs a torch with oneDNN and a processor with VNNI; choose another dtype"
            )
        self.dtype, self.int8, self.exact_int8 = dtype, int8, exact_int8
        self.bf16 = dtype == torch.bfloat16
        self.threads = torch.get_num_threads() if threads is None else threads
        self.lib: Any = native.lib
        if self.threads > 1:
            reduce_openmp_spinning(self.threads)

    def pack(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """See `Ops.pack`."""
        if self.int8 and weight.shape[1] >= INT8_MIN_INPUTS:
            return pack_int8(weight, bias, onednn=not self.exact_int8)
        return pack_linear(weight, bias, self.dtype)

    def linear(
        self,
        x: Tensor,
        weights: Any,
        out: Tensor | None,
        activation: str = "none",
        out_scale: float | None = None,
    ) -> Tensor:
        """See `Ops.linear`; weights: from `pack`."""
        if out_scale is not None:
            raise BackendUnavailableError("fp8 outputs need the CUDA table; choose another precision")
        if not isinstance(weights, Int8Linear):
            y: Tensor = weights(x, activation)
            return y
        quantized, scale = self.quantize(x)
        y = self.rescale(weights(quantized, self.dtype), scale, weights.bias, activation)
        return y.view(*x.shape[:-1], y.shape[-1])

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return x (..., K) as uint8 (rows, K) around 128, and a scale (rows,) fp32 for each row."""
        rows, width = x.numel() // x.shape[-1], x.shape[-1]
        out, scale = torch.empty(rows, width, dtype=torch.uint8), torch.empty(rows)
        address = check(x, *x.shape, dtype=self.dtype)
        self.lib.quantize(address, out.data_ptr(), scale.data_ptr(), self.bf16, rows, width, self.threads)
        return out, scale

    def rescale(self, y: Tensor, scale: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
        """Compute act(scale y + bias) in place; y (rows, N), scale (rows,) and bias (N,) fp32."""
        rows, width = y.shape
        address = check(y, rows, width, dtype=self.dtype)
        self.lib.rescale(
            address, check(scale, rows, dtype=torch.float32),
            0 if bias is None else check(bias, width, dtype=torch.float32), address, self.bf16, rows, width,
            KINDS[activation], self.threads,
        )  # fmt: skip
        return y

    def adaln(
        self,
        source: Tensor,
        branch: Tensor,
        modulation: Modulation,
        residual: Tensor,
        out: Tensor,
        eps: float,
        out_scale: float | None = None,
    ) -> None:
        """See `Ops.adaln`."""
        table, gate, shift, scale = modulation.table, modulation.gate, modulation.shift, modulation.scale
        shape = residual.shape
        batch, tokens, width = shape
        rows = [0, 0, 0]
        stride = table.stride(0)
        start = table.data_ptr()
        if table.shape[0] != batch or table.shape[2] != width or table.dtype != torch.float32 or stride % width:
            raise ValueError(f"the table must be float32 ({batch}, rows, {width}), got {tuple(table.shape)}")
        for i, row in enumerate((gate, shift, scale)):
            if row is not None:
                if not 0 <= row < table.shape[1]:
                    raise ValueError(f"row {row} is not in the table's 0..{table.shape[1] - 1}")
                rows[i] = start + 4 * width * row
        self.lib.adaln(
            check(source, *shape, dtype=torch.float32), check(residual, *shape, dtype=torch.float32),
            0 if branch is None else check(branch, *shape, dtype=self.dtype), check(out, *shape, dtype=self.dtype),
            self.bf16, batch, tokens, width, *rows, stride, eps, self.threads,
        )  # fmt: skip

    def qk_norm_rope(
        self,
        qkv: Tensor,
        angles: tuple[Tensor, Tensor],
        weights: tuple[Tensor, Tensor],
        q: Tensor,
        k: Tensor,
        eps: float,
    ) -> Tensor:
        """See `Ops.qk_norm_rope`."""
        batch, heads, tokens, dim = q.shape
        f32 = torch.float32
        self.lib.qk_norm_rope(
            check(qkv, batch, tokens, 3 * heads * dim, dtype=self.dtype), check(q, *q.shape, dtype=self.dtype),
            check(k, *q.shape, dtype=self.dtype), self.bf16, batch, tokens, heads, dim,
            *(check(a, tokens, dim // 2, dtype=f32) for a in angles), *(check(w, dim, dtype=f32) for w in weights), eps,
            self.threads,
        )  # fmt: skip
        return qkv.view(batch, tokens, 3, heads, dim)[:, :, 2].transpose(1, 2)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, scratch: Tensor | None, out: Tensor, lengths: Tensor | None = None
    ) -> Tensor:
        """See `Ops.attention`."""
        return self._attend(q, k, v, None, lengths, scratch, out, 1e-6)

    def cross_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_weight: Tensor | None,
        lengths: Tensor,
        scratch: Tensor | None,
        out: Tensor,
        eps: float = 1e-6,
    ) -> Tensor:
        """See `Ops.cross_attention`."""
        heads = q.unflatten(-1, (k.shape[1], k.shape[3])).transpose(1, 2)
        return self._attend(heads, k, v, q_weight, lengths, scratch, out, eps)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_weight: Tensor | None,
        lengths: Tensor | None,
        scratch: Tensor | None,
        out: Tensor,
        eps: float,
    ) -> Tensor:
        batch, heads, tokens, dim = q.shape
        keys = k.shape[2]
        for x in (q, k, v):
            if x.dtype != self.dtype or x.stride(3) != 1 or x.device.type != "cpu":
                raise ValueError(f"q, k and v must be {self.dtype} with contiguous heads, got {x.dtype} {x.stride()}")
        if scratch is None:
            raise ValueError("attention needs scratch memory of scratch_bytes()")
        if k.shape != (batch, heads, keys, dim) or v.shape != k.shape:
            raise ValueError(f"k and v must be ({batch}, {heads}, keys, {dim}), got {tuple(k.shape)}, {tuple(v.shape)}")
        self.lib.attention(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), check(out, batch, tokens, heads * dim, dtype=self.dtype),
            0 if q_weight is None else check(q_weight, dim, dtype=torch.float32),
            0 if lengths is None else check(lengths, batch, dtype=torch.int32), scratch.data_ptr(), scratch.numel(),
            self.bf16, batch, heads, tokens, keys, dim, q.stride()[:3], k.stride()[:3], v.stride()[:3], dim**-0.5, eps,
            self.threads,
        )  # fmt: skip
        return out

    def scratch_bytes(self, batch: int, heads: int, keys: int, dim: int) -> int:
        """See `Ops.scratch_bytes`."""
        return int(self.lib.attention_bytes(batch, heads, keys, dim, self.threads))

    def mix_norm(
        self,
        source: Tensor | None,
        branch: Tensor | None,
        mix: Tensor | None,
        norm: tuple[Tensor, Tensor] | None,
        residual: Tensor | None,
        out: Tensor,
        eps: float = 1e-5,
        after: bool = False,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """See `Ops.mix_norm`; buffers fit their clips here, so lengths must be None."""
        if lengths is not None:
            raise ValueError("mix_norm on a CPU takes no lengths: give it buffers of the clip's size")
        shape, f32 = out.shape, torch.float32
        batch, frames, width = shape

        def address(x: Tensor | None, *size: int, dtype: torch.dtype) -> int:
            return 0 if x is None else check(x, *size, dtype=dtype)

        self.lib.mix_norm(
            address(source, *shape, dtype=f32), address(branch, *shape, dtype=self.dtype),
            address(mix, 5, width, dtype=f32), *(address(w, width, dtype=f32) for w in norm or (None, None)),
            address(residual, *shape, dtype=f32), check(out, *shape, dtype=self.dtype), self.bf16, after, batch, frames,
            width, eps, self.threads,
        )  # fmt: skip
        return out

    def features(
        self, head: Tensor, linear: Tensor, mean: Tensor, maximum: Tensor, scale: float, out: Tensor
    ) -> Tensor:
        """See `Ops.features`."""
        batch, frames, _, bands = out.shape
        stride, f32 = head.shape[-1], torch.float32
        if stride < 3 * bands:
            raise ValueError(f"rows of {stride} numbers do not hold three of {bands} bands")
        self.lib.features(
            *(check(x, batch, frames, stride, dtype=self.dtype) for x in (head, linear)),
            check(mean, 2, bands, dtype=f32), check(maximum, 2, bands, dtype=f32), check(out, *out.shape, dtype=f32),
            self.bf16, batch * frames, bands, stride, scale, self.threads,
        )  # fmt: skip
        return out

    def synthesize(
        self,
        frames: SpectralFrames,
        features: Tensor,
        gain: Tensor,
        iterations: int,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """See `Ops.synthesize`; buffers fit their clips here, so lengths must be None."""
        if lengths is not None:
            raise ValueError("synthesize on a CPU takes no lengths: give it features of the clip's size")
        return frames.synthesize(features, iterations, gain)

    def normal(self, seeds: Seeds, stream: int, out: Tensor) -> Tensor:
        """See `Ops.normal`; seeds are integers here."""
        for clip, seed in zip(out, seeds, strict=True):
            self.lib.normal(clip.numpy(), noise.check_seed(seed), stream)
        return out

    def sampler_step(
        self,
        buffers: SamplerBuffers,
        conditional: Tensor,
        unconditional: Tensor | None,
        seeds: Seeds,
        call: PlannedCall,
        edit: LatentEdit | None,
    ) -> None:
        """See `Ops.sampler_step`."""
        fresh = None if call.noise_stream is None else self.normal(seeds, call.noise_stream, buffers.noise)
        self.update_state(buffers, conditional, unconditional, fresh, call)
        if edit is not None and call.step:
            self.normal(seeds, 0, buffers.noise)
            keep_latents(buffers, call, edit)

    def update_state(
        self,
        buffers: SamplerBuffers,
        conditional: Tensor,
        unconditional: Tensor | None,
        fresh: Tensor | None,
        call: PlannedCall,
    ) -> None:
        """Apply the nine coefficients of `trajectory` to the state.

        Args:
            buffers: x, history and network_input are written.
            conditional: raw output F_c.
            unconditional: raw output F_u, or None.
            fresh: noise (B, T, C) fp32, or None.
            call: coefficients and number of copies of the next input.
        """
        x, network_input = buffers.x, buffers.network_input
        shape, f32, copies = x.shape, torch.float32, call.next_copies
        if copies * shape[0] > network_input.shape[0]:
            raise ValueError(f"{copies} copies of {shape[0]} clips do not fit an input of {network_input.shape[0]}")
        self.lib.sampler_step(
            check(x, *shape, dtype=f32), check(buffers.history, *shape, dtype=f32),
            check(conditional, *shape, dtype=self.dtype),
            0 if unconditional is None else check(unconditional, *shape, dtype=self.dtype),
            0 if fresh is None else check(fresh, *shape, dtype=f32),
            check(network_input, len(network_input), *shape[1:], dtype=self.dtype),
            check(call.coefficients, 9, dtype=f32), self.bf16, x.numel(), copies, self.threads,
        )  # fmt: skip
