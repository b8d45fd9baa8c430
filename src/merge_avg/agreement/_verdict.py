"""The verdict: whether the mean of checkpoints works as a network, from the whole picture.

    agree       they learned the same function in the same place; their mean is near all of them
    drifted     they began in one place and went far, or share a part only: the mean may work
    strangers   what one learned means nothing in the place of another: the mean does not work

Why the rules are as they are. Two networks that were initialised apart, or whose hidden units are
in another order, have matrices whose cosines lie near 0, whatever they learned. Training from one
start keeps them above. A hidden unit is made by the rows of one matrix and read by the columns of
the next: if two such matrices in a row have nothing in common, the units between them are others.
The mean of a single matrix, between parts that agree, is the mean of what it computes, since that
is linear. With one layer of other units the mean often works, as wide layers average well; from two
layers on it does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from merge_avg.agreement._cosines import Agreement, TensorAgreement
from merge_avg.errors import named

Word = Literal["agree", "drifted", "strangers"]

# The mean cosine from which on checkpoints agree: those of one run, and fine-tunes of one base, lie
# far above it; and differences of strangers to one base, which all have the base in them, at 1/2.
# And the one up to which matrices have nothing in common: that of networks which were initialised
# apart is 0, plus what positive values and few elements add.
LEAST_AGREEMENT = 0.55
_NOTHING = 0.25
# Matrices in a row that have nothing in common, and layers of other units between them.
_ROW = 2
_LAYERS = 2
# The norm of what does not belong, over that of what does, in the mean: below a fifth it is noise
# that a network bears, as it does rounding to few bits; from two fifths on it is half of a mean of
# two with one stranger.
_NOISE, _HALF = 0.2, 0.4
# Weights of a layer are about 1/sqrt(inputs) when training begins, and grow from there. Matrices
# that are all ten times smaller are differences to a base, of which each adds what it has.
_SMALL = 0.1


@dataclass(frozen=True)
class Verdict:
    """The judgement on a mean: a word, with the number, the reason and what to do."""

    word: Word
    # The lower of the mean cosine and the higher one of two matrices in a row where that is least.
    number: float
    reason: str = ""
    advice: str = ""
    tensors: tuple[str, ...] = field(default=(), repr=False)  # those that have nothing in common
    groups: tuple[tuple[int, ...], ...] = ()  # of checkpoints, the largest first; if not one

    def doubts(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return a warning where the mean may be no working network; checkpoints have names."""
        if self.word == "agree":
            return ()
        return (f"{self.why(names)}; {self.advice}",)

    def why(self, names: Sequence[str]) -> str:
        """Return the word with the reason, and which tensors or checkpoints it is about."""
        about = [named(self.tensors, 3)] if self.tensors else []
        about += [named([names[i] for i in group], 3) for group in self.groups]
        listed = f" ({' | '.join(about)})" if about else ""
        return f"{self.word}: {self.reason}{listed}"


def judge(found: Agreement) -> Verdict:
    """Return the verdict on checkpoints that were compared."""
    learned = [tensor for tensor in found.tensors if tensor.norm and tensor.mean is not None]
    rows, weakest = _rows(learned)
    number = min(found.mean, weakest)
    groups = groups_of(found)
    share = _foreign(found, groups) if groups and len(groups[0]) > 1 else 0.0
    names = tuple(tensor.name for row in rows for tensor in row)
    if number < LEAST_AGREEMENT and all(_size(tensor) < _SMALL for tensor in learned):
        reason = "the values are as small as differences to a base, whose cosines tell little"
        return Verdict(
            "drifted", number, reason, "evaluate what their mean adds to the base", names
        )
    if share >= _NOISE:
        word: Word = "strangers" if share >= _HALF else "drifted"
        reason = "the checkpoints fall into groups that have nothing in common"
        few = "average without it" if list(map(len, groups[1:])) == [1] else None
        return Verdict(word, number, reason, few or "average those of one group", groups=groups)
    # Matrices may read from a stream of a width that runs through the network, and write to it. If
    # others of that width agree, it is the same stream, and no layer of other units. What is the
    # same everywhere says nothing of it: a table of positions is of that width in any network.
    agreeing = [tensor for tensor in learned if (tensor.mean or 0.0) >= LEAST_AGREEMENT]
    shared = {extent for tensor in agreeing for extent in tensor.shape[:2]}
    others = [sum(one.shape[1] not in shared for one in row[1:]) for row in rows]
    whole = any(len(row) == len(found.tensors) for row in rows)
    if whole or max(others, default=0) >= _LAYERS:
        reason = "matrices in a row have nothing in common, so the units between them differ"
        advice = "average checkpoints of one initialisation, or average their outputs instead"
        return Verdict("strangers", number, reason, advice, names)
    advice = "evaluate the mean before you use it, and recompute BatchNorm's statistics first"
    if rows:
        reason = "two matrices in a row have nothing in common"
        return Verdict("drifted", number, reason, advice, names)
    if number < LEAST_AGREEMENT and len(learned) > 1:
        return Verdict("drifted", number, "the checkpoints have drifted far apart", advice)
    alone = "one matrix alone has a mean that works" if number < LEAST_AGREEMENT else ""
    return Verdict("agree", number, alone)


def _rows(learned: Sequence[TensorAgreement]) -> tuple[list[list[TensorAgreement]], float]:
    """Return runs of matrices that have nothing in common, and the least cosine of two in a row."""
    rows: list[list[TensorAgreement]] = []
    weakest = math.inf
    before: TensorAgreement | None = None
    for tensor in learned:
        cosine = tensor.mean or 0.0
        joined = before is not None and _feeds(before, tensor)
        if before is not None and joined:
            weakest = min(weakest, max(cosine, before.mean or 0.0))
        if cosine < _NOTHING:
            if rows and joined and rows[-1][-1] is before:
                rows[-1].append(tensor)
            else:
                rows.append([tensor])
        before = tensor
    return [row for row in rows if len(row) >= _ROW], weakest


def _feeds(first: TensorAgreement, second: TensorAgreement) -> bool:
    """Return whether a matrix may read what another computes, by their shapes: heads do not."""
    made, read = first.shape[0], second.shape[1]
    # Gates of one cell come as one matrix, as do queries, keys and values; a linear layer reads the
    # places of a convolution's channels one by one; and one channel is read by each of a group.
    gates = made in (2 * read, 3 * read, 4 * read)
    places = len(first.shape) > 2 and read % max(made, 1) == 0
    return made == read or gates or places or len(second.shape) > 2


def _size(tensor: TensorAgreement) -> float:
    """Return the root mean square of a matrix, over that of one that keeps the size of inputs."""
    return tensor.norm / math.sqrt(max(tensor.size, 1)) * math.sqrt(math.prod(tensor.shape[1:]))


def groups_of(found: Agreement) -> tuple[tuple[int, ...], ...]:
    """Return the groups of checkpoints that are connected by cosines, if there are several."""
    left = [i for i, value in enumerate(found.each) if value is not None]
    groups: list[tuple[int, ...]] = []
    while left:
        group, fresh = [left[0]], [left.pop(0)]
        while fresh:
            row = found.pairs[fresh.pop()]
            near = [j for j in left if (row[j] or 0.0) >= _NOTHING]
            left = [j for j in left if j not in near]
            group += near
            fresh += near
        groups.append(tuple(sorted(group)))
    return tuple(sorted(groups, key=len, reverse=True)) if len(groups) > 1 else ()


def _foreign(found: Agreement, groups: Sequence[Sequence[int]]) -> float:
    """Return the norm of what does not belong to the largest group over that of the group."""
    ours, theirs = groups[0], [i for group in groups[1:] for i in group]
    return _norm(found, theirs) / max(_norm(found, ours), 1e-300)


def _norm(found: Agreement, chosen: Sequence[int]) -> float:
    pairs, norms = found.pairs, found.norms
    total = sum((pairs[i][j] or 0.0) * norms[i] * norms[j] for i in chosen for j in chosen)
    return math.sqrt(max(total, 0.0))
