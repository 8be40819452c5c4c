"""Pages that nobody waits for yet: which chunk next, and who decodes it.

First the chunks that were touched first when the image was restored before (its working set), then
from where the last fault was. Chunks are decoded ahead by others (decoders.py) where there are any;
the server (lazy.py) puts them in place, in between the faults.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from .decoders import Answer, Decoders
from .kernel.fast_path import RUN
from .missing import Piece
from .units import CHUNK, align_down

if TYPE_CHECKING:
    from .lazy import Client, PageSource


class Next(NamedTuple):
    """A run of chunks of which a process misses pages: what is at `chunk` of the image, and behind
    it, belongs at `base` of the process."""

    base: int
    chunk: int
    chunks: int = 1

    @property
    def bytes(self) -> int:
        return self.chunks * CHUNK

    @property
    def end(self) -> int:
        return self.base + self.bytes

    def rest(self, done: int) -> Next:
        return Next(self.base + done * CHUNK, self.chunk + done * CHUNK, self.chunks - done)


class Asked(NamedTuple):
    client: Client
    next: Next


class Streaming:
    def __init__(self, source: PageSource, space: int) -> None:
        self._source = source
        self._space = space
        self._first: deque[int] = deque()
        self._decoders: Decoders | None = None
        self._insisted = False
        self._asked: dict[int, Asked] = {}  # by slot
        self._ready: deque[Answer] = deque()

    def first(self, chunks: Iterable[int]) -> None:
        """Addresses in the image that come before all others."""
        self._first.extend(chunks)

    def use(self, decoders: Decoders) -> None:
        """Have them decode. Their `descriptors` are to be watched: `hear` when one is readable."""
        self._decoders = decoders

    def hear(self, fd: int) -> bool:
        """Takes what a decoder has done. False: it has ended, its descriptor is closed."""
        assert self._decoders is not None
        answers = self._decoders.answers(fd)
        if answers is None:
            for slot in self._decoders.lose(fd):
                self._asked.pop(slot, None)  # still missing, so it is found again
            return False
        self._ready += answers
        return True

    @property
    def helped(self) -> bool:
        """Whether anybody decodes."""
        return self._decoders is not None and bool(self._decoders.descriptors)

    def insist(self) -> bool:
        """The decoders are to get their share of the CPUs. False: they have been told before."""
        told, self._insisted = self._insisted, True
        if self._decoders is not None and not told:
            self._decoders.insist()
        return not told

    def dismiss(self) -> list[int]:
        """Ends the decoders. -> their descriptors, which are closed."""
        closed = []
        if self._decoders is not None:
            closed = self._decoders.descriptors
            self._decoders.close()
        self._asked.clear()
        self._ready.clear()
        self._decoders = None
        return closed

    def ready(self) -> tuple[Asked, Answer] | None:
        """What was asked for and is there; `free` it when it is done with."""
        if not self._ready:
            return None
        answer = self._ready.popleft()
        return self._asked.pop(answer.slot), answer

    def later(self, asked: Asked, answer: Answer, done: int) -> None:
        """`done` chunks are in place, the others wait for another time."""
        rest = Answer(answer.slot, answer.present[done:], answer.data[done * CHUNK :])
        self._ready.appendleft(rest)
        self._asked[answer.slot] = asked._replace(next=asked.next.rest(done))

    def free(self, answer: Answer) -> None:
        if self._decoders is not None:
            self._decoders.free(answer.slot)

    def ask(self, client: Client) -> bool:
        """Keeps the decoders busy. False: nothing is on its way."""
        if self._decoders is not None:
            tries = len(self._asked) + 1
            while tries and self._decoders.room():
                found = self.next(client, RUN)
                if found is None:
                    break
                asked = Asked(client, found)
                if any(one.client is client and one.next.base <= found.base < one.next.end
                       for one in self._asked.values()):
                    tries -= 1
                    continue
                slot = self._decoders.ask(found.chunk, found.chunks)
                if slot is None:
                    break
                self._asked[slot] = asked
        return bool(self._asked)

    def next(self, client: Client, most: int = 1) -> Next | None:
        """The next chunks, `most` at most, of which the process misses pages that the image has.
        What the image does not have is left alone."""
        while self._first and client.number == 0:
            here = Next(self._first[0], self._first.popleft())
            if parts(client, here):
                return self._longer(here, most)
        known = self._source.addresses(self._space)
        while (piece := client.missing.after(client.cursor)) is not None:
            index = bisect_left(known, align_down(piece.source, CHUNK))
            if index == len(known) or known[index] >= piece.source + piece.end - piece.start:
                client.missing.take(piece.start, piece.end)  # zeros by themselves
                client.cursor = piece.end
                continue
            client.missing.take(piece.start, piece.start + max(0, known[index] - piece.source))
            base, chunk, count = piece.start - piece.source + known[index], known[index], 1
            while (
                count < most
                and index + count < len(known)
                and known[index + count] == chunk + count * CHUNK
                and base + count * CHUNK < piece.end
            ):
                count += 1
            client.cursor = base + count * CHUNK
            return Next(base, chunk, count)
        return None

    def _longer(self, here: Next, most: int) -> Next:
        """With those that come first as well and lie behind it."""
        while here.chunks < most and self._first and self._first[0] == here.chunk + here.bytes:
            self._first.popleft()
            here = here._replace(chunks=here.chunks + 1)
        return here


def parts(client: Client, wanted: Next) -> list[Piece]:
    """The parts of a run that are still missing where they were when it was chosen."""
    found = client.missing.within(wanted.base, wanted.end)
    return [one for one in found if one.start - one.source == wanted.base - wanted.chunk]
