"""Sizes and addresses as people write them. ValueError says what was expected."""

from __future__ import annotations

from contextlib import suppress


def size(given: str) -> int:
    """Bytes of `4096`, `0x1000`, `64K`, `256M`, `1.5G`, `256 MiB`."""
    number = given.strip().upper().removesuffix("IB").removesuffix("B").strip()
    factor = 1
    if not number.startswith("0X") and number[-1:] in ("K", "M", "G", "T"):
        factor = 1024 ** ("KMGT".index(number[-1]) + 1)
        number = number[:-1].strip()
    try:
        value = int(float(number) * factor) if "." in number else int(number, 0) * factor
    except (ValueError, OverflowError):
        value = -1
    if value < 0:
        raise ValueError(f"{given!r} is not a size like 4096, 64K or 1.5G")
    return value


def address(given: str) -> int:
    """An address: `0x7ffd5000`, or as in /proc/PID/maps without 0x when it has a hex letter."""
    for base in (0, 16):
        with suppress(ValueError):
            if (value := int(given, base)) >= 0:
                return value
    raise ValueError(f"{given!r} is not an address like 0x7ffd5000")
