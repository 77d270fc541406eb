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
from ..eager.ops import ComposedSamplerStep
from ..ops import Capabilities, Modulation, PackedLinear, SamplerBuffers, Seeds
from ..plan import PlannedCall
from .products import INT8_MIN_INPUTS, Int8Linear, int8_is_exact, pack_int8, pack_linear
from .threads import reduce_openmp_spinning

DTYPES = (torch.float32, torch.bfloat16)


def unsupported_reason(dtype: torch.dtype = torch.float32) -> str | None:
    """Return why this table is not available here, in one line, or None."""
    if native.lib is None:
        return f"no C++ operators: {native.why}"
    if dtype not in DTYPES:
        return f"it computes in float32 or bfloat16, not {str(dtype).removeprefix('torch.')}"
    return None


class CpuOps(ComposedSamplerStep):
    """C++ and oneDNN. See `runtime.ops.Ops`.

    Args:
        dtype: of the activations, float32 or bfloat16.
        threads: of every operator; None for torch's number.
        int8: products of at least INT8_MIN_INPUTS inputs are computed in 8-bit integers, with a scale for each token
            and output channel.
        exact_int8: int8 products in fp64 arithmetic, exact and slow, on any processor; else oneDNN's, which need VNNI.

    Raises:
        BackendUnavailableError: where `unsupported_reason` has a reason, and for int8 products that are not available.
    """

    capabilities = Capabilities(allocates_matmul_output=True)
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
        x = x.view(-1, x.shape[-1])
        out, scale = torch.empty(x.shape, dtype=torch.uint8), torch.empty(len(x))
        self.lib.quantize(x, out, scale, self.threads)
        return out, scale

    def rescale(self, y: Tensor, scale: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
        """Compute act(scale y + bias) in place; y (rows, N), scale (rows,) and bias (N,) fp32."""
        self.lib.rescale(y, scale, bias, y, activation, self.threads)
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
        self.lib.adaln(source, branch, table, gate, shift, scale, residual, out, eps, self.threads)

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
        self.lib.qk_norm_rope(qkv, *angles, *weights, q, k, eps, self.threads)
        batch, heads, tokens, dim = q.shape
        return qkv.view(batch, tokens, 3, heads, dim)[:, :, 2].transpose(1, 2)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, scratch: Tensor | None, out: Tensor, lengths: Tensor | None = None
    ) -> Tensor:
        """See `Ops.attention`."""
        self.lib.attention(q, k, v, None, lengths, scratch, out, q.shape[3] ** -0.5, 0.0, self.threads)
        return out

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
        self.lib.attention(heads, k, v, q_weight, lengths, scratch, out, k.shape[3] ** -0.5, eps, self.threads)
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
        weight, bias = norm or (None, None)
        self.lib.mix_norm(source, branch, mix, weight, bias, residual, out, eps, after, self.threads)
        return out

    def features(
        self, head: Tensor, linear: Tensor, mean: Tensor, maximum: Tensor, scale: float, out: Tensor
    ) -> Tensor:
        """See `Ops.features`."""
        self.lib.features(head, linear, mean, maximum, out, scale, self.threads)
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
            self.lib.normal(clip, noise.check_seed(seed), stream)
        return out

    def update_state(
        self,
        buffers: SamplerBuffers,
        conditional: Tensor,
        unconditional: Tensor | None,
        fresh: Tensor | None,
        call: PlannedCall,
    ) -> None:
        """See `ComposedSamplerStep.update_state`."""
        b = buffers
        self.lib.sampler_step(
            b.x, b.history, conditional, unconditional, fresh, call.coefficients, call.next_copies, b.network_input,
            self.threads,
        )  # fmt: skip
