"""Running a merge: open, restride, let workers fill the windows, check, publish."""

from __future__ import annotations

import contextlib
import functools
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from merge_avg.agreement import Agreement, Comparison
from merge_avg.engine import _hashing as hashing
from merge_avg.engine._parallel import in_parallel, single_threaded
from merge_avg.engine._worker import Worker
from merge_avg.engine._workspace import Findings, Workspace
from merge_avg.errors import MergeError, failure
from merge_avg.io import Output, Reader, Scratch, Sink
from merge_avg.plan import Hashes, Job, OutputSpec, batches

Opened = Callable[[OutputSpec], contextlib.AbstractContextManager[Sink]]


@dataclass(frozen=True)
class Result:
    """The result of a merge.

    Attributes:
        job: what was asked for, and what was planned.
        nbytes: bytes read from the checkpoints.
        seconds: wall time of reading, averaging and writing.
        differing: integer tensors that differ between the checkpoints and were decided by the
            policy.
        nonfinite: tensors that hold NaN or infinity, where that was allowed.
        warnings: what may make the mean meaningless.
        agreement: how far the checkpoints agree; None where there is nothing to compare.
        centred: the same for their differences to the base, if there is one.
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


def run(
    job: Job, progress: Callable[[int], None] | None = None, opened: Opened | None = None
) -> Result:
    """Run a prepared merge.

    Args:
        job: the merge.
        progress: called with the number of bytes read since the last call, from any thread.
        opened: opens what takes an output; by default, its file or directory.

    Raises:
        MergeError: nothing at the output's path was created or changed.
    """
    try:
        return _run(job, progress, opened or functools.partial(_output, job))
    except OSError as error:  # of the scratch file, or of a file system that fails
        known = isinstance(error.filename, str)
        raise failure(error, where=None if known else job.outputs[0].path) from None
    except (MemoryError, RuntimeError) as error:  # torch and threads say it by the latter
        if isinstance(error, RuntimeError) and not re.search("memory|new thread", str(error)):
            raise
        hint = "lower --max-memory and --threads, or allow this process more"
        raise MergeError("there is not enough memory for it", hint=hint) from None


def _run(job: Job, progress: Callable[[int], None] | None, opened: Opened) -> Result:
    started = time.perf_counter()
    job, device = _on_device(job)
    findings = Findings(progress, [0] * (len(job.layouts) + 1))
    compared = job.averaged if job.options.agreement else ()
    comparison = Comparison(compared, job.plan.units, job.base)
    with contextlib.ExitStack() as stack:
        # Outputs first: that there is no room for them should not show at the end of a long merge.
        sinks = [stack.enter_context(opened(output)) for output in job.outputs]
        folder = sinks[0].folder
        readers = [Reader(layout, folder) for layout in job.layouts]
        for reader in readers:
            stack.callback(reader.close)
        scratch = Scratch(folder)
        stack.callback(scratch.close)
        load_torch = stack.enter_context(single_threaded())
        space = Workspace(job, readers, sinks, scratch, findings, comparison, device, load_torch)
        if _restrides(job):
            load_torch()
            from merge_avg.engine._restride import restride, restride_results

            restride(space)
        in_parallel(_tasks(job), functools.partial(Worker, space), job.budget.threads)
        if space.results:
            restride_results(space)
        # Nothing gets its name before the inputs are known to be whole, and the same as at first.
        for reader in readers:
            reader.finish()
        agreement = comparison.result()
        _refuse_strangers(job, agreement)
        hashes = hashing.total(job, findings)
        cosine = None if agreement is None else agreement.mean
        for sink, output in zip(sinks, job.outputs, strict=True):
            sink.complete(job.record(output, hashes, cosine))
        # Not before all are complete, so that an error leaves none of the outputs.
        for sink in sinks:
            sink.publish()
    return Result(
        job,
        findings.nbytes,
        time.perf_counter() - started,
        tuple(sorted(findings.differing)),
        tuple(sorted(findings.nonfinite)),
        job.plan.warnings if findings.factors_differ or not job.plan.factors else (),
        agreement,
        comparison.centred(),
        compared,
        hashes if job.options.hashes else None,
    )


def _on_device(job: Job) -> tuple[Job, str]:
    """Return the job with a budget that fits its device, and the device."""
    if job.options.device == "cpu":
        return job, "cpu"
    from merge_avg.engine._cuda import find_device

    device, free = find_device(job.options.device)
    return replace(job, budget=job.budget.fitting(free)) if free else job, device


def _output(job: Job, output: OutputSpec) -> Output:
    draft = job.record(output)
    return Output(output.path, job.layout.files, draft, overwrite=job.options.overwrite)


def _restrides(job: Job) -> bool:
    """Return whether a tensor, or a result, lies otherwise than in the template: seldom."""
    units = zip(job.plan.units, job.layout.targets, strict=True)
    return bool(job.plan.restrides) or any(
        unit.holed or any(target.view is not None for target in targets) for unit, targets in units
    )


def _tasks(job: Job) -> Iterator[Callable[[Worker], None]]:
    """Yield what there is to do: the windows of all units that go anywhere, then the copies."""
    placed = [u for u, targets in zip(job.plan.units, job.layout.targets, strict=True) if targets]
    chunk = max(map(hashing.chunk, placed), default=1)
    for batch in batches(placed, job.budget.window, chunk):
        yield functools.partial(Worker.fill, batch=batch)
    for index, (number, record) in enumerate(job.layout.copies):
        yield functools.partial(Worker.copy, index=index, number=number, record=record)


def _refuse_strangers(job: Job, agreement: Agreement | None) -> None:
    """Raise MergeError where the checkpoints agree less than is asked for."""
    least = job.options.min_agreement
    if least is not None and agreement is not None and agreement.mean < least:
        what = f"the checkpoints agree by {agreement.mean:.3f}, and {least:g} is asked for"
        hint = "average checkpoints of one initialisation, or average their outputs instead"
        raise MergeError(what, where=job.outputs[0].path, hint=hint)
