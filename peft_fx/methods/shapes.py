"""Sizes that have to fit."""

import math


def divisors(size: int) -> list[int]:
    return [d for d in range(1, size + 1) if size % d == 0]


def nearest_divisor(wanted: int, size: int) -> int:
    """The divisor of `size` nearest to `wanted`."""
    return min(divisors(size), key=lambda d: abs(d - wanted))


def indivisible(name: str, value: int, size: int, of: str) -> str | None:
    """Why `name=value` is refused where it does not divide `size`, which is called `of`."""
    if size % value == 0:
        return None
    return f"{name}={value} does not divide {of}; nearest valid: {nearest_divisor(value, size)}"


def factorization(size: int, factor: int) -> tuple[int, int]:
    """(factor, size / factor) if that divides, else the divisors closest to the root, the smaller one first and <= factor."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    largest = size if factor == -1 else factor
    small = max(i for i in range(1, math.isqrt(size) + 1) if size % i == 0 and i <= max(largest, 1))
    return small, size // small
