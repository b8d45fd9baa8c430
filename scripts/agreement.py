"""Compare what merge-avg says of checkpoints with what becomes of their mean.

In each of the situations of situations.py a few models are trained, saved and averaged. The table
shows what merge-avg says beside the score of their mean: accuracy, or perplexity of text.

    python scripts/agreement.py [--keep FOLDER] [--seed NUMBER] [--set-aside yes|no] [WORD]...

--keep saves the checkpoints as FOLDER/SITUATION/0.pt and so on, with their scores in results.json,
and does not train again what is there. --seed trains others. --set-aside shows one half only, and
words choose the situations whose kind or name holds one of them.
"""

import argparse
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from merge_avg import MergeError, merge_checkpoints
from merge_avg.agreement import LEAST_AGREEMENT
from situations import SITUATIONS

COLUMNS = "kind|networks|set aside|agreement|each (mean)|their mean|after BatchNorm|truth|warned"


def asked(folder: Path) -> tuple[str, str]:
    """Return the agreement that merge-avg finds between checkpoints, and whether it warns."""
    paths = sorted(folder.glob("*.pt"))
    with tempfile.TemporaryDirectory() as temporary:
        try:
            found = merge_checkpoints(paths, Path(temporary) / "merged.pt").agreement
        except MergeError as error:
            return "-", f"refused: {error}"
    if found is None:
        return "-", "no"
    return f"{found.mean:.3f}", "yes" if found.mean < LEAST_AGREEMENT else "no"


def shown(found: dict[str, Any]) -> list[str]:
    """Return the scores as cells of the table."""
    each = found["each"]
    scores = [sum(each) / len(each), found["mean"], found["after_update_bn"]]
    form = "{:.1%}" if found["metric"] == "accuracy" else "{:.2f}"
    return ["" if score is None else form.format(score) for score in scores]


def counted(counts: Counter[tuple[str, str, str]]) -> Table:
    """Return how often each word was said of each truth, by halves."""
    table = Table("set aside", "truth", "warned", "situations", title="both halves apart")
    for key, count in sorted(counts.items()):
        table.add_row(*key, str(count))
    return table


def main() -> None:
    """Train, average and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set-aside", choices=["yes", "no"])
    parser.add_argument("words", nargs="*")
    options = parser.parse_args()
    counts: Counter[tuple[str, str, str]] = Counter()
    table = Table(*COLUMNS.split("|"), title="scores on held-out data: accuracy, or perplexity")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        for situation in SITUATIONS:
            title = f"{situation.kind}: {situation.name}"
            aside = "yes" if situation.set_aside else "no"
            if options.words and not any(word in title for word in options.words):
                continue
            if options.set_aside not in {None, aside}:
                continue
            found = situation.keep(folder, options.seed)
            agreement, warned = asked(folder / situation.folder)
            scores = shown(found)
            row = situation.kind, situation.name, aside, agreement, *scores, found["truth"], warned
            table.add_row(*row)
            counts[aside, found["truth"], warned] += 1
    Console(width=170).print(table, counted(counts))


if __name__ == "__main__":
    main()
