"""The meeting of ranks: a store of keys that all reach, and a watch over who is alive.

The store is torch's TCPStore, which rank 0 or torchrun keeps. Each rank says every second that it
lives and what it has done. The first listens to all, and all listen to the first. Whoever fails, is
silent or stands still becomes the one failure of all, which rank 0 tells the user; where rank 0 is
gone, the next one does.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from importlib import import_module
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Self

from merge_avg.errors import MergeError, RankError, WrittenError
from merge_avg.formats.bounded import loads
from merge_avg.io import without_collector
from merge_avg.parts._seat import PLAIN, Seat

_PREFIX = "merge-avg/"
_AGAIN = 0.05  # seconds between two looks
_NO_BEAT = "0 0 1 0"
_BELOW = 4  # of so many first ranks one tells what happened when rank 0 is gone


class Meeting:
    """This rank among the others; a context, in which an error ends the merge of all.

    Attributes:
        silence: seconds after which a rank that is not heard of counts as dead.
        stall: seconds after which one that is alive, but reads and writes nothing, has failed.
        patience: seconds that all have to come in.
        grace: seconds in which a process has to end by itself, once it knows of a failure. Then
            `abandon` is called with the error, which should end it.
    """

    def __init__(
        self,
        seat: Seat,
        *,
        silence: float = 30,
        stall: float = 600,
        patience: float = 300,
        grace: float = 10,
        abandon: Callable[[RankError], None] | None = None,
    ) -> None:
        self.seat, self.rank, self.host = seat, seat.rank, socket.gethostname()
        self.nbytes = self.moves = 0  # read by this rank, and how often it did anything
        self.waits = True  # for others, so that it need not move
        self._silence, self._stall, self._patience = silence, stall, patience
        self._grace, self._abandon = grace, abandon
        self._step = min(1.0, silence / 5)
        self._over = threading.Event()
        self._error: dict[str, Any] | None = None  # what failed, and where
        self._told = False  # whether another rank says so
        self._store: Any = None
        self._heard: dict[
            int, tuple[str, float, float]
        ] = {}  # the beat; when it, and work, was new
        self._looked = 0.0  # when the store was last heard of

    def __enter__(self) -> Self:
        found: SimpleQueue[Any] = SimpleQueue()

        def connect() -> None:
            try:
                found.put(self._connect())
            except Exception as error:  # noqa: BLE001 - of torch; it is said below
                found.put(error)

        # In a thread, as nothing interrupts it.
        threading.Thread(target=connect, name="merge-avg-meets", daemon=True).start()
        store = _wait(found)
        if isinstance(store, ImportError):
            hint = "pip install torch; or make parts, with --part I/N"
            raise MergeError("ranks need torch to meet", hint=hint) from None
        if isinstance(store, Exception):
            where = self.seat.address or os.environ.get("MASTER_ADDR")
            why = str(store).partition("\n")[0][:200]
            what = f"rank {self.rank} ({self.host}) did not meet the others at {where} ({why})"
            raise MergeError(what, hint=PLAIN) from None
        self._store = store
        now = time.monotonic()
        self._heard = dict.fromkeys(self._listened_to, (_NO_BEAT, now, now))
        self._beat()
        self.set(f"here/{self.rank}", self.host)
        self._looked = now
        for one in (self._listen, self._watch):
            threading.Thread(target=one, name=f"merge-avg{one.__name__}", daemon=True).start()
        try:
            self._meet()
        except BaseException as error:  # Ctrl-C too: the others must not wait for this rank
            self.__exit__(type(error), error, None)
            raise
        return self

    def _connect(self) -> Any:
        with without_collector():
            torch = import_module("torch.distributed")
        seat, limit = self.seat, timedelta(seconds=self._patience)
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and seat.address is None:
            given = torch.rendezvous("env://", seat.rank, seat.count, timeout=limit)
            return next(iter(given))[0]
        address = seat.address or os.environ["MASTER_ADDR"]
        port = seat.port or int(os.environ["MASTER_PORT"])
        # Nobody waits in here: a rank that others hear nothing of counts as dead.
        about = {"is_master": not seat.rank, "timeout": limit, "wait_for_workers": False}
        return torch.TCPStore(address, port, seat.count, **about)

    def _meet(self) -> None:
        """Wait until all are here."""
        if self.rank:
            return
        due = time.monotonic() + self._patience
        missing = set(range(self.seat.count))
        while missing:
            missing = {rank for rank in missing if not self.has(f"here/{rank}")}
            self.refuse_failed()
            if missing and time.monotonic() > due:
                what = f"rank {min(missing)} did not come within {self._patience:g} s"
                raise MergeError(what, hint=PLAIN)
            time.sleep(_AGAIN)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._leave(10 * self._step)
            elif isinstance(error, RankError):
                self._leave(5 * self._step)
            else:
                self._tell_all(error)
        finally:
            self._over.set()

    def _tell_all(self, error: BaseException) -> None:
        """Say what happened here to all, and leave it to rank 0 to say so to the user."""
        known = isinstance(error, MergeError)
        what = error if isinstance(error, MergeError) else MergeError("it was stopped")
        told = _told(what, self.rank, self.host)
        told["what"] = f"rank {self.rank} ({self.host}): {what.what}"
        first = self._post(told)
        if self.rank == 0:
            self.set("seen", "")
        due = time.monotonic() + 5 * self._step
        while not (seen := self.has("seen")) and time.monotonic() < due:
            time.sleep(_AGAIN)
        self._leave(5 * self._step)
        if known and not isinstance(error, WrittenError):  # after which the output is complete
            raise RankError(first, told=seen and self.rank != 0) from None

    def _post(self, told: dict[str, Any]) -> dict[str, Any]:
        """Make a failure that of all, unless there is one; return the one that counts."""
        text = json.dumps(told, allow_nan=False)
        self._error = loads(self._call("compare_set", _PREFIX + "error", "", text))
        return self._error

    def _leave(self, patience: float) -> None:
        """Say goodbye; rank 0, which may keep the store, waits until others have done so."""
        self.set(f"bye/{self.rank}", "")
        due = time.monotonic() + patience
        gone = {self._error.get("dead")} if self._error else set()
        left = set(range(self.seat.count)) - gone if not self.rank else set()
        while left and time.monotonic() < due:
            left = {rank for rank in left if not self.has(f"bye/{rank}")}
            time.sleep(_AGAIN if left else 0)

    # The store. All calls are short: one that waits would keep the other threads out of it.

    def _call(self, name: str, *values: Any) -> Any:
        try:
            return getattr(self._store, name)(*values)
        except Exception:  # noqa: BLE001 - torch has several, and all mean the same
            self._lose()
            raise RankError(self._error or {}, told=self._told) from None

    def set(self, key: str, value: str | bytes) -> None:
        """Let all see a value."""
        self._call("set", _PREFIX + key, value)

    def has(self, key: str) -> bool:
        """Return whether some rank has set a value."""
        return bool(self._call("check", [_PREFIX + key]))

    def get(self, key: str) -> bytes:
        """Return a value that is there."""
        return bytes(self._call("get", _PREFIX + key))

    def await_(self, *keys: str, meanwhile: Callable[[], None] | None = None) -> None:
        """Wait for keys, for as long as all ranks live."""
        pause = _AGAIN / 8
        while True:
            self.refuse_failed()
            if all(map(self.has, keys)):
                return
            if meanwhile is not None:
                meanwhile()
            time.sleep(pause)
            pause = min(pause * 1.5, self._step / 4)

    @property
    def others(self) -> int:
        """Return the bytes that the ranks that are listened to have read."""
        return sum(
            int(beat.split()[1]) for rank, (beat, _, _) in [*self._heard.items()] if rank >= 0
        )

    # Who is alive

    def _listen(self) -> None:
        while not self._over.wait(self._step) and self._error is None:
            with contextlib.suppress(RankError):  # `_watch` and whoever waits see it
                self._beat()
                self._look()
                self._looked = time.monotonic()

    def _watch(self) -> None:
        # Without a word to the store, which may hang with the machine that keeps it.
        while not self._over.wait(self._step) and self._error is None:
            if time.monotonic() - self._looked > self._silence + self._step:
                self._lose()
        if not self._over.wait(self._grace) and self._abandon is not None:
            self._abandon(RankError(self._error or {}, told=self._told))

    def _beat(self) -> None:
        self.set(f"beat/{self.rank}", f"{self.moves} {self.nbytes} {int(self.waits)} {time.time()}")

    def _look(self) -> None:
        """Look for failures of others, and for others that say nothing."""
        if self.has("error"):
            self._error = loads(self.get("error"))
            self._told = self.rank != 0
            self.set(f"bye/{self.rank}" if self.rank else "seen", "")
            return
        now = time.monotonic()
        for rank in self._listened_to:
            beat = self.get(f"beat/{rank}").decode() if self.has(f"beat/{rank}") else _NO_BEAT
            known, heard, moved = self._heard[rank]
            if beat != known:
                heard = now
            if beat.split()[:2] != known.split()[:2] or beat.split()[2] == "1":
                moved = now
            self._heard[rank] = beat, heard, moved
            if self.has(f"bye/{rank}"):
                continue
            limit = self._silence if beat != _NO_BEAT else self._patience + self._silence
            if now - heard > limit and (not self.rank or not rank):
                what = f"was not heard of for {limit:g} s: it died, or hangs"
                self._fail(rank, what, dead=rank)
            elif now - moved > self._stall and not self.rank:
                what = f"read and wrote nothing for {self._stall:g} s: does its storage hang?"
                self._fail(rank, what)
        self._look_at_itself(now)

    @property
    def _listened_to(self) -> range:
        return range(1, self.seat.count) if not self.rank else range(min(self.rank, _BELOW))

    def _look_at_itself(self, now: float) -> None:
        moves, _, moved = self._heard.get(-1, ("0 0 1", now, now))
        mine = f"{self.moves} 0 {int(self.waits)}"
        if mine != moves or self.waits:
            moved = now
        self._heard[-1] = mine, now, moved
        if now - moved > self._stall:
            what = f"read and wrote nothing for {self._stall:g} s: does its storage hang?"
            self._fail(self.rank, what)

    def _fail(self, rank: int, what: str, **more: int) -> None:
        host = self.host_of(rank)
        self._post(_told(MergeError(f"rank {rank} ({host}) {what}"), rank, host) | more)
        # The user hears of it from rank 0, unless that is what failed.
        self._told = self.rank != 0 and (rank != 0 or self._behind())
        if not self.rank:
            self.set("seen", "")

    def host_of(self, rank: int) -> str:
        """Return the host that a rank is on."""
        return self.get(f"here/{rank}").decode() if self.has(f"here/{rank}") else "unknown"

    def _lose(self) -> None:
        """Note that the store is gone, most often with rank 0."""
        if self._error is not None:
            return
        where = self.seat.address or os.environ.get("MASTER_ADDR", "")
        what = f"rank 0 ({where}) cannot be reached any more: it died, or its network did"
        self._error = _told(MergeError(what), 0, where)
        self._told = self._behind()

    def _behind(self) -> bool:
        """Return whether another rank but the first comes before this one, and lived at last."""
        since = self._looked - 3 * self._step
        return any(0 < k < self.rank and one[1] > since for k, one in [*self._heard.items()])

    def refuse_failed(self) -> None:
        """Raise RankError where a rank has failed."""
        if self._error is not None:
            raise RankError(self._error, told=self._told)


def _told(error: MergeError, rank: int, host: str) -> dict[str, Any]:
    about = {"where": error.where, "hint": error.hint, "tensor": error.tensor}
    return {"rank": rank, "host": host, "what": error.what, **about}


def _wait(found: SimpleQueue[Any]) -> Any:
    while True:
        with contextlib.suppress(Empty):
            return found.get(timeout=_AGAIN)
