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
quite unseen. The fresh situations were written down after that, and before any of them was trained.
One rule is owed to them: a block that reads from and writes to a stream which others share is no
layer of other units. With --seed all are trained anew.
"""

import argparse
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from merge_avg import MergeError, MergeWarning, merge_checkpoints
from situations import SITUATIONS, Half

HALVES = get_args(Half)
TRUTHS = ("works", "hurt", "broken")
WORDS = ("agree", "drifted", "strangers", "nothing", "refused")
COLUMNS = "kind|networks|half|agreement|number|each (mean)|their mean|after BatchNorm|truth|verdict"


@dataclass(frozen=True)
class Asked:
    """What became of a mean, and what merge-avg says, with figures unless that is nothing."""

    kind: str
    half: str
    truth: str
    word: str
    agreement: float | None = None
    number: float | None = None


def asked(folder: Path) -> tuple[str, float | None, float | None]:
    """Return the verdict of merge-avg on checkpoints, their agreement and the verdict's number."""
    paths = sorted(folder.glob("*.pt"))
    with tempfile.TemporaryDirectory() as temporary:
        try:
            # Copies of one network are one of the situations.
            merged = Path(temporary) / "merged.pt"
            found = merge_checkpoints(paths, merged, allow_trivial=True)
        except MergeError:
            return "refused", None, None
    if found.agreement is None or found.verdict is None:
        return "nothing", None, None
    return found.verdict.word, found.agreement.mean, found.verdict.number


def shown(found: dict[str, Any]) -> list[str]:
    """Return the scores as cells of the table."""
    each = found["each"]
    scores = [sum(each) / len(each), found["mean"], found["after_update_bn"]]
    form = "{:.1%}" if found["metric"] == "accuracy" else "{:.2f}"
    return ["" if score is None else form.format(score) for score in scores]


def words(chosen: Sequence[Asked]) -> str:
    """Return how often each word was said, in words."""
    counts = Counter(one.word for one in chosen)
    return ", ".join(f"{counts[word]} {word}" for word in WORDS if counts[word])


def counted(found: Sequence[Asked], name: str) -> Table:
    """Return what was said of the means that work, are hurt and are broken, by kind or half."""
    table = Table(name, "situations", "number", *TRUTHS)
    for value in dict.fromkeys(getattr(one, name) for one in found):
        chosen = [one for one in found if getattr(one, name) == value]
        numbers = sorted(one.number for one in chosen if one.number is not None)
        span = f"{numbers[0]:.2f} to {numbers[-1]:.2f}" if numbers else ""
        said = (words([one for one in chosen if one.truth == truth]) for truth in TRUTHS)
        table.add_row(value, str(len(chosen)), span, *said)
    return table


def mistakes(found: Sequence[Asked]) -> Iterator[str]:
    """Yield what is wrong, by halves: of a broken mean nothing is said, or too much of another."""
    for half in HALVES:
        said = Counter((one.truth, one.word) for one in found if one.half == half)
        silent = said["broken", "agree"] + said["broken", "nothing"]
        called = said["works", "strangers"]
        yield (
            f"{half}, {said.total()} situations: broken and silent: {silent}; "
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
    warnings.simplefilter("ignore", MergeWarning)  # the table says it
    said: list[Asked] = []
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
            word, *figures = asked(folder / situation.folder)
            said.append(Asked(situation.kind, situation.half, found["truth"], word, *figures))
            cells = ("" if figure is None else f"{figure:.3f}" for figure in figures)
            row = situation.kind, situation.name, situation.half, *cells, *shown(found)
            table.add_row(*row, found["truth"], word)
    console = Console(width=170)
    console.print(table, counted(said, "kind"), counted(said, "half"))
    for line in mistakes(said):
        console.print(line)


if __name__ == "__main__":
    main()
