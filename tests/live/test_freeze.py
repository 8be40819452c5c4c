"""Freezing must not be noticed: every blocking call goes on, registers and signals are the same."""

from __future__ import annotations

import errno
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshot.errors import TargetError
from snapshot.freeze import Frozen, freeze
from snapshot.kernel import arch_x86_64 as arch
from snapshot.kernel.arch_x86_64 import NR, Registers
from snapshot.kernel.remote import Call

from .freezing import Victim, proc_state, wait_until

pytestmark = pytest.mark.live

FREEZES = 200
ROOT = str(Path(__file__).parents[2])

# One blocking call per mode. A second thread makes it come back when a byte arrives on stdin.
BLOCKED = r"""
#include <linux/futex.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/socket.h>
static int pipes[2], sockets[2], set, port, queue, child;
static uint32_t word;
static const char *mode;
static long timeout_ms = 400;
static int is(const char *name) { return strcmp(mode, name) == 0; }
static void on_signal(int number) { (void)number; }
static void *waker(void *leader)
{
    char byte;
    if (read(0, &byte, 1) != 1)
        return 0;
    if (is("semop")) semop(set, &(struct sembuf){0, 1, 0}, 1);
    else if (is("msgrcv")) msgsnd(queue, &(struct { long type; char c[1]; }){1, "x"}, 1, 0);
    else if (is("recv") || is("recv_timeout") || is("read_timeout")) write(sockets[1], "x", 1);
    else if (is("futex")) { word = 1; syscall(SYS_futex, &word, FUTEX_WAKE, 1, 0, 0, 0); }
    else if (is("wait4")) kill(child, SIGKILL);
    else if (is("sigtimedwait")) kill(getpid(), SIGUSR2);
    else if (is("pause") || is("sigsuspend")) pthread_kill(*(pthread_t *)leader, SIGUSR1);
    else if (is("accept")) {
        struct sockaddr_in to = {AF_INET, htons(port), {htonl(INADDR_LOOPBACK)}, {0}};
        connect(socket(AF_INET, SOCK_STREAM, 0), (void *)&to, sizeof to);
    } else write(pipes[1], "x", 1);
    pause();
    return 0;
}
int main(int argc, char **argv)
{
    mode = argv[2];
    if (argc > 3) timeout_ms = atol(argv[3]);
    pipe2(pipes, O_CLOEXEC);
    socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets);
    struct timeval limit = {timeout_ms / 1000, timeout_ms % 1000 * 1000}, hour = {3600, 0};
    struct timespec until;
    struct timespec limit_ns = {timeout_ms / 1000, timeout_ms % 1000 * 1000000};
    if (is("recv_timeout")) setsockopt(sockets[0], SOL_SOCKET, SO_RCVTIMEO, &hour, sizeof hour);
    if (is("read_timeout")) setsockopt(sockets[0], SOL_SOCKET, SO_RCVTIMEO, &hour, sizeof hour);
    if (is("recv_timed_out")) setsockopt(sockets[0], SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    struct epoll_event event = {.events = EPOLLIN};
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    epoll_ctl(epoll, EPOLL_CTL_ADD, pipes[0], &event);
    set = semget(IPC_PRIVATE, 1, 0600);
    queue = msgget(IPC_PRIVATE, 0600);
    signal(SIGUSR1, on_signal);
    sigset_t usr1, usr2, none;
    sigemptyset(&none), sigemptyset(&usr1), sigaddset(&usr1, SIGUSR1);
    sigemptyset(&usr2), sigaddset(&usr2, SIGUSR2);
    sigprocmask(SIG_BLOCK, &usr2, 0);
    if (is("sigsuspend") || is("epoll_pwait")) sigprocmask(SIG_BLOCK, &usr1, 0);
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in any = {AF_INET, 0, {htonl(INADDR_LOOPBACK)}, {0}};
    bind(listener, (void *)&any, sizeof any), listen(listener, 1);
    socklen_t length = sizeof any;
    getsockname(listener, (void *)&any, &length);
    port = ntohs(any.sin_port);
    if (is("wait4") && !(child = fork())) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        pause();
    }
    struct pollfd one = {pipes[0], POLLIN, 0};
    fd_set reading;
    FD_ZERO(&reading);
    FD_SET(pipes[0], &reading);
    pthread_t leader = pthread_self(), thread;
    open_page(argv);
    sigset_t all, own; /* a signal of the process is for the leader alone, from the first moment */
    sigfillset(&all), pthread_sigmask(SIG_BLOCK, &all, &own);
    pthread_create(&thread, 0, waker, &leader);
    pthread_sigmask(SIG_SETMASK, &own, 0);
    char byte;
    page->tid = syscall(SYS_gettid);
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += limit_ns.tv_sec, until.tv_nsec += limit_ns.tv_nsec;
    until.tv_sec += until.tv_nsec / 1000000000, until.tv_nsec %= 1000000000;
    page->ready = 1;
    int64_t began = now_us();
    long result = -2;
    errno = 0;
    if (is("epoll_wait")) result = epoll_wait(epoll, &event, 1, -1);
    if (is("epoll_pwait")) result = epoll_pwait(epoll, &event, 1, -1, &none);
    if (is("epoll_pwait2")) result = syscall(SYS_epoll_pwait2, epoll, &event, 1, 0, 0, 0);
    if (is("epoll_timed_out")) result = epoll_wait(epoll, &event, 1, timeout_ms);
    if (is("sigtimedwait")) result = sigtimedwait(&usr2, 0, &(struct timespec){3600, 0});
    if (is("sigtimedwait_timed_out")) result = sigtimedwait(&usr2, 0, &limit_ns);
    if (is("semop")) result = semop(set, &(struct sembuf){0, -1, 0}, 1);
    if (is("semtimedop_timed_out"))
        result = semtimedop(set, &(struct sembuf){0, -1, 0}, 1, &limit_ns);
    if (is("msgrcv")) { struct { long t; char c[8]; } m; result = msgrcv(queue, &m, 8, 0, 0); }
    if (is("recv") || is("recv_timeout")) result = recv(sockets[0], &byte, 1, 0);
    if (is("read_timeout")) result = read(sockets[0], &byte, 1);
    if (is("recv_timed_out")) result = recv(sockets[0], &byte, 1, 0);
    if (is("nanosleep")) result = nanosleep(&limit_ns, 0);
    if (is("sleep_until")) result = clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, 0);
    if (is("poll")) result = poll(&one, 1, -1);
    if (is("poll_timed_out")) result = poll(&one, 1, timeout_ms);
    if (is("ppoll")) result = ppoll(&one, 1, 0, &none);
    if (is("ppoll_timed_out")) result = ppoll(&one, 1, &limit_ns, &none);
    if (is("select")) result = select(pipes[0] + 1, &reading, 0, 0, 0);
    if (is("select_timed_out")) result = select(pipes[0] + 1, &reading, 0, 0, &limit);
    if (is("futex")) result = syscall(SYS_futex, &word, FUTEX_WAIT, 0, 0, 0, 0);
    if (is("futex_timed_out")) result = syscall(SYS_futex, &word, FUTEX_WAIT, 0, &limit_ns, 0, 0);
    if (is("condition")) {
        pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
        pthread_cond_t condition = PTHREAD_COND_INITIALIZER;
        pthread_mutex_lock(&mutex);
        clock_gettime(CLOCK_REALTIME, &until), until.tv_sec += limit_ns.tv_sec;
        result = -(errno = pthread_cond_timedwait(&condition, &mutex, &until));
    }
    if (is("pipe_read")) result = read(pipes[0], &byte, 1);
    if (is("pause")) result = pause();
    if (is("sigsuspend")) result = sigsuspend(&none);
    if (is("accept")) result = accept(listener, 0, 0) > 0;
    if (is("wait4")) result = wait4(child, 0, 0, 0) == child;
    page->error = result < 0 ? errno : 0;
    page->result = result;
    page->elapsed_us = now_us() - began;
    page->returned++;
    semctl(set, 0, IPC_RMID);
    msgctl(queue, IPC_RMID, 0);
    if (child) kill(child, SIGKILL);
    pause();
}
"""
# mode: what the call gives in the end (result, errno) once it is woken
WOKEN = {
    "epoll_wait": (1, 0),
    "epoll_pwait": (1, 0),
    "epoll_pwait2": (1, 0),
    "sigtimedwait": (int(signal.SIGUSR2), 0),
    "semop": (0, 0),
    "msgrcv": (1, 0),
    "recv": (1, 0),
    "recv_timeout": (1, 0),
    "read_timeout": (1, 0),
    "poll": (1, 0),
    "ppoll": (1, 0),
    "select": (1, 0),
    "futex": (0, 0),
    "pipe_read": (1, 0),
    "pause": (-1, errno.EINTR),
    "sigsuspend": (-1, errno.EINTR),
    "accept": (1, 0),
    "wait4": (1, 0),
}
TIMED_OUT = {
    "epoll_timed_out": (0, 0),
    "sigtimedwait_timed_out": (-1, errno.EAGAIN),
    "semtimedop_timed_out": (-1, errno.EAGAIN),
    "recv_timed_out": (-1, errno.EAGAIN),
    "nanosleep": (0, 0),
    "sleep_until": (0, 0),
    "poll_timed_out": (0, 0),
    "ppoll_timed_out": (0, 0),
    "select_timed_out": (0, 0),
    "futex_timed_out": (-1, errno.ETIMEDOUT),
}
TIMEOUT_US = 400_000


def make_calls(frozen: Frozen) -> None:
    """Injected calls in every thread of the target."""
    expected = [frozen.pid] * 3
    assert frozen.remote.batch([Call(NR.getpid)] * 3) == expected
    for tracee in frozen.threads[1:]:
        assert frozen.remote.on(tracee).call(NR.gettid) == tracee.tid


@pytest.mark.parametrize("inject", [False, True], ids=["stop", "calls"])
@pytest.mark.parametrize("mode", WOKEN)
def test_a_blocked_call_sleeps_on(mode: str, inject: bool) -> None:
    with Victim(BLOCKED, mode) as victim:
        wait_until(lambda: victim.system_call() >= 0, "the call sleeps")
        for _ in range(FREEZES):
            with freeze(victim.pid) as frozen:
                if inject:
                    make_calls(frozen)
        assert victim.get("returned") == 0, os.strerror(victim.get("error"))
        # A futex whose value has changed before the call is made again says EAGAIN.
        wait_until(lambda: victim.system_call() >= 0, "the call sleeps again")
        victim.wake()
        wait_until(lambda: victim.get("returned"), "the call came back")
        assert (victim.get("result"), victim.get("error")) == WOKEN[mode]


@pytest.mark.parametrize("inject", [False, True], ids=["stop", "calls"])
@pytest.mark.parametrize("mode", TIMED_OUT)
def test_a_timeout_is_not_early(mode: str, inject: bool) -> None:
    with Victim(BLOCKED, mode) as victim:
        began = time.monotonic()
        while time.monotonic() - began < 0.3:
            with freeze(victim.pid) as frozen:
                if inject:
                    make_calls(frozen)
        wait_until(lambda: victim.get("returned"), "the call came back")
        assert (victim.get("result"), victim.get("error")) == TIMED_OUT[mode]
        assert victim.get("elapsed_us") >= TIMEOUT_US


@pytest.mark.parametrize("mode", ["epoll_wait", "epoll_pwait", "semop", "poll", "pipe_read"])
def test_a_signal_that_comes_while_stopped_still_interrupts(mode: str) -> None:
    """A handler runs and the call returns EINTR where it always does: nothing is swallowed."""
    with Victim(BLOCKED, mode) as victim:
        wait_until(lambda: victim.system_call() >= 0, "the call sleeps")
        with freeze(victim.pid) as frozen:
            assert frozen.restarted == (mode in ("epoll_wait", "epoll_pwait", "semop"))
            frozen.remote.call(NR.getpid)
            os.kill(victim.pid, signal.SIGUSR1)
        if mode == "pipe_read":  # signal(2) of glibc: SA_RESTART
            wait_until(lambda: victim.system_call() == NR.read, "read sleeps again")
            assert victim.get("returned") == 0
        else:
            wait_until(lambda: victim.get("returned"), "the call came back")
            assert (victim.get("result"), victim.get("error")) == (-1, errno.EINTR)


# All general and SSE registers hold known values while a counter in the red zone runs down.
REGISTERS = r"""
#define SIXTEEN "0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15"
static volatile int turned[4];
static void *spin(void *arg)
{
    uint64_t in[15], out[15];
    float xmm[16][4], back[16][4];
    for (int i = 0; i < 15; i++) in[i] = 0x1111111111111111ull * (i + 1) + (uint64_t)arg;
    for (int i = 0; i < 64; i++) xmm[i / 4][i % 4] = i + 0.5f;
    for (;;) {
        struct { uint64_t *in, *out; float (*xmm)[4], (*back)[4]; } t = {in, out, xmm, back};
        memset(out, 0, sizeof out), memset(back, 0, sizeof back);
        asm volatile(
            "sub $256, %%rsp\n push %%rbx\n push %%rbp\n push %0\n movl $200000, -8(%%rsp)\n"
            "mov 16(%0), %%rax\n"
            ".irp n," SIXTEEN "\n movups \\n*16(%%rax), %%xmm\\n\n .endr\n"
            "mov (%0), %%rax\n"
            "mov 8(%%rax), %%rbx\n mov 16(%%rax), %%rcx\n mov 24(%%rax), %%rdx\n"
            "mov 32(%%rax), %%rsi\n mov 40(%%rax), %%rdi\n mov 48(%%rax), %%rbp\n"
            "mov 56(%%rax), %%r8\n mov 64(%%rax), %%r9\n mov 72(%%rax), %%r10\n"
            "mov 80(%%rax), %%r11\n mov 88(%%rax), %%r12\n mov 96(%%rax), %%r13\n"
            "mov 104(%%rax), %%r14\n mov 112(%%rax), %%r15\n mov (%%rax), %%rax\n"
            "1: decl -8(%%rsp)\n jnz 1b\n"
            "push %%rax\n mov 8(%%rsp), %%rax\n mov 8(%%rax), %%rax\n"
            "mov %%rbx, 8(%%rax)\n mov %%rcx, 16(%%rax)\n mov %%rdx, 24(%%rax)\n"
            "mov %%rsi, 32(%%rax)\n mov %%rdi, 40(%%rax)\n mov %%rbp, 48(%%rax)\n"
            "mov %%r8, 56(%%rax)\n mov %%r9, 64(%%rax)\n mov %%r10, 72(%%rax)\n"
            "mov %%r11, 80(%%rax)\n mov %%r12, 88(%%rax)\n mov %%r13, 96(%%rax)\n"
            "mov %%r14, 104(%%rax)\n mov %%r15, 112(%%rax)\n pop %%rbx\n mov %%rbx, (%%rax)\n"
            "pop %%rcx\n mov 24(%%rcx), %%rax\n"
            ".irp n," SIXTEEN "\n movups %%xmm\\n, \\n*16(%%rax)\n .endr\n"
            "pop %%rbp\n pop %%rbx\n add $256, %%rsp\n"
            : : "r"(&t)
            : "rax", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
              "r15", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8",
              "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "memory", "cc");
        if (memcmp(in, out, sizeof in) || memcmp(xmm, back, sizeof xmm))
            __atomic_fetch_add((int64_t *)&page->bad, 1, __ATOMIC_RELAXED);
        __atomic_fetch_add((int64_t *)&page->count, 1, __ATOMIC_RELAXED);
        turned[(long)arg] = 1; /* a thread that is just being made has its signals blocked */
        page->ready = turned[0] && turned[1] && turned[2] && turned[3];
    }
}
int main(int argc, char **argv)
{
    (void)argc;
    open_page(argv);
    pthread_t thread;
    for (long i = 1; i < 4; i++) pthread_create(&thread, 0, spin, (void *)i);
    spin(0);
}
"""


def test_no_register_changes() -> None:
    with Victim(REGISTERS) as victim:
        for _ in range(FREEZES):
            with freeze(victim.pid) as frozen:
                assert len(frozen.threads) == 4
                make_calls(frozen)
        count = victim.get("count")
        wait_until(lambda: victim.get("count") > count + 20, "it runs on")
        assert victim.get("bad") == 0


# Counts queued signals, whose values must come in order, and ordinary ones in pairs of a handshake.
SIGNALS = r"""
static void queued(int number, siginfo_t *info, void *context)
{
    (void)number, (void)context;
    if (info->si_value.sival_int != (int)page->count) page->bad++;
    page->count++;
}
static void *idle(void *arg) { (void)arg; for (;;) page->elapsed_us++; }
int main(int argc, char **argv)
{
    (void)argc;
    open_page(argv);
    struct sigaction action = {.sa_sigaction = queued, .sa_flags = SA_SIGINFO};
    sigaction(SIGRTMIN, &action, 0);
    pthread_t thread;
    sigset_t all;
    sigfillset(&all), pthread_sigmask(SIG_BLOCK, &all, 0);
    pthread_create(&thread, 0, idle, 0);
    sigemptyset(&all), pthread_sigmask(SIG_SETMASK, &all, 0);
    page->ready = 1;
    for (;;) { page->returned++; if (page->returned % 64 == 0) usleep(200); }
}
"""
# Queues signals 0, 1, 2, … about 1000 times a second until its stdin ends; prints how many.
SENDER = """
import ctypes, os, select, sys
libc = ctypes.CDLL(None, use_errno=True)
pid, sent = int(sys.argv[1]), 0
signal = libc.__libc_current_sigrtmin()
while not select.select([0], [], [], 0.001)[0]:
    if libc.sigqueue(pid, signal, ctypes.c_void_p(sent)) == 0:
        sent += 1
print(sent)
"""


@pytest.mark.parametrize("inject", [False, True], ids=["stop", "calls"])
def test_no_signal_is_lost_or_doubled(inject: bool) -> None:
    with Victim(SIGNALS) as victim:
        command = [sys.executable, "-c", SENDER, str(victim.pid)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as sender:
            try:
                wait_until(lambda: victim.get("count") > 10, "signals arrive")
                for _ in range(500):
                    with freeze(victim.pid) as frozen:
                        if inject:
                            make_calls(frozen)
                sent = int(sender.communicate(timeout=10)[0])
            finally:
                sender.kill()
        wait_until(lambda: victim.get("count") >= sent, "all signals arrived")
        assert victim.get("count") == sent
        assert victim.get("bad") == 0


def state_letter(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def test_a_stopped_process_stays_stopped() -> None:
    with Victim(REGISTERS) as victim:
        os.kill(victim.pid, signal.SIGSTOP)
        wait_until(lambda: state_letter(victim.pid) == "T", "it is stopped")
        before = proc_state(victim.pid)
        for _ in range(50):
            with freeze(victim.pid) as frozen:
                assert frozen.group_stopped
                make_calls(frozen)
                assert frozen.group_stopped
            wait_until(lambda: state_letter(victim.pid) == "T", "it is stopped again")
        count = victim.get("count")
        assert proc_state(victim.pid) == before
        assert victim.get("count") == count
        os.kill(victim.pid, signal.SIGCONT)
        wait_until(lambda: victim.get("count") > count + 10, "it runs on")
        assert victim.get("bad") == 0


def test_sigstop_during_the_freeze_takes_effect() -> None:
    with Victim(REGISTERS) as victim:
        for _ in range(20):
            with freeze(victim.pid) as frozen:
                os.kill(victim.pid, signal.SIGSTOP)
                assert not frozen.group_stopped
                make_calls(frozen)
                assert frozen.group_stopped
                make_calls(frozen)
            wait_until(lambda: state_letter(victim.pid) == "T", "it is stopped")
            count = victim.get("count")
            os.kill(victim.pid, signal.SIGCONT)
            wait_until(lambda: victim.get("count") > count, "it runs on")  # noqa: B023
        assert victim.get("bad") == 0


def test_sigcont_during_the_freeze_takes_effect() -> None:
    with Victim(REGISTERS) as victim:
        for _ in range(20):
            os.kill(victim.pid, signal.SIGSTOP)
            wait_until(lambda: state_letter(victim.pid) == "T", "it is stopped")
            with freeze(victim.pid) as frozen:
                os.kill(victim.pid, signal.SIGCONT)
                make_calls(frozen)
            count = victim.get("count")
            wait_until(lambda: victim.get("count") > count, "it runs on")  # noqa: B023


@pytest.fixture
def sleeper() -> Iterator[Victim]:
    with Victim(BLOCKED, "epoll_wait") as victim:
        tids = [int(name) for name in os.listdir(f"/proc/{victim.pid}/task")]
        calls = (NR.epoll_wait, NR.read)
        wait_until(lambda: all(victim.system_call(tid) in calls for tid in tids), "all sleep")
        yield victim


def test_nothing_of_ours_stays(sleeper: Victim) -> None:
    before = proc_state(sleeper.pid)
    for _ in range(20):
        with freeze(sleeper.pid) as frozen:
            make_calls(frozen)
            frozen.close_remote()
            make_calls(frozen)
    assert proc_state(sleeper.pid) == before


def test_an_exception_lets_it_go(sleeper: Victim) -> None:
    before = proc_state(sleeper.pid)
    with pytest.raises(ZeroDivisionError), freeze(sleeper.pid) as frozen:  # noqa: PT012
        make_calls(frozen)
        raise ZeroDivisionError
    assert proc_state(sleeper.pid) == before


def test_registers_are_those_an_image_needs(sleeper: Victim) -> None:
    """epoll_wait as the kernel will make it again, not with the EINTR of our own stop."""
    with freeze(sleeper.pid) as frozen:
        make_calls(frozen)
        registers = Registers.unpack(frozen.threads[0].registers())
        assert (registers.result, registers.orig_rax) == (-514, NR.epoll_wait)
        assert frozen.restarted == 1


@pytest.mark.parametrize(
    ("mode", "number"),
    [
        ("nanosleep", NR.clock_nanosleep),  # glibc makes it of nanosleep
        ("poll_timed_out", NR.poll),
        ("condition", NR.futex),
        ("futex_timed_out", NR.futex),  # made by syscall(3): its code does not tell the number
    ],
)
def test_a_restarted_call_is_known_by_its_own_number(mode: str, number: int) -> None:
    """The second stop finds restart_syscall; an image needs the call itself."""
    with Victim(BLOCKED, mode, "60000") as victim:
        earlier = None
        for turn in range(4):
            wait_until(lambda: victim.system_call() >= 0, "the call sleeps")
            with freeze(victim.pid, earlier=earlier) as frozen:
                leader = frozen.threads[0]
                raw = Registers.unpack(leader.registers())
                registers = Registers.unpack(frozen.registers(leader))
                assert raw.result == registers.result == -516
                assert raw.orig_rax == (NR.restart_syscall if turn else number)
                assert registers.orig_rax == number
                about = raw._replace(rax=NR.restart_syscall, rip=raw.rip - 2)
                try:  # as the kernel leaves it that is stopped again before it makes the call
                    leader.set_registers(about.pack())
                    registers = Registers.unpack(frozen.registers(leader))
                finally:
                    leader.set_registers(raw.pack())
                assert registers == about._replace(rax=number, orig_rax=arch.NO_SYSCALL)
            earlier = frozen if mode == "futex_timed_out" else None


def test_an_ending_target_is_one_error() -> None:
    with Victim(BLOCKED, "pause") as victim:
        with pytest.raises(TargetError), freeze(victim.pid) as frozen:  # noqa: PT012
            os.kill(victim.pid, signal.SIGKILL)
            make_calls(frozen)
        with pytest.raises(TargetError), freeze(victim.pid):
            pass


def test_only_the_thread_that_froze_may_ask(sleeper: Victim) -> None:
    errors: list[BaseException] = []

    def ask(frozen: Frozen) -> None:
        try:
            frozen.threads[0].registers()
        except AssertionError as error:
            errors.append(error)

    with freeze(sleeper.pid) as frozen:
        thread = threading.Thread(target=ask, args=(frozen,))
        thread.start()
        thread.join()
    assert len(errors) == 1


THREADS = r"""
static void *idle(void *arg)
{
    (void)arg;
    __atomic_fetch_add((int64_t *)&page->count, 1, __ATOMIC_RELAXED);
    for (;;) pause();
}
int main(int argc, char **argv)
{
    (void)argc;
    open_page(argv);
    pthread_attr_t small;
    pthread_attr_init(&small), pthread_attr_setstacksize(&small, 65536);
    pthread_t thread;
    for (int i = 1; i < atoi(argv[2]); i++) pthread_create(&thread, &small, idle, 0);
    while (page->count < atoi(argv[2]) - 1) usleep(100);
    page->ready = 1;
    for (;;) pause();
}
"""


def test_200_threads(capsys: pytest.CaptureFixture[str]) -> None:
    with Victim(THREADS, "200") as victim:
        before = proc_state(victim.pid)
        freezing, stopped = [], []
        for _ in range(20):
            with freeze(victim.pid) as frozen:
                assert len(frozen.threads) == 200
                assert frozen.threads[0].tid == victim.pid
            freezing.append(frozen.freeze_us)
            stopped.append(frozen.stopped_us)
        with freeze(victim.pid) as frozen:
            make_calls(frozen)
        assert proc_state(victim.pid) == before
    with capsys.disabled():
        print(
            f"\n200 threads: frozen in {statistics.median(freezing):.0f} µs, stopped for "
            f"{statistics.median(stopped):.0f} µs; calls in each of them {frozen.stopped_us} µs"
        )


# Threads are born and end without pause; each checks that it has run from start to end.
STORM = r"""
static void *shortlived(void *arg)
{
    volatile int work = 0;
    for (int i = 0; i < 2000; i++) work += i;
    if (work != 1999000) page->bad++;
    __atomic_fetch_add((int64_t *)&page->count, 1, __ATOMIC_RELAXED);
    return arg;
}
static void *maker(void *arg)
{
    pthread_t threads[4];
    for (;;) {
        for (int i = 0; i < 4; i++)
            if (pthread_create(&threads[i], 0, shortlived, arg)) page->bad++;
        for (int i = 0; i < 4; i++) pthread_join(threads[i], 0);
        page->ready = 1;
    }
}
int main(int argc, char **argv)
{
    (void)argc;
    open_page(argv);
    pthread_t thread;
    for (int i = 0; i < 3; i++) pthread_create(&thread, 0, maker, 0);
    maker(0);
}
"""


def test_a_storm_of_threads_is_stopped_to_the_last() -> None:
    with Victim(STORM) as victim:
        for turn in range(FREEZES):
            with freeze(victim.pid) as frozen:
                names = {int(name) for name in os.listdir(f"/proc/{victim.pid}/task")}
                assert names == {tracee.tid for tracee in frozen.threads}
                for tid in names:
                    assert state_letter(tid) == "t"
                if turn % 10 == 0:
                    make_calls(frozen)
        count = victim.get("count")
        wait_until(lambda: victim.get("count") > count + 100, "it runs on")
        assert victim.get("bad") == 0


# A thread that is not the leader replaces the program, without pause: execve waits until its
# siblings are gone, and holds a lock that PTRACE_SEIZE wants.
EXEC = r"""
static void *idle(void *arg) { for (;;) pause(); return arg; }
static void *replace(void *argv)
{
    execv("/proc/self/exe", argv);
    return 0;
}
int main(int argc, char **argv)
{
    (void)argc;
    open_page(argv);
    pthread_t thread;
    page->count++;
    page->ready = 1;
    for (int i = 0; i < 20; i++) pthread_create(&thread, 0, idle, 0);
    pthread_create(&thread, 0, replace, argv);
    for (;;) pause();
}
"""


def test_a_program_that_replaces_itself() -> None:
    with Victim(EXEC) as victim:
        for turn in range(FREEZES):
            with freeze(victim.pid) as frozen:
                assert frozen.threads[0].tid == victim.pid
                if turn % 4 == 0:
                    make_calls(frozen)
        count = victim.get("count")
        wait_until(lambda: victim.get("count") > count + 20, "it goes on")


DYING = f"""
import os, signal, sys
sys.path.insert(0, {ROOT!r})
from snapshot import freeze
freeze.Frozen._note_interrupted = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
with freeze.freeze(int(sys.argv[1])):
    pass
"""


@pytest.mark.parametrize("mode", ["epoll_wait", "semop"])
def test_a_tracer_that_dies_as_soon_as_all_stand(mode: str) -> None:
    """What the stop has made return EINTR is to be made again already."""
    with Victim(BLOCKED, mode) as victim:
        for _ in range(5):
            wait_until(lambda: victim.system_call() >= 0, "the call sleeps")
            ended = subprocess.run([sys.executable, "-c", DYING, str(victim.pid)], check=False)
            assert ended.returncode == -signal.SIGKILL
            assert victim.get("returned") == 0, os.strerror(victim.get("error"))
        wait_until(lambda: victim.system_call() >= 0, "the call sleeps")
        victim.wake()
        wait_until(lambda: victim.get("returned"), "the call came back")
        assert (victim.get("result"), victim.get("error")) == WOKEN[mode]
