"""Calls made inside other processes, with every obstacle a real target can have."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from snapshot.errors import DeniedError, KernelError, TargetError
from snapshot.freeze import freeze
from snapshot.kernel import ptrace, refusal
from snapshot.kernel.arch_x86_64 import NR, Registers
from snapshot.kernel.remote import Call, Remote
from snapshot.kernel.room import find_syscall
from snapshot.units import PAGE

from ..live.freezing import Victim, proc_state, wait_until

# Makes itself difficult in one way, then counts; SIGTRAP and SIGUSR1 are counted as they arrive.
DIFFICULT = r"""
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/auxv.h>
static void on_signal(int number, siginfo_t *info, void *context)
{
    (void)context;
    if (info->si_code != SI_USER && info->si_code != SI_QUEUE && info->si_code != SI_TKILL)
        page->bad++;
    if (number == SIGTRAP) page->result++;
    else page->error++;
}
static void filter(void)
{
    /* Kills on getpid, getppid, mmap, munmap: all that the tests inject. */
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_getpid, 4, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_getppid, 3, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_mmap, 2, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_munmap, 1, 0),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
    };
    struct sock_fprog program = {sizeof code / sizeof *code, code};
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program)) abort();
}
int main(int argc, char **argv)
{
    (void)argc;
    const char *how = argv[2];
    open_page(argv);
    struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_RESTART};
    sigaction(SIGUSR1, &action, 0);
    if (!strcmp(how, "ignored")) signal(SIGTRAP, SIG_IGN);
    else sigaction(SIGTRAP, &action, 0);
    sigset_t trap;
    sigemptyset(&trap), sigaddset(&trap, SIGTRAP);
    if (!strcmp(how, "blocked") || !strcmp(how, "pending")) sigprocmask(SIG_BLOCK, &trap, 0);
    if (!strcmp(how, "pending")) raise(SIGTRAP);
    if (!strcmp(how, "seccomp")) filter();
    if (!strcmp(how, "wx") && prctl(65 /* PR_SET_MDWE */, 1, 0, 0, 0)) page->bad = errno;
    if (!strcmp(how, "locked")) mlockall(MCL_FUTURE);
    if (!strcmp(how, "no vdso")) {
        unsigned long base = getauxval(AT_SYSINFO_EHDR);
        syscall(SYS_munmap, base, 8192);
    }
    char byte;
    page->ready = 1;
    if (!strcmp(how, "busy")) for (;;) page->count++;
    for (;;) { if (read(0, &byte, 1) == 1) page->returned++; else page->bad++; }
}
"""


@contextmanager
def difficult(how: str) -> Iterator[Victim]:
    with Victim(DIFFICULT, how) as victim:
        wait_until(lambda: how == "busy" or victim.system_call() == NR.read, "it reads")
        yield victim


def expect_calls(remote: Remote, pid: int) -> None:
    assert remote.call(NR.getpid) == pid
    assert remote.batch([Call(NR.getpid), Call(NR.getppid)] * 5) == [pid, os.getpid()] * 5


@pytest.mark.parametrize(
    "how", ["plain", "busy", "ignored", "blocked", "pending", "seccomp", "wx", "locked", "no vdso"]
)
def test_calls_and_no_trace_of_them(how: str) -> None:
    with difficult(how) as victim:
        if victim.get("bad"):
            pytest.skip(f"PR_SET_MDWE: {errno.errorcode[victim.get('bad')]}")
        before = proc_state(victim.pid)
        for _ in range(30):
            with freeze(victim.pid) as frozen:
                expect_calls(frozen.remote, victim.pid)
        assert proc_state(victim.pid) == before
        if how != "busy":
            victim.wake()
            wait_until(lambda: victim.get("returned") == 1, "read goes on")
        assert victim.alive
        assert victim.get("bad") == 0
        assert victim.get("result") == 0


def test_hundreds_of_calls() -> None:
    with difficult("plain") as victim, freeze(victim.pid) as frozen:
        remote = frozen.remote
        assert remote.capacity < 1000
        results = remote.batch([Call(NR.dup2, (n, 10_000 + n)) for n in range(1000)])
        assert results[:3] == [10_000, 10_001, 10_002] or results[0] == -errno.EBADF
        assert set(results[3:]) == {-errno.EBADF}
        remote.batch([Call(NR.close, (10_000 + n,)) for n in range(3)])
        assert remote.batch([]) == []


def test_all_six_arguments_and_data() -> None:
    with difficult("plain") as victim, freeze(victim.pid) as frozen:
        remote = frozen.remote
        assert remote.scratch + remote.scratch_size == remote.data + remote.data_size
        text = remote.put(b"six arguments\0", 64)
        assert text == remote.data + 64
        fd = remote.call(NR.memfd_create, text, 0)
        remote.call(NR.ftruncate, fd, 3 * PAGE)
        assert remote.call(NR.pwrite64, fd, text, 13, 2 * PAGE) == 13
        flags = mmap.MAP_SHARED | 0x100000
        hint = remote.scratch - 0x100000000
        address = remote.call(NR.mmap, hint, PAGE, mmap.PROT_READ, flags, fd, 2 * PAGE)
        assert address == hint
        assert remote.get(address, 13) == b"six arguments"
        remote.batch([Call(NR.munmap, (address, PAGE)), Call(NR.close, (fd,))])


def test_a_failing_call_is_named() -> None:
    with difficult("plain") as victim, freeze(victim.pid) as frozen:
        with pytest.raises(KernelError, match=r"close\(0x3e7\) .*EBADF"):
            frozen.remote.call(NR.close, 999)
        assert frozen.remote.batch([Call(NR.close, (999,))]) == [-errno.EBADF]


def test_the_scratch_where_it_is_wanted() -> None:
    with difficult("plain") as victim, freeze(victim.pid) as frozen:
        remote = Remote(frozen.threads[0], size=2 * PAGE)
        remote.open(hint=0x12345000)
        assert (remote.scratch, remote.scratch_size) == (0x12345000, 2 * PAGE)
        expect_calls(remote, victim.pid)
        remote.close()
        maps = Path(f"/proc/{victim.pid}/maps").read_text()
        assert "12345000" not in maps
        with pytest.raises(KernelError, match="mmap"):
            Remote(frozen.threads[0]).open(hint=int(maps.partition("-")[0], 16))
        expect_calls(frozen.remote, victim.pid)


def test_sigtrap_that_becomes_ignored_by_a_call_stays_so() -> None:
    """As when a process is rebuilt: the trap of the same batch must not reset it."""
    with difficult("plain") as victim:
        with freeze(victim.pid) as frozen:
            remote = frozen.remote
            action = remote.put(struct.pack("4Q", 1, 0, 0, 0))
            calls = [Call(NR.getpid), Call(NR.rt_sigaction, (signal.SIGTRAP, action, 0, 8))]
            assert remote.batch([*calls, Call(NR.getpid)]) == [victim.pid, 0, victim.pid]
            expect_calls(remote, victim.pid)
        ignored = int(refusal.status(victim.pid)["SigIgn"], 16)
        assert ignored & 1 << (signal.SIGTRAP - 1)


@pytest.mark.parametrize("count", [1, 200])
def test_sigtrap_from_outside_is_delivered_after_the_calls(count: int) -> None:
    """Sent by another process all the while: none disturbs a batch, and the handler sees them."""
    program = "import os, sys\npid = int(sys.argv[1])\nwhile True: os.kill(pid, 5)\n"
    with difficult("plain") as victim:
        before = proc_state(victim.pid)
        with subprocess.Popen([sys.executable, "-c", program, str(victim.pid)]) as sender:
            try:
                wait_until(lambda: victim.get("result") > 100, "traps arrive")
                for _ in range(100):
                    with freeze(victim.pid) as frozen:
                        for _ in range(3):
                            expected = [victim.pid] * count
                            assert frozen.remote.batch([Call(NR.getpid)] * count) == expected
            finally:
                sender.kill()
        handled = victim.get("result")
        os.kill(victim.pid, signal.SIGTRAP)
        wait_until(lambda: victim.get("result") > handled, "its handler is still there")
        assert victim.get("bad") == 0
        assert proc_state(victim.pid) == before


def test_signals_sent_during_a_batch_wait() -> None:
    with difficult("plain") as victim:
        with freeze(victim.pid) as frozen:
            remote = frozen.remote
            sent = [Call(NR.tgkill, (victim.pid, victim.pid, n)) for n in (signal.SIGUSR1,) * 3]
            assert remote.batch(sent) == [0, 0, 0]
            traps = [Call(NR.tgkill, (victim.pid, victim.pid, signal.SIGTRAP))] * 3
            assert remote.batch([*traps, Call(NR.getpid)]) == [0, 0, 0, victim.pid]
            assert len(frozen.threads[0].pending(shared=False)) == 2
            assert victim.get("result") == victim.get("error") == 0
        wait_until(lambda: victim.get("result") and victim.get("error"), "both are handled")
        assert (victim.get("result"), victim.get("error"), victim.get("bad")) == (1, 1, 0)


def test_the_rseq_critical_section_is_put_back() -> None:
    with difficult("busy") as victim, freeze(victim.pid) as frozen:
        leader = frozen.threads[0]
        rseq = leader.rseq()
        if rseq is None:
            pytest.skip("this C library registers no rseq area")
        field = rseq.address + 8
        descriptor = Registers.unpack(leader.registers()).rsp - 4096 & ~31
        abort = descriptor + 64 + 4
        leader.write(abort - 4, struct.pack("I", rseq.signature))
        leader.write(descriptor, struct.pack("IIQQQ", 0, 0, 0x1000, 16, abort))
        leader.write(field, struct.pack("Q", descriptor))
        for _ in range(2):
            expect_calls(frozen.remote, victim.pid)
            assert leader.read(field, 8) == struct.pack("Q", descriptor)
        frozen.close_remote()
        assert leader.read(field, 8) == struct.pack("Q", descriptor)
        leader.write(field, bytes(8))


def test_a_call_that_does_not_return_is_given_up() -> None:
    with difficult("plain") as victim:
        before = proc_state(victim.pid)
        with freeze(victim.pid) as frozen:
            remote = Remote(frozen.threads[0], timeout=0.05)
            remote.open()
            registers = frozen.threads[0].registers()
            with pytest.raises(KernelError, match=r"pause.* did not return within 0.05 s"):
                remote.call(NR.pause)
            assert frozen.threads[0].registers() == registers
            expect_calls(remote, victim.pid)
            remote.close()
        assert proc_state(victim.pid) == before
        victim.wake()
        wait_until(lambda: victim.get("returned") == 1, "read goes on")


def test_the_end_of_the_target_is_one_error() -> None:
    with difficult("plain") as victim:
        with pytest.raises(TargetError, match="ended"), freeze(victim.pid) as frozen:
            frozen.remote.call(NR.exit_group, 7)
        assert victim.process.wait(10) == 7


def test_threads_share_a_scratch_and_clones_are_adopted() -> None:
    """What a restore does: clone with CLONE_PTRACE, then calls in the new thread."""
    with difficult("plain") as victim:
        with freeze(victim.pid) as frozen:
            remote = frozen.remote
            # CLONE_VM|FS|FILES|SIGHAND|THREAD|SYSVSEM|PTRACE
            flags = 0x00000100 | 0x200 | 0x400 | 0x800 | 0x10000 | 0x40000 | 0x2000
            made = remote.put(struct.pack("11Q", flags, *[0] * 10))
            tid = remote.call(NR.clone3, made, 88)
            thread = ptrace.adopt(tid)
            inside = remote.on(thread)
            hand_made = Registers.unpack(thread.registers())._replace(orig_rax=2**64 - 1)
            thread.set_registers(hand_made.pack())
            assert inside.batch([Call(NR.gettid), Call(NR.getpid)]) == [tid, victim.pid]
            assert remote.call(NR.gettid) == victim.pid
            # A thread without a stack of its own must not run: it ends in the calls.
            with pytest.raises(TargetError):
                inside.call(NR.exit, 0)
            wait_until(lambda: len(os.listdir(f"/proc/{victim.pid}/task")) == 1, "it ended")
            expect_calls(remote, victim.pid)
        victim.wake()
        wait_until(lambda: victim.get("returned") == 1, "read goes on")


def test_find_syscall_is_in_the_vdso() -> None:
    with difficult("plain") as victim, freeze(victim.pid) as frozen:
        address = find_syscall(frozen.threads[0])
        assert frozen.threads[0].read(address, 2) == b"\x0f\x05"
        for line in Path(f"/proc/{victim.pid}/maps").read_text().splitlines():
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            if start <= address < end:
                assert line.endswith("[vdso]")
                break


def test_a_filter_that_cannot_be_suspended_is_an_error() -> None:
    """A tracer with a seccomp filter of its own may not suspend one (prctl, strict: a child)."""
    with difficult("seccomp") as victim:
        program = f"""
import ctypes, struct, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from snapshot.errors import DeniedError
from snapshot.freeze import freeze
libc = ctypes.CDLL(None)
code = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0x7fff0000))
class Prog(ctypes.Structure):
    _fields_ = [("n", ctypes.c_ushort), ("p", ctypes.c_void_p)]
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Prog(1, ctypes.addressof(code)))) == 0
try:
    with freeze({victim.pid}) as frozen:
        frozen.threads[0].registers()
        frozen.remote
except DeniedError as error:
    print(error.message)
"""
        output = subprocess.check_output([sys.executable, "-c", program], text=True)
        assert "seccomp filter that cannot be suspended" in output
        assert victim.alive
        assert DeniedError.exit_code == 4


def test_a_tracer_killed_between_calls_leaves_the_target_alive() -> None:
    """The scratch stays; threads run on with their own registers and mask."""
    program = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from snapshot.freeze import freeze
from snapshot.kernel.arch_x86_64 import NR
with freeze(int(sys.argv[1])) as frozen:
    frozen.remote.call(NR.getpid)
    os.kill(os.getpid(), 9)
"""
    with difficult("plain") as victim:
        before = proc_state(victim.pid)
        for _ in range(5):
            command = [sys.executable, "-c", program, str(victim.pid)]
            assert subprocess.call(command) == -signal.SIGKILL
            wait_until(lambda: victim.system_call() == NR.read, "it reads again")
        after = proc_state(victim.pid)
        assert after[str(victim.pid)] == before[str(victim.pid)]
        assert (victim.get("result"), victim.get("bad")) == (0, 0)
        victim.wake()
        wait_until(lambda: victim.get("returned") == 1, "read goes on")


