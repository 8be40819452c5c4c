"""Names of errno values, as messages print them."""

from __future__ import annotations

import errno
import os


def error_name(number: int) -> str:
    """13 or -13 → "EACCES"; the number itself when it has no name."""
    return errno.errorcode.get(abs(number), str(number))


def error_text(number: int) -> str:
    """13 or -13 → "EACCES (Permission denied)"."""
    return f"{error_name(number)} ({os.strerror(abs(number))})"
