"""Table of operators for CUDA GPUs: `presto_rt.kernels` (Triton) between matrix products by cuBLASLt or Triton.

Everything between two products is one kernel, results go to buffers of the arena, and everything that may change
between two replays of a captured graph is read from the device. On CPU tensors the kernels run in Triton's interpreter
where it is enabled, and otherwise as their torch references, so the same table is tested, and usable, everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...errors import BackendUnavailableError, InvalidInputError
from ...kernels import adaln, attention, cross_attention, gemm, qk_norm_rope, runtime, sampler_step, spsi
from ...kernels.autotune import KernelSelector
from ...models import spectral
from ..eager.ops import DenseWeights, ReferenceOps
from ..ops import Modulation, PackedLinear, SamplerBuffers, Seeds
from ..plan import LatentEdit, PlannedCall
from ..spec import NetworkSpec

#: Operators that can run as plain torch instead, which shows what a fused one saves.
OPERATORS = ("adaln", "qk_norm_rope", "attention", "cross_attention", "gemm", "sampler_step")
FP8 = torch.float8_e4m3fn
products = KernelSelector("product")


def unsupported_reason(spec: NetworkSpec, dtype: torch.dtype, device: torch.device) -> str | None:
    """Return why this table cannot run a network on a CUDA device, in one line, or None."""
    if runtime.triton is None:
        return "Triton is not installed (pip install triton)"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs compute capability 8.0 or newer"
    if spec.head_dim % 16 or spec.head_dim > 128:
        return f"head dim {spec.head_dim} is not a multiple of 16 up to 128"
    if spec.max_cross_tokens > cross_attention.MAX_KEYS:
        return f"texts of {spec.max_cross_tokens} tokens are longer than {cross_attention.MAX_KEYS}"
    return None if dtype.is_floating_point else f"it cannot compute in {dtype}"


@dataclass(frozen=True)
class CudaLinear(DenseWeights):
    """Weights (N, K) of a matrix product and bias (N,) or None.

    With input_scale the weights are fp8 (e4m3) with weight_scale (N,) fp32, and inputs are fp8, divided by input_scale.
    """

    weight_scale: Tensor | None = None


class CudaOps(ReferenceOps):
    """Triton and cuBLASLt in fp32 (for checks), fp16 or bf16. See `runtime.ops.Ops`.

    Args:
        dtype: of the activations.
        device: a CUDA device, or the CPU.
        unfused: names from OPERATORS that run as plain torch.
        backend: of the kernels, "auto", "triton" or "torch".
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cuda",
        unfused: Collection[str] = (),
        backend: str = "auto",
    ) -> None:
        if unknown := set(unfused) - set(OPERATORS):
            raise InvalidInputError(f"unknown operators {sorted(unknown)}; choose from: {', '.join(OPERATORS)}")
        super().__init__(dtype, device)
        self.unfused, self.backend = frozenset(unfused), backend
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise BackendUnavailableError("no CUDA GPU is available here; choose device='cpu'")
        self._row_bases: dict[tuple[int, int], Tensor] = {}

    # ---- matrix products

    def pack(self, weight: Tensor, bias: Tensor | None) -> CudaLinear:
        """See `Ops.pack`."""
        dense = super().pack(weight, bias)
        return CudaLinear(dense.weight, dense.bias)

    def to_fp8(self, weights: CudaLinear, input_scale: float) -> CudaLinear:
        """Return the product in fp8, for inputs within 448 times `input_scale`; one weight scale for each output."""
        wide = weights.weight.float()
        scale = (wide.abs().amax(1) / runtime.fp8_limit(FP8)).clamp_min(1e-12)
        return CudaLinear(runtime.saturating_cast(wide / scale[:, None], FP8), weights.bias, input_scale, scale)

    def linear(
        self,
        x: Tensor,
        weights: PackedLinear,
        out: Tensor | None,
        activation: str = "none",
        out_scale: float | None = None,
    ) -> Tensor:
        """See `Ops.linear`."""
        assert isinstance(weights, DenseWeights)
        assert out is not None  # this table does not allocate outputs
        if weights.input_scale is not None or out_scale is not None:
            weight_scale = weights.weight_scale if isinstance(weights, CudaLinear) else None
            result: Tensor = gemm.linear(
                x,
                weights.weight,
                weights.bias,
                activation=activation,
                scales=gemm.Fp8Scales(weights.input_scale or 1.0, weight_scale, out_scale or 1.0),
                out=out,
                backend=self.backend,
            )
            return result
        fused = activation in ("none", "gelu_tanh")
        if not fused or not runtime.use_triton(x, self.backend):
            return super().linear(x, weights, out, activation)
        ways = self._implementations(x, weights, activation)
        if "gemm" in self.unfused:
            return ways["cublas"](out)
        if not x.is_cuda:
            return ways["triton"](out)
        key = (x.dtype, x.shape, weights.weight.shape, weights.bias is None, activation)
        scratch = partial(torch.empty_like, out)
        fastest = products.fastest(
            x.device, key, lambda: {name: partial(way, scratch()) for name, way in ways.items()}, "cublas"
        )
        return ways[fastest](out)

    def _implementations(
        self, x: Tensor, weights: DenseWeights, activation: str
    ) -> dict[str, Callable[[Tensor], Tensor]]:
        rows, w, b = x.flatten(0, 1), weights.weight.T, weights.bias

        def cublas(out: Tensor) -> Tensor:
            flat = out.view(-1, out.shape[-1])
            if b is None:
                torch.mm(rows, w, out=flat)
            else:
                torch.addmm(b, rows, w, out=flat)
            if activation == "gelu_tanh":
                torch.ops.aten.gelu.out(out, approximate="tanh", out=out)
            return out

        def epilogue(out: Tensor) -> Tensor:  # cuBLASLt's own GELU is the tanh form
            torch.ops.aten._addmm_activation.out(b, rows, w, use_gelu=True, out=out.view(-1, out.shape[-1]))
            return out

        def triton(out: Tensor) -> Tensor:
            result: Tensor = gemm.linear(x, weights.weight, b, activation=activation, out=out, backend="triton")
            return result

        ways: dict[str, Callable[[Tensor], Tensor]] = {"cublas": cublas, "triton": triton}
        if activation == "gelu_tanh" and b is not None and x.is_cuda and x.dtype != torch.float32:
            ways["cublas, epilogue"] = epilogue
        return ways

    # ---- between products

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
        if "adaln" in self.unfused and out_scale is None:
            super().adaln(source, branch, modulation, residual, out, eps)
            return
        clips, rows, width = modulation.table.shape
        rows_of_clips = modulation.table.view(-1, width)
        adaln.adaln(
            source,
            branch,
            adaln.Modulation(
                rows_of_clips, self._row_base(clips, rows), modulation.gate, modulation.shift, modulation.scale
            ),
            norm=adaln.Norm(eps=eps),
            out_scale=out_scale or 1.0,
            residual_out=residual,
            out=out,
            backend=self.backend,
        )

    def _row_base(self, clips: int, rows: int) -> Tensor:
        """First row of each clip in the flattened table; created once, before any capture."""
        if (clips, rows) not in self._row_bases:
            self._row_bases[clips, rows] = torch.arange(clips, dtype=torch.int32, device=self.device) * rows
        return self._row_bases[clips, rows]

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
        if "qk_norm_rope" in self.unfused:
            return super().qk_norm_rope(qkv, angles, weights, q, k, eps)
        norm = qk_norm_rope.QKNorm("rms", eps, *weights)
        rotary = qk_norm_rope.Rotary(*angles)
        _, _, v = qk_norm_rope.qk_norm_rope(qkv, q.shape[1], rotary, norm=norm, q_out=q, k_out=k, backend=self.backend)
        result: Tensor = v
        return result

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, scratch: Tensor | None, out: Tensor, lengths: Tensor | None = None
    ) -> Tensor:
        """See `Ops.attention`."""
        if "attention" in self.unfused:
            return super().attention(q, k, v, scratch, out, lengths)
        heads = out.unflatten(-1, (q.shape[1], q.shape[3])).transpose(1, 2)
        attention.attention(q, k, v, key_lengths=lengths, out=heads, backend=self.backend)
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
        if "cross_attention" in self.unfused:
            return super().cross_attention(q, k, v, q_weight, lengths, scratch, out, eps)
        result: Tensor = cross_attention.cross_attention(
            q, k, v, q_weight=q_weight, key_lengths=lengths, eps=eps, out=out, backend=self.backend
        )
        return result

    # ---- noise, sampler steps, phases

    def _device_seeds(self, seeds: Seeds) -> Tensor:
        return seeds if isinstance(seeds, Tensor) else sampler_step.seeds_tensor(list(seeds), self.device)

    def normal(self, seeds: Seeds, stream: int, out: Tensor) -> Tensor:
        """See `Ops.normal`."""
        shape = tuple(out.shape[1:])
        result: Tensor = sampler_step.normal(
            self._device_seeds(seeds), shape, stream=stream, out=out, backend=self.backend
        )
        return result

    def sampler_step(
        self,
        buffers: SamplerBuffers,
        conditional: Tensor,
        unconditional: Tensor | None,
        seeds: Seeds,
        call: PlannedCall,
        edit: LatentEdit | None,
    ) -> None:
        """See `Ops.sampler_step`; one kernel."""
        if "sampler_step" in self.unfused:
            super().sampler_step(buffers, conditional, unconditional, seeds, call, edit)
            return
        inpainting = None
        if edit is not None and call.step:
            inpainting = sampler_step.Inpainting(edit.init, edit.keep, call.next_sigma)
        sampler_step.sampler_step(
            buffers.x,
            buffers.history,
            conditional,
            call.coefficients,
            network_input=buffers.network_input,
            copies=call.next_copies,
            unconditional=unconditional,
            noise=sampler_step.NoiseStream(self._device_seeds(seeds), call.noise_stream),
            inpainting=inpainting,
            backend=self.backend,
        )

    def phases(self, magnitude: Tensor) -> Tensor:
        """Return unit phasors of magnitudes (channels, frames, bins) by single-pass spectrogram inversion."""
        if not runtime.use_triton(magnitude, self.backend):
            return super().phases(magnitude)
        result: Tensor = spsi.spsi(magnitude, hop=spectral.FRAME_HOP, size=spectral.N_FFT, backend=self.backend)
        return result
