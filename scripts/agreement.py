"""Compare what merge-avg says of checkpoints with what becomes of their mean.

In each of the situations of situations.py a few models are trained, saved and averaged. The table
shows the verdict of merge-avg beside the score of their mean: accuracy, or perplexity of text.

    python scripts/agreement.py [--keep FOLDER] [--seed NUMBER] [--half HALF] [WORD]...

--keep saves the checkpoints as FOLDER/SITUATION/0.pt and so on, with their scores in results.json,
and does not train again what is there. --seed trains others. --half shows some only, and words
choose the situations whose kind or name holds one of them.

How far to believe the counts: the rules of the verdict were made while looking at the known half.
Two of them are owed to the other, whose first run had two broken means that passed in silence: the
least agreement became 0.55, and a tensor of shape (n, 1) is no matrix. So that half is no longer
quite unseen. The fresh situations are: their list was written down after the rules, and before any
of them was trained.
"""

import argparse
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from merge_avg import MergeError, merge_checkpoints
from merge_avg.agreement import judge
from situations import SITUATIONS, Half

HALVES = get_args(Half)
TRUTHS = ("works", "hurt", "broken")
WORDS = ("agree", "drifted", "strangers", "nothing", "refused")
COLUMNS = "kind|networks|half|agreement|number|each (mean)|their mean|after BatchNorm|truth|verdict"
Counts = Counter[tuple[str, str, str]]


def asked(folder: Path) -> tuple[str, str, str]:
    """Return the agreement that merge-avg finds between checkpoints, and its verdict."""
    paths = sorted(folder.glob("*.pt"))
    with tempfile.TemporaryDirectory() as temporary:
        try:
            found = merge_checkpoints(paths, Path(temporary) / "merged.pt").agreement
        except MergeError:
            return "", "", "refused"
    if found is None:
        return "", "", "nothing"
    verdict = judge(found)
    return f"{found.mean:.3f}", f"{verdict.number:.3f}", verdict.word


def shown(found: dict[str, Any]) -> list[str]:
    """Return the scores as cells of the table."""
    each = found["each"]
    scores = [sum(each) / len(each), found["mean"], found["after_update_bn"]]
    form = "{:.1%}" if found["metric"] == "accuracy" else "{:.2f}"
    return ["" if score is None else form.format(score) for score in scores]


def counted(counts: Counts) -> Table:
    """Return how many means of each kind got which word, by halves."""
    table = Table("half", "their mean", *WORDS, title="what is said of the means")
    for half in HALVES:
        for truth in TRUTHS:
            table.add_row(half, truth, *(str(counts[half, truth, word] or "") for word in WORDS))
    return table


def mistakes(counts: Counts) -> Iterator[str]:
    """Yield what is wrong, by halves: of a broken mean nothing is said, or too much of another."""
    for half in HALVES:
        total = sum(count for (of, _, _), count in counts.items() if of == half)
        silent = counts[half, "broken", "agree"] + counts[half, "broken", "nothing"]
        called = counts[half, "works", "strangers"]
        yield (
            f"{half}, {total} situations: broken and silent: {silent}; "
            f"working and called strangers: {called}"
        )


def main() -> None:
    """Train, average and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--half", choices=HALVES)
    parser.add_argument("words", nargs="*")
    options = parser.parse_args()
    counts: Counts = Counter()
    table = Table(*COLUMNS.split("|"), title="scores on held-out data: accuracy, or perplexity")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        for situation in SITUATIONS:
            title = f"{situation.kind}: {situation.name}"
            if options.words and not any(word in title for word in options.words):
                continue
            if options.half not in {None, situation.half}:
                continue
            found = situation.keep(folder, options.seed)
            *figures, word = asked(folder / situation.folder)
            row = situation.kind, situation.name, situation.half, *figures, *shown(found)
            table.add_row(*row, found["truth"], word)
            counts[situation.half, found["truth"], word] += 1
    console = Console(width=170)
    console.print(table, counted(counts))
    for line in mistakes(counts):
        console.print(line)


if __name__ == "__main__":
    main()
