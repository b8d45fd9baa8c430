"""Parts of a merge: what a worker's stretch adds to a merge, taken out as a ledger and put back."""

from __future__ import annotations

from collections.abc import Sequence

from merge_avg.checkpoint import Storage
from merge_avg.engine._workspace import Workspace
from merge_avg.errors import MergeError
from merge_avg.io import SharedOutput
from merge_avg.parts import Crew, Ledger, Stretch


def take(space: Workspace, stretch: Stretch, crew: Crew, seconds: float) -> Ledger:
    """Return all that has been added since the last call, after which nothing is known."""
    names = {name: place for place, name in enumerate(space.job.plan.aligned.rows)}
    findings = space.findings
    hashes, nbytes, sets = findings.take()
    differing, nonfinite, varying = sets
    return Ledger(
        stretch.number,
        crew.host,
        crew.rank,
        seconds,
        nbytes,
        tuple(hashes),
        tuple(sorted(differing)),
        tuple(sorted(nonfinite)),
        tuple(sorted(names[name] for name in varying)),
        tuple(space.comparison.take()),
        tuple(tuple(reader.take()) for reader in space.readers),
        tuple(tuple(tuple(f.take()) for f in out.files) for out in _outputs(space)),
    )


def put(space: Workspace, ledgers: Sequence[Ledger], crew: Crew) -> None:
    """Add up ledgers, in their order; MergeError for one that says what cannot be."""
    names = list(space.job.plan.aligned.rows)
    storages = [_storages(space, k) for k in range(len(space.readers))]
    for ledger in ledgers:
        try:
            varying = [names[place] for place in ledger.varying]
            found = set(ledger.differing), set(ledger.nonfinite), set(varying)
            space.findings.put(ledger.hashes, ledger.nbytes, found)
            space.comparison.put(ledger.products)
            for reader, known, rows in zip(space.readers, storages, ledger.inputs, strict=True):
                for file, offset, nbytes, *part in rows:
                    reader.put(known[file, offset, nbytes], *part)
            for output, files in zip(_outputs(space), ledger.outputs, strict=True):
                for shared, rows in zip(output.files, files, strict=bool(output.files)):
                    for row in rows:
                        shared.put(*row)
        except (ValueError, LookupError) as error:
            why = str(error) if isinstance(error, ValueError) else "it names what there is not"
            raise crew.refuse(ledger, why) from None
    for output in _outputs(space):
        for shared in output.files:
            if (name := shared.lacks()) is not None:
                what = f"the ledgers lack a part of record {name!r}"
                hint = f"remove {output.site.folder}, and begin anew"
                raise MergeError(what, where=output.path, hint=hint)


def sync(space: Workspace) -> None:
    """Force to the disk what was written to all outputs."""
    for output in _outputs(space):
        output.sync()


def _outputs(space: Workspace) -> list[SharedOutput]:
    return [sink for sink in space.sinks if isinstance(sink, SharedOutput)]


def _storages(space: Workspace, number: int) -> dict[tuple[int, int, int], Storage]:
    """Return the storages of a checkpoint whose checksums a ledger may have parts of."""
    job = space.job
    if not job.layouts[number].checksums:
        return {}
    found = [
        part
        for unit in job.plan.units
        for source in unit.sources
        if source.checkpoint == number and source.storage is not None
        for part in source.storage.ranges
    ]
    pairs = (row for one in job.plan.restrides if one.checkpoint == number for row in one.pairs)
    found += (part for _, info, _ in pairs for part in info.storage.ranges)
    found += () if number else (record for _, record in job.layout.copies)
    return {part.bytes_at: part for part in found}
