"""Running a merge: open, stage, let workers fill the windows, check, publish."""

from __future__ import annotations

import contextlib
import functools
import inspect
import mmap
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any, Concatenate, ParamSpec

from xxhash import xxh3_128_intdigest

from merge_avg.agreement import Agreement, Comparison
from merge_avg.engine._worker import KEPT, Findings, Maps, Worker, chunk
from merge_avg.errors import MergeError, failure
from merge_avg.io import Output, Reader, Scratch, Sink
from merge_avg.options import Location, Options, Outputs, meanings
from merge_avg.plan import (
    Hashes,
    Job,
    OutputSpec,
    aligned_to_page,
    batches,
    prepare,
    without_collector,
)


@dataclass(frozen=True)
class Result:
    """What a merge did.

    Attributes:
        job: what was asked, and what was found.
        nbytes: bytes read from the checkpoints.
        seconds: wall time of reading, averaging and writing.
        differing: integer tensors that differ between the checkpoints and were decided by the
            policy.
        nonfinite: tensors that hold NaN or infinity, where that was allowed.
        warnings: what may make the mean meaningless.
        agreement: how far the checkpoints agree; None where there is nothing to compare.
        centred: the same for what they differ by from the base, if there is one.
        compared: the numbers of the checkpoints that `agreement` is about.
        hashes: of what was read of each checkpoint; None where they were not asked for.
    """

    job: Job
    nbytes: int
    seconds: float
    differing: tuple[str, ...]
    nonfinite: tuple[str, ...]
    warnings: tuple[str, ...]
    agreement: Agreement | None
    centred: Agreement | None
    compared: tuple[int, ...]
    hashes: Hashes | None


P = ParamSpec("P")


@dataclass(frozen=True, kw_only=True)
class _Call(Options):
    """What `merge_checkpoints` takes by name: the options, and where to report progress."""

    progress: Callable[[int], None] | None = None


def _with_options(
    options: Callable[P, _Call],
) -> Callable[
    [Callable[[Sequence[Location], Outputs, _Call], Result]],
    Callable[Concatenate[Sequence[Location], Outputs, P], Result],
]:
    """Give a function the keywords of `Options`, so that each option is declared in one place."""

    def decorate(
        function: Callable[[Sequence[Location], Outputs, _Call], Result],
    ) -> Callable[Concatenate[Sequence[Location], Outputs, P], Result]:
        first, second, _ = inspect.signature(function).parameters.values()
        named = inspect.signature(options).parameters.values()
        signature = inspect.Signature([first, second, *named])

        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Result:
            given = signature.bind(*args, **kwargs).arguments
            paths, output = given.pop("paths"), given.pop("output")
            return function(paths, output, _Call(**given))

        called.__signature__ = signature  # type: ignore[attr-defined]
        texts = "\n".join(f"        {name}: {one.help}" for name, one in meanings(Options))
        called.__doc__ = str(function.__doc__).replace("        options: by name.", texts)
        return called

    return decorate


@_with_options(_Call)
def merge_checkpoints(
    paths: Sequence[Location],
    output: Outputs,
    options: _Call,
) -> Result:
    """Average checkpoints into a new one, in bounded memory.

    The output is the first checkpoint, the template, with its weights replaced by their mean. Float
    and complex tensors get the exact weighted mean, rounded once to their dtype; so the result does
    not depend on the order of the checkpoints, nor on threads, memory or device.

    Args:
        paths: checkpoints of one architecture: files (.pt, .pth, .bin, .ckpt, .safetensors) or
            directories of them.
        output: the file or directory to write; the ending .safetensors asks for that format. Or
            several, with the weights of the checkpoints for each: all are made in one reading, and
            all are copies of one template.
        options: by name.
        progress: called with the number of bytes read since the last call, from any thread.

    Raises:
        MergeError: nothing was written; the message names the file and the tensor.
        UsageError: the options do not fit each other.
    """
    return run(prepare(paths, output, options), options.progress)


Opened = Callable[[OutputSpec], contextlib.AbstractContextManager[Sink]]


def run(
    job: Job, progress: Callable[[int], None] | None = None, opened: Opened | None = None
) -> Result:
    """Runs a prepared merge.

    Args:
        job: the merge.
        progress: called with the number of bytes read since the last call, from any thread.
        opened: opens where an average goes; by default, its output.

    Raises:
        MergeError: nothing at the output's path was created or changed.
    """
    try:
        return _run(job, progress, opened)
    except OSError as error:  # of the scratch file, or of a file system that fails
        known = isinstance(error.filename, str)
        raise failure(error, where=None if known else job.outputs[0].path) from None
    except (MemoryError, RuntimeError) as error:  # torch and threads say it by the latter
        if isinstance(error, RuntimeError) and not re.search("memory|new thread", str(error)):
            raise
        hint = "lower --max-memory and --threads, or allow this process more"
        raise MergeError("there is not enough memory for it", hint=hint) from None


def _run(job: Job, progress: Callable[[int], None] | None, opened: Opened | None) -> Result:
    started = time.perf_counter()
    device = job.options.device
    if device != "cpu":
        from merge_avg.engine._cuda import find_device

        device, free = find_device(device)
        job = replace(job, budget=job.budget.fitting(free)) if free else job
    findings = Findings(progress)
    with contextlib.ExitStack() as stack:
        outs: list[Sink] = [
            stack.enter_context(opened(output) if opened else _output(job, output))
            for output in job.outputs
        ]
        folder = outs[0].folder
        readers = [Reader(layout, folder) for layout in job.layouts]
        for reader in readers:
            stack.callback(reader.close)
        scratch = Scratch(folder)
        stack.callback(scratch.close)
        load_torch = stack.enter_context(single_threaded())
        if job.plan.stagings:
            load_torch()
            _stage(job, readers, scratch)
        maps = _maps(job, scratch, load_torch)
        counted = job.averaged if job.options.agreement else ()
        comparison = Comparison(counted, job.plan.units, job.base)

        def worker() -> Worker:
            rest = findings, comparison, device, load_torch
            return Worker(job, readers, outs, scratch, maps, *rest)

        _in_parallel(job, worker)
        if maps.results:
            load_torch()
            _spread(job, outs, maps)
        for reader in readers:
            reader.finish()
        agreement = comparison.result()
        _refuse_strangers(job, agreement)
        hashes = _hashes(job, findings)
        cosine = None if agreement is None else agreement.mean
        for out, output in zip(outs, job.outputs, strict=True):
            out.complete(job.record(output, hashes, cosine))
        for out in outs:
            out.publish()
    return Result(
        job,
        findings.nbytes,
        time.perf_counter() - started,
        tuple(sorted(findings.differing)),
        tuple(sorted(findings.nonfinite)),
        job.plan.warnings if findings.factors_differ or not job.plan.factors else (),
        agreement,
        comparison.centred(),
        counted,
        hashes if job.options.hashes else None,
    )


def _stage(job: Job, readers: Sequence[Reader], scratch: Scratch) -> None:
    """Copies tensors into the template's geometry, where they have another."""
    from merge_avg.engine._restride import stage

    for staging in job.plan.stagings:
        tied_in = job.layouts[staging.tied_in].path
        stage(scratch, readers[staging.checkpoint], staging, tied_in)


def _spread(job: Job, outs: Sequence[Sink], maps: Maps) -> None:
    """Copies results to where outputs have them in another geometry."""
    from merge_avg.engine._restride import spread

    for unit, targets in zip(job.plan.units, job.layout.targets, strict=True):
        for number, out in enumerate(outs):
            if (number, id(unit)) in maps.results:
                spread(out, unit, targets, maps.results[number, id(unit)])


def _hashes(job: Job, findings: Findings) -> Hashes:
    """The sums of the hashes of chunks, and what else the outputs have of the template."""
    kept = findings.hashes[KEPT] + sum(map(xxh3_128_intdigest, job.kept_texts))
    read = tuple(findings.hashes[k] % (1 << 128) for k in range(len(job.layouts)))
    return Hashes(read, kept % (1 << 128))


def _output(job: Job, output: OutputSpec) -> Output:
    draft = job.record(output)
    return Output(output.path, job.layout.files, draft, overwrite=job.options.overwrite)


def _refuse_strangers(job: Job, agreement: Agreement | None) -> None:
    """Raises MergeError where the checkpoints agree less than is asked for."""
    least = job.options.min_agreement
    if least is not None and agreement is not None and agreement.mean < least:
        what = f"the checkpoints agree by {agreement.mean:.3f}, and {least:g} is asked for"
        hint = "average checkpoints of one initialisation, or average their outputs instead"
        raise MergeError(what, where=job.outputs[0].path, hint=hint)


def _maps(job: Job, scratch: Scratch, load_torch: Callable[[], None]) -> Maps:
    """Room in the scratch file for what units need beside their windows."""
    results: dict[tuple[int, int], mmap.mmap] = {}
    masks: dict[int, mmap.mmap] = {}
    offset = job.plan.scratch

    def room(nbytes: int) -> mmap.mmap:
        nonlocal offset
        place = scratch.map(offset, nbytes)
        offset = aligned_to_page(offset + nbytes)
        return place

    for unit, targets in zip(job.plan.units, job.layout.targets, strict=True):
        if any(target.view is not None for target in targets):
            for number in range(len(job.outputs)):
                results[number, id(unit)] = room(len(unit) * unit.dtype.itemsize)
        if unit.holed:
            load_torch()
            from merge_avg.engine._restride import mark

            masks[id(unit)] = room(len(unit))
            mark(masks[id(unit)], unit.members, unit.start)
    return Maps(results, masks)


@contextlib.contextmanager
def single_threaded() -> Iterator[Callable[[], None]]:
    """Torch's own threads cost more than they give on windows of this size.

    Yields:
        A function that imports torch, unless it is there, and keeps it to one thread meanwhile.
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


def _in_parallel(job: Job, make_worker: Callable[[], Worker]) -> None:
    """Runs all windows and copies on worker threads; the first error stops them all."""
    placed = [u for u, targets in zip(job.plan.units, job.layout.targets, strict=True) if targets]
    work = batches(placed, job.budget.window, max(map(chunk, placed), default=1))
    copies = enumerate(job.layout.copies)
    lock, stop = threading.Lock(), threading.Event()

    # A queue in C: a signal that ends the wait for it by an exception leaves no lock behind, on
    # which a worker would hang.
    ended: SimpleQueue[BaseException | None] = SimpleQueue()

    def loop() -> None:
        with contextlib.closing(make_worker()) as worker:
            while not stop.is_set():
                with lock:
                    batch = next(work, None)
                    copy = None if batch is not None else next(copies, None)
                if batch is not None:
                    for window in batch:
                        worker.fill(window)
                elif copy is not None:
                    index, (number, record) = copy
                    worker.copy(index, number, record)
                else:
                    return

    def run() -> None:
        try:
            loop()
        except BaseException as error:  # noqa: BLE001 - it is raised by who waits
            ended.put(error)
        else:
            ended.put(None)

    with ThreadPoolExecutor(job.budget.threads, thread_name_prefix="merge-avg") as pool:
        try:
            with _signals_held():
                for _ in range(job.budget.threads):
                    pool.submit(run)
            for _ in range(job.budget.threads):
                if (error := ended.get()) is not None:
                    raise error
        finally:
            stop.set()


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Lets signals wait while threads begin: an exception in between would leave locks behind."""
    before = signal.pthread_sigmask(
        signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    )
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
