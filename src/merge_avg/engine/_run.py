"""Running a merge: open, stage, let workers fill the windows, check, publish."""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from queue import SimpleQueue

from xxhash import xxh3_128_intdigest

from merge_avg.agreement import Agreement, Comparison
from merge_avg.arithmetic import Weight
from merge_avg.engine._worker import KEPT, Findings, Maps, Worker, chunk
from merge_avg.errors import MergeError, failure
from merge_avg.io import Output, Reader, Scratch, Sink
from merge_avg.options import IntPolicy, Missing
from merge_avg.plan import (
    Average,
    Hashes,
    Job,
    Options,
    Outputs,
    aligned_to_page,
    batches,
    marked,
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


def merge_checkpoints(
    paths: Sequence[str | os.PathLike[str]],
    output: Outputs,
    *,
    weights: Sequence[Weight] | None = None,
    normalize: bool = True,
    dtype: str | None = None,
    key: str | None = None,
    missing: Missing = "error",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    template: int | str | os.PathLike[str] | None = None,
    int_policy: IntPolicy = "error",
    state_dict: bool = False,
    allow_nonfinite: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    max_memory: int | None = None,
    max_shard_size: int | None = None,
    min_agreement: float | None = None,
    base: str | os.PathLike[str] | None = None,
    agreement: bool = True,
    hashes: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Result:
    """Averages checkpoints into a new one, in bounded memory.

    The output is the first checkpoint, the template, with its weights replaced by their mean. Float
    and complex tensors get the exact weighted mean, rounded once to their dtype; so the result does
    not depend on the order of the checkpoints, nor on threads, memory or device.

    Args:
        paths: checkpoints of one architecture: files (.pt, .pth, .bin, .ckpt, .safetensors) or
            directories of them.
        output: the file or directory to write; the ending .safetensors asks for that format. Or
            several, with the weights of the checkpoints for each: all are made in one reading, and
            all are copies of one template.
        weights: one number a checkpoint, zero or above; by default all count the same.
        normalize: whether to divide by the sum of the weights. If not, the result is their linear
            combination, and weights may be negative.
        dtype: of the averaged float tensors: float64, float32, float16 or bfloat16; or "template",
            where checkpoints have others than the template.
        key: dotted path of the one state dict to average, such as "state_dict_ema".
        missing: what becomes of tensors that not every checkpoint has: "error", "skip" (the
            template's is kept) or "available" (averaged over those that have it).
        include: shell patterns of the names of tensors to average; by default all.
        exclude: shell patterns of the names of tensors to keep from the template.
        template: which checkpoint the result is a copy of: a number from 1, or the path of one,
            which may be none of those averaged; by default the first.
        int_policy: what becomes of integers that differ: "error" (but counters are the template's),
            "template", "max" or "mean".
        state_dict: write a bare state dict, without what the template has around it.
        allow_nonfinite: average NaN and infinity too, as IEEE 754 says.
        overwrite: replace the output if it exists.
        device: where sums are kept: "cpu", "cuda" or "cuda:N".
        threads: how many windows are worked on at a time; by default one a core, but eight at most.
        max_memory: bytes that may be taken beside what torch takes; by default 64 MiB, or more on
            more than four cores.
        max_shard_size: write a directory of safetensors shards of at most so many bytes, with an
            index.
        min_agreement: the least mean cosine between the checkpoints' matrices; below it nothing is
            written.
        base: a checkpoint that the others were fine-tuned from: how far they agree is also measured
            by their differences to it. It is not averaged, but if it is one of `paths`.
        agreement: whether to measure how far the checkpoints agree.
        hashes: whether the output records a hash of each checkpoint.
        progress: called with the number of bytes read since the last call, from any thread.

    Raises:
        MergeError: nothing was written; the message names the file and the tensor.
        UsageError: the options do not fit each other.
    """
    options = Options(
        weights=weights,
        normalize=normalize,
        dtype=dtype,
        key=key,
        missing=missing,
        include=include,
        exclude=exclude,
        template=template,
        int_policy=int_policy,
        state_dict=state_dict,
        allow_nonfinite=allow_nonfinite,
        overwrite=overwrite,
        device=device,
        threads=threads,
        max_memory=max_memory,
        max_shard_size=max_shard_size,
        min_agreement=min_agreement,
        base=base,
        agreement=agreement,
        hashes=hashes,
    )
    return run(prepare(paths, output, options), progress)


Opened = Callable[[Average], contextlib.AbstractContextManager[Sink]]


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
        raise failure(error, where=None if known else job.averages[0].output) from None
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
            stack.enter_context(opened(average) if opened else _output(job, average))
            for average in job.averages
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
        for out, average in zip(outs, job.averages, strict=True):
            out.complete(marked(job, average, hashes, cosine))
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

    for unit, targets in zip(job.plan.units, job.draft.targets, strict=True):
        for number, out in enumerate(outs):
            if (number, id(unit)) in maps.results:
                spread(out, unit, targets, maps.results[number, id(unit)])


def _hashes(job: Job, findings: Findings) -> Hashes:
    """The sums of the hashes of chunks, and what else the outputs have of the template."""
    kept = findings.hashes[KEPT] + sum(map(xxh3_128_intdigest, job.kept_texts))
    read = tuple(findings.hashes[k] % (1 << 128) for k in range(len(job.layouts)))
    return Hashes(read, kept % (1 << 128))


def _output(job: Job, average: Average) -> Output:
    return Output(average.output, average.draft.files, overwrite=job.options.overwrite)


def _refuse_strangers(job: Job, agreement: Agreement | None) -> None:
    """Raises MergeError where the checkpoints agree less than is asked for."""
    least = job.options.min_agreement
    if least is not None and agreement is not None and agreement.mean < least:
        what = f"the checkpoints agree by {agreement.mean:.3f}, and {least:g} is asked for"
        hint = "average checkpoints of one initialisation, or average their outputs instead"
        raise MergeError(what, where=job.averages[0].output, hint=hint)


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

    for unit, targets in zip(job.plan.units, job.draft.targets, strict=True):
        if any(target.view is not None for target in targets):
            for number in range(len(job.averages)):
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
    placed = [u for u, targets in zip(job.plan.units, job.draft.targets, strict=True) if targets]
    work = batches(placed, job.budget.window, max(map(chunk, placed), default=1))
    copies = enumerate(job.draft.copies)
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
