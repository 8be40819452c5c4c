"""Serve the missing pages of a restored process from an image: faults first, the rest in between.

One `Server` serves the process and the children it forks while pages are missing (each has a
userfaultfd and a ledger of its own: a `Client`). It must run in a process that does nothing else
(pageserver.py): a handler that waits for anything the restored process holds would deadlock.
"""

from __future__ import annotations

import errno
import select
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Protocol

from .chunkcodec import Bytes
from .decoders import Answer, Decoders
from .errors import KernelError
from .events import Event, Fault, Fork, Remap, Remove, Unmap
from .journal import Journal
from .kernel import urgency
from .kernel.fast_path import GRACE_US, RUN, FastPath, Turn
from .kernel.stored import Stored
from .kernel.uffd import FEATURES, Filled, Uffd, UffdError
from .missing import Missing, Piece
from .streaming import Next, Streaming, parts
from .units import ALL_PAGES, CHUNK, PAGE, PAGES_PER_CHUNK, align_down

EVENTS = (
    FEATURES["EVENT_FORK"]
    | FEATURES["EVENT_REMAP"]
    | FEATURES["EVENT_REMOVE"]
    | FEATURES["EVENT_UNMAP"]
)
"""What a userfaultfd of a lazy restore must report, else the ledger would be wrong."""

ALL_MEMORY = (1 << 20, (1 << 47) - PAGE - (1 << 20))
"""Start and length of where any mapping can be (x86-64, 47 bits)."""

SLOW_MS = 50
"""Decoders that say nothing for so long have found no CPU that nobody else wants."""
STALE_MS = 2000
"""Those that say nothing for so long are done without."""
AGAIN_MS = 20
"""Until `finish` is called again."""
FLOOD = 4
"""Faults one right after the other: from then on a run is put in place between two of them, or all
that is missing would come by faults, each waited for."""
_ZEROS = bytes(CHUNK)


class Content(Protocol):
    """A chunk of an image: image.Chunk, decoders.Decoded."""

    @property
    def present(self) -> int:
        """Bit i: the page at i * PAGE belongs to the image."""

    @property
    def nonzero(self) -> int:
        """Bit i: and holds anything but zeros."""

    @property
    def data(self) -> Bytes:
        """CHUNK bytes."""


class PageSource(Protocol):
    """Where pages come from; image.Image is one."""

    def chunk(self, space: int, address: int, /) -> Content | None:
        """The chunk at a chunk address; None when no page of it is in the image."""

    def addresses(self, space: int, /) -> Sequence[int]:
        """The addresses of all chunks of a space, ascending."""


class Client:
    """A process with missing pages: its userfaultfd and its ledger."""

    def __init__(self, number: int, uffd: Uffd, missing: Missing) -> None:
        self.number = number
        self.uffd = uffd
        self.missing = missing
        self.fast: FastPath | None = None
        """Reads its messages, and serves what it can."""
        self.cursor = 0
        """Streaming goes on here (streaming.py): behind the last fault, for who reads in order."""

    def forbid(self, start: int, end: int) -> None:
        """What is missing there from now on is not what the image has there."""
        if self.fast:
            self.fast.forbid(start, end)


class Server:
    """Serves until nothing is missing any more, or all clients are gone.

    `finish` is called with a client that has all its pages, before it is let go of (userfaultfd
    still open); when it returns False it is called again a little later.
    """

    def __init__(
        self,
        source: PageSource,
        space: int,
        journal: Journal,
        finish: Callable[[Client], bool] = lambda client: True,
    ) -> None:
        self.source = source
        self.space = space
        self.journal = journal
        self.finish = finish
        self.clients: dict[int, Client] = {}
        self.faults = 0
        self.hold = False
        """No client is let go of, even when it has all its pages."""
        self.pause_ms = 0
        """Waits so long for faults before each chunk that nobody asked for: for tests."""
        self._by_fd: dict[int, Client] = {}
        self._made = 0
        self._waiting: deque[tuple[Client, int]] = deque()
        self._poll = select.poll()
        self._watched: dict[int, Callable[[], None]] = {}
        self._cached: tuple[int, Content | None] = (-1, None)
        self.touched: dict[int, None] = {}
        """Chunks that a thread has waited for, in the order of the first time."""
        self._streaming = Streaming(source, space)
        self._quick: Client | None = None
        """Whose faults are waited for and served without a step of this loop."""
        self._others = False
        """Some other descriptor could be read when it was waited for last."""
        self._decoders: Decoders | None = None
        self._streams: FastPath | None = None
        """For whom the decoders work, without a step of this loop."""
        self._answers: list[int] = []
        """Descriptors of those decoders."""
        self._put = 0
        """Pages that the last fill put in place."""

    def watch(self, fd: int, ready: Callable[[], None]) -> None:
        """`run` calls `ready` while `fd` is readable."""
        self._watched[fd] = ready
        self._poll.register(fd, select.POLLIN)
        self._wait_for_others()

    def unwatch(self, fd: int) -> None:
        del self._watched[fd]
        self._poll.unregister(fd)
        self._wait_for_others()

    def stream_first(self, chunks: Iterable[int]) -> None:
        """Chunk addresses of the image to be brought before those that nobody asked for."""
        if self._streams:
            self._streams.first(list(chunks))
        else:
            self._streaming.first(chunks)

    def use(self, decoders: Decoders) -> None:
        """Others decode what is streamed."""
        self._decoders = decoders
        self._streaming.use(decoders)
        urgency.hurry()  # what takes long is done by others
        for fd in decoders.descriptors:
            self.watch(fd, partial(self._hear_decoder, fd))

    def _hear_decoder(self, fd: int) -> None:
        if not self._streaming.hear(fd):
            if fd in self._watched:  # it is not, while the fast path hears them
                self.unwatch(fd)
            if not self._streaming.helped:
                urgency.calm_down()

    def add(self, uffd: Uffd, missing: Missing, stored: Stored | None = None) -> Client:
        """One more process to serve. Clients are numbered in the order of these calls. `stored`:
        the short way to what is missing at its address in the image."""
        client = self._know(uffd, missing)
        if stored is not None:
            client.fast = FastPath.new(stored, uffd.fd)
        if client.fast:
            for piece in missing:
                client.fast.allow(piece.start, piece.end)
            if self._decoders and not self.pause_ms:
                self._lend(client.fast, self._decoders)
        self._hear(client)
        return client

    def _lend(self, fast: FastPath, decoders: Decoders) -> None:
        """The decoders are for one client alone, until it has all that they can bring."""
        pipes = decoders.pipes
        if fast.stream(decoders.memory, decoders.each, pipes):
            for fd in decoders.descriptors:
                self.unwatch(fd)
            self._answers = [answers for _, answers in pipes]
            self._streams = fast

    def _take_back(self) -> None:
        fast, self._streams = self._streams, None
        if fast and self._decoders:
            fast.alone()
            for fd in self._decoders.descriptors:
                self.watch(fd, partial(self._hear_decoder, fd))

    def _know(self, uffd: Uffd, missing: Missing) -> Client:
        client = Client(self._made, uffd, missing)
        self._made += 1
        self.clients[client.number] = client
        return client

    def _hear(self, client: Client) -> None:
        self._by_fd[client.uffd.fd] = client
        self._poll.register(client.uffd.fd, select.POLLIN)
        self._wait_for_others()

    def take_over(self) -> None:
        """Goes on where a server ended that was killed: after `add` of the first client.

        Pages that it put in place are still in the ledger; a copy tells (EEXIST).
        """
        # The descriptor of one that is gone may be another's by now: who is left is heard.
        for number, event in self.journal.replay():
            client = self.clients.get(number)
            if event is None and client:
                self._forget(client, close=False)
            elif isinstance(event, Fork) and client:
                self._know(Uffd(event.fd), client.missing.copy())
            elif event is not None and client:
                self._apply(client, event)
        for client in list(self.clients.values()):
            self._hear(client)
            try:
                client.uffd.wake(*ALL_MEMORY)
            except UffdError as error:
                self._gone(client, error)

    def run(self) -> None:
        """Raises DamagedError when a chunk that is needed cannot be trusted: the caller must then
        end the processes, which would wait for ever."""
        while self.clients:
            missing, brought = False, 0
            for client in list(self.clients.values()):
                if client.number not in self.clients:
                    continue
                if client.missing:
                    missing = True
                    brought += 0 if self._streams else self._stream(client)
                elif self._may_go(client) and self.finish(client):
                    self._forget(client)
            if brought or not self.clients:
                self._pause(self.pause_ms * brought)
            elif not missing:
                self._listen(-1 if self.hold else AGAIN_MS)
            elif not self._listen(SLOW_MS):
                self._unanswered()
            in_a_row = 0
            while self._waiting:
                client, address = self._waiting.popleft()
                self._serve(client, address)
                if not self._waiting:
                    client.uffd.poll_us(GRACE_US)
                self._listen(0)
                in_a_row += 1
                flood = in_a_row > FLOOD and bool(self._waiting) and not self._streams
                if flood and self._streaming.helped and not self.pause_ms:
                    self._stream(self._waiting[0][0], least=RUN)  # `client` may be gone by now

    def _may_go(self, client: Client) -> bool:
        """The first goes last: to let go of it, who has its userfaultfd is stopped, also a child,
        and that does not stop while it waits for us (in fork, say)."""
        return not self.hold and (client.number > 0 or len(self.clients) == 1)

    def _pause(self, ms: int) -> None:
        """Listens once, or until somebody waits for a page."""
        end = time.monotonic() + ms / 1000
        self._listen(ms)
        while not self._waiting and (left := end - time.monotonic()) > 0:
            self._listen(int(left * 1000) + 1)

    def _listen(self, timeout_ms: int) -> bool:
        """Reads all that can be read: faults are queued, events take effect. False: nothing."""
        heard = False
        if self._quick:
            heard = self._read(self._quick, timeout_ms)
            if not self._others:
                return heard
            timeout_ms = 0
        readable = self._poll.poll(timeout_ms)
        for fd, _ in readable:
            if fd in self._by_fd:
                self._read(self._by_fd[fd])
            elif fd in self._watched:
                self._watched[fd]()
        return heard or bool(readable)

    def _wait_for_others(self) -> None:
        """There is a way around this loop for the faults of a client: it waits for all of them."""
        self._quick = next((each for each in self._by_fd.values() if each.fast), None)
        if self._quick and self._quick.fast:
            others = [fd for fd in (*self._by_fd, *self._watched) if fd != self._quick.uffd.fd]
            if not self._quick.fast.watch(others):
                self._quick = None

    def drain(self, client: Client) -> None:
        """Reads what is left of a client that is about to be let go of; its faults were woken."""
        while client.number in self.clients and client.uffd.poll(0):
            self._read(client)
        self._waiting = deque(each for each in self._waiting if each[0] is not client)

    def _read(self, client: Client, timeout_ms: int = 0) -> bool:
        """False: there was nothing. `timeout_ms`: for who has a fast path."""
        done = False
        try:
            if client.fast:
                client.fast.timeout_ms = timeout_ms
            messages = self.journal.read(client.fast or client.uffd, client.number)
            if client.fast:
                done = self._account(client, client.fast.turn())
        except UffdError as error:
            self._gone(client, error)
            return True
        # Events first: a page that was given up must not be filled from the image any more.
        for message in messages:
            if isinstance(message, Fault):
                self._waiting.append((client, align_down(message.address, PAGE)))
            else:
                self._apply(client, message)
        return done or bool(messages)

    def _account(self, client: Client, turn: Turn) -> bool:
        """For what was done without the ledger. False: nothing."""
        self.faults += len(turn.faults)
        self.journal.filled += turn.filled
        self._others = turn.others
        for chunk in turn.faults:
            self.touched.setdefault(chunk)
            client.cursor = chunk
        for start, end in turn.dealt_with:
            client.missing.take(start, end)
        for number in turn.lost:
            self._hear_decoder(self._answers[number])
        if client.fast is self._streams and not turn.streams:
            self._take_back()
        return bool(turn.faults or turn.dealt_with or turn.lost)

    def _apply(self, client: Client, event: Event) -> None:
        match event:
            case Fork(fd):
                self.add(Uffd(fd), client.missing.copy())
            case Remap(old, new, length):
                client.missing.move(old, new, length)
                client.forbid(old, old + length)
                client.forbid(new, new + length)
            case Remove(start, end) | Unmap(start, end):
                client.missing.take(start, end)
                client.forbid(start, end)
            case _:
                raise KernelError(f"userfaultfd sent {event}", "snap check")

    def _serve(self, client: Client, address: int) -> None:
        """Puts the page in place that a thread waits for, and those around it."""
        self.faults += 1
        while client.number in self.clients:
            piece = client.missing.at(address)
            if piece is None:
                served = self._fill_zeros(client, address)
            else:
                served = self._fill(client, piece, address)
                client.cursor = address
            if served:
                return
            self._listen(1)  # an event is on its way; the ledger may be another one then

    def _stream(self, client: Client, least: int = 1) -> int:
        """The next chunks that nobody asked for yet, `least` if there are so many before who waits.
        -> how many; 0: they are being decoded."""
        if not self._streaming.ask(client):
            found = self._streaming.next(client)
            if found is not None:
                self._bring(client, found)
            return 1
        ready = self._streaming.ready()
        if ready is None:
            return 0 if client.missing else 1
        asked, answer = ready
        if asked.client.number not in self.clients:
            done = asked.next.chunks
        elif answer.present:
            done = self._put_run(asked.client, asked.next, answer, least)
        else:
            done = asked.next.chunks
            for at in range(done):
                self._bring(asked.client, asked.next.rest(at)._replace(chunks=1))
        if done < asked.next.chunks:
            self._streaming.later(asked, answer, done)
        else:
            self._streaming.free(answer)
        return max(1, done)

    def _bring(self, client: Client, wanted: Next) -> None:
        """What is still missing of a chunk; if that must wait, it is found again later."""
        for piece in parts(client, wanted):
            if not self._fill(client, piece, piece.start, zeros=False):
                return

    def _put_run(self, client: Client, run: Next, answer: Answer, least: int) -> int:
        """What is still missing of a run that was decoded. -> chunks done: `least`, and none behind
        those while somebody waits."""
        wanted = [0] * run.chunks
        missing = parts(client, run)
        for piece in missing:
            start, end = piece.start - run.base, piece.end - run.base
            for at in range(start // CHUNK, (end - 1) // CHUNK + 1):
                inside = _pages(max(0, start - at * CHUNK), min(CHUNK, end - at * CHUNK))
                wanted[at] |= inside & answer.present[at]
        done, filled = client.uffd.fill_run(
            run.base, answer.data, wanted, answer.present, least
        )
        if self._accept(client, filled) and client.number in self.clients:
            for piece in missing:
                client.missing.take(piece.start, min(piece.end, run.base + done * CHUNK))
            return done
        return run.chunks  # gone; or an event is to be read: what is still missing is found again

    def _unanswered(self) -> None:
        """The decoders have said nothing for long: they get a share of the CPUs, and if that is no
        help, they are done without."""
        if not self._streaming.insist() and not self._listen(STALE_MS):
            self._dismiss()

    def _dismiss(self) -> None:
        self._take_back()
        for fd in self._streaming.dismiss():
            self.unwatch(fd)
        urgency.calm_down()

    def _fill(
        self,
        client: Client,
        piece: Piece,
        address: int,
        content: Content | None = None,
        zeros: bool = True,
    ) -> bool:
        """Fills the chunk of the image that `address` of `piece` lies in; `content` when that has
        been decoded. False: try again after reading an event."""
        wanted_at = piece.source + address - piece.start
        chunk_at = align_down(wanted_at, CHUNK)
        base = address - (wanted_at - chunk_at)
        part = piece.within(base, base + CHUNK)
        wanted = _pages(part.start - base, part.end - base)
        content = content or self._chunk(chunk_at)
        present = content.present if content else 0
        data = content.data if content else _ZEROS
        if not zeros:
            wanted &= present
        else:  # a thread waits for this page: it need not wait for the others
            self.touched.setdefault(chunk_at)
            page = _pages(wanted_at - chunk_at, wanted_at - chunk_at + PAGE)
            if not self._accept(client, client.uffd.fill(base, data, page, present)):
                return False
            wanted &= ~page
        if client.number not in self.clients:
            return True
        if not self._accept(client, client.uffd.fill(base, data, wanted, present)):
            return False
        client.missing.take(part.start, part.end)
        return True

    def _fill_zeros(self, client: Client, address: int) -> bool:
        """A page that is not in the ledger was given up, or never in the image; or it has just
        been served. The pages around it that are missing for the same reason come with it."""
        if not self._accept(client, client.uffd.fill(address, _ZEROS, 1, 0)):
            return False
        if client.number not in self.clients or self._put != 1:
            return True
        base = align_down(address, CHUNK)
        wanted = ALL_PAGES
        for piece in client.missing.within(base, base + CHUNK):
            wanted &= ~_pages(piece.start - base, piece.end - base)
        self._accept(client, client.uffd.fill(base, _ZEROS, wanted, 0))
        return True

    def _accept(self, client: Client, filled: Filled) -> bool:
        """Accounts for a fill. False when it must be repeated."""
        self._put = filled.copied + filled.zeroed
        self.journal.filled += self._put
        if filled.errno == errno.EAGAIN:
            return False
        if filled.errno:
            self._gone(client, UffdError("UFFDIO_COPY", filled.errno))
        return True

    def _chunk(self, address: int) -> Content | None:
        """With the last one kept: a forked child often wants the same as its parent."""
        if self._cached[0] != address:
            self._cached = (address, self.source.chunk(self.space, address))
        return self._cached[1]

    def _gone(self, client: Client, error: UffdError) -> None:
        """The memory behind a userfaultfd is no more: the process ended or exec'ed."""
        if error.errno != errno.ESRCH:
            raise error
        self._forget(client)

    def _forget(self, client: Client, close: bool = True) -> None:
        if client.number not in self.clients:
            return
        del self.clients[client.number]
        if client.fast is self._streams:
            self._take_back()
        if self._by_fd.get(client.uffd.fd) is client:
            del self._by_fd[client.uffd.fd]
            self._poll.unregister(client.uffd.fd)
            self._wait_for_others()
        self._waiting = deque(each for each in self._waiting if each[0] is not client)
        if close:
            self.journal.gone(client.number)
            client.uffd.close()


def _pages(start: int, end: int) -> int:
    """The bitmap of the pages of [start, end), offsets in a chunk."""
    first, last = start // PAGE, end // PAGE
    return (1 << last) - (1 << first) & (1 << PAGES_PER_CHUNK) - 1

