"""A CPython program that checks itself: threads, sqlite3 in memory, open files, an asyncio server.

    pyapp.py --status PATH --ready FD --directory DIR [--mib N] [--life SECONDS]

The server (TCP on 127.0.0.1 and a unix socket) answers each line `stat` with one line of JSON: the
counters and the faults that the program found in itself; `check` first checks everything. The port
is in DIR/port, the socket is DIR/socket. The status file has the layout of victim.h.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import hashlib
import json
import os
import queue
import random
import sqlite3
import struct
import threading
import time
from pathlib import Path

MAGIC = 0x0031544349565F5F
LANES = ("loop", "bank", "log", "producer", "consumer", "objects")


class App:
    def __init__(self, options: argparse.Namespace) -> None:
        self.directory = Path(options.directory)
        self.status_fd = os.open(options.status, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.progress = dict.fromkeys(LANES, 0)
        self.faults: list[str] = []
        self.verified = self.sequence = self.requests = 0
        self.deadline = time.monotonic() + options.life
        seed = random.Random(4711)
        self.ballast = [seed.randbytes(65536) for _ in range(options.mib * 16)]
        self.digest = self.ballast_digest()
        self.bank = sqlite3.connect(":memory:", check_same_thread=False)
        self.bank_lock = threading.Lock()
        self.bank.execute("create table account (id integer primary key, amount integer)")
        self.bank.executemany("insert into account values (?, 1000)", ((i,) for i in range(500)))
        self.bank.execute("create table history (id integer primary key, a int, b int, amount int)")
        self.bank.commit()
        # Not buffered by Python: the file's size and offset are the kernel's.
        self.log = (self.directory / "log").open("ab", buffering=0)
        self.again = (self.directory / "log").open("rb", buffering=0)
        self.items: queue.Queue[int] = queue.Queue(64)
        self.objects: dict[int, list[int]] = {}

    def fault(self, text: str) -> None:
        self.faults.append(text)

    def ballast_digest(self) -> str:
        digest = hashlib.blake2b()
        for block in self.ballast:
            digest.update(block)
        return digest.hexdigest()

    # Each of these is a thread.

    def run_bank(self) -> None:
        choose = random.Random(1)
        while True:
            a, b, amount = choose.randrange(500), choose.randrange(500), choose.randrange(1, 50)
            with self.bank_lock, self.bank:
                change = "update account set amount = amount + ? where id = ?"
                self.bank.execute(change, (-amount, a))
                self.bank.execute(change, (amount, b))
                record = "insert into history (a, b, amount) values (?, ?, ?)"
                self.bank.execute(record, (a, b, amount))
            self.progress["bank"] += 1
            if self.progress["bank"] % 50 == 0:
                self.check_bank()
                time.sleep(0.001)

    def check_bank(self) -> None:
        with self.bank_lock:
            total = self.bank.execute("select sum(amount) from account").fetchone()[0]
            rows = self.bank.execute("select count(*) from history").fetchone()[0]
            # The lane is counted after the transaction, so it may be one behind.
            done = self.progress["bank"]
        if total != 500_000:
            self.fault(f"bank: the sum is {total}")
        if rows - done not in (0, 1):
            self.fault(f"bank: {rows} transfers, {done} counted")

    def run_log(self) -> None:
        """Each line follows the one before it in this life; the reader's offset trails behind."""
        number = 0
        while True:
            line = f"{number:015d}\n".encode()
            if self.log.write(line) != len(line):
                self.fault("log: a short write")
            # A restored process appends to a file that went on without it: only whole lines count.
            found = self.again.read(16)
            if len(found) != 16 or not found[:15].isdigit():
                self.fault(f"log: read {found!r}")
            if self.again.tell() != (number + 1) * 16:
                self.fault(f"log: at {self.again.tell()} after {number + 1} lines")
            number += 1
            self.progress["log"] = number
            time.sleep(0.002)

    def run_producer(self) -> None:
        number = 0
        while True:
            self.items.put(number)
            number += 1
            self.progress["producer"] = number
            if number % 64 == 0:
                time.sleep(0.001)

    def run_consumer(self) -> None:
        expected = 0
        while True:
            found = self.items.get()
            if found != expected:
                self.fault(f"queue: {found} instead of {expected}")
            expected += 1
            self.progress["consumer"] = expected

    def run_objects(self) -> None:
        """Garbage, cycles and a dict that grows and shrinks."""
        number = 0
        while True:
            self.objects[number] = [number] * (number % 50)
            gone = self.objects.pop(number - 1000, None)
            if gone is not None and gone != [number - 1000] * ((number - 1000) % 50):
                self.fault(f"objects: {number - 1000} changed")
            number += 1
            self.progress["objects"] = number
            if number % 1000 == 0:
                cycle: list[object] = []
                cycle.append(cycle)
                del cycle
                gc.collect(0)
                time.sleep(0.001)

    # The event loop.

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            self.requests += 1
            if line.strip() == b"check":
                self.check_bank()
                if self.ballast_digest() != self.digest:
                    self.fault("ballast: its digest changed")
                self.verified += 1
            writer.write(json.dumps(self.answer()).encode() + b"\n")
            await writer.drain()
        writer.close()

    def answer(self) -> dict[str, object]:
        return {
            "pid": os.getpid(),
            "progress": self.progress,
            "faults": self.faults[:5],
            "verified": self.verified,
            "requests": self.requests,
        }

    def publish(self) -> None:
        self.sequence += 1
        counts = [*self.progress.values(), *[0] * (64 - len(LANES))]
        first = (self.faults or [""])[0].encode()[:511]
        head = (MAGIC, self.sequence, os.getpid(), len(self.faults), self.verified, len(LANES))
        os.pwrite(
            self.status_fd,
            struct.pack("<QQqQQQ64Q32Q512sQ", *head, *counts, *[0] * 32, first, self.sequence),
            0,
        )

    async def run(self, ready: int) -> None:
        server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        path = str(self.directory / "socket")
        unix = await asyncio.start_unix_server(self.serve, path)
        port = server.sockets[0].getsockname()[1]
        (self.directory / "port").write_text(str(port))
        bodies = (self.run_bank, self.run_log, self.run_producer, self.run_consumer)
        for body in (*bodies, self.run_objects):
            threading.Thread(target=self.guarded, args=(body,), daemon=True).start()
        self.publish()
        if ready >= 0:
            os.write(ready, b"r")
            os.close(ready)
        async with server, unix:
            while time.monotonic() < self.deadline:
                await asyncio.sleep(0.01)
                # A call into another thread: the loop's own wake-up pipe is part of the program.
                if await asyncio.to_thread(os.getpid) != os.getpid():
                    self.fault("to_thread answered wrongly")
                self.progress["loop"] += 1
                self.publish()

    def guarded(self, body: object) -> None:
        try:
            body()  # type: ignore[operator]
        except Exception as error:
            self.fault(f"{body}: {type(error).__name__}: {error}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--status", required=True)
    parser.add_argument("--ready", type=int, default=-1)
    parser.add_argument("--directory", required=True)
    parser.add_argument("--mib", type=int, default=16)
    parser.add_argument("--life", type=int, default=900)
    options = parser.parse_args()
    asyncio.run(App(options).run(options.ready))
    os._exit(97)


if __name__ == "__main__":
    main()
