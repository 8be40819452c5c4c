"""`snap check`: what this kernel, this user and a target allow, item by item.

Every item is found out by doing the thing, on a small process made for it (kernel/selftest.py);
versions are never asked. A target is only looked at, never stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from .errors import DeniedError, SnapError, StoreError, TargetError, UnsupportedError
from .kernel import probes, procfs, uffd, yama
from .kernel.selftest import PATTERN
from .kernel.stored import Stored
from .units import MIB, count, mib

State = Literal["ok", "degraded", "missing"]
STAGING = 192 * MIB
ROOT = "sudo snap check"


@dataclass(frozen=True, slots=True)
class Item:
    """`missing`: a take or a restore cannot work without it; `degraded`: something less can be
    done. `lost` says what, `command` what would allow it, `exit_code` what a take would end with.
    """

    item: str
    state: State
    detail: str = ""
    lost: str = ""
    command: str = ""
    exit_code: int = 0


@dataclass(frozen=True, slots=True)
class _Sample:
    """The process that probes are made on, and what it found out about itself."""

    pid: int
    page: int
    features: list[str]
    results: dict[str, str]


def run(pid: int | None = None, store: Path | None = None) -> list[Item]:
    """All items; those of the target `pid` last. Raises nothing that an item could say."""
    try:
        with _sample() as sample:
            items = [*_userfaultfd(sample), *_tracing(sample)]
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        code = UnsupportedError.exit_code
        items = [Item("self-test", "missing", str(error), "everything", ROOT, code)]
    items += _resources(store)
    if pid is not None:
        items += _target(pid)
    return items


def exit_code(items: list[Item]) -> int:
    """0 when a take and a restore can work; else the code of what a take would end with."""
    codes = [item.exit_code for item in items if item.state == "missing"]
    order = (TargetError, DeniedError, UnsupportedError, StoreError)
    return next(
        (kind.exit_code for kind in order if kind.exit_code in codes), max(codes, default=0)
    )


def as_json(items: list[Item], pid: int | None) -> dict[str, Any]:
    return {
        "ok": exit_code(items) == 0,
        "pid": pid,
        "exit_code": exit_code(items),
        "items": [asdict(item) for item in items],
    }


def as_text(items: list[Item]) -> list[str]:
    lines = []
    for item in items:
        lines.append(f"{item.state:<9} {item.item:<30} {item.detail}".rstrip())
        if item.state != "ok":
            lines += [f"{'':<9} lost: {item.lost}"] if item.lost else []
            lines += [f"{'':<9} try:  {item.command}"] if item.command else []
    missing = sum(item.state == "missing" for item in items)
    degraded = sum(item.state == "degraded" for item in items)
    verdict = f"{missing} missing" if missing else "take and restore can work"
    return [*lines, f"{verdict}{f', {degraded} degraded' if degraded else ''}"]


@contextlib.contextmanager
def _sample() -> Iterator[_Sample]:
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "snapshot.kernel.selftest"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin, process.stdout:
        line = process.stdout.readline()
        process.wait()  # the first process; the one that answered is nobody's child
        if not line:
            raise ValueError("the self-test ended without an answer")
        sample = _Sample(**json.loads(line))
        yield sample
    with contextlib.suppress(ChildProcessError):
        os.waitpid(sample.pid, 0)  # our own after all: this process is a sub-reaper


# --- this kernel and this user --------------------------------------------------------------------


def _item(
    name: str, reason: str, lost: str, command: str, code: int = UnsupportedError.exit_code
) -> Item:
    """Something that cannot be done without; a reason of EPERM or EACCES makes it a denial."""
    if not reason:
        return Item(name, "ok")
    if "EPERM" in reason or "EACCES" in reason or "not permitted" in reason:
        code = DeniedError.exit_code
    return Item(name, "missing", reason, lost, command, code)


def _optional(name: str, reason: str, lost: str, command: str) -> Item:
    return Item(name, "degraded", reason, lost, command) if reason else Item(name, "ok")


def _userfaultfd(sample: _Sample) -> list[Item]:
    from . import lazy, wrprotect

    results, have = sample.results, set(sample.features)
    call, device = results["system_call"], results["device"]
    root = os.geteuid() == 0
    items = []
    if call and device:
        lost = "everything: neither way to a userfaultfd is open"
        command = "sudo sysctl vm.unprivileged_userfaultfd=1"
        items.append(_item("userfaultfd", f"{call}; /dev/userfaultfd: {device}", lost, command))
        absent = f"none to be asked: {call}"
    else:
        absent = ""
        command = "sudo sysctl vm.unprivileged_userfaultfd=1"
        items.append(_optional("userfaultfd(2)", call, "the direct way to a userfaultfd", command))
        lost = "targets that lack CAP_SYS_PTRACE, unless vm.unprivileged_userfaultfd is 1"
        command = "sudo chmod 666 /dev/userfaultfd" if not root else "ls -l /dev/userfaultfd"
        items.append(_optional("/dev/userfaultfd", device, lost, command))
    # A user who may not have a userfaultfd learns nothing of the kernel: a newer one is no help.
    newer = command if absent else "uname -r   (a kernel that has it is needed)"
    lacks = absent or _lacks([name for name in wrprotect.NEEDED if name not in have])
    items.append(_item("userfaultfd features, take", lacks, "takes", newer))
    lacks = absent or _lacks([name for name in uffd.names(lazy.EVENTS) if name not in have])
    items.append(_optional("userfaultfd features, lazy", lacks, "restore --lazy", newer))
    memory = "takes of processes with shared memory"
    denied = "CAP_SYS_PTRACE" in results["missing"]
    lazily = "sudo snap restore IMAGE --lazy" if denied else newer
    items += [
        _item("write-protect, private memory", results["wp_private"], "takes", newer),
        _item("write-protect, shared memory", results["wp_shared"], memory, newer),
        _optional("missing faults", results["missing"], "restore --lazy", lazily),
    ]
    return items


def _lacks(names: list[str]) -> str:
    return f"the kernel lacks {', '.join(names)}" if names else ""


def _tracing(sample: _Sample) -> list[Item]:
    pid, page = sample.pid, sample.page
    as_root = "sudo snap take PID"
    scope = yama.scope()
    unlock = "sudo sysctl kernel.yama.ptrace_scope=0" if scope else as_root
    caps = "sudo setcap cap_checkpoint_restore+ep PYTHON   (or: sudo snap restore IMAGE)"
    return [
        _item(
            "ptrace",
            probes.trace(pid),
            "takes of processes that are not this shell's own children",
            unlock,
        ),
        _item("process_vm_readv", probes.read_memory(pid, page, PATTERN), "takes", unlock),
        _item("PAGEMAP_SCAN", probes.scan_pages(pid, page), "takes", "uname -r   (6.7 or newer)"),
        _item("pidfd_getfd", probes.take_descriptor(pid), "takes", unlock),
        _item("kcmp", probes.compare_descriptors(pid), "dup'ed descriptors in takes", unlock),
        _item("/proc/PID/map_files", probes.map_files(pid), "takes of mapped files", as_root),
        _optional(
            "BPF task iterator",
            probes.read_tasks(pid),
            "a pause that is 0.5 ms shorter, and 50 µs for each thread",
            as_root,
        ),
        _item("clone3 set_tid", probes.choose_pid(), "restores with the same pids", caps),
        _optional(
            "pid namespace",
            probes.pid_namespace(),
            "restore --pid new",
            "sudo snap restore IMAGE --pid new",
        ),
    ]


def _resources(store: Path | None) -> list[Item]:
    short_way = "" if Stored.possible() else "not there, or other than it should be"
    lost = "missing pages of a lazy restore in half the time"
    items = [_optional("libzstd", short_way, lost, "sudo apt-get install libzstd1")]
    available = _available_memory()
    if available is not None:
        short = "" if available >= 2 * STAGING else f"{mib(available)} available"
        lost = f"room for {mib(STAGING)} of staging"
        item = _optional("memory", short, lost, "snap take PID --memory 64M")
        items.append(item if short else Item("memory", "ok", f"{mib(available)} available"))
    if store is not None:
        items.append(_space(store))
    return items


def _available_memory() -> int | None:
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _space(store: Path) -> Item:
    existing = store.absolute()
    while not existing.exists():
        existing = existing.parent
    name, code = f"store {store}", StoreError.exit_code
    elsewhere = "snap take PID --store DIR"
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return Item(name, "missing", f"{existing} is not writable", "takes", elsewhere, code)
    if (existing == store.absolute()) and any(existing.iterdir()):
        from .store import Store

        try:
            Store.open(store).close()
        except SnapError as error:
            return Item(name, "missing", error.message, "takes", error.hint, error.exit_code)
    free = shutil.disk_usage(existing).free
    if free < STAGING:
        return Item(name, "degraded", f"{mib(free)} free", "room for images", elsewhere)
    return Item(name, "ok", f"{mib(free)} free")


# --- a target -------------------------------------------------------------------------------------


def _target(pid: int) -> list[Item]:
    from . import examine

    name = f"process {pid}"
    try:
        examine.target(pid)
        status = procfs.status(pid)
    except DeniedError:
        status = procfs.status(pid)  # "permission" below says why
    except SnapError as error:
        return [Item(name, "missing", error.message, "the take", error.hint, error.exit_code)]
    threads, resident = count(int(status["Threads"]), "thread"), mib(status.number("VmRSS") * 1024)
    found = Item(name, "ok", f"{status['Name']}, {threads}, {resident} resident")
    denied = probes.open_memory(pid)
    if denied:
        detail, command = f"{denied}{_why_denied(status)}", f"sudo snap take {pid}"
        code = DeniedError.exit_code
        return [found, Item("permission", "missing", detail, "the take", command, code)]
    return [found, Item("permission", "ok"), *_contents(pid)]


def _why_denied(status: procfs.Status) -> str:
    reasons = []
    if os.geteuid() not in status.uids:
        reasons.append(f"it belongs to uid {status.uids[0]}, snap runs as {os.geteuid()}")
    if os.geteuid() == 0:
        reasons.append("root without CAP_SYS_PTRACE")
    if scope := yama.scope():
        reasons.append(f"kernel.yama.ptrace_scope is {scope}")
    return f" ({'; '.join(reasons)})" if reasons else ""


def _contents(pid: int) -> list[Item]:
    """What of its mappings and descriptors a take could not handle, or not bring back as it was."""
    from . import examine
    from .resources import preflight

    name, lost = "mappings and descriptors", "the take"
    try:
        plan = examine.examine(pid).plan
        examine.refuse(pid, plan)
        changed = [*plan.warnings, *preflight.warnings(pid)]
    except UnsupportedError as error:
        things = error.things or [error.message]
        show = f"ls -l /proc/{pid}/fd; cat /proc/{pid}/maps"
        return [Item(name, "missing", thing, lost, show, error.exit_code) for thing in things]
    except SnapError as error:
        return [Item(name, "missing", error.message, lost, error.hint, error.exit_code)]
    slow = [Item("pause", "degraded", one, "a short pause", "") for one in plan.costs]
    lost, show = "this much of it after a restore", f"snap take {pid}   (and snap show IMAGE)"
    return [
        Item(name, "ok"),
        *slow,
        *(Item("not restored as it was", "degraded", one, lost, show) for one in changed),
    ]
