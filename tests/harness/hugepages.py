"""The machine's pool of 2 MiB pages, for a test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SIZE = 2 << 20
_POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")


class Unavailable(Exception):
    """Why there can be none."""


@contextmanager
def more(pages: int) -> Iterator[None]:
    """`pages` more than there were; afterwards as many less, so that others may do the same."""
    if not _POOL.exists():
        raise Unavailable("this kernel has no 2 MiB pages (CONFIG_HUGETLBFS)")
    before = total()
    try:
        resize(pages)
    except OSError as error:
        raise Unavailable(f"{_POOL}/nr_hugepages: {error.strerror}") from None
    got = total() - before
    try:
        if got < pages:
            raise Unavailable(f"no memory for {pages} huge pages in a row, only for {got}")
        yield
    finally:
        resize(-got)


def resize(by: int) -> None:
    (_POOL / "nr_hugepages").write_text(str(total() + by))


def total() -> int:
    return _number("nr_hugepages")


def used() -> int:
    """Pages that somebody has touched; what is only reserved does not count."""
    return total() - _number("free_hugepages")


def free() -> int:
    """That nobody has reserved."""
    return _number("free_hugepages") - _number("resv_hugepages")


def _number(name: str) -> int:
    return int((_POOL / name).read_text())
