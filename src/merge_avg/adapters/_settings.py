"""Settings of adapters: the ranks and scalings that adapter_config.json and its like tell.

    {"r": 8, "lora_alpha": 16, "use_rslora": false,
     "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"layers.0.v_proj": 32}}

A module's change is scaled by alpha / r, or by alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023). A
pattern is a regular expression for the end of a module's name; of several that match, the first
counts. Source: PEFT's `LoraConfig` and `get_pattern_key`. torchtune writes the same file. diffusers
has the same keys, behind the name of a component, in the metadata of a safetensors file.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

from merge_avg.errors import MergeError
from merge_avg.formats import bounded

CONFIG = "adapter_config.json"
METADATA = "lora_adapter_metadata"  # where diffusers keeps it in a safetensors file
SCALING = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
# Ways to change a weight that are more, or other, than a product of two matrices.
_OTHERS = {"use_dora": "DoRA", "lora_bias": "biases of B", "target_parameters": "target_parameters"}
# Ways to begin that take the first product out of the base: what is left depends on the rank.
_RESIDUAL = ("pissa", "olora", "corda", "loftq", "lora_ga")
_MOST_REPEATS = 3  # in a pattern: with more, matching a name could take forever

Number = int | float


@dataclass(frozen=True)
class Settings:
    """The settings of an adapter, or of one component of a pipeline."""

    path: Path  # of the file that says so
    values: Mapping[str, Any]
    prefix: str = ""  # of the names of modules in that file

    def scaling(self, module: str, rank: int, path: Path) -> Fraction:
        """Return what the product of a module, whose factors have a rank, is scaled by."""
        wanted, alpha = self._rank(module), self._alpha(module)
        if wanted != rank:
            what = f"the factors of {module!r} have the rank {rank}, expected {wanted}"
            hint = f"{self.path} does not belong to it"
            raise MergeError(what, where=path, hint=hint)
        if self.values.get("use_rslora"):
            return Fraction(alpha / math.sqrt(rank))
        return Fraction(str(alpha)) / rank

    def refuse_others(self) -> None:
        """Raise MergeError for an adapter whose change is not a product of two matrices alone."""
        kind = self.values.get("peft_type", "LORA")
        known = [name for key, name in _OTHERS.items() if self.values.get(key)]
        start = self.values.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_RESIDUAL):
            known.append(f"init_lora_weights={start!r}, which changes the base too")
        if kind != "LORA" or known:
            raise refusal(self.path, str(kind) if kind != "LORA" else known[0])

    def rewritten(self, modules: Mapping[str, tuple[int, Fraction]]) -> dict[str, Any]:
        """Return the settings with the rank and the alpha of all modules."""
        default = Counter(modules.values()).most_common(1)[0][0]
        # A pattern would fit the end of a longer name too, if ^ did not keep it from that.
        others = sorted((m for m in modules if modules[m] != default), key=len, reverse=True)
        keys = {module: f"^{re.escape(module)}" for module in others}
        ranks = {keys[m]: modules[m][0] for m in others if modules[m][0] != default[0]}
        alphas = {keys[m]: number_of(modules[m][1]) for m in others if modules[m][1] != default[1]}
        new = {"r": default[0], "lora_alpha": number_of(default[1]), "use_rslora": False}
        return {**self.values, **new, "rank_pattern": ranks, "alpha_pattern": alphas}

    def _rank(self, module: str) -> int:
        value = self._of(module, "rank_pattern", "r")
        if type(value) is not int or value < 1:
            raise MergeError(f"the rank of {module!r} is {value!r}", where=self.path)
        return value

    def _alpha(self, module: str) -> Number:
        value = self._of(module, "alpha_pattern", "lora_alpha")
        if type(value) not in (int, float) or not 0 < abs(value) < 1e30:
            raise MergeError(f"the lora_alpha of {module!r} is {value!r}", where=self.path)
        return value  # type: ignore[no-any-return]

    def _of(self, module: str, table: str, default: str) -> Any:
        for pattern, value in self._patterns[table]:
            if pattern.match(module):
                return value
        return self.values.get(default, 8)  # as PEFT has both where they are not given

    @cached_property
    def _patterns(self) -> Mapping[str, Sequence[tuple[re.Pattern[str], Any]]]:
        return {key: [*self._compiled(key)] for key in ("rank_pattern", "alpha_pattern")}

    def _compiled(self, key: str) -> Iterator[tuple[re.Pattern[str], Any]]:
        table = self.values.get(key) or {}
        if not isinstance(table, Mapping):
            raise MergeError(f"its {key} is not an object", where=self.path)
        for pattern, value in table.items():
            # It comes from a file that nobody vouches for.
            repeats = len(re.findall(r"[*+{]", pattern))
            if repeats > _MOST_REPEATS or re.search(r"\)[*+{?]", pattern) or len(pattern) > 1000:
                raise MergeError(f"the pattern {pattern!r} is too complex", where=self.path)
            try:
                yield re.compile(rf"(.*\.)?({pattern})$"), value
            except re.error:
                what = f"the pattern {pattern!r} is no regular expression"
                raise MergeError(what, where=self.path) from None


def refusal(path: Path, kind: str) -> MergeError:
    """Return the error for an adapter of another kind."""
    what = f"it is an adapter with {kind}, whose change is not the product of two matrices"
    hint = "merge each adapter into its base model and average these, or use --lora factors"
    return MergeError(what, where=path, hint=hint)


def number_of(value: Fraction) -> Number:
    """Return a fraction as JSON has it: an integer, or a float."""
    return value.numerator if value.denominator == 1 else float(value)


def read_settings(path: Path) -> Settings | None:
    """Return what a file says, if it is there."""
    if not path.is_file():
        return None
    try:
        return Settings(path, bounded.loads(bounded.read(path)))
    except (ValueError, UnicodeDecodeError) as error:
        raise MergeError(f"it is not JSON as it should be: {error}", where=path) from None


def components(text: str, path: Path) -> dict[str, Any]:
    """Return what the metadata of a safetensors file says, by component and key."""
    try:
        return bounded.loads(text.encode())
    except ValueError as error:
        what = f"its metadata {METADATA!r} is not JSON as it should be: {error}"
        raise MergeError(what, where=path) from None
