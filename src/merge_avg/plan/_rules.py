"""Rules by name: tensors whose names match a pattern have weights of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from merge_avg.arithmetic import Weights
from merge_avg.checkpoint import Name
from merge_avg.errors import MergeError, UsageError, counted, named
from merge_avg.plan._alignment import is_chosen
from merge_avg.plan._units import Plan

_MOST_RULES = 1000


@dataclass(frozen=True)
class Rule:
    """The weights of the tensors that a pattern matches, one for each checkpoint of the job."""

    pattern: str
    weights: Weights
    given: str = ""  # the weights as the user gave them, in the order of the inputs


def read_rules(
    texts: Sequence[str], order: Sequence[int | None], count: int, *, normalize: bool
) -> tuple[Rule, ...]:
    """Return rules written as PATTERN=W,W,..., with `count` weights in the order of the inputs.

    `order` has the number of each of the job's checkpoints among the inputs, None for others.
    """
    if len(texts) > _MOST_RULES:
        raise UsageError(f"there are more than {_MOST_RULES:,} rules", hint="write fewer patterns")
    rules = []
    for text in texts:
        pattern, _, listed = text.rpartition("=")
        values = listed.split(",")
        if not pattern:
            hint = "write it as 'head.*=1,0': a pattern of names, and a weight for each checkpoint"
            raise UsageError(f"the rule {text!r} is not understood", hint=hint)
        if len(values) != count:
            counts = f"{counted(len(values), 'weight')} for {counted(count, 'checkpoint')}"
            hint = "give one for each, in the order of the checkpoints"
            raise UsageError(f"the rule {text!r} has {counts}", hint=hint)
        row = ["0" if number is None else values[number] for number in order]
        rules.append(Rule(pattern, Weights.of(row, normalize=normalize), ", ".join(values)))
    return tuple(rules)


def ruled(
    plan: Plan, rules: Sequence[Rule], masters: Mapping[Name, Name | None], path: Path
) -> tuple[Plan, list[str]]:
    """Return the plan with the rule of each unit, the last that matches, and a note on each.

    Raises:
        MergeError: a rule matches nothing that is averaged; or two tensors that share their memory
            match different rules.
    """
    if not rules:
        return plan, []
    found: dict[int, list[str]] = {number: [] for number in range(len(rules))}
    units = []
    for unit in plan.units:
        numbers = {_rule(masters.get(name) or name, rules) for name, _ in unit.members}
        if unit.kind == "keep" or numbers <= {-1}:
            units.append(unit)
            continue
        names = [str(name) for name, _ in unit.members]
        if len(numbers) > 1:
            hint = "write patterns that match all of them, or none"
            what = f"{named(names)} share their memory, but not their weights"
            raise MergeError(what, where=path, hint=hint, tensor=names[0])
        units.append(replace(unit, rule=numbers.pop()))
        found[units[-1].rule] += names
    notes = []
    for rule, names in zip(rules, found.values(), strict=True):
        if not names:
            hint = f"patterns are compared with names such as {named(plan.aligned.rows, 4)}"
            raise MergeError(f"no averaged tensor is like {rule.pattern!r}", where=path, hint=hint)
        notes.append(f"{named(names)}: the weights are {rule.given}, as of {rule.pattern!r}")
    return replace(plan, units=tuple(units)), notes


def _rule(name: Name, rules: Sequence[Rule]) -> int:
    matching = (n for n, one in enumerate(rules) if is_chosen(name, (one.pattern,), ()))
    return max(matching, default=-1)
