"""One sampler step after a network call: guidance, update, fresh noise, inpainting and the next network input, fused.

With the network's outputs F_c (conditional) and F_u (unconditional), a history tensor H, standard normal noise n, and
nine coefficients that `presto_rt.diffusion.trajectory` derives in fp64 on the host before the first step:

    x'     = a x + b F_c + c F_u + h H + s n
    H'     = p x + q F_c + r F_u
    input' = c_in' x'                                   the next network input, in the network's dtype

Inpainting replaces x' before the input is computed: x' = keep (init + sigma' n_0) + (1 - keep) x'. At every noise level
the kept part of a clip is the clip plus that level's noise.

Coefficients and seeds are read from the device, so a captured graph can be replayed with another schedule, guidance
scale or seed. n is bitwise equal to presto_rt.diffusion.noise.normal(seed, shape, stream=stream) of each clip. Sums are
evaluated in the order written, without fused multiply-adds.

Sources: Karras et al. 2022, table 1 (preconditioning); Ho & Salimans 2022 (guidance); Lugmayr et al. 2022 (inpainting).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from . import runtime
from .checks import (
    FLOATS,
    check,
    check_contiguous,
    check_same_device,
    check_shape,
    check_tensor,
    check_vector,
)
from .philox import UNFUSED, normals
from .registration import register_operator
from .runtime import jit, meta, tl

BLOCK = 1024
COEFFICIENTS = 9


@dataclass(frozen=True)
class NoiseStream:
    """Noise of one call: seeds (B,) int64, one for each clip, and the stream of fresh noise, 0 ... 2^32 - 1.

    stream=None adds no fresh noise; inpainting then still reads the seeds.
    """

    seeds: Tensor
    stream: int | None = None


@dataclass(frozen=True)
class Inpainting:
    """Kept part of a clip.

    init: (B, T, C) fp32, the clip. keep: (B, T) fp32 in 0 ... 1; 1 keeps. sigma: (1,) fp32, noise level of x'.
    """

    init: Tensor
    keep: Tensor
    sigma: Tensor


@partial(jit, varying=("stream",))
def sampler_step_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    history_ptr,
    conditional_ptr,
    unconditional_ptr,
    coefficients_ptr,
    seeds_ptr,
    init_ptr,
    keep_ptr,
    sigma_ptr,
    input_ptr,
    numel,
    batch_size,
    channels,
    stream,
    BLOCK: tl.constexpr,
    FRESH: tl.constexpr,
    COPIES: tl.constexpr,
):
    """Update BLOCK elements of one clip.

    Writes: program (i, b) writes elements i*BLOCK ... of clip b in x_ptr and history_ptr, in place, and COPIES times in
    input_ptr.
    """
    pid_b = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offs = start + tl.arange(0, BLOCK)
    mask = offs < numel
    offs_b = pid_b * numel + offs
    x = tl.load(x_ptr + offs_b, mask=mask, other=0.0)
    conditional = tl.load(conditional_ptr + offs_b, mask=mask, other=0.0).to(tl.float32)
    x_next = tl.load(coefficients_ptr) * x + tl.load(coefficients_ptr + 1) * conditional
    history_next = tl.load(coefficients_ptr + 5) * x + tl.load(coefficients_ptr + 6) * conditional
    if unconditional_ptr is not None:
        unconditional = tl.load(unconditional_ptr + offs_b, mask=mask, other=0.0).to(tl.float32)
        x_next += tl.load(coefficients_ptr + 2) * unconditional
        history_next += tl.load(coefficients_ptr + 7) * unconditional
    x_next += tl.load(coefficients_ptr + 3) * tl.load(history_ptr + offs_b, mask=mask, other=0.0)
    counter = start // 4 + tl.arange(0, BLOCK // 4)
    if FRESH:
        noise = normals(tl.load(seeds_ptr + pid_b), counter, tl.full((), stream, tl.int64))
        x_next += tl.load(coefficients_ptr + 4) * noise
    if init_ptr is not None:
        noise = normals(tl.load(seeds_ptr + pid_b), counter, tl.full((), 0, tl.int64))
        known = tl.load(init_ptr + offs_b, mask=mask, other=0.0) + tl.load(sigma_ptr) * noise
        keep = tl.load(keep_ptr + offs_b // channels, mask=mask, other=0.0)
        x_next = keep * known + (1.0 - keep) * x_next
    tl.store(x_ptr + offs_b, x_next, mask=mask)
    tl.store(history_ptr + offs_b, history_next, mask=mask)
    scaled = (tl.load(coefficients_ptr + 8) * x_next).to(input_ptr.dtype.element_ty)
    for copy in tl.static_range(COPIES):
        tl.store(input_ptr + (copy * batch_size + pid_b) * numel + offs, scaled, mask=mask)


@jit
def normal_kernel(out_ptr, seeds_ptr, numel, stream, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Draw BLOCK standard normals of one clip.

    Writes: program (i, b) writes elements i*BLOCK ... of clip b in out_ptr.
    """
    pid_b = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offs = start + tl.arange(0, BLOCK)
    counter = start // 4 + tl.arange(0, BLOCK // 4)
    noise = normals(tl.load(seeds_ptr + pid_b), counter, tl.full((), stream, tl.int64))
    tl.store(out_ptr + pid_b * numel + offs, noise, mask=offs < numel)


def seeds_tensor(seeds: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Return seeds 0 ... 2^64 - 1 as the int64 tensor that the kernels read: the same 64 bits."""
    return torch.tensor([seed - 2**64 if seed >= 2**63 else seed for seed in seeds], dtype=torch.int64, device=device)


def normal_reference(seeds: Tensor, shape: Sequence[int], *, stream: int = 0) -> Tensor:
    """Compute `normal` by `presto_rt.diffusion.noise`, clip by clip."""
    from ..diffusion.noise import normal as package_normal

    shape, device = tuple(shape), seeds.device
    return torch.stack([package_normal(seed % 2**64, shape, stream=stream, device=device) for seed in seeds.tolist()])


def normal(
    seeds: Tensor, shape: Sequence[int], *, stream: int = 0, out: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Return standard normal noise (B, *shape) fp32, each clip's from its own seed.

    Args:
        seeds: (B,) int64 from `seeds_tensor`.
        shape: shape of one clip.
        stream: 0 ... 2^32 - 1; independent noise of the same seed.
        out: (B, *shape) fp32, contiguous. None: a new tensor.
        backend: "auto", "triton" or "torch".

    Raises:
        InvalidInputError: a stream out of range or shapes that do not fit.
        BackendUnavailableError: the backend is not available on this device.
    """
    check_tensor("seeds", seeds, 1, (torch.int64,))
    _check_stream(stream)
    full_shape = (seeds.shape[0], *shape)
    out = torch.empty(full_shape, device=seeds.device) if out is None else out
    check_tensor("out", out, len(full_shape), (torch.float32,))
    check_shape("out", out, full_shape)
    check_contiguous(out=out)
    if not runtime.use_triton(seeds, backend):
        return out.copy_(normal_reference(seeds, shape, stream=stream))
    numel = out.numel() // full_shape[0]
    grid = (runtime.ceil_div(numel, BLOCK), full_shape[0])
    runtime.launch(normal_kernel, grid, out, seeds, numel, stream, options=UNFUSED, BLOCK=BLOCK)
    return out


def sampler_step_reference(
    x: Tensor,
    history: Tensor,
    conditional: Tensor,
    coefficients: Tensor,
    *,
    unconditional: Tensor | None = None,
    noise: NoiseStream | None = None,
    inpainting: Inpainting | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `sampler_step` in plain torch: (x', H', c_in' x'), new fp32 tensors, the same sums in the same order.

    Arguments as in `sampler_step`.
    """
    a, b, c, h, s, p, q, r, c_in = coefficients
    x_next = a * x + b * conditional.float()
    history_next = p * x + q * conditional.float()
    if unconditional is not None:
        x_next = x_next + c * unconditional.float()
        history_next = history_next + r * unconditional.float()
    x_next = x_next + h * history
    shape = tuple(x.shape[1:])
    if noise is not None and noise.stream is not None:
        x_next = x_next + s * normal_reference(noise.seeds, shape, stream=noise.stream)
    if noise is not None and inpainting is not None:
        known = inpainting.init + inpainting.sigma * normal_reference(noise.seeds, shape)
        keep = inpainting.keep[..., None]
        x_next = keep * known + (1.0 - keep) * x_next
    return x_next, history_next, c_in * x_next


def sampler_step(
    x: Tensor,
    history: Tensor,
    conditional: Tensor,
    coefficients: Tensor,
    *,
    network_input: Tensor,
    copies: int = 1,
    unconditional: Tensor | None = None,
    noise: NoiseStream | None = None,
    inpainting: Inpainting | None = None,
    backend: str = "auto",
) -> None:
    """Update the sampler's state and history in place and write the next network input.

    All tensors are contiguous.

    Args:
        x: (B, T, C) fp32, the state; updated.
        history: (B, T, C) fp32, the tensor that multistep samplers carry on; updated.
        conditional: (B, T, C) fp32, fp16 or bf16, the network's raw output.
        coefficients: (9,) fp32 on x's device: (a, b, c, h, s, p, q, r, c_in').
        network_input: (N, T, C), N >= copies * B, any float dtype; the first copies * B clips are written.
        copies: number of copies of the next input, 0 or more; 2 for a doubled guidance batch.
        unconditional: (B, T, C), the dtype of `conditional`; None: no guidance.
        noise: seeds and the stream of fresh noise; None: none.
        inpainting: kept part of the clip; needs `noise` for its seeds. None: none.
        backend: "auto", "triton" or "torch".

    Raises:
        InvalidInputError: shapes, dtypes or streams that do not fit.
        BackendUnavailableError: the backend is not available on this device.
    """
    _check(x, history, conditional, coefficients, network_input, copies, unconditional, noise, inpainting)
    batch = x.shape[0]
    if not runtime.use_triton(x, backend):
        x_next, history_next, scaled = sampler_step_reference(
            x, history, conditional, coefficients, unconditional=unconditional, noise=noise, inpainting=inpainting
        )
        x.copy_(x_next)
        history.copy_(history_next)
        for copy in range(copies):
            network_input[copy * batch : (copy + 1) * batch].copy_(scaled)
        return
    seeds, stream = (None, None) if noise is None else (noise.seeds, noise.stream)
    init, keep, sigma = (
        (None, None, None) if inpainting is None else (inpainting.init, inpainting.keep, inpainting.sigma)
    )
    numel = x.numel() // batch
    runtime.launch(
        sampler_step_kernel, (runtime.ceil_div(numel, BLOCK), batch),
        x, history, conditional, unconditional, coefficients, seeds, init, keep, sigma, network_input,
        numel, batch, x.shape[2], stream or 0,
        options=UNFUSED, BLOCK=BLOCK, FRESH=stream is not None, COPIES=copies,
    )  # fmt: skip


def _check_stream(stream: int | None) -> None:
    check(0 <= (stream or 0) < 2**32, f"stream={stream} must lie in 0..2^32 - 1")


def _check(
    x: Tensor,
    history: Tensor,
    conditional: Tensor,
    coefficients: Tensor,
    network_input: Tensor,
    copies: int,
    unconditional: Tensor | None,
    noise: NoiseStream | None,
    inpainting: Inpainting | None,
) -> None:
    check_tensor("x", x, 3, (torch.float32,))
    shape = tuple(x.shape)
    batch = shape[0]
    check(noise is not None or inpainting is None, "inpainting needs seeds; pass noise=NoiseStream(seeds)")
    check_tensor("conditional", conditional, 3, FLOATS)
    check_vector("coefficients", coefficients, COEFFICIENTS, torch.float32)
    check_tensor("network_input", network_input, 3, FLOATS)
    check(copies >= 0, f"copies={copies} must be 0 or more")
    check(network_input.shape[0] >= copies * batch, f"network_input holds no {copies} copies of {batch} clips")
    check_shape("network_input", network_input, (network_input.shape[0], *shape[1:]))
    check_shape("conditional", conditional, shape)
    clips: list[tuple[str, Tensor | None, torch.dtype]] = [
        ("history", history, torch.float32),
        ("unconditional", unconditional, conditional.dtype),
        ("init", inpainting.init if inpainting else None, torch.float32),
    ]
    for name, tensor, dtype in clips:
        if tensor is not None:
            check_tensor(name, tensor, 3, (dtype,))
            check_shape(name, tensor, shape)
    named = {name: tensor for name, tensor, _ in clips}
    if noise is not None:
        _check_stream(noise.stream)
        check_vector("seeds", noise.seeds, batch, torch.int64)
        named["seeds"] = noise.seeds
    if inpainting is not None:
        check_tensor("keep", inpainting.keep, 2, (torch.float32,))
        check_shape("keep", inpainting.keep, shape[:2])
        check_vector("sigma", inpainting.sigma, 1, torch.float32)
        named |= {"keep": inpainting.keep, "sigma": inpainting.sigma}
    named |= {"x": x, "conditional": conditional, "coefficients": coefficients, "network_input": network_input}
    check_contiguous(**named)
    check_same_device(**named)


def shipped(arch: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield name and call, on meta tensors, of every configuration that `report` compiles: 689 x 64 latents."""
    x, f, doubled = meta(1, 689, 64, dtype=torch.float32), meta(1, 689, 64), meta(2, 689, 64)
    noise = NoiseStream(meta(1, dtype=torch.int64), 3)
    yield "normal", partial(normal, noise.seeds, (689, 64))
    step = partial(sampler_step, x, x, f, meta(COEFFICIENTS, dtype=torch.float32), network_input=doubled)
    yield "step", step
    guided = partial(step, unconditional=f, copies=2)
    yield "guided", guided
    yield "fresh noise", partial(step, noise=noise)
    yield "guided, fresh noise", partial(guided, noise=noise)
    inpainting = Inpainting(x, meta(1, 689, dtype=torch.float32), meta(1, dtype=torch.float32))
    yield "guided, fresh noise, inpainting", partial(guided, noise=noise, inpainting=inpainting)


def _normal_op(seeds: Tensor, shape: Sequence[int], *, stream: int = 0) -> Tensor:
    return normal(seeds, shape, stream=stream)


def _normal_fake(seeds: Tensor, shape: Sequence[int], *, stream: int = 0) -> Tensor:
    return seeds.new_empty((seeds.shape[0], *shape), dtype=torch.float32)


register_operator("normal(Tensor seeds, SymInt[] shape, *, int stream=0) -> Tensor", _normal_op, _normal_fake)


def _sampler_step_op(
    x: Tensor,
    history: Tensor,
    conditional: Tensor,
    coefficients: Tensor,
    *,
    unconditional: Tensor | None = None,
    seeds: Tensor | None = None,
    stream: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    check(seeds is not None or stream is None, "fresh noise needs seeds; pass seeds")
    noise = None if seeds is None else NoiseStream(seeds, stream)
    x_next, history_next, network_input = x.clone(), history.clone(), torch.empty_like(conditional)
    sampler_step(
        x_next,
        history_next,
        conditional,
        coefficients,
        network_input=network_input,
        unconditional=unconditional,
        noise=noise,
    )
    return x_next, history_next, network_input


def _sampler_step_fake(
    x: Tensor, history: Tensor, conditional: Tensor, *_: object, **__: object
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), history.new_empty(history.shape), conditional.new_empty(conditional.shape)


register_operator(
    "sampler_step(Tensor x, Tensor history, Tensor conditional, Tensor coefficients, *, Tensor? unconditional=None, "
    "Tensor? seeds=None, int? stream=None) -> (Tensor, Tensor, Tensor)",
    _sampler_step_op,
    _sampler_step_fake,
)
