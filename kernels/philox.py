"""Counter-based normal noise inside kernels, bitwise equal to `presto_rt.diffusion.noise`.

The docstring of `presto_rt.diffusion.noise` lists every operation in order. Elements 4b ... 4b + 3 of a stream take the
four words of Philox4x32-10 with the counter (b mod 2^32, b div 2^32, stream, 0) and the 64-bit seed as key. Kernels
that call `normals` are launched with UNFUSED, since one fused multiply-add would change bits.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

from typing import Any

from .runtime import jit, tl

#: Launch options of kernels in which every fp32 operation must round on its own.
UNFUSED: dict[str, Any] = {"enable_fp_fusion": False}


@jit
def words(seed, block, stream):  # type: ignore[no-untyped-def]
    """Return four uint32 words for each block index (int64) of a stream under a 64-bit seed."""
    low = (block & 0xFFFFFFFF).to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    return tl.philox(seed, low, high, low * 0 + stream.to(tl.uint32), low * 0)


@jit
def interleave(a, b, c, d):  # type: ignore[no-untyped-def]
    """Return a0 b0 c0 d0 a1 b1 c1 d1 ..."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (a.shape[0] * 4,))


@jit
def box_muller(radius_word, angle_word):  # type: ignore[no-untyped-def]
    """Return two standard normals from two uint32 words (Box & Muller 1958)."""
    u = radius_word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # 2^-32, 2^-33
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    m = (bits - exponent * 8388608).to(tl.float32, bitcast=True)
    s = tl.div_rn(m - 1.0, m + 1.0)
    t = s * s
    p = t * (1.0 / 9.0) + (1.0 / 7.0)
    p = t * p + (1.0 / 5.0)
    p = t * p + (1.0 / 3.0)
    artanh = (s * t) * p + s
    ln = exponent.to(tl.float32) * 0.6931471805599453 + artanh * 2.0
    radius = tl.sqrt_rn(ln * -2.0)

    shifted = angle_word + 536870912
    quadrant = shifted >> 30
    rest = (shifted & 1073741823).to(tl.int32) - 536870912
    a = rest.to(tl.float32) * 1.4629180792671596e-09  # 2 pi / 2^32
    b = a * a
    p = b * (1.0 / 362880.0) - (1.0 / 5040.0)
    p = b * p + (1.0 / 120.0)
    p = b * p - (1.0 / 6.0)
    sine = (a * b) * p + a
    p = b * (1.0 / 40320.0) - (1.0 / 720.0)
    p = b * p + (1.0 / 24.0)
    p = b * p - 0.5
    cosine = b * p + 1.0
    odd = (quadrant & 1) == 1
    x, y = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    x = tl.where((quadrant == 1) | (quadrant == 2), -x, x)
    y = tl.where(quadrant >= 2, -y, y)
    return radius * x, radius * y


@jit
def normals(seed, block, stream):  # type: ignore[no-untyped-def]
    """Return the standard normals of elements 4 * block ... 4 * block + 3, in that order, for each block index."""
    w0, w1, w2, w3 = words(seed, block, stream)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    return interleave(n0, n1, n2, n3)
