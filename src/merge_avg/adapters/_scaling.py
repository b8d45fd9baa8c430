"""Scalings: what each product is multiplied by, as the files of its checkpoint say.

lora_unet_X.alpha            a tensor of one number: alpha / rank
adapter_config.json          for all modules; see _settings
lora_adapter_metadata        the same, in a safetensors file
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from fractions import Fraction

from merge_avg.adapters._factors import PEFT, Factors
from merge_avg.adapters._settings import CONFIG, METADATA, Settings, components, read_settings
from merge_avg.checkpoint import Layout, Name, TensorInfo
from merge_avg.errors import MergeError
from merge_avg.io import Reader


class Scales:
    """The scalings of products in a checkpoint: by tensors called alpha, settings, or nothing."""

    def __init__(self, layout: Layout, weights: Mapping[Name, TensorInfo], reader: Reader) -> None:
        self._layout, self._weights, self._reader = layout, weights, reader
        self._known: dict[tuple[int, str], Settings | None] = {}

    def of(self, factors: Factors, rank: int) -> Fraction:
        """Return the scaling of a product of a rank."""
        number = self._weights[factors.a].storage.ranges[0].file
        settings = self.settings(factors, number)
        if settings is not None:
            settings.refuse_others()
        if settings is None and factors.alpha is None and factors.module.startswith(PEFT):
            hint = f"put the {CONFIG} of each adapter into its folder"
            what = f"what scales it is unknown, as {CONFIG} does not lie beside it"
            raise MergeError(what, where=self._layout.files[number].path, hint=hint)
        if factors.alpha is not None:
            info = self._weights[factors.alpha]
            return Fraction(str(self._value(info, factors.alpha))) / rank
        if settings is None:
            return Fraction(1)
        return settings.scaling(module_of(factors, settings), rank, self._layout.path)

    def settings(self, factors: Factors, number: int) -> Settings | None:
        """Return the settings that are about a product in file `number`."""
        # Read once: there may be thousands of modules.
        key = number, factors.module.partition(".")[0]
        if key not in self._known:
            self._known[key] = _settings_of(self._layout, number, factors.module)
        return self._known[key]

    def _value(self, info: TensorInfo, name: Name) -> float:
        kinds = {"float64": "<d", "float32": "<f", "float16": "<e", "int64": "<q", "int32": "<i"}
        raw = bytearray(info.dtype.itemsize)
        if info.numel == 1 and info.dtype.name in (*kinds, "bfloat16"):
            at = info.start * info.dtype.itemsize
            self._reader.read(memoryview(raw), info.storage, at, again=True)
            raw = bytearray(2) + raw if info.dtype.name == "bfloat16" else raw
            (value,) = struct.unpack(kinds.get(info.dtype.name, "<f"), raw)
            if value and math.isfinite(value):
                return float(value)
        what = f"tensor {str(name)!r} is not one number other than zero, as an alpha is"
        raise MergeError(what, where=self._layout.where(info), tensor=name)


def module_of(factors: Factors, settings: Settings) -> str:
    return factors.module.removeprefix(PEFT).removeprefix(settings.prefix)


def _settings_of(layout: Layout, number: int, module: str) -> Settings | None:
    """Return the settings beside file `number` of a checkpoint, or in its metadata."""
    file = layout.files[number]
    found = read_settings(file.path.parent / CONFIG)
    if found is not None:
        return found
    text = metadata_of(layout, number).get(METADATA)
    if text is None:
        return None
    prefix = module.partition(".")[0] + "."
    values = components(text, file.path)
    ours = {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
    return Settings(file.path, ours, prefix) if ours else None


def metadata_of(layout: Layout, number: int) -> dict[str, str]:
    member = layout.members[number] if layout.members else layout
    return {} if member is None else dict(member.metadata)
