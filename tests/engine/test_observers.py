"""Sums of hashes: the same for all windows, and another for every change that matters."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from merge_avg.engine._observers import Hasher, chunk, total
from merge_avg.engine._workspace import Findings
from merge_avg.options import Options
from merge_avg.plan import Piece, batches, prepare

SIZES = (300_000, 70, 131_072)  # of several chunks, of less than one, and of exactly one


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A merge of two checkpoints with a tensor of each size."""
    folder = tmp_path_factory.mktemp("hashing")
    paths = [folder / "0.safetensors", folder / "1.safetensors"]
    for path in paths:
        save_file({f"w{n}": torch.zeros(size) for n, size in enumerate(SIZES)}, path)
    return prepare(paths, folder / "o.safetensors", Options())


def contents(job, seed):
    """The bytes of each unit."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(len(unit), generator=generator) for unit in job.plan.units]
    return [row.numpy().tobytes() for row in rows]


def sums(job, rows, limit, workers=1):
    """The hashes of two checkpoints, read by several workers in windows of at most `limit`."""
    findings = Findings(None, [0] * (len(job.layouts) + 1))
    some = [Hasher(job, findings) for _ in range(workers)]
    for number, batch in enumerate(batches(job.plan.units, limit, chunk(job.plan.units[0]))):
        hasher = some[number % workers]
        for window in batch:
            hasher.begin(window)
            for k, row in enumerate(rows):
                parts = [row[p.unit.number][4 * p.start : 4 * p.stop] for p in window]
                hasher.see(k, memoryview(b"".join(parts)))
    for hasher in some:
        hasher.close()
    return total(job, findings)


@given(st.integers(10, 19), st.integers(1, 3))
def test_windows_and_workers_do_not_matter(job, power, workers):
    """Whatever windows a budget makes, and whoever reads them, the hashes are the same."""
    rows = [contents(job, 0), contents(job, 1)]
    found = sums(job, rows, 1 << power, workers)
    assert found == sums(job, rows, 1 << 17)
    assert found.read[0] != found.read[1]


@pytest.mark.parametrize("what", ["a bit", "chunks that change places", "units that do"])
def test_every_change_is_seen(job, what):
    """A flipped bit changes the hash of its checkpoint, and so does what lies elsewhere."""
    ours, theirs = contents(job, 0), contents(job, 0)
    first, size = theirs[0], 4 * chunk(job.plan.units[0])
    if what == "a bit":
        theirs[0] = first[:-1] + bytes([first[-1] ^ 1])
    elif what == "units that do":
        theirs[2], theirs[0] = first[:size], theirs[2] + first[size:]
    else:
        theirs[0] = first[size : 2 * size] + first[:size] + first[2 * size :]
    found = sums(job, [ours, theirs], 1 << 17)
    assert found.read[0] != found.read[1]
    assert found.read[0] == sums(job, [ours, ours], 1 << 17).read[1]


def test_what_is_kept_has_a_sum_of_its_own(job):
    """Records that are copied, and holes in what is averaged, count as kept and as nothing else."""
    kept = set()
    unit = job.plan.units[1]
    for part in (b"", b"a" * 280, b"b" * 280):
        for copied in (True, False):
            findings = Findings(None, [0] * (len(job.layouts) + 1))
            hasher = Hasher(job, findings)
            if copied:
                with hasher.copying(0) as seen:
                    seen(memoryview(part))
            elif part:
                hasher.keep(Piece(unit, 0, len(unit)), memoryview(part))
            hasher.close()
            found = total(job, findings)
            assert found.read == (0, 0)
            kept.add(found.kept)
    assert len(kept) == 6
