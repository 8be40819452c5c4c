"""What holds something of the kernel's, and is used in a `with` statement."""

from __future__ import annotations

from typing import Self


class Closing:
    """A context manager that closes at the end."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
