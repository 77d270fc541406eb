"""The operators as `torch.ops.presto_rt.*`: they trace, compile and export. Importing this module registers them.

    import presto_rt.kernels.ops
    y = torch.ops.presto_rt.norm_modulate(x, table, shift=0, scale=1)

All are functional: they make their outputs, contiguous whatever the layout of the inputs, and alias nothing (so
`qk_norm_rope` returns q and k alone; v is a view that the caller takes). The functions of the operator modules are the
plain path, with `out=` and without the dispatcher's microseconds; the engine, which records everything in one graph,
calls those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .adaln import gate_residual_norm_modulate, norm_modulate
from .attention import attention
from .conv_transpose1d import conv_transpose1d
from .cross_attention import cross_attention
from .edm_step import edm_step, normal
from .gemm import linear, linear_gate_residual
from .istft_head import overlap_add, spectrum
from .pcm import pcm
from .qk_norm_rope import qk_norm_rope
from .snake_conv1d import snake_conv1d
from .spsi import spsi

library = torch.library.Library("presto_rt", "DEF")
#: names of the registered operators
NAMES: list[str] = []


def _register(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define `schema`; `function` computes on CPU and CUDA tensors, `fake` makes outputs of the right shape and
    strides.
    """
    name = schema.split("(")[0]
    library.define(schema)
    for key in ("CPU", "CUDA"):
        library.impl(name, function, key)
    torch.library.register_fake(f"presto_rt::{name}", fake, lib=library)
    NAMES.append(name)


def _fake_norm_modulate(x: Tensor, *_: Any, out_dtype: torch.dtype | None = None, **__: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=out_dtype or x.dtype)


_NORM = (
    "Tensor? base=None, Tensor? weight=None, str norm='layer', float eps=1e-6, ScalarType? out_dtype=None, "
    "float out_scale=1.0"
)
_register(
    f"norm_modulate(Tensor x, Tensor? table=None, *, int? shift=None, int? scale=None, {_NORM}) -> Tensor",
    lambda *arguments, **options: norm_modulate(*arguments, **options).contiguous(),
    _fake_norm_modulate,
)


def _fake_gate_residual(
    residual: Tensor, branch: Tensor, *_: Any, out_dtype: torch.dtype | None = None, **__: Any
) -> tuple[Tensor, Tensor]:
    return residual.new_empty(residual.shape), branch.new_empty(branch.shape, dtype=out_dtype or branch.dtype)


_register(
    "gate_residual_norm_modulate(Tensor residual, Tensor branch, Tensor? table=None, *, int? gate=None, "
    f"int? shift=None, int? scale=None, {_NORM}) -> (Tensor, Tensor)",
    lambda *arguments, **options: tuple(t.contiguous() for t in gate_residual_norm_modulate(*arguments, **options)),
    _fake_gate_residual,
)


def _qk_norm_rope(qkv: Tensor, heads: int, cos: Tensor, sin: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    q, k, _ = qk_norm_rope(qkv, heads, cos, sin, **options)
    return q, k


def _fake_qk_norm_rope(qkv: Tensor, heads: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    batch, tokens, packed = qkv.shape
    shape = (batch, heads, tokens, packed // (3 * heads))
    return qkv.new_empty(shape), qkv.new_empty(shape)


_register(
    "qk_norm_rope(Tensor qkv, int heads, Tensor cos, Tensor sin, *, Tensor? q_weight=None, Tensor? k_weight=None, "
    "str norm='rms', str pairs='halves', float eps=1e-6) -> (Tensor, Tensor)",
    _qk_norm_rope,
    _fake_qk_norm_rope,
)


def _fake_attention(q: Tensor, *_: Any, **__: Any) -> Tensor:
    batch, heads, tokens, dim = q.shape
    return q.new_empty(batch, tokens, heads, dim).transpose(1, 2)


def _attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return attention(q, k, v, out=_fake_attention(q), **options)  # whichever backend: always the same strides


_register(
    "attention(Tensor q, Tensor k, Tensor v, *, Tensor? key_lengths=None, int? window=None, float? scale=None, "
    "str backend='auto') -> Tensor",
    _attention,
    _fake_attention,
)
_register(
    "cross_attention(Tensor q, Tensor k, Tensor v, *, Tensor? q_weight=None, Tensor? key_lengths=None, "
    "float? scale=None, float eps=1e-6) -> Tensor",
    lambda q, *rest, **options: cross_attention(q, *rest, out=q.new_empty(q.shape), **options),
    lambda q, *_, **__: q.new_empty(q.shape),
)


def _fake_linear(
    x: Tensor, weight: Tensor, *_: Any, activation: str = "none", out_dtype: torch.dtype | None = None, **__: Any
) -> Tensor:
    columns = weight.shape[0] // 2 if activation == "swiglu" else weight.shape[0]
    made = torch.bfloat16 if x.dtype == torch.float8_e4m3fn else x.dtype
    return x.new_empty((*x.shape[:2], columns), dtype=out_dtype or made)


_register(
    "linear(Tensor x, Tensor weight, Tensor? bias=None, *, str activation='none', float x_scale=1.0, "
    "Tensor? weight_scale=None, ScalarType? out_dtype=None, float out_scale=1.0) -> Tensor",
    linear,
    _fake_linear,
)
_register(
    "linear_gate_residual(Tensor x, Tensor weight, Tensor? bias, Tensor residual, Tensor? table=None, *, int gate=0, "
    "Tensor? base=None, float x_scale=1.0, Tensor? weight_scale=None) -> Tensor",
    lambda *arguments, **options: linear_gate_residual(*arguments, **options).contiguous(),
    lambda x, weight, bias, residual, *_, **__: residual.new_empty(residual.shape),
)


def _normal(seeds: Tensor, shape: Sequence[int], **options: Any) -> Tensor:
    return normal(seeds, tuple(shape), **options)


_register(
    "normal(Tensor seeds, SymInt[] shape, *, int stream=0, float scale=1.0) -> Tensor",
    _normal,
    lambda seeds, shape, **_: seeds.new_empty((seeds.shape[0], *shape), dtype=torch.float32),
)
_register(
    "edm_step(Tensor x, Tensor conditional, Tensor coefficient, *, Tensor? unconditional=None, Tensor? seeds=None, "
    "int stream=0) -> (Tensor, Tensor)",
    edm_step,
    lambda x, conditional, *_, **__: (x.new_empty(x.shape), conditional.new_empty(x.shape)),
)
_register(
    "pcm(Tensor samples, Tensor? seeds=None) -> Tensor",
    pcm,
    lambda samples, seeds=None: samples.new_empty(
        (samples.shape[0], samples.shape[2], samples.shape[1]), dtype=torch.int16
    ),
)


def _fake_spectrum(head: Tensor, **_: Any) -> Tensor:
    return head.new_empty((*head.shape[:2], head.shape[2] // 2), dtype=torch.complex64)


_register("spectrum(Tensor head, *, str kind='polar', float limit=100.0) -> Tensor", spectrum, _fake_spectrum)


def _fake_overlap_add(frames: Tensor, window: Tensor, hop: int, *, padding: str = "center") -> Tensor:
    count = frames.shape[1]
    return frames.new_empty((frames.shape[0], (count if padding == "same" else count - 1) * hop), dtype=torch.float32)


_register(
    "overlap_add(Tensor frames, Tensor window, int hop, *, str padding='center') -> Tensor",
    overlap_add,
    _fake_overlap_add,
)

_register(
    "spsi(Tensor magnitude, int hop, int size) -> Tensor",
    spsi,
    lambda magnitude, *_: magnitude.new_empty(magnitude.shape, dtype=torch.complex64),
)


def _fake_snake_conv1d(x: Tensor, weight: Tensor, *_: Any, dilation: int = 1, padding: int = 0, **__: Any) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[1], x.shape[2] + 2 * padding - dilation * (weight.shape[0] - 1)))


_register(
    "snake_conv1d(Tensor x, Tensor weight, Tensor? bias=None, *, Tensor? alpha=None, Tensor? beta=None, "
    "int dilation=1, int padding=0, Tensor? residual=None) -> Tensor",
    snake_conv1d,
    _fake_snake_conv1d,
)


def _fake_conv_transpose1d(
    x: Tensor, weight: Tensor, *_: Any, stride: int, kernel_size: int, padding: int = 0, output_padding: int = 0,
    **__: Any,
) -> Tensor:  # fmt: skip
    channels = weight.shape[1] // (1 << (stride - 1).bit_length())
    return x.new_empty((x.shape[0], channels, (x.shape[2] - 1) * stride - 2 * padding + kernel_size + output_padding))


_register(
    "conv_transpose1d(Tensor x, Tensor weight, Tensor? bias=None, *, int stride, int kernel_size, int padding=0, "
    "int output_padding=0, Tensor? alpha=None, Tensor? beta=None) -> Tensor",
    conv_transpose1d,
    _fake_conv_transpose1d,
)
