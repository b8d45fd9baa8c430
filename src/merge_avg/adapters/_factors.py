"""The factors of adapters, found by their names, whoever wrote the file.

    PEFT       base_model.model.X.lora_A.weight, .lora_B.weight       adapter_config.json
    torchtune  X.lora_a.weight, X.lora_b.weight                       the same
    kohya      lora_unet_X.lora_down.weight, .lora_up.weight          lora_unet_X.alpha
    diffusers  unet.X.lora.down.weight, transformer.X.lora_A.weight   alpha, or the metadata

A and "down" come first: A is (rank, n) and B is (m, rank). Those of convolutions have more
dimensions, of which A's all belong to its columns.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from merge_avg.adapters._settings import refusal
from merge_avg.checkpoint import Name, TensorInfo, TreePath
from merge_avg.errors import MergeError

_FACTOR = re.compile(
    r"(?i)(?P<stem>.*?)(?P<family>[._]?lora\d*)(_embedding)?[._](?P<side>A|B|down|up)"
    r"(?P<rest>(\.[\w-]+)?(\.weight)?)"
)
_A = {"a", "down"}
# What belongs to an adapter and is neither a factor nor its alpha: magnitudes, middle factors,
# biases, and factors of products of another kind. kohya's names begin with "lora_".
_OTHER = re.compile(r"(?i)(?:^|[._])(dora|hada|loha|lokr)[._]|[._]lora\d*[._]")
PEFT = "base_model.model."  # begins the names of modules

Key = tuple[TreePath, str, str]  # what the names of both factors have in common


@dataclass(frozen=True)
class Factors:
    """The factors of one product in one checkpoint."""

    module: str  # as settings call it
    a: Name
    b: Name
    alpha: Name | None

    @property
    def names(self) -> tuple[Name, ...]:
        return (self.a, self.b) if self.alpha is None else (self.a, self.b, self.alpha)


def factors_in(weights: Mapping[Name, TensorInfo], path: Path) -> dict[Key, Factors]:
    """Return the factors in some weights by what their names have in common."""
    sides: dict[Key, dict[str, Name]] = defaultdict(dict)
    for name in weights:
        match = _FACTOR.fullmatch(name.key)
        if match is None or match["rest"] == ".bias":
            continue
        key = name.state_dict, match["stem"], match["family"].lower() + match["rest"]
        side = "A" if match["side"].lower() in _A else "B"
        if side in sides[key]:
            what = f"{str(name)!r} and {str(sides[key][side])!r} are factors of one side"
            raise MergeError(what, where=path, tensor=name)
        sides[key][side] = name
    found: dict[Key, Factors] = {}
    for key, pair in sides.items():
        if len(pair) < 2:
            (alone,) = pair.values()
            what = f"the other factor of {str(alone)!r} is missing"
            raise MergeError(what, where=path, tensor=alone)
        state_dict, stem, family = key
        bases = stem, stem + family.removesuffix(".weight")
        spelled = (Name(state_dict, f"{base}.alpha") for base in bases)
        alpha = next((name for name in spelled if name in weights), None)
        found[key] = Factors(stem, pair["A"], pair["B"], alpha)
    known = {name for one in found.values() for name in one.names}
    for name in weights:
        if name not in known and _OTHER.search(name.key):
            raise refusal(path, repr(str(name)))
    return found
