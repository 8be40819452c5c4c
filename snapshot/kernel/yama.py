"""Yama, the security module that by default lets a process trace only its own descendants.

Documentation/admin-guide/LSM/Yama.rst: PR_SET_PTRACER names one more process (and its descendants)
that may trace the caller under ptrace_scope 1. There is no way to ask who is named at the moment.
"""

from __future__ import annotations

import ctypes

PR_SET_PTRACER = 0x59616D61
SCOPE = "/proc/sys/kernel/yama/ptrace_scope"


def allow_tracer(pid: int) -> None:
    """Let `pid` trace the calling process; 0 takes it back. Does nothing without Yama (EINVAL)."""
    ctypes.CDLL(None).prctl(PR_SET_PTRACER, ctypes.c_ulong(pid), 0, 0, 0)


def scope() -> int | None:
    """0: like classic ptrace, 1: descendants only, 2: CAP_SYS_PTRACE only, 3: nobody; None: no
    Yama in this kernel."""
    try:
        with open(SCOPE, encoding="ascii") as file:
            return int(file.read())
    except OSError:
        return None
