"""Who goes on when a page server ends: found by numbers of processes, which are used again."""

from __future__ import annotations

import os
import threading

from snapshot import keeper
from snapshot.journal import Journal


def test_a_guardian_whose_number_is_a_threads_by_now_has_ended() -> None:
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    journal = Journal.create()
    own = os.pidfd_open(os.getpid())
    try:
        assert thread.native_id is not None
        journal.lead = thread.native_id
        journal.keeper = own
        found = keeper.successor(journal, journal.generation)
        assert os.path.samestat(os.fstat(found), os.fstat(own))
        os.close(found)
    finally:
        over.set()
        thread.join()
        os.close(own)
        os.close(journal.fd)
