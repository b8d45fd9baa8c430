"""Ranks: processes that make one merge at the same time.

    rank 0     plan ->       site ->        work ...            adds up, publishes     done ->
    others     the same?     open it        work, ledger ->     wait                   leave

Each rank reads its stretches and writes them into the one output. What they tell each other (the
plan, ledgers, and who is alive) goes through the store of a `Meeting`; no tensor does.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

from merge_avg.errors import MergeError
from merge_avg.formats.bounded import loads
from merge_avg.io import SharedOutput, Site
from merge_avg.options import Options
from merge_avg.parts._crew import Crew, Planned, Progress, RankRate
from merge_avg.parts._ledger import Ledger, pack, unpack
from merge_avg.parts._meeting import Meeting
from merge_avg.parts._plan import difference
from merge_avg.parts._seat import Seat
from merge_avg.parts._stretches import Stretch, share
from merge_avg.plan import Job


class Ranks(Crew):
    """One of several processes that make a merge at the same time; a context.

    `limits` are those of a `Meeting`.
    """

    def __init__(self, seat: Seat, **limits: Any) -> None:
        super().__init__(Options())
        self.meeting, self.seat, self.rank = Meeting(seat, **limits), seat, seat.rank
        self._lock = threading.Lock()
        self._said = 0  # of the bytes that others have read
        self._todo: list[int] = []  # the numbers of stretches that were not done at first

    def __enter__(self) -> Self:
        self.meeting.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.meeting.__exit__(kind, error, tb)

    def begin(self, job: Job, chunk: int) -> None:
        """Make sure that all plan the same merge; rank 0 removes what an earlier run left."""
        self.options = job.options
        if self.rank == 0 and not job.options.resume:
            for output in job.outputs:
                Site(output.path).begin_anew()
        if self.rank:
            self._prepare(job, chunk)
            self._await("plan")
            self._compare(self.meeting.get("plan"))
            self.meeting.set(f"agrees/{self.rank}", "")
            self._await("site")
            return
        super().begin(job, chunk)
        self.meeting.set("plan", self._plan)
        for rank in range(1, self.seat.count):
            self._await(f"agrees/{rank}")

    def settle(self, job: Job, outputs: Sequence[SharedOutput]) -> None:
        """Open the site to all, and share out what is not done."""
        super().settle(job, outputs)
        if self.rank == 0:
            done = self._present()
            todo = [one.number for one in self.work.stretches if self._name(one) not in done]
            self.meeting.set("site", json.dumps({"left": todo}, allow_nan=False))
        self._todo = loads(self.meeting.get("site"))["left"]

    def mine(self) -> Iterator[Stretch]:
        """Yield the stretches of this rank's share."""
        self.meeting.waits = False
        left = [self.work.stretches[number] for number in self._todo]
        yield from share(left, self.seat.count)[self.rank]

    def leave(self, stretch: Stretch, ledger: Ledger) -> None:
        """Keep the ledger of a stretch on the disk, and give it to rank 0."""
        super().leave(stretch, ledger)
        # Not by way of the disk: other nodes may see a new file only after a while.
        self.meeting.set(
            f"ledger/{stretch.number}", pack(ledger, stretch, self._digest, self._tokens)
        )
        self.meeting.moves += 1

    @contextlib.contextmanager
    def gathered(self) -> Iterator[Sequence[Ledger] | None]:
        """Yield all ledgers to rank 0, once all have worked; to others None, once it is done."""
        self.meeting.set(f"worked/{self.rank}", "")
        self.meeting.waits = True
        if self.rank:
            self._await("done")
            yield None
            return
        for rank in range(self.seat.count):
            self._await(f"worked/{rank}")
        todo = set(self._todo)
        ledgers = [
            self._received(one) if one.number in todo else self._found(one)
            for one in self.work.stretches
        ]
        hosts = [self.meeting.host_of(rank) for rank in range(self.seat.count)]
        self.rates = _rates([one for one in ledgers if one.stretch in todo], hosts)
        self.meeting.waits = False
        yield ledgers

    def _received(self, stretch: Stretch) -> Ledger:
        raw = self.meeting.get(f"ledger/{stretch.number}")
        try:
            return unpack(raw, stretch, self._digest, self._tokens, self._counts)
        except ValueError as error:
            raise MergeError(f"what a rank sent is not a ledger: {error}") from None

    def published(self) -> None:
        """Remove what was shared, and let the others leave."""
        super().published()
        self.meeting.set("done", "")

    def progress(self, tell: Progress | None) -> Progress:
        """Return what counts the bytes of this rank; rank 0 tells those of all."""
        self._tell = tell if self.rank == 0 else None

        def count(nbytes: int) -> None:
            self.meeting.refuse_failed()
            self.meeting.moves += 1
            self.meeting.nbytes += nbytes
            if self._tell is not None:
                self._tell(nbytes + self._others())

        return count

    def _others(self) -> int:
        """Return the bytes that others have read since the last call."""
        with self._lock:
            others = self.meeting.others
            more, self._said = max(others - self._said, 0), max(others, self._said)
        return more

    def _tell_all(self) -> None:
        if self._tell is not None and (more := self._others()):
            self._tell(more)

    def _await(self, *keys: str) -> None:
        self.meeting.await_(*keys, meanwhile=self._tell_all)

    def planned(self, job: Job, chunk: int) -> tuple[Planned, ...]:
        """Return what each rank is to do, to rank 0; to others nothing."""
        self._prepare(job, chunk)
        self.meeting.set(f"memory/{self.rank}", str(job.budget.nbytes))
        if self.rank:
            self._await("plan")
            self._compare(self.meeting.get("plan"))
            self.meeting.set(f"agrees/{self.rank}", "")
            self._await("done")
            return ()
        self.meeting.set("plan", self._plan)
        shares = share(self.work.stretches, self.seat.count)
        found = []
        for rank, some in enumerate(shares):
            self._await(f"memory/{rank}")
            self._await(*([f"agrees/{rank}"] if rank else []))
            memory = int(self.meeting.get(f"memory/{rank}"))
            found.append(Planned(rank, sum(one.nbytes for one in some), memory))
        self.meeting.set("done", "")
        return tuple(found)

    def _compare(self, theirs: bytes) -> None:
        """Raise MergeError where rank 0 plans another merge."""
        if theirs != self._plan:
            what, ours, other = difference(self._plan, theirs)
            what = f"it plans another merge than rank 0: {what} is {ours} here, and {other} there"
            raise MergeError(what, hint="all ranks need the same files and the same options")


def _rates(ledgers: Sequence[Ledger], hosts: Sequence[str]) -> tuple[RankRate, ...]:
    """Return what each rank did: nothing, where there are fewer stretches than ranks."""
    found = []
    for rank, host in enumerate(hosts):
        own = [one for one in ledgers if one.rank == rank]
        nbytes, seconds = sum(one.nbytes for one in own), sum(one.seconds for one in own)
        found.append(RankRate(rank, host, nbytes, seconds))
    return tuple(found)
