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

`trajectory_step` is the same for samplers with a memory: with one tensor H that is carried on, and both in place,

    x'  = a x + b F_c + c F_u + h H + s n        H' = p x + q F_c + r F_u        input' = c_in' x'

and, for editing, x' = keep (init + sigma' n_0) + (1 - keep) x' before the input is made: what is kept of a clip is at
every level the clip with that level's noise.

They are read from the device, so a captured graph can be replayed with another schedule, guidance scale or seed. n
is, to the bit, presto_rt.diffusion.noise.normal(seed, shape, stream=stream) of each clip: sums are unfused and in the order
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


@partial(jit, varying=("stream",))
def trajectory_step_kernel(
    x_ptr, history_ptr, conditional_ptr, unconditional_ptr, update_ptr, seed_ptr, init_ptr, keep_ptr, after_ptr,
    input_ptr, count, batch_size, channels, stream,
    BLOCK: tl.constexpr, FRESH: tl.constexpr, COPIES: tl.constexpr,
):  # fmt: skip
    """Who writes what: program (i, b) writes elements i*BLOCK ... of clip b in x_ptr and history_ptr, in place, and
    COPIES times in input_ptr.
    """
    batch = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    element = start + tl.arange(0, BLOCK)
    inside = element < count
    at = batch * count + element
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    conditional = tl.load(conditional_ptr + at, mask=inside, other=0.0).to(tl.float32)
    result = tl.load(update_ptr) * x + tl.load(update_ptr + 1) * conditional
    kept = tl.load(update_ptr + 5) * x + tl.load(update_ptr + 6) * conditional
    if unconditional_ptr is not None:
        unconditional = tl.load(unconditional_ptr + at, mask=inside, other=0.0).to(tl.float32)
        result += tl.load(update_ptr + 2) * unconditional
        kept += tl.load(update_ptr + 7) * unconditional
    result += tl.load(update_ptr + 3) * tl.load(history_ptr + at, mask=inside, other=0.0)
    block = start // 4 + tl.arange(0, BLOCK // 4)
    if FRESH:
        result += tl.load(update_ptr + 4) * normals(tl.load(seed_ptr + batch), block, tl.full((), stream, tl.int64))
    if init_ptr is not None:
        first = normals(tl.load(seed_ptr + batch), block, tl.full((), 0, tl.int64))
        known = tl.load(init_ptr + at, mask=inside, other=0.0) + tl.load(after_ptr) * first
        keep = tl.load(keep_ptr + at // channels, mask=inside, other=0.0)
        result = keep * known + (1.0 - keep) * result
    tl.store(x_ptr + at, result, mask=inside)
    tl.store(history_ptr + at, kept, mask=inside)
    scaled = (tl.load(update_ptr + 8) * result).to(input_ptr.dtype.element_ty)
    for copy in tl.static_range(COPIES):
        tl.store(input_ptr + (copy * batch_size + batch) * count + element, scaled, mask=inside)


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
    from ..diffusion.noise import normal as package_normal

    clips = [package_normal(seed % 2**64, shape, stream=stream, device=seeds.device) for seed in seeds.tolist()]
    return torch.stack(clips) * scale


def normal(
    seeds: Tensor, shape: tuple[int, ...], *, stream: int = 0, scale: float = 1.0, out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    """(B, *shape) fp32: scale times the standard normal noise of each clip's seed. seeds (B,) int64 from
    `seeds_tensor`.

    Raises InvalidInputError for a stream outside 0 ... 2^32 - 1 or shapes that do not fit.
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
    doubled guidance batch. Returns (x', input'). Raises InvalidInputError for anything that does not fit.
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


def trajectory_step_reference(
    x: Tensor, history: Tensor, conditional: Tensor, update: Tensor, *, unconditional: Tensor | None = None,
    seeds: Tensor | None = None, stream: int | None = None, init: Tensor | None = None, keep: Tensor | None = None,
    after: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`trajectory_step` in plain torch, fp32, the same sums in the same order: (x', H', c_in' x'), all new."""
    a, b, c, h, s, p, q, r, c_in = update
    result, kept = a * x + b * conditional.float(), p * x + q * conditional.float()
    if unconditional is not None:
        result, kept = result + c * unconditional.float(), kept + r * unconditional.float()
    result = result + h * history
    shape = tuple(x.shape[1:])
    if seeds is not None and stream is not None:
        result = result + s * normal_reference(seeds, shape, stream=stream)
    if init is not None and keep is not None and after is not None and seeds is not None:
        known = init + after * normal_reference(seeds, shape)
        result = keep[..., None] * known + (1.0 - keep[..., None]) * result
    return result, kept, c_in * result


def trajectory_step(
    x: Tensor, history: Tensor, conditional: Tensor, update: Tensor, *, network_input: Tensor,
    unconditional: Tensor | None = None, seeds: Tensor | None = None, stream: int | None = None, copies: int = 1,
    init: Tensor | None = None, keep: Tensor | None = None, after: Tensor | None = None, backend: str = "auto",
) -> None:  # fmt: skip
    """The next state, memory and network input, in place.

    x, history (B, T, C) fp32; conditional, unconditional (B, T, C), one dtype; update (9,) fp32: (a, b, c, h, s, p, q,
    r, c_in'). stream: of the fresh noise, None for none. network_input (N, T, C) with N >= copies B, of which the first
    copies B are written; copies may be 0. Editing: init (B, T, C) fp32, keep (B, T) fp32 from 0 to 1, after (1,) fp32,
    the noise level sigma' of x'. seeds (B,) int64, for either. All contiguous. Raises InvalidInputError for anything that
    does not fit.
    """
    check_tensor("x", x, 3, (torch.float32,))
    shape, edits = tuple(x.shape), (init, keep, after)
    check(all(e is None for e in edits) or None not in edits, "init, keep and after go together; give all or none")
    check(seeds is not None or (stream is None and init is None), "fresh noise and editing need seeds")
    check(0 <= (stream or 0) < 2**32, f"stream={stream} must lie in 0..2^32 - 1")
    check_tensor("conditional", conditional, 3, FLOATS)
    check_tensor("update", update, 1, (torch.float32,))
    check_shape("update", update, (9,))
    check_tensor("network_input", network_input, 3, FLOATS)
    check(network_input.shape[0] >= copies * shape[0], f"network_input holds no {copies} copies of {shape[0]} clips")
    given = [("history", history, torch.float32), ("unconditional", unconditional, conditional.dtype)]
    for name, tensor, dtype in [*given, ("init", init, torch.float32)]:
        if tensor is not None:
            check_tensor(name, tensor, 3, (dtype,))
            check_shape(name, tensor, shape)
    check_shape("conditional", conditional, shape)
    check_shape("network_input", network_input, (network_input.shape[0], *shape[1:]))
    for name, tensor, sizes in (("seeds", seeds, shape[:1]), ("keep", keep, shape[:2]), ("after", after, (1,))):
        if tensor is not None:
            check_tensor(name, tensor, len(sizes), (torch.int64 if name == "seeds" else torch.float32,))
            check_shape(name, tensor, sizes)
    named = {"x": x, "history": history, "conditional": conditional, "unconditional": unconditional, "init": init,
             "keep": keep, "network_input": network_input}  # fmt: skip
    for name, tensor in named.items():
        check(tensor is None or tensor.is_contiguous(), f"{name} is not contiguous; call .contiguous()")
    check_same_device(**named, update=update, seeds=seeds, after=after)
    if not runtime.use_triton(x, backend):
        options = {"unconditional": unconditional, "seeds": seeds, "stream": stream, "init": init, "keep": keep}
        result, kept, scaled = trajectory_step_reference(x, history, conditional, update, after=after, **options)
        x.copy_(result)
        history.copy_(kept)
        for copy in range(copies):
            network_input[copy * shape[0] : (copy + 1) * shape[0]].copy_(scaled)
        return
    count = x.numel() // shape[0]
    runtime.launch(
        trajectory_step_kernel, (runtime.ceil_div(count, BLOCK), shape[0]),
        x, history, conditional, unconditional, update, seeds, init, keep, after, network_input,
        count, shape[0], shape[2], stream or 0,
        options=UNFUSED, BLOCK=BLOCK, FRESH=stream is not None, COPIES=copies,
    )  # fmt: skip


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
    step = partial(trajectory_step, x, x, f, torch.empty(9, device="meta"), network_input=doubled)
    yield "trajectory guided", partial(step, unconditional=f, copies=2)
    edit = {"init": x, "keep": torch.empty(1, 689, device="meta"), "after": torch.empty(1, device="meta")}
    yield "trajectory edited", partial(step, unconditional=f, seeds=seeds, stream=3, copies=2, **edit)
    yield "few-step guided", partial(edm_step, x, f, five, unconditional=f, seeds=seeds, stream=3, input_out=doubled)
