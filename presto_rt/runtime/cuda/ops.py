"""The table of operators for CUDA GPUs: `presto_rt.kernels` (Triton) between matrix products by cuBLASLt or Triton.

Everything between two products is one kernel, all results go to buffers of the arena, and all that may change between
two replays of a captured graph is read from the device. On CPU tensors the kernels run in Triton's interpreter where
it is switched on, and otherwise as their plain torch references, so the same table is tested, and usable, everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...errors import BackendUnavailableError, InvalidInputError
from ...kernels import adaln, attention, cross_attention, edm_step, gemm, qk_norm_rope, runtime
from ...kernels.choice import Choice
from ...models.config import ModelConfig
from ..eager.ops import EPS, ReferenceOps
from ..plan import Edit, Run

#: what can run as plain torch instead, to see what a fused operator brings
OPERATORS = ("norm", "qk", "attention", "cross", "gemm", "step")
products = Choice("product")


def unavailable(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why this table cannot run a model on a CUDA device, in one line, or None."""
    if runtime.triton is None:
        return "Triton is not installed (pip install triton)"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs compute capability 8.0 or newer"
    if config.head_dim % 16 or config.head_dim > 128:
        return f"head dim {config.head_dim} is not a multiple of 16 up to 128"
    if config.text_tokens > cross_attention.MAX_KEYS:
        return f"texts of {config.text_tokens} tokens are longer than {cross_attention.MAX_KEYS}"
    return None if dtype.is_floating_point else f"it cannot compute in {dtype}"


def noise_of(seeds: list[int], shape: tuple[int, ...], device: torch.device | str) -> Callable[[int], Tensor]:
    """A function from a stream to each clip's noise (B, *shape) fp32, the bits of `presto_rt.diffusion.noise`, in one kernel: in
    torch's own operators they take hundreds."""
    given = edm_step.seeds_tensor(seeds, device)
    return lambda stream: edm_step.normal(given, shape, stream=stream)


@dataclass(frozen=True)
class Packed:
    """Weights (N, K) of a matrix product and bias (N,) or None. With x_scale they are float8_e4m3fn, weight_scale (N,)
    fp32, and the product takes inputs in fp8 that were divided by x_scale."""

    weight: Tensor
    bias: Tensor | None
    x_scale: float | None = None
    weight_scale: Tensor | None = None


class CudaOps(ReferenceOps):
    """Triton and cuBLASLt in fp32 (for checks), fp16 or bf16. See `forward.Ops`.

    plain: names from OPERATORS that run as plain torch. backend: of the kernels, "auto", "triton" or "torch".
    """

    allocates_matmul_output = False

    def __init__(
        self,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cuda",
        plain: Collection[str] = (),
        backend: str = "auto",
    ) -> None:
        if unknown := set(plain) - set(OPERATORS):
            raise InvalidInputError(f"unknown operators {sorted(unknown)}; there are {', '.join(OPERATORS)}")
        super().__init__(dtype)
        self.device, self.plain, self.backend = torch.device(device), frozenset(plain), backend
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise BackendUnavailableError("no CUDA GPU can be used here; choose device='cpu'")
        self._bases: dict[tuple[int, int], Tensor] = {}
        if "step" in self.plain:
            self.fused_step = None

    # ---- matrix products

    def pack(self, weight: Tensor, bias: Tensor | None) -> Packed:  # type: ignore[override]
        w, b = super().pack(weight, bias)
        return Packed(w.detach().to(self.device).contiguous(), None if b is None else b.detach().to(self.device))

    def narrow(self, weights: Packed, x_scale: float) -> Packed:
        """The same product in fp8, for inputs that lie within 448 times `x_scale`; one scale for each output."""
        wide = weights.weight.float()
        scale = (wide.abs().amax(1) / runtime.fp8_limit(torch.float8_e4m3fn)).clamp_min(1e-12)
        return Packed(runtime.narrow(wide / scale[:, None], torch.float8_e4m3fn), weights.bias, x_scale, scale)

    def linear(self, x: Tensor, weights: Packed, out: Tensor, activation: str = "none",  # type: ignore[override]
               out_scale: float | None = None) -> Tensor:  # fmt: skip
        if weights.x_scale is not None or out_scale is not None:
            return gemm.linear(
                x, weights.weight, weights.bias, activation=activation, x_scale=weights.x_scale or 1.0,
                weight_scale=weights.weight_scale, out_scale=out_scale or 1.0, out=out, backend=self.backend,
            )  # fmt: skip
        if not runtime.use_triton(x, self.backend):
            return super().linear(x, (weights.weight, weights.bias), out, activation)
        ways = self._ways(x, weights, activation)
        if "gemm" in self.plain:
            return ways["cublas"](out)
        if not x.is_cuda:
            return ways["triton"](out)
        key = (x.dtype, x.shape, weights.weight.shape, weights.bias is None, activation)
        scratch = partial(torch.empty_like, out)
        chosen = products.fastest(
            x.device, key, lambda: {name: partial(way, scratch()) for name, way in ways.items()}, "cublas"
        )
        return ways[chosen](out)

    def _ways(self, x: Tensor, weights: Packed, activation: str) -> dict[str, Callable[[Tensor], Tensor]]:
        rows, w, b = x.flatten(0, 1), weights.weight.T, weights.bias

        def cublas(out: Tensor) -> Tensor:
            flat = out.view(-1, out.shape[-1])
            if b is None:
                torch.mm(rows, w, out=flat)
            else:
                torch.addmm(b, rows, w, out=flat)
            return torch.ops.aten.gelu.out(out, approximate="tanh", out=out) if activation == "gelu_tanh" else out

        def epilogue(out: Tensor) -> Tensor:  # cuBLASLt's own GELU is the one by tanh
            torch.ops.aten._addmm_activation.out(b, rows, w, use_gelu=True, out=out.view(-1, out.shape[-1]))
            return out

        def triton(out: Tensor) -> Tensor:
            return gemm.linear(x, weights.weight, b, activation=activation, out=out, backend="triton")

        ways = {"cublas": cublas, "triton": triton}
        if activation == "gelu_tanh" and b is not None and x.is_cuda and x.dtype != torch.float32:
            ways["cublas, epilogue"] = epilogue
        return ways

    # ---- what lies between them

    def adaln(
        self, source: Tensor, branch: Tensor, table: Tensor, gate: int | None, shift: int | None, scale: int | None,
        residual: Tensor, out: Tensor, out_scale: float | None = None,
    ) -> None:  # fmt: skip
        if "norm" in self.plain and out_scale is None:
            super().adaln(source, branch, table, gate, shift, scale, residual, out)
            return
        clips, rows, width = table.shape
        adaln.gate_residual_norm_modulate(
            source, branch, table.view(-1, width), gate=gate, shift=shift, scale=scale, base=self._base(clips, rows),
            eps=EPS, out_scale=out_scale or 1.0, residual_out=residual, out=out, backend=self.backend,
        )  # fmt: skip

    def _base(self, clips: int, rows: int) -> Tensor:
        """Where each clip's rows begin in the flattened table; made once, before any capture."""
        if (clips, rows) not in self._bases:
            self._bases[clips, rows] = torch.arange(clips, dtype=torch.int32, device=self.device) * rows
        return self._bases[clips, rows]

    def qk_norm_rope(self, qkv: Tensor, angles: tuple[Tensor, Tensor], weights: tuple[Tensor, Tensor], q: Tensor,
                     k: Tensor) -> Tensor:  # fmt: skip
        if "qk" in self.plain:
            return super().qk_norm_rope(qkv, angles, weights, q, k)
        return qk_norm_rope.qk_norm_rope(
            qkv, q.shape[1], *angles, q_weight=weights[0], k_weight=weights[1], eps=EPS, q_out=q, k_out=k,
            backend=self.backend,
        )[2]  # fmt: skip

    def attention(self, q: Tensor, k: Tensor, v: Tensor, scratch: Tensor | None, out: Tensor,
                  lengths: Tensor | None = None) -> Tensor:  # fmt: skip
        if "attention" in self.plain:
            return super().attention(q, k, v, scratch, out, lengths)
        heads = out.unflatten(-1, (q.shape[1], q.shape[3])).transpose(1, 2)
        attention.attention(q, k, v, key_lengths=lengths, out=heads, backend=self.backend)
        return out

    def cross_attention(self, q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor | None, lengths: Tensor,
                        scratch: Tensor | None, out: Tensor) -> Tensor:  # fmt: skip
        if "cross" in self.plain:
            return super().cross_attention(q, k, v, q_weight, lengths, scratch, out)
        return cross_attention.cross_attention(
            q, k, v, q_weight=q_weight, key_lengths=lengths, eps=EPS, out=out, backend=self.backend
        )

    # ---- noise and steps

    def normal(self, seeds: list[int] | Tensor, stream: int, out: Tensor) -> Tensor:
        given = seeds if isinstance(seeds, Tensor) else edm_step.seeds_tensor(seeds, self.device)
        return edm_step.normal(given, tuple(out.shape[1:]), stream=stream, out=out, backend=self.backend)

    def fused_step(self, x: Tensor, history: Tensor, conditional: Tensor, unconditional: Tensor | None,
                   seeds: list[int] | Tensor, run: Run, edit: Edit | None, network_input: Tensor) -> None:  # fmt: skip
        """The end of an evaluation in one kernel: guidance, update, fresh noise, what an edit keeps, the next input."""
        given = seeds if isinstance(seeds, Tensor) else edm_step.seeds_tensor(seeds, self.device)
        kept = edit is not None and run.step > 0
        edm_step.trajectory_step(
            x, history, conditional, run.update, network_input=network_input, unconditional=unconditional, seeds=given,
            stream=run.stream, copies=run.copies, init=edit.init if kept and edit else None,
            keep=edit.keep if kept and edit else None, after=run.after if kept else None, backend=self.backend,
        )  # fmt: skip
