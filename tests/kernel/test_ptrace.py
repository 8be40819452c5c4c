"""ptrace.Tracee against real threads, and one clear error for whatever cannot be traced."""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from snapshot.errors import DeniedError, KernelError, TargetError
from snapshot.kernel import ptrace, refusal
from snapshot.kernel.arch_x86_64 import NR, REGISTERS_SIZE, Registers, numbers

from ..live.freezing import Victim, wait_until

ROOT = str(Path(__file__).parents[2])
SLEEPER = ["sleep", "1000"]


@contextmanager
def child(command: Sequence[str | Path]) -> Iterator[int]:
    """Its pid; killed at the end, also when it is still traced."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    try:
        yield process.pid
    finally:
        process.kill()
        process.communicate(timeout=10)


@pytest.fixture
def sleeper() -> Iterator[int]:
    with child(SLEEPER) as pid:
        wait_until(lambda: sleeps(pid), "it sleeps")
        yield pid


def sleeps(pid: int) -> bool:
    call = Path(f"/proc/{pid}/syscall").read_text().split()[0]
    return call in ("35", "219", "230")  # nanosleep, restart_syscall, clock_nanosleep


def stopped(pid: int, options: int = 0) -> ptrace.Tracee:
    tracee = ptrace.seize(pid, options)
    tracee.halt()
    return tracee


HEARING = f"""
import signal, sys, threading
sys.path.insert(0, {ROOT!r})
from snapshot.kernel.ptrace import child_signals

def blocked():
    return signal.SIGCHLD in signal.pthread_sigmask(signal.SIG_BLOCK, [])

def of_a_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(blocked()))
    thread.start()
    thread.join()
    return found[0]

with child_signals():
    assert blocked() and of_a_thread()
assert not blocked() and not of_a_thread()
signal.signal(signal.SIGCHLD, lambda *_: None)
with child_signals():
    assert not blocked()
signal.signal(signal.SIGCHLD, signal.SIG_DFL)
end = threading.Event()
threading.Thread(target=end.wait).start()
with child_signals():
    assert not blocked()  # that thread would be told
end.set()
"""


def test_who_is_told_of_stops() -> None:
    subprocess.run([sys.executable, "-c", HEARING], check=True)


def test_registers_round_trip() -> None:
    registers = Registers(*range(27))
    packed = registers.pack()
    assert len(packed) == REGISTERS_SIZE == 216
    assert Registers.unpack(packed) == registers
    assert struct.unpack_from("Q", packed, 8 * 15)[0] == registers.orig_rax


def test_numbers_are_those_of_the_kernel_headers(tmp_path: Path) -> None:
    lines = "\n".join(
        f'#ifdef SYS_{name}\nif (SYS_{name} != {nr}) puts("{name}");\n#endif'
        for nr, name in numbers().items()
    )
    program = tmp_path / "numbers"
    head = "#include <stdio.h>\n#include <sys/syscall.h>\nint main(void) {\n"
    text = head + lines + "\nreturn 0; }"
    subprocess.run(["gcc", "-x", "c", "-", "-o", program], input=text.encode(), check=True)
    assert subprocess.check_output([program]) == b""
    assert len(numbers()) > 340


def test_a_stopped_thread_tells_what_it_holds(sleeper: int) -> None:
    tracee = stopped(sleeper)
    registers = Registers.unpack(tracee.registers())
    assert registers.orig_rax == NR.clock_nanosleep
    assert registers.result == -516
    assert tracee.read(registers.rip - 2, 2) == b"\x0f\x05"
    assert len(tracee.xstate()) >= 576
    rseq = tracee.rseq()
    assert rseq is None or (rseq.size >= 20 and rseq.signature)
    assert tracee.signal_mask() == 0
    assert tracee.pending(False) == tracee.pending(True) == []
    tracee.detach()
    wait_until(lambda: sleeps(sleeper), "it sleeps again")


def test_what_is_set_is_there(sleeper: int) -> None:
    tracee = stopped(sleeper)
    registers = tracee.registers()
    changed = Registers.unpack(registers)._replace(r12=0x1122334455667788)
    tracee.set_registers(changed.pack())
    assert tracee.registers() == changed.pack()
    tracee.set_registers(registers)

    xstate = bytearray(tracee.xstate())
    original = bytes(xstate)
    xstate[160:176] = bytes(range(16))  # xmm0 in the legacy area
    xstate[512] |= 2  # XSTATE_BV: SSE state is not in its initial configuration
    tracee.set_xstate(bytes(xstate))
    assert tracee.xstate()[160:176] == bytes(range(16))
    tracee.set_xstate(original)

    mask = 1 << (signal.SIGUSR1 - 1)
    tracee.set_signal_mask(mask)
    assert tracee.signal_mask() == mask
    os.kill(sleeper, signal.SIGUSR1)
    (info,) = tracee.pending(shared=True)
    assert struct.unpack_from("iii", info) == (signal.SIGUSR1, 0, 0)
    assert struct.unpack_from("i", info, 16)[0] == os.getpid()
    assert tracee.pending(shared=False) == []
    tracee.detach()
    assert os.path.exists(f"/proc/{sleeper}")


def test_more_signals_than_one_request_holds(sleeper: int) -> None:
    tracee = stopped(sleeper)
    number = signal.SIGRTMIN + 3
    tracee.set_signal_mask(1 << (number - 1))
    libc = ctypes.CDLL(None)
    for value in range(100):
        libc.sigqueue(sleeper, number, ctypes.c_void_p(value))
    infos = tracee.pending(shared=True)
    assert [struct.unpack_from("i", info, 24)[0] for info in infos] == list(range(100))
    tracee.detach()


def test_system_call_steps(sleeper: int) -> None:
    tracee = stopped(sleeper)
    tracee.syscall()  # the interrupted sleep goes on: its entry …
    tracee.wait()
    assert tracee.in_syscall_stop
    assert Registers.unpack(tracee.registers()).orig_rax == NR.restart_syscall
    tracee.syscall()
    tracee.interrupt()  # … and its exit
    tracee.wait()
    assert tracee.in_syscall_stop
    assert Registers.unpack(tracee.registers()).result == -516
    tracee.halt()
    assert not tracee.in_syscall_stop
    tracee.detach()
    wait_until(lambda: sleeps(sleeper), "it sleeps again")


COUNTER = r"""
static void on(int number) { (void)number; page->count++; }
int main(int argc, char **argv)
{
    (void)argc;
    open_page(argv);
    signal(SIGUSR1, on);
    page->ready = 1;
    for (;;) pause();
}
"""


def test_halt_lets_signals_through() -> None:
    with Victim(COUNTER) as victim:
        tracee = ptrace.seize(victim.pid)
        for turn in range(100):
            tracee.halt()
            os.kill(victim.pid, signal.SIGUSR1)
            tracee.cont()
            tracee.wait()
            assert tracee.stop_signal == signal.SIGUSR1
            tracee.halt()
            assert not tracee.stop_signal
            tracee.cont()
            wait_until(lambda: victim.get("count") > turn, "the handler ran")  # noqa: B023
        tracee.halt()
        tracee.detach()
        assert victim.get("count") == 100


@pytest.mark.parametrize("options", [0, ptrace.EXITKILL], ids=["lives", "dies"])
def test_exitkill(options: int) -> None:
    """A tracee with EXITKILL dies with the OS thread that traces it; another one runs on."""
    with child(SLEEPER) as pid:
        thread = threading.Thread(target=stopped, args=(pid, options))
        thread.start()
        thread.join()
        if options:
            wait_until(lambda: refusal.status(pid)["State"].startswith("Z"), "it is dead")
        else:
            wait_until(lambda: sleeps(pid), "it runs on")


def test_one_that_is_killed_has_ended() -> None:
    """Also between the signal and its end, when the kernel still shows it."""
    for _ in range(50):
        with child(SLEEPER) as pid:
            tracee = stopped(pid)
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(TargetError, match=f"thread {pid} has ended"):
                for _ in iter(tracee.registers, None):  # until it fails
                    pass


def test_a_request_that_is_refused_is_no_end(sleeper: int) -> None:
    tracee = stopped(sleeper)
    tracee.cont()
    with pytest.raises(KernelError, match="ESRCH"):
        tracee.registers()
    assert sleeps(sleeper)


# What cannot be traced


def test_no_such_process() -> None:
    with subprocess.Popen(["true"]) as process:
        pass
    with pytest.raises(TargetError, match=f"no process {process.pid}"):
        ptrace.seize(process.pid)


def test_a_zombie() -> None:
    with subprocess.Popen(["true"]) as process:
        wait_until(lambda: Path(f"/proc/{process.pid}/stat").read_text().split()[2] == "Z", "dead")
        with pytest.raises(TargetError, match="zombie"):
            ptrace.seize(process.pid)


def test_a_kernel_thread() -> None:
    threads = (int(name) for name in os.listdir("/proc") if name.isdigit())
    for pid in threads:
        if int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[6]) & 0x200000:
            break
    else:
        pytest.skip("no kernel thread is visible in this pid namespace")
    with pytest.raises(TargetError, match="kernel thread"):
        ptrace.seize(pid)


def test_ourselves() -> None:
    with pytest.raises(TargetError, match="this process itself"):
        ptrace.seize(os.getpid())


def test_traced_by_another(sleeper: int) -> None:
    """The error names the tracer."""
    errors: list[TargetError] = []

    def trace_too() -> None:
        try:
            ptrace.seize(sleeper)
        except TargetError as error:
            errors.append(error)

    tracee = stopped(sleeper)
    thread = threading.Thread(target=trace_too)
    thread.start()
    thread.join()
    assert f"traced by {threading.get_native_id()} " in errors[0].message
    tracee.detach()


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user: run as root")
@pytest.mark.parametrize("own", [False, True], ids=["other user", "not dumpable"])
def test_no_permission(own: bool) -> None:
    """As an ordinary user: the error names the user or the flag, and the missing capability."""
    program = f"""
import ctypes, os, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from snapshot.kernel import ptrace, refusal
from snapshot.errors import DeniedError
victim = os.getppid()
os.setuid(65534)
if {own}:
    read, hold = os.pipe()
    ready, write = os.pipe()
    victim = os.fork()
    if not victim:
        ctypes.CDLL(None).prctl(4, 0)
        ctypes.CDLL(None).prctl(1, 9)
        os.write(write, b"x")
        os.read(read, 1)  # until it is killed
    assert os.read(ready, 1)
try:
    ptrace.seize(victim)
except DeniedError as error:
    print(error.message)
finally:
    if {own}:
        os.kill(victim, 9)
"""
    output = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert "CAP_SYS_PTRACE" in output
    assert ("not dumpable" in output) if own else ("runs as user 0" in output)
    assert DeniedError.exit_code == 4


VFORK = r"""
int main(int argc, char **argv)
{
    (void)argc;
    open_page(argv);
    char byte;
    if (vfork() == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        page->ready = 1;
        if (read(0, &byte, 1) >= 0) _exit(0);
    }
    for (;;) pause();
}
"""


def test_a_thread_that_cannot_stop_is_named() -> None:
    """A parent in vfork cannot be woken until the child execs or exits."""
    with Victim(VFORK) as victim:
        tracee = ptrace.seize(victim.pid)
        with pytest.raises(KernelError, match=rf"{victim.pid} \(.*state D.*in \w+"):
            tracee.halt(timeout=0.05)
        victim.wake()  # ends the child
        tracee.halt()
        tracee.detach()
