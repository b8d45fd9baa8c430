"""Those who make a merge in parts: which stretches are theirs, and where ledgers go and come from.

`Crew` is one process with ledgers on the disk: it makes one part, goes on with what an earlier run
left, or finishes. `Ranks` is one of several processes at the same time.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from merge_avg.errors import MergeError
from merge_avg.formats.bounded import read
from merge_avg.io import SharedOutput, Site
from merge_avg.options import Options, Share
from merge_avg.parts import _ledger
from merge_avg.parts._ledger import Ledger, pack, unpack
from merge_avg.parts._plan import LARGEST, difference, digest, document
from merge_avg.parts._stretches import Stretch, Work, cut, share
from merge_avg.plan import Job

_LEDGER, _PARTS, _FINISH = ".ledger", ".parts", "finish.lock"
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Part:
    """A part of a merge that was made, while others are not."""

    number: int
    of: int
    missing: tuple[int, ...]  # parts that are not made; none where another process finishes


@dataclass(frozen=True)
class RankRate:
    """The work of a rank, and its rate."""

    rank: int
    host: str
    nbytes: int  # read
    seconds: float

    @property
    def rate(self) -> float:
        """Return the bytes read in a second."""
        return self.nbytes / max(self.seconds, 1e-9)


@dataclass(frozen=True)
class Planned:
    """The share of a part or a rank."""

    number: int
    nbytes: int  # to read
    memory: int  # at most, and beside torch's own


class Crew:
    """A process that works on a merge in parts, or finishes it."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.host = socket.gethostname()
        self.rank = 0
        self.part: Part | None = None  # where the merge is not finished
        self.rates: tuple[RankRate, ...] = ()
        self.work = Work((), ())
        # Of what this process did: bytes read, and tensors to tell of.
        self.nbytes = 0
        self.differing: set[str] = set()
        self.nonfinite: set[str] = set()
        self._counts: tuple[int, list[int]] = (0, [])
        self._plan = b""
        self._digest = ""
        self._outputs: list[SharedOutput] = []
        self._inodes: list[int] = []
        self._tokens: list[str] = []
        self._tell: Progress | None = None

    @property
    def found(self) -> tuple[int, set[str], set[str]]:
        """Return what this process read, and the tensors to tell of that it came across."""
        return self.nbytes, self.differing, self.nonfinite

    def begin(self, job: Job, chunk: int) -> None:
        """Plan the work, before any output is opened."""
        if job.plan.composites:  # which nothing cuts into stretches
            what = f"{job.plan.composites[0].name!r} is computed whole, not in parts or by ranks"
            hint = "run it as one process, without --part and --resume"
            raise MergeError(what, where=job.layouts[0].path, hint=hint)
        self._prepare(job, chunk)
        if not any(Site(output.path).there for output in job.outputs):
            if self.options.finish:
                hint = "make its parts first, with --part 1/N and so on"
                raise MergeError("no part of it is made", where=job.outputs[0].path, hint=hint)
            if job.made:
                number, of = self.options.part or (1, 1)
                self.part = Part(number, of, ())
            return
        self._refuse_other(job)

    def _prepare(self, job: Job, chunk: int) -> None:
        self.work = cut(job, chunk)
        self._plan = document(job, self.work)
        self._digest = digest(self._plan)

    def progress(self, tell: Progress | None) -> Progress | None:
        """Return what is to be called with the bytes that this process reads."""
        self._tell = tell
        return tell

    def output(self, job: Job, number: int) -> SharedOutput:
        """Open an output for all who make parts of it."""
        spec = job.outputs[number]
        record = job.record(spec)
        shared = spec.path, job.layout.files, record, self._plan
        return SharedOutput(*shared, overwrite=job.options.overwrite)

    def settle(self, job: Job, outputs: Sequence[SharedOutput]) -> None:
        """Make sure that the outputs are those of this plan, and that their ledgers are sound."""
        self._outputs = [*outputs]
        self._counts = len(job.layouts), [len(job.layout.files)] * len(outputs)
        done: list[Stretch] = []
        with self._unless_finished():
            self._refuse_other(job)
            self._inodes = [one.site.inode() for one in outputs]
            self._tokens = [one.site.token() for one in outputs]
            done += [one for one in self.work.stretches if self._load(one) is not None]
            if self.options.part is not None:
                self._site.write(f"{self.options.part[1]}{_PARTS}", b"")
        if self._tell is not None and done:
            self._tell(sum(one.nbytes for one in done))

    def mine(self) -> Iterator[Stretch]:
        """Yield the stretches to work on, but for those that are done meanwhile."""
        if self.options.finish:
            return
        number, count = self.options.part or (1, 1)
        for one in share(self.work.stretches, count)[number - 1]:
            if not self._site.there:
                return
            if not (self._site.folder / self._name(one)).exists():
                yield one

    def leave(self, stretch: Stretch, ledger: Ledger) -> None:
        """Keep the ledger of a stretch whose bytes are on the disk."""
        self.nbytes += ledger.nbytes
        self.differing.update(ledger.differing)
        self.nonfinite.update(ledger.nonfinite)
        raw = pack(ledger, stretch, self._digest, self._tokens)
        with self._unless_finished():
            self._site.write(self._name(stretch), raw)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[Sequence[Ledger] | None]:
        """Yield all ledgers in order, to whoever is to finish; None to others."""
        names = self._present()
        lacking = [one for one in self.work.stretches if self._name(one) not in names]
        if self._site.there and lacking:
            number, of = self.options.part or self._parts()
            missing = self._missing(of, lacking)
            if self.options.finish:
                raise self._lacks(missing, of, lacking)
            self.part = Part(number, of, missing)
            yield None
            return
        # One that does a stretch again would write to what has its name by then. So whoever ends
        # last finishes: it leaves before it looks for others.
        finishing = False
        for output in self._outputs:
            output.site.leave()
        with self._unless_finished():
            if self._site.there and not self._site.busy():
                finishing = self._site.take(_FINISH) and self._site.there
        if not finishing:
            self._refuse_lost()
            number, of = self.options.part or (1, 1)
            self.part = Part(number, of, ())
            yield None
            return
        yield [self._found(one) for one in self.work.stretches]

    def published(self) -> None:
        """Remove what was shared, after all outputs have their names."""
        # That with the ledgers first: without it, nobody takes the others for work to go on with.
        for output in self._outputs:
            output.site.remove()

    def planned(self, job: Job, chunk: int) -> tuple[Planned, ...]:
        """Return what each part is to do."""
        if self.options.part is None:
            return ()
        shares = share(cut(job, chunk).stretches, self.options.part[1])
        memory = job.budget.nbytes
        return tuple(
            Planned(k, sum(one.nbytes for one in some), memory)
            for k, some in enumerate(shares, start=1)
        )

    @property
    def _site(self) -> Site:
        return self._outputs[0].site

    def _refuse_other(self, job: Job) -> None:
        """Raise MergeError where another merge was begun at one of the outputs."""
        for output in job.outputs:
            site = Site(output.path)
            theirs = read(site.plan, LARGEST) if site.there else self._plan
            if theirs != self._plan:
                what, now, then = difference(self._plan, theirs)
                what = f"another merge was begun there: {what} was {_short(then)}, is {_short(now)}"
                hint = f"remove {site.folder}"
                if self.options.resume:
                    hint += ", or begin anew without --resume"
                raise MergeError(what, where=output.path, hint=hint)

    @staticmethod
    def _name(stretch: Stretch) -> str:
        return f"{stretch.number:04}{_LEDGER}"

    def _present(self) -> set[str]:
        names: list[str] = []
        with self._unless_finished():
            names = self._site.names(_LEDGER)
        return set(names)

    def _load(self, stretch: Stretch) -> Ledger | None:
        """Return the ledger of a stretch if there is one, or raise MergeError for what it is."""
        path = self._site.folder / self._name(stretch)
        if not path.exists():
            return None
        raw = read(path, _ledger.LARGEST)
        try:
            return unpack(raw, stretch, self._digest, self._tokens, self._counts)
        except ValueError as error:
            hint = "remove it, and its part of the work is done again"
            raise MergeError(f"not a ledger to go by: {error}", where=path, hint=hint) from None

    def _found(self, stretch: Stretch) -> Ledger:
        found = self._load(stretch)
        if found is None:
            path = self._site.folder / self._name(stretch)
            raise MergeError("the ledger is gone", where=path, hint="run again with --resume")
        return found

    def refuse(self, ledger: Ledger, why: str) -> MergeError:
        """Return the error for a ledger that says what cannot be."""
        path = self._site.folder / self._name(self.work.stretches[ledger.stretch])
        hint = "remove it, and its part of the work is done again"
        return MergeError(f"not a ledger to go by: {why}", where=path, hint=hint)

    def _parts(self) -> Share:
        """Return the largest number of parts that a run was told."""
        names = (name.removesuffix(_PARTS) for name in self._site.names(_PARTS))
        return 1, max((int(one) for one in names if one.isdecimal()), default=1)

    def _missing(self, of: int, lacking: Sequence[Stretch]) -> tuple[int, ...]:
        numbers = {one.number for one in lacking}
        shares = share(self.work.stretches, of)
        return tuple(k for k, some in enumerate(shares, 1) if numbers & {s.number for s in some})

    def _lacks(self, missing: Sequence[int], of: int, lacking: Sequence[Stretch]) -> MergeError:
        left = f"{len(lacking)} of {len(self.work.stretches)} stretches"
        numbers = ", ".join(map(str, missing[:20])) + ", ..." * (len(missing) > 20)
        what = f"it lacks part{'s' * (len(missing) > 1)} {numbers} of {of} ({left} of the work)"
        hint = f"run --part {missing[0]}/{of}, or all that is left with --resume"
        return MergeError(what, where=self._site.output, hint=hint)

    @contextlib.contextmanager
    def _unless_finished(self) -> Iterator[None]:
        """Suppress an error that comes of another process having finished."""
        try:
            yield
        except MergeError:
            if self._site.there:
                raise
            self._refuse_lost()

    def _refuse_lost(self) -> None:
        """Raise MergeError where neither the site is there nor the output that was made in it."""
        for number, output in enumerate(self._outputs):
            if self._site.there or not output.files:
                continue
            with contextlib.suppress(OSError):
                inode = output.path.lstat().st_ino
                if inode in self._inodes[number : number + 1] or not self._inodes:
                    continue
            what = "what was made of it is gone, and it is not there"
            raise MergeError(what, where=output.path, hint="run again")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
