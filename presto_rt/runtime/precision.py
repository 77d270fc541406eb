"""`Precision`: the number format of matrix products and activations, one value for the whole runtime."""

from __future__ import annotations

from dataclasses import dataclass

import torch

NAMES = ("float32", "bfloat16", "float16", "int8", "fp8")


@dataclass(frozen=True)
class Precision:
    """Format of matrix products, and dtype of everything between them.

    name: one of NAMES. dtype: of activations and of products that are not in int8 or fp8.
    """

    name: str
    dtype: torch.dtype

    @classmethod
    def of(cls, dtype: torch.dtype) -> Precision:
        """Return the precision of products in a floating-point dtype."""
        return cls(str(dtype).removeprefix("torch."), dtype)

    def __str__(self) -> str:
        return self.name
