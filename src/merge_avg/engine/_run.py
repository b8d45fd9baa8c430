"""Running a merge: open, restride, let workers fill the windows, check, publish."""

from __future__ import annotations

import contextlib
import functools
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from merge_avg import _signals
from merge_avg.agreement import Agreement, Comparison, Verdict, judge
from merge_avg.arithmetic import LOOPS
from merge_avg.brief import Brief
from merge_avg.checkpoint import Storage
from merge_avg.engine._diagnose import refuse_derived
from merge_avg.engine._observers import chunk, total
from merge_avg.engine._worker import Worker
from merge_avg.engine._workspace import Findings, Workspace
from merge_avg.errors import MergeError, counted, failure, named
from merge_avg.io import Output, Reader, Scratch, SharedOutput, Sink, Site, without_collector
from merge_avg.options import DOUBTS
from merge_avg.plan import Hashes, Job, OutputSpec, Piece, Unit, batches

if TYPE_CHECKING:  # a plain run needs none of it
    from merge_avg.parts import Crew, Part, Planned, RankRate

# In the words of torch's allocators and of Python's threads, whose errors have no type.
_NO_MEMORY = re.compile("DefaultCPUAllocator|out of memory|can't start new thread")
Opened = Callable[[OutputSpec], contextlib.AbstractContextManager[Sink]]


@dataclass(frozen=True, repr=False)
class Result(Brief):
    """The result of a merge.

    Attributes:
        job: what was asked for, and what was planned.
        nbytes: bytes read from the checkpoints.
        seconds: wall time of reading, averaging and writing.
        differing: integer tensors that differ between the checkpoints, which the policy decided.
        nonfinite: tensors that hold NaN or infinity, where that was allowed.
        warnings: what may make the mean meaningless.
        agreement: how far the checkpoints agree; None where there is nothing to compare.
        verdict: whether the mean works as a network, as far as the agreement tells.
        centred: the same for their differences to the base, if there is one.
        compared: the numbers of the checkpoints that `agreement` is about.
        hashes: of what was read of each checkpoint; None where they were not asked for.
        notes: what else is to be known, such as what was left out; of `merge_checkpoints` only.
        part: the part that was made, where that did not finish the merge; else None.
        ranks: what each rank did, where there were several.
        errors: for each mean that its tensors hold only nearly, its name, and the squared norms of
            its error and of itself.
    """

    job: Job
    nbytes: int
    seconds: float
    differing: tuple[str, ...]
    nonfinite: tuple[str, ...]
    warnings: tuple[str, ...]
    agreement: Agreement | None
    verdict: Verdict | None
    centred: Agreement | None
    compared: tuple[int, ...]
    hashes: Hashes | None
    notes: tuple[str, ...] = ()
    part: Part | None = None
    ranks: tuple[RankRate, ...] = ()
    errors: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def brief(self) -> Iterator[str]:
        """Yield what was averaged, and what is to be known of it."""
        written = named(output.path for output in self.job.outputs)
        if self.part is not None:
            yield f"part {self.part.number} of {self.part.of} made of {written}"
        else:
            yield f"{counted(len(self.job.averaged), 'checkpoint')} averaged into {written}"
        yield f"read: {self.nbytes:,} bytes in {self.seconds:.2f} s"
        if self.verdict is not None:
            yield f"verdict: {self.verdict.word} ({self.verdict.number:.3f})"
        for label, names in (("differing", self.differing), ("nonfinite", self.nonfinite)):
            yield from [f"{label}: {named(names, 3)}"] if names else []
        yield from (f"warning: {text}" for text in self.warnings)
        yield from (f"note: {text}" for text in self.notes)


def run(
    job: Job,
    progress: Callable[[int], None] | None = None,
    opened: Opened | None = None,
    crew: Crew | None = None,
) -> Result:
    """Run a prepared merge.

    `progress` is called with the number of bytes read since the last call, from any thread, and at
    last with 0, before the outputs are forced to the disk. What it raises comes as it is. `opened`
    opens what takes an output: by default, a file or directory. A `crew` shares the work with other
    processes, or goes on with theirs; where the job's options ask for that, there is one.

    Raises:
        MergeError: nothing at the output's path was created or changed.
        WrittenError: the output is complete, but what follows failed.
    """

    def output(spec: OutputSpec) -> Output:
        if crew is not None:
            return crew.output(job, job.outputs.index(spec))
        record = job.record(spec)
        return Output(spec.path, job.layout.files, record, overwrite=job.options.overwrite)

    if crew is None and job.options.shared:
        from merge_avg.parts import Crew

        crew = Crew(job.options)
    tell = progress if crew is None else crew.progress(progress)
    findings = Findings(tell, [0] * (len(job.layouts) + 1))
    try:
        if crew is not None:
            crew.begin(job, largest_chunk(job))
            if crew.part is not None:  # it is made already
                return _unfinished(job, crew, 0.0)
        result = _run(job, findings, opened or output, crew)
    except (OSError, ImportError, MemoryError, RuntimeError) as error:
        known = not isinstance(error, RuntimeError) or _NO_MEMORY.search(str(error))
        if error is findings.theirs or not known:
            raise
        if isinstance(error, OSError):  # of the scratch file, or of a file system that fails
            named = isinstance(error.filename, str)
            raise failure(error, where=None if named else job.outputs[0].path) from None
        if isinstance(error, ImportError):  # most merges do without torch
            what = f"torch is needed and cannot be loaded ({str(error).partition(chr(10))[0]})"
            hint = "see python -c 'import torch', or reinstall it"
            if error.name == "torch":
                raise (_needs_torch(job) or _missing("this merge needs")) from None
            raise MergeError(what, hint=hint) from None
        hint = "lower --max-memory and --threads, or allow this process more"
        raise MergeError("there is not enough memory for it", hint=hint) from None
    for spec in job.outputs if crew is None and opened is None else ():
        # The merge is done; and one that is at work on it cleans up by itself.
        with contextlib.suppress(MergeError, OSError):
            Site(spec.path).begin_anew()
    return result


def _run(job: Job, findings: Findings, opened: Opened, crew: Crew | None) -> Result:
    started = time.perf_counter()
    device = job.options.device
    if device != "cpu":
        from merge_avg.engine._cuda import find_device

        device, free = find_device(device)
        job = replace(job, budget=job.budget.fitting(free)) if free else job
    compared = job.averaged if job.options.agreement else ()
    comparison = Comparison(compared, job.plan.units, job.base, job.plan.composites)
    with contextlib.ExitStack() as stack:
        load_torch = stack.enter_context(single_threaded())
        if _needs_torch(job):  # if it is missing, the last of many files should not be what tells
            load_torch()
        # Outputs first: a lack of room for them should not show at the end of a long merge.
        sinks = [stack.enter_context(opened(output)) for output in job.outputs]
        folder = sinks[0].folder
        readers = [Reader(layout, folder) for layout in job.layouts]
        for reader in readers:
            stack.callback(reader.close)
        scratch = Scratch(folder)
        stack.callback(scratch.close)
        space = Workspace(job, readers, sinks, scratch, findings, comparison, device, load_torch)
        if not stack.enter_context(_worked(space, crew)):
            return _unfinished(job, crew, time.perf_counter() - started)
        if not findings.varying.isdisjoint(job.plan.derived):
            refuse_derived(space)
        # Nothing gets its name before the inputs are known to be whole, and the same as at first.
        for reader in readers:
            reader.finish(elsewhere=crew is not None)
        agreement = comparison.result()
        # What adapters learned may well have nothing in common where their mean works.
        changes = any(one.change for one in job.plan.composites)
        verdict = None if agreement is None or changes else judge(agreement)
        hashes = total(job, findings)
        cosine = None if agreement is None else agreement.mean
        names = [str(job.layouts[number].path) for number in compared]
        _refuse_strangers(job, agreement, verdict, names)
        doubts = () if verdict is None else verdict.doubts(names)
        lora = job.plan.warnings if any(map(findings.varying.issuperset, job.plan.factors)) else ()
        findings.count(0)
        for sink, output in zip(sinks, job.outputs, strict=True):
            sink.complete(job.record(output, hashes, cosine))
        # Not before all are complete, so that an error leaves none of the outputs.
        for sink in sinks:
            sink.publish()
        if crew is not None:
            crew.published()
    return Result(
        job,
        findings.nbytes,
        time.perf_counter() - started,
        tuple(sorted(findings.differing)),
        tuple(sorted(findings.nonfinite)),
        (*lora, *doubts),
        agreement,
        verdict,
        comparison.centred(),
        compared,
        hashes if job.options.hashes else None,
        ranks=() if crew is None else crew.rates,
        errors=dict(sorted(findings.errors.items())),
    )


def _work(
    space: Workspace,
    units: Iterable[Unit | Piece],
    copies: Iterable[tuple[int, Storage]],
    first: int = 0,
    *,
    restrides: bool,
) -> None:
    """Work on units, or on pieces of them, and copy records, which are numbered from `first` on."""
    job = space.job
    if restrides:
        from merge_avg.engine._restride import restride, restride_results

        restride(space)
    tasks = _tasks(job, units, enumerate(copies, first))
    in_parallel(tasks, functools.partial(Worker, space), job.budget.threads)
    if space.results:
        restride_results(space)


@contextlib.contextmanager
def _worked(space: Workspace, crew: Crew | None) -> Iterator[bool]:
    """Do the work, and yield whether all of it is done, so that this process is to finish it."""
    job = space.job
    if crew is None:
        placed = [unit for unit in job.plan.units if job.layout.targets[unit.number]]
        _work(space, placed, job.layout.copies, restrides=_restrides(job))
        yield True
        return
    from merge_avg.engine._parts import put

    crew.settle(job, [sink for sink in space.sinks if isinstance(sink, SharedOutput)])
    _work_on(space, crew)
    with crew.gathered() as ledgers:
        if ledgers is None:
            yield False
            return
        put(space, ledgers, crew)
        if space.findings.varying and _restrides(job):
            from merge_avg.engine._restride import restride

            restride(space)  # which other processes did, each for itself
        yield True


def _work_on(space: Workspace, crew: Crew) -> None:
    """Work on the stretches of a crew's share, and leave a ledger for each."""
    from merge_avg.engine._parts import sync, take

    copies = list(space.job.layout.copies)
    for stretch in crew.mine():
        started = time.perf_counter()
        first, stop = stretch.copies
        some = copies[first:stop]
        _work(space, crew.work.pieces(stretch), some, first, restrides=stretch.whole)
        space.results.clear()
        sync(space)
        crew.leave(stretch, take(space, stretch, crew, time.perf_counter() - started))


def _unfinished(job: Job, crew: Crew | None, seconds: float) -> Result:
    """Return the result of a process that leaves the rest of a merge to others."""
    nbytes, differing, nonfinite = crew.found if crew is not None else (0, set(), set())
    told = tuple(sorted(differing)), tuple(sorted(nonfinite)), ()
    part = None if crew is None else crew.part
    return Result(job, nbytes, seconds, *told, None, None, None, (), None, part=part)


def shares(job: Job, crew: Crew | None = None) -> tuple[Planned, ...]:
    """Return what each part or rank of a merge is to do."""
    from merge_avg.parts import Crew

    return (crew or Crew(job.options)).planned(job, largest_chunk(job))


def largest_chunk(job: Job) -> int:
    """Return how many elements of any unit are hashed at a time at most."""
    placed = (unit for unit in job.plan.units if job.layout.targets[unit.number])
    return max(map(chunk, placed), default=1)


def _needs_torch(job: Job) -> MergeError | None:
    """Return the error of a merge without torch that is known to need it; None for most merges."""
    if job.options.device != "cpu":
        return _missing(f"the device {job.options.device!r} needs")
    if LOOPS is None:
        return _missing("merge-avg was installed without its compiled loops, so that a mean needs")
    if not all(weights.small for weights in job.all_weights):
        return _missing("weights of so many digits need")
    for one in job.plan.composites:
        return _missing(f"{one.name!r} is computed from several tensors, which needs")
    for unit in job.plan.units:
        if unit.kind == "mean" or unit.dtype != unit.sources[0].dtype:
            for dtype in (unit.dtype, *unit.dtypes):
                if dtype.name not in LOOPS.dtypes:
                    name, path = unit.members[0][0], job.layouts[0].path
                    what = f"tensor {str(name)!r} is to be averaged as {dtype.name}, which needs"
                    return _missing(what, where=path, tensor=name)
    return _missing("tensors with gaps, or with other strides, need") if _restrides(job) else None


def _missing(what: str, **about: Any) -> MergeError:
    return MergeError(f"{what} torch, which is not installed", hint="pip install torch", **about)


def _restrides(job: Job) -> bool:
    """Return whether a tensor, or a result, lies otherwise than in the template: seldom."""
    viewed = any(target.view is not None for some in job.layout.targets for target in some)
    return bool(job.plan.restrides) or viewed or bool(job.plan.holed)


def _tasks(
    job: Job, units: Iterable[Unit | Piece], copies: Iterable[tuple[int, tuple[int, Storage]]]
) -> Iterator[Callable[[Worker], None]]:
    """Yield what there is to do: the windows of units that go anywhere, then numbered copies."""
    for number in range(len(job.plan.composites)):  # first: they may take long
        yield functools.partial(Worker.compose, number=number)
    for batch in batches(units, job.budget.window, largest_chunk(job)):
        yield functools.partial(Worker.fill, batch=batch)
    for index, (number, record) in copies:
        yield functools.partial(Worker.copy, index=index, number=number, record=record)


def _refuse_strangers(
    job: Job, agreement: Agreement | None, verdict: Verdict | None, names: Sequence[str]
) -> None:
    """Raise MergeError where the checkpoints, which have names, agree less than is asked for."""
    least, worst = job.options.min_agreement, job.options.fail_on
    if agreement is None:
        return
    number = agreement.mean if verdict is None else verdict.number
    if least is not None and number < least:
        what = f"the checkpoints agree by {number:.3f}, and {least:g} is asked for"
        hint = "average checkpoints of one initialisation, or average their outputs instead"
        raise MergeError(what, where=job.outputs[0].path, hint=hint)
    if worst is not None and verdict is not None and verdict.word in DOUBTS[DOUBTS.index(worst) :]:
        what = f"the verdict is {verdict.why(names)}"
        hint = f"{verdict.advice}; without --fail-on it is written all the same"
        raise MergeError(what, where=job.outputs[0].path, hint=hint)


def in_parallel(
    tasks: Iterator[Callable[[Worker], None]], make_worker: Callable[[], Worker], threads: int
) -> None:
    """Run tasks on worker threads, each with its own worker; raise the first error, and stop."""
    lock, stop = threading.Lock(), threading.Event()
    # A queue in C: a signal that ends the wait for it by an exception leaves no lock behind, on
    # which a worker would hang.
    ended: SimpleQueue[BaseException | None] = SimpleQueue()

    def run() -> None:
        try:
            with contextlib.closing(make_worker()) as worker:
                while not stop.is_set():
                    with lock:
                        task = next(tasks, None)
                    if task is None:
                        break
                    task(worker)
        except BaseException as error:  # noqa: BLE001 - it is raised by who waits
            ended.put(error)
        else:
            ended.put(None)

    with ThreadPoolExecutor(threads, thread_name_prefix="merge-avg") as pool:
        try:
            # An exception while a thread begins would leave locks behind.
            with _signals.held():
                for _ in range(threads):
                    pool.submit(run)
            for _ in range(threads):
                if (error := _next(ended)) is not None:
                    raise error
        finally:
            stop.set()


def _next(ended: SimpleQueue[BaseException | None]) -> BaseException | None:
    """Wait for what a worker ends with."""
    while True:
        with contextlib.suppress(Empty):
            return ended.get(timeout=_signals.PATIENCE)


@contextlib.contextmanager
def single_threaded() -> Iterator[Callable[[], None]]:
    """Keep torch to one thread meanwhile: its own cost more than they give on small windows.

    Yields:
        A function that imports torch, unless it is there, and keeps it to one thread.
    """
    before: list[int] = []
    lock = threading.Lock()

    def load() -> None:
        with lock:
            if not before:
                with without_collector():
                    import torch

                before.append(torch.get_num_threads())
                torch.set_num_threads(1)

    if "torch" in sys.modules:
        load()
    try:
        yield load
    finally:
        if before:
            sys.modules["torch"].set_num_threads(before[0])
