"""Memory whose pages are there: a first touch would cost more than what is read into it."""

from __future__ import annotations

from ..units import PAGE


def touched(size: int) -> bytearray:
    """Zeros."""
    made = bytearray(size)
    made[::PAGE] = bytes(len(made[::PAGE]))
    return made
