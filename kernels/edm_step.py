"""One sampler step behind the network: preconditioning, guidance, the update, fresh noise and the next input, in one
pass.

With D = c_skip x + c_out F for each branch (Karras et al. 2022, table 1; any preconditioner of that form), guidance
D = D_u + w (D_c - D_u) (Ho & Salimans 2022), and r = sigma' / sigma:

    Euler               x' = D + r (x - D)
    Euler with CFG++    x' = D + r (x - D_u)                   (Chung et al. 2024)
    few-step            x' = D + sigma' n                      (distilled models; n: fresh standard normal noise)

each is linear, and `coefficients` makes its five numbers in fp64 on the host, before the first step:

    x'      = a x + b F_c + c F_u + s n
    input'  = c_in' x'                                         what the network sees next, in its own dtype

They are read from the device, so a captured graph can be replayed with another schedule, guidance scale or seed. n
is, to the bit, presto_rt.noise.normal(seed, shape, stream=stream) of each clip: sums are unfused and in the order
written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from . import runtime
from .philox import UNFUSED, normals
from .runtime import FLOATS, check, check_same_device, check_shape, check_tensor, jit, tl

BLOCK = 1024


def coefficients(
    c_skip: float, c_out: float, ratio: float, *, guidance: float = 1.0, plus_plus: bool = False, noise: float = 0.0,
    c_in_next: float = 1.0,
) -> Tensor:  # fmt: skip
    """(a, b, c, s, c_in') as fp32, from one step's preconditioner.

    ratio: sigma' / sigma for Euler, 0 for the few-step sampler, whose `noise` is sigma'. guidance: w; plus_plus: CFG++.
    c_in_next: the preconditioner's c_in at sigma' (1 for the last step).
    """
    keep = ratio * (0.0 if plus_plus else 1.0)
    a = c_skip + ratio * (1.0 - c_skip)
    b = c_out * guidance * (1.0 - keep)
    c = c_out * (1.0 - guidance) * (1.0 - keep) - (ratio * c_out if plus_plus else 0.0)
    return torch.tensor([a, b, c, noise, c_in_next], dtype=torch.float64).float()


@jit
def edm_step_kernel(
    x_ptr, conditional_ptr, unconditional_ptr, coefficient_ptr, seed_ptr, x_out_ptr, input_ptr, count, batch_size,
    stream,
    BLOCK: tl.constexpr, DOUBLED: tl.constexpr,
):  # fmt: skip
    """Who writes what: program (i, b) writes elements i*BLOCK ... of clip b in x_out_ptr and input_ptr, there in both
    halves of a doubled batch.
    """
    batch = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    element = start + tl.arange(0, BLOCK)
    inside = element < count
    at = batch * count + element
    x = tl.load(coefficient_ptr) * tl.load(x_ptr + at, mask=inside, other=0.0)
    x += tl.load(coefficient_ptr + 1) * tl.load(conditional_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if unconditional_ptr is not None:
        x += tl.load(coefficient_ptr + 2) * tl.load(unconditional_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if seed_ptr is not None:
        block = start // 4 + tl.arange(0, BLOCK // 4)
        x += tl.load(coefficient_ptr + 3) * normals(tl.load(seed_ptr + batch), block, tl.full((), stream, tl.int64))
    tl.store(x_out_ptr + at, x, mask=inside)
    if input_ptr is not None:
        scaled = (tl.load(coefficient_ptr + 4) * x).to(input_ptr.dtype.element_ty)
        tl.store(input_ptr + at, scaled, mask=inside)
        if DOUBLED:
            tl.store(input_ptr + (batch_size + batch) * count + element, scaled, mask=inside)


@jit
def normal_kernel(out_ptr, seed_ptr, scale, count, stream, BLOCK: tl.constexpr):
    """Who writes what: program (i, b) writes elements i*BLOCK ... of clip b in out_ptr."""
    batch = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    element = start + tl.arange(0, BLOCK)
    block = start // 4 + tl.arange(0, BLOCK // 4)
    noise = scale * normals(tl.load(seed_ptr + batch), block, tl.full((), stream, tl.int64))
    tl.store(out_ptr + batch * count + element, noise, mask=element < count)


def seeds_tensor(seeds: list[int], device: torch.device | str = "cpu") -> Tensor:
    """Seeds 0 ... 2^64 - 1 as the int64 tensor that the kernels read (same 64 bits)."""
    return torch.tensor([seed - 2**64 if seed >= 2**63 else seed for seed in seeds], dtype=torch.int64, device=device)


def normal_reference(seeds: Tensor, shape: tuple[int, ...], *, stream: int = 0, scale: float = 1.0) -> Tensor:
    """`normal` by the package's own generator, clip by clip."""
    from ..noise import normal as package_normal

    clips = [package_normal(seed % 2**64, shape, stream=stream, device=seeds.device) for seed in seeds.tolist()]
    return torch.stack(clips) * scale


def normal(
    seeds: Tensor, shape: tuple[int, ...], *, stream: int = 0, scale: float = 1.0, out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    """(B, *shape) fp32: scale times the standard normal noise of each clip's seed. seeds (B,) int64 from
    `seeds_tensor`.

    Raises InvalidInput for a stream outside 0 ... 2^32 - 1 or shapes that do not fit.
    """
    check_tensor("seeds", seeds, 1, (torch.int64,))
    check(0 <= stream < 2**32, f"stream={stream} must lie in 0..2^32 - 1")
    full = (seeds.shape[0], *shape)
    out = torch.empty(full, device=seeds.device) if out is None else out
    check_tensor("out", out, len(full), (torch.float32,))
    check_shape("out", out, full)
    check(out.is_contiguous(), "out is not contiguous; call .contiguous()")
    if not runtime.use_triton(seeds, backend):
        return out.copy_(normal_reference(seeds, shape, stream=stream, scale=scale))
    count = out.numel() // full[0]
    grid = (runtime.ceil_div(count, BLOCK), full[0])
    runtime.launch(normal_kernel, grid, out, seeds, float(scale), count, stream, options=UNFUSED, BLOCK=BLOCK)
    return out


def edm_step_reference(
    x: Tensor, conditional: Tensor, coefficient: Tensor, *, unconditional: Tensor | None = None, seeds: Tensor | None
    = None,
    stream: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`edm_step` in plain torch, fp32: the same sums in the same order. Returns (x', input' in the network's dtype)."""
    a, b, c, s, c_in = coefficient
    result = a * x + b * conditional.float()
    if unconditional is not None:
        result = result + c * unconditional.float()
    if seeds is not None:
        result = result + s * normal_reference(seeds, tuple(x.shape[1:]), stream=stream)
    return result, (c_in * result).to(conditional.dtype)


def edm_step(
    x: Tensor, conditional: Tensor, coefficient: Tensor, *, unconditional: Tensor | None = None, seeds: Tensor | None
    = None,
    stream: int = 0, out: Tensor | None = None, input_out: Tensor | None = None, backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The next state and the network's next input.

    x (B, ...) fp32; conditional, unconditional: raw network outputs of the same shape, fp32, fp16 or bf16; all
    contiguous. coefficient (5,) fp32 from `coefficients`, on x's device. seeds (B,) int64: add fresh noise of
    `stream`; None: none. out may be x itself. input_out: (B, ...) or (2B, ...), the latter written twice for a
    doubled guidance batch. Returns (x', input'). Raises InvalidInput for anything that does not fit.
    """
    check_tensor("x", x, x.dim(), (torch.float32,))
    check(x.dim() >= 2, f"x has {x.dim()} dimensions; the first is the clip, add it with [None]")
    check_tensor("conditional", conditional, x.dim(), FLOATS)
    check_tensor("coefficient", coefficient, 1, (torch.float32,))
    check_shape("coefficient", coefficient, (5,))
    check(0 <= stream < 2**32, f"stream={stream} must lie in 0..2^32 - 1")
    shape = tuple(x.shape)
    check_shape("conditional", conditional, shape)
    if unconditional is not None:
        check_tensor("unconditional", unconditional, x.dim(), (conditional.dtype,))
        check_shape("unconditional", unconditional, shape)
    if seeds is not None:
        check_tensor("seeds", seeds, 1, (torch.int64,))
        check_shape("seeds", seeds, shape[:1])
    out = torch.empty_like(x) if out is None else out
    input_out = torch.empty(shape, dtype=conditional.dtype, device=x.device) if input_out is None else input_out
    check_tensor("out", out, x.dim(), (torch.float32,))
    check_shape("out", out, shape)
    check_tensor("input_out", input_out, x.dim(), FLOATS)
    doubled = input_out.shape[0] == 2 * shape[0]
    check_shape("input_out", input_out, ((2 if doubled else 1) * shape[0], *shape[1:]))
    named = {"x": x, "conditional": conditional, "unconditional": unconditional, "out": out, "input_out": input_out}
    for name, tensor in named.items():
        check(tensor is None or tensor.is_contiguous(), f"{name} is not contiguous; call .contiguous()")
    check_same_device(**named, coefficient=coefficient, seeds=seeds)
    if not runtime.use_triton(x, backend):
        result, scaled = edm_step_reference(
            x, conditional, coefficient, unconditional=unconditional, seeds=seeds, stream=stream
        )
        return out.copy_(result), input_out.copy_(torch.cat([scaled, scaled]) if doubled else scaled)
    count = x.numel() // shape[0]
    runtime.launch(
        edm_step_kernel, (runtime.ceil_div(count, BLOCK), shape[0]),
        x, conditional, unconditional, coefficient, seeds, out, input_out, count, shape[0], stream,
        options=UNFUSED, BLOCK=BLOCK, DOUBLED=doubled,
    )  # fmt: skip
    return out, input_out


def shipped(arch: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and call, on meta tensors, of every configuration that `report` compiles: 32 s of 64-channel latents."""
    x = torch.empty(1, 689, 64, device="meta")
    f = torch.empty(1, 689, 64, dtype=torch.bfloat16, device="meta")
    five, seeds = torch.empty(5, device="meta"), torch.empty(1, dtype=torch.int64, device="meta")
    doubled = torch.empty(2, 689, 64, dtype=torch.bfloat16, device="meta")
    yield "normal", partial(normal, seeds, (689, 64), scale=80.0)
    yield "euler", partial(edm_step, x, f, five)
    yield "euler guided", partial(edm_step, x, f, five, unconditional=f, input_out=doubled)
    yield "few-step", partial(edm_step, x, f, five, seeds=seeds, stream=3)
    yield "few-step guided", partial(edm_step, x, f, five, unconditional=f, seeds=seeds, stream=3, input_out=doubled)
