"""Options that do nothing beside others, or contradict them: refused before any file is read."""

from __future__ import annotations

from merge_avg.cli._parameters import Action, Display, SoupOptions
from merge_avg.errors import UsageError
from merge_avg.options import Criteria, Options, Series, Weighting

_SOUP = "write merge-avg soup ... --eval 'python eval.py {}' --mode max"


def refuse_misfits(
    series: Series,
    criteria: Criteria,
    weighting: Weighting,
    options: Options,
    soup: SoupOptions,
    action: Action,
    display: Display,
) -> None:
    """Raise UsageError for options that do not fit the task, a merge or a soup."""
    if action.inputs is not None:
        hint = "write merge-avg verify OUTPUT --inputs DIR"
        raise UsageError("--inputs is of the command verify", hint=hint)
    if soup == SoupOptions():
        return
    if options.shared:
        hint = "leave out --part, --resume and --finish: a soup goes on from its log"
        raise UsageError("a soup is made by one process", hint=hint)
    if soup.recipe is None or soup.evaluation is None or criteria.mode is None:
        word = "" if soup.recipe else "the command soup, "
        raise UsageError(f"a soup needs {word}--eval and --mode", hint=_SOUP)
    if display.page is not None or options.base is not None:
        raise UsageError("a soup has no report", hint="leave out --report and --base")
    if options.min_agreement is not None or options.fail_on is not None or not options.agreement:
        hint = "leave out --min-agreement, --fail-on and --no-agreement"
        raise UsageError("a soup has no verdict: the score decides", hint=hint)
    if weighting != Weighting() or options.weights_for or not options.normalize:
        hint = "leave out --weights, --weights-for, --weighting, --phema and --no-normalize"
        raise UsageError("a soup is the plain mean of its members", hint=hint)
    if options.template or options.dtype:
        hint = "leave out --template and --dtype"
        raise UsageError("a soup is the plain mean of its members", hint=hint)
    if series.several:
        hint = "leave out --leave-one-out, --prefixes, --sliding and the second --last"
        raise UsageError("a soup is one output", hint=hint)
