"""Sine and cosine inside kernels, by range reduction and polynomials.

`tl.sin` has a slow path for huge arguments, which costs every thread a stack in local memory.
"""

from __future__ import annotations

from .runtime import jit, tl


@jit
def nearest(x):  # type: ignore[no-untyped-def]
    """Round x to an integer, as fp32, for |x| < 2^22: above 2^23 fp32 has no fraction bits, so the sum rounds."""
    return (x + 12582912.0) - 12582912.0


@jit
def sin_cos(x):  # type: ignore[no-untyped-def]
    """Return (sin x, cos x) in fp32 with an absolute error below 3e-7 for |x| < 6000.

    The nearest multiple of pi/2 is subtracted in three parts; two polynomials evaluate the rest.
    """
    k = nearest(x * 0.6366197723675814)
    r = ((x - k * 1.5703125) - k * 4.837512969970703e-4) - k * 7.549789948768648e-8
    s = r * r
    sine = r + r * s * (-1.6666666e-1 + s * (8.3333310e-3 + s * (-1.9840874e-4 + s * 2.7525562e-6)))
    cosine = 1.0 + s * (-0.5 + s * (4.1666638e-2 + s * (-1.3888378e-3 + s * 2.4463779e-5)))
    quadrant = k.to(tl.int32) & 3
    odd = (quadrant & 1) == 1
    a, b = tl.where(odd, cosine, sine), tl.where(odd, sine, cosine)
    return tl.where(quadrant >= 2, -a, a), tl.where((quadrant == 1) | (quadrant == 2), -b, b)


@jit
def sin_squared(x):  # type: ignore[no-untyped-def]
    """Return sin(x)^2, period pi, in fp32 with an absolute error below 3e-7 for |x| < 6000."""
    k = nearest(x * 0.3183098861837907)
    r = ((x - k * 3.140625) - k * 9.675025939941406e-4) - k * 1.5099579897537296e-7
    s = r * r
    p = -1.984127e-4 + s * (2.7557319e-6 - s * 2.5052108e-8)
    sine = r + r * s * (-1.6666667e-1 + s * (8.333333e-3 + s * p))
    return sine * sine
