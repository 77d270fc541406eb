"""Counter-based random numbers: the same noise for a seed on every device, in C++, torch and Triton, to the bit.

Generator. Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The key is the
64-bit seed, low word first. Elements come in blocks of four; block b = i // 4 has the counter (b mod 2^32, b div
2^32, stream, 0), and element i takes word j = i mod 4 of its block. So element i of a flattened tensor depends on
(seed, stream, i) alone: a longer clip begins with the same noise, and any part can be made without the rest.

Normals. Box and Muller's transform makes the elements (0, 1) of a block from the words (x0, x1) and the elements (2,
3) from (x2, x3). Every operation is a correctly rounded fp32 one (+, -, *, /, sqrt, conversion) or an integer one, in
exactly this order, and **no multiply and add may be fused**; constants are rounded from double to fp32. With word `x`
of the radius and word `y` of the angle:

    u     = fp32(x) * 2^-32 + 2^-33                 conversion rounds to nearest even; 0 < u <= 1
    e     = (bits(u) - 0x3F3504F3) >> 23            int32, arithmetic shift: u = 2^e m with m in [sqrt(1/2), sqrt(2))
    m     = float(bits(u) - e * 2^23)
    s     = (m - 1) / (m + 1)                       ln m = 2 artanh s
    t     = s * s
    p     = t * (1/9) + 1/7;  p = t * p + 1/5;  p = t * p + 1/3
    h     = (s * t) * p + s
    ln    = fp32(e) * ln2 + h * 2
    r     = sqrt(ln * -2)

    w     = y + 2^29 mod 2^32                       uint32
    q     = w >> 30                                 the quadrant; the rest of the angle lies in [-pi/4, pi/4)
    a     = fp32(int32(w & (2^30 - 1)) - 2^29) * (2 pi / 2^32)
    b     = a * a
    p     = b * (1/9!) - 1/7!;  p = b * p + 1/5!;  p = b * p - 1/3!;  sin = (a * b) * p + a
    p     = b * (1/8!) - 1/6!;  p = b * p + 1/4!;  p = b * p - 1/2;   cos = b * p + 1
    (c, d) = (cos, sin), (-sin, cos), (-cos, -sin), (sin, -cos)       for q = 0, 1, 2, 3
    elements  r * c,  r * d

In Triton this means `tl.div_rn`, `tl.sqrt_rn`, and `enable_fp_fusion=False` at launch. Against the exact formula in
fp64, from the same u, the error is below 1e-6; the largest magnitude that can come out is sqrt(66 ln 2) = 6.76.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from .. import native
from ..errors import InvalidInputError

MAX_SEED = 2**64 - 1
MAX_STREAM = 2**32 - 1

_MASK32 = 0xFFFFFFFF


def check_seed(seed: object) -> int:
    """The seed as an int from 0 to 2^64 - 1; InvalidInputError otherwise (bool and float included)."""
    return _integer(seed, "seed", MAX_SEED)


def normal(seed: int, shape: Sequence[int], *, stream: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal noise, float32, of the given shape on the given device.

    Element i of the flattened shape depends only on (seed, stream, i). Different streams (0 to 2^32 - 1) of one seed
    are independent. Raises InvalidInputError for a seed, stream or shape out of range.
    """
    seed = check_seed(seed)
    stream = _integer(stream, "stream", MAX_STREAM)
    sizes = tuple(_integer(size, "size in shape", 2**62) for size in shape)
    device = torch.device(device)
    if native.lib is not None and device.type == "cpu":
        out = torch.empty(sizes, dtype=torch.float32)
        native.lib.normal(out, seed, stream)
        return out
    return normal_torch(seed, math.prod(sizes), stream=stream, device=device).reshape(sizes)


def normal_torch(seed: int | Tensor, count: int, *, stream: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """The first `count` elements of a stream, float32, by the equations above: the torch reference of `normal`.

    seed: an int, or its 64 bits as an int64 tensor without dimensions, which is not read on the host.
    """
    words = random_words(seed, count, stream=stream, device=device).reshape(-1, 2, 2)
    radius = polar_radius(words[..., 0])
    cosine, sine = polar_direction(words[..., 1])
    return torch.stack((radius * cosine, radius * sine), dim=-1).flatten()[:count]


def random_words(seed: int | Tensor, count: int, *, stream: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """The words of the first `count` elements of a stream and of the rest of the last block, as int64 in [0, 2^32)."""
    block = torch.arange((count + 3) // 4, dtype=torch.int64, device=device)
    counters = torch.stack((block & _MASK32, block >> 32, torch.full_like(block, stream), torch.zeros_like(block)))
    return philox4x32(counters, seed).T.flatten()


def philox4x32(counters: Tensor, seed: int | Tensor) -> Tensor:
    """Philox4x32-10 in torch. counters (4, n): 32-bit words in int64; key: the 64-bit seed. Returns words (4, n),
    int64."""
    c0, c1, c2, c3 = counters
    key0, key1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & _MASK32, (key1 + 0xBB67AE85) & _MASK32
    return torch.stack((c0, c1, c2, c3))


def _multiply(factor: int, words: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of factor * words. The product has 64 bits and int64 only 63, so the factor goes in
    halves."""
    low = words * (factor & 0xFFFF)
    high = words * (factor >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def polar_radius(word: Tensor) -> Tensor:
    """Return sqrt(-2 ln u), float32, of 32-bit words held in int64."""
    u = word.to(torch.float32) * 2.0**-32 + 2.0**-33
    bits = u.view(torch.int32)
    exponent = (bits - 0x3F3504F3) >> 23
    m = (bits - exponent * 2**23).view(torch.float32)
    s = (m - 1.0) / (m + 1.0)
    t = s * s
    p = t * (1.0 / 9.0) + 1.0 / 7.0
    p = t * p + 1.0 / 5.0
    p = t * p + 1.0 / 3.0
    artanh = (s * t) * p + s
    ln = exponent.to(torch.float32) * math.log(2.0) + artanh * 2.0
    # torch.sqrt of fp32 need not be correctly rounded on the CPU (a vector library computes it). In fp64 a few ulp do
    # no harm: the root of an fp32 number is at least 4 fp64 ulp away from the midpoint of two fp32 numbers, so this
    # rounds correctly.
    return torch.sqrt((ln * -2.0).to(torch.float64)).to(torch.float32)


def polar_direction(word: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin of 2 pi word / 2^32, float32, of 32-bit words held in int64."""
    shifted = (word + 2**29) & _MASK32
    quadrant = shifted >> 30
    a = ((shifted & (2**30 - 1)) - 2**29).to(torch.float32) * (2.0 * math.pi * 2.0**-32)
    b = a * a
    p = b * (1.0 / 362880.0) - 1.0 / 5040.0
    p = b * p + 1.0 / 120.0
    p = b * p - 1.0 / 6.0
    sine = (a * b) * p + a
    p = b * (1.0 / 40320.0) - 1.0 / 720.0
    p = b * p + 1.0 / 24.0
    p = b * p - 0.5
    cosine = b * p + 1.0
    odd = (quadrant & 1) == 1
    x, y = torch.where(odd, sine, cosine), torch.where(odd, cosine, sine)
    x = torch.where((quadrant == 1) | (quadrant == 2), -x, x)
    return x, torch.where(quadrant >= 2, -y, y)


def _integer(value: object, name: str, largest: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InvalidInputError(f"{name} must be an integer from 0 to {largest}, got {value!r}")
    number = int(value)
    if not 0 <= number <= largest:
        raise InvalidInputError(f"{name} must be an integer from 0 to {largest}, got {number}")
    return number
