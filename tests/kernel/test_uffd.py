"""userfaultfd: the ABI written down in native/uffd.h, and each ioctl against the running kernel."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshot import events
from snapshot.errors import UnsupportedError
from snapshot.kernel import uffd
from snapshot.kernel.uffd import FEATURES, Uffd, UffdError
from snapshot.units import CHUNK, PAGE

HEADER = Path(uffd.__file__).parent / "native" / "uffd.h"
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: sudo pytest tests/kernel")


@pytest.fixture
def memory() -> tuple[mmap.mmap, int]:
    """An empty anonymous mapping of 16 pages, aligned to a chunk inside of 32."""
    area = mmap.mmap(-1, 2 * CHUNK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    base = ctypes.addressof(ctypes.c_char.from_buffer(area))
    return area, -(-base // CHUNK) * CHUNK  # mapped as long as the exported buffer lives


@pytest.fixture
def fd() -> Iterator[Uffd]:
    with Uffd.open() as opened:
        yield opened


def test_constants_are_those_of_the_system_header(tmp_path: Path) -> None:
    """Every constant that the system's header has too must be the same there."""
    text = HEADER.read_text()
    ours = dict(re.findall(r"^#define (UFFD\w+)\s+(\S.*?)\s*(?:/\*.*)?$", text, re.M))
    ours.pop("UFFD_API_VERSION")
    checks = "\n".join(
        f'#ifdef {name}\n_Static_assert({name} == ({value}), "{name}");\nint seen_{name};\n#endif'
        for name, value in ours.items()
    )
    enums = {"UFFD_PAGEFAULT_FLAG_WRITE", "UFFD_EVENT_PAGEFAULT"}
    assert enums <= ours.keys()
    source = tmp_path / "abi.c"
    source.write_text(
        "#include <linux/userfaultfd.h>\n#include <stdint.h>\n#include <sys/ioctl.h>\n"
        + checks
        + '\n_Static_assert(UFFD_API == 0xAA, "UFFD_API");'
        + '\n_Static_assert(sizeof(struct uffd_msg) == 32, "uffd_msg");'
        + '\n_Static_assert(sizeof(struct uffdio_copy) == 40, "uffdio_copy");'
        + '\n_Static_assert(UFFDIO_COPY == 0xc028aa03, "UFFDIO_COPY");\n'
    )
    object_file = tmp_path / "abi.o"
    subprocess.run(["gcc", "-c", "-o", object_file, source], check=True)
    seen = subprocess.run(["nm", object_file], capture_output=True, text=True, check=True).stdout
    assert seen.count("seen_") > 15, "the system's header was hardly compared"


def test_available_features_have_names() -> None:
    features = uffd.available()
    assert "EVENT_FORK" in uffd.names(features)
    assert features & FEATURES["PAGEFAULT_FLAG_WP"]


def test_a_missing_feature_is_named(fd: Uffd) -> None:
    with pytest.raises(UnsupportedError, match="0x4000000000000000"):
        fd.api(FEATURES["EVENT_FORK"] | 1 << 62)
    fd.api(FEATURES["EVENT_FORK"])  # the handshake can be repeated after a refusal


def test_missing_fault_is_served_by_copy(fd: Uffd, memory: tuple[mmap.mmap, int]) -> None:
    _, base = memory
    fd.api(0)
    fd.register(base, CHUNK, uffd.MISSING)
    seen: list[bytes] = []
    reader = threading.Thread(target=lambda: seen.append(ctypes.string_at(base + 5, 3)))
    # string_at holds the GIL while it waits for the page: the fault must be served by a process
    # of its own (the reason why lazy.py has a page server).
    child = os.fork()
    if child == 0:
        served = fd.poll(10_000)
        (fault,) = events.parse(fd.read_msgs())
        copied = fd.copy(base, bytes(range(256)) * 16, PAGE)
        good = served and isinstance(fault, events.Fault) and fault.address == base
        os._exit(0 if good and copied == (PAGE, 0) else 1)
    reader.start()
    reader.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert seen == [bytes([5, 6, 7])]


def test_partial_copy_is_told_apart_from_its_errno(fd: Uffd, memory: tuple[mmap.mmap, int]) -> None:
    _, base = memory
    fd.api(0)
    fd.register(base, CHUNK, uffd.MISSING)
    assert fd.zeropage(base + 2 * PAGE, PAGE) == (PAGE, 0)
    data = b"x" * CHUNK
    assert fd.copy(base, data, 4 * PAGE) == (2 * PAGE, errno.EAGAIN)
    assert fd.copy(base + 2 * PAGE, data, 2 * PAGE) == (0, errno.EEXIST)
    assert fd.copy(base + CHUNK, data, PAGE) == (0, errno.ENOENT)


def test_fill_steps_over_pages_that_are_there_or_gone(
    fd: Uffd, memory: tuple[mmap.mmap, int]
) -> None:
    _, base = memory
    fd.api(0)
    fd.register(base, 8 * PAGE, uffd.MISSING)  # pages 8 to 15 are not registered
    fd.zeropage(base + 3 * PAGE, PAGE)
    data = b"".join(bytes([65 + page]) * PAGE for page in range(16))
    filled = fd.fill(base, data, wanted=0x0FFE, present=0x0FCF)
    assert filled == (0, 0, 4, 2, 1, 4)
    got = ctypes.string_at(base + PAGE, 7 * PAGE)[::PAGE]
    assert got == b"BC\0\0\0GH"  # page 3 was there, 4 and 5 are absent in the image


def test_writeprotect_and_wake(fd: Uffd, memory: tuple[mmap.mmap, int]) -> None:
    area, base = memory
    area[:] = b"a" * len(area)
    fd.api(FEATURES["PAGEFAULT_FLAG_WP"])
    fd.register(base, CHUNK, uffd.WP)
    fd.writeprotect(base, CHUNK, on=True)
    writer = os.fork()  # the child is not protected: userfaultfd without EVENT_FORK is dropped
    if writer == 0:
        ctypes.memset(base, 98, 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1]) == 0
    fd.writeprotect(base, CHUNK, on=False)
    ctypes.memset(base, 99, 1)
    assert not fd.poll(0)
    fd.wake(base, CHUNK)
    fd.unregister(base, CHUNK)
    with pytest.raises(UffdError) as caught:
        fd.writeprotect(base, CHUNK, on=True)
    assert caught.value.errno == errno.ENOENT
    assert hex(base) in caught.value.message


def test_no_message_is_no_bytes(fd: Uffd) -> None:
    fd.api(0)
    assert fd.read_msgs() == b""
    assert not fd.poll(0)
