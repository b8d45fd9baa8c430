"""Recognition: which tensors are codes, which are their scales, and why some are not understood.

    layer.weight            float8 [m, n]           codes
    layer.weight_scale_inv  float32 [m/128, n/128]  their scales: the same words, and "scale"
    layer.input_scale       float32 []              a scale of activations: other words

    experts.up_blocks       uint8 [..., groups, 16] codes of MX, two in a byte
    experts.up_scales       uint8 [..., groups]     exponents

Structure decides: dtypes, shapes that divide each other into blocks, and names that share words.
A configuration beside the weights may tell the size of blocks, and may name another scheme.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from merge_avg.checkpoint import Name, TensorInfo
from merge_avg.scaled._blocks import Blocks, Shape, cut, extents
from merge_avg.scaled._config import Config
from merge_avg.scaled._forms import E2M1, FORMS, MX_BLOCK, Form, Rule, ScaleKind

_USUAL = (128, 128)  # blocks of DeepSeek, of Qwen, and of all who follow them
_REAL = ("float32", "bfloat16", "float16")
_EXPONENT = "float8_e8m0fnu"
_LAYOUT_WORDS = {"blocks", "packed"}  # of codes, that say how they lie and not what they are
_MOST_BESIDE = 64  # tensors of a module that are looked at
_ZERO = re.compile(r"zero|offset|g_idx")


@dataclass(frozen=True, slots=True)
class Group:
    """Codes, their scales, and scales of activations beside them."""

    codes: Name
    scales: Name
    inputs: tuple[Name, ...]
    form: Form
    blocks: Blocks
    scale_kind: ScaleKind
    rule: Rule
    shape: Shape  # of the numbers

    @property
    def names(self) -> tuple[Name, ...]:
        """Return the names of all its tensors."""
        return self.codes, self.scales, *self.inputs


@dataclass(frozen=True)
class Recognised:
    """The scaled tensors of a checkpoint, and what has scales that are not understood, and why."""

    groups: tuple[Group, ...]
    refused: Mapping[Name, str]


@dataclass(frozen=True, slots=True)
class _Pair:
    codes: Name
    scales: Name
    inputs: tuple[Name, ...]
    form: Form
    shape: Shape
    scale_shape: Shape
    scale_kind: ScaleKind


def recognise(tensors: Mapping[Name, TensorInfo], config: Config) -> Recognised:
    """Return the scaled tensors among the weights of a checkpoint."""
    homes: dict[tuple[object, str], list[Name]] = defaultdict(list)
    coded = [name for name, info in tensors.items() if _may_be_codes(info)]
    modules = {_module(name) for name in coded}
    for name in tensors if coded else ():
        if _module(name) in modules:
            homes[_module(name)].append(name)
    pairs: list[_Pair] = []
    refused: dict[Name, str] = {}
    for name in coded:
        beside = homes[_module(name)]
        found = _pair(name, tensors, beside if len(beside) <= _MOST_BESIDE else ())
        if isinstance(found, str):
            refused[name] = found
        elif found is not None:
            pairs.append(found)
    shared = Counter(name for pair in pairs for name in (pair.scales, *pair.inputs))
    usual = config.block or (_USUAL if _fit(pairs, _USUAL) else ())
    groups: list[Group] = []
    for pair in pairs:
        block = extents(pair.shape, pair.scale_shape, usual)
        blocks = None if block is None else cut(pair.shape, block)
        if config.trouble is not None:
            refused[pair.codes] = config.trouble
        elif any(shared[name] > 1 for name in (pair.scales, *pair.inputs)):
            refused[pair.codes] = f"its scales {str(pair.scales)!r} are those of others too"
        elif blocks is None or blocks.count != math.prod(pair.scale_shape):
            shapes = f"{list(pair.scale_shape)} for codes of {list(pair.shape)}"
            refused[pair.codes] = f"its scales have the shape {shapes}"
        else:
            names = pair.codes, pair.scales, pair.inputs
            mx = pair.scale_kind == "exponent" and blocks.block == (1, MX_BLOCK)
            rule: Rule = ("round" if _is_packed(tensors, pair) else "floor") if mx else "fit"
            groups.append(Group(*names, pair.form, blocks, pair.scale_kind, rule, pair.shape))
    return Recognised(tuple(groups), refused)


def _module(name: Name) -> tuple[object, str]:
    return name.state_dict, name.key.rpartition(".")[0]


def _words(name: Name) -> list[str]:
    return name.key.rpartition(".")[2].lower().split("_")


def _may_be_codes(info: TensorInfo) -> bool:
    return (info.dtype.name in FORMS or info.dtype.name == "uint8") and info.numel > 1


def _pair(
    name: Name, tensors: Mapping[Name, TensorInfo], beside: Iterable[Name]
) -> _Pair | str | None:
    """Return codes and what belongs to them, or why they are not understood; None for no codes."""
    info, stem = tensors[name], [word for word in _words(name) if word not in _LAYOUT_WORDS]
    scales: list[Name] = []
    inputs: list[Name] = []
    others: list[Name] = []
    for other in beside:
        words = _words(other)
        if other == name:
            continue
        scale = "scale" in words or "scales" in words
        rest = [word for word in words if word not in ("scale", "scales", "inv")]
        bare = not rest and len(tensors[other].shape) == len(info.shape) > 1
        if scale and (bare or rest == stem):
            scales.append(other)
        elif words[: len(stem)] == stem and (scale or _ZERO.search("_".join(words))):
            others.append(other)
        elif scale and tensors[other].dtype.name in _REAL and tensors[other].numel == 1:
            inputs.append(other)
    if not scales or (info.dtype.name == "uint8" and not _is_mx(info, tensors[scales[0]])):
        return None
    if len(scales) > 1 or others:
        return f"it has {' and '.join(repr(str(one)) for one in (*scales, *others))} beside it"
    # Scales of activations belong to a module with one matrix, as a linear layer is.
    alone = sum(_may_be_codes(tensors[one]) for one in beside if one not in scales) == 1
    return _paired(name, scales[0], tuple(inputs) if alone else (), tensors)


def _is_packed(tensors: Mapping[Name, TensorInfo], pair: _Pair) -> bool:
    """Return whether codes of MX lie as compressed-tensors writes them, beside plain bytes."""
    codes, scales = tensors[pair.codes], tensors[pair.scales]
    return scales.dtype.name == "uint8" and len(codes.shape) == len(scales.shape)


def _is_mx(codes: TensorInfo, scales: TensorInfo) -> bool:
    """Return whether bytes are codes of MX, by the shape and dtype of their scales."""
    if scales.dtype.name not in ("uint8", _EXPONENT):
        return False
    return _mx_shape(codes.shape, scales.shape) is not None


def _mx_shape(codes: Shape, scales: Shape) -> Shape | None:
    """Return the shape of the numbers that bytes of MX stand for."""
    half = MX_BLOCK // 2
    if codes and codes[-1] == half and codes[:-1] == scales and scales:
        return (*scales[:-1], scales[-1] * MX_BLOCK)
    if len(codes) == len(scales) and codes and codes[:-1] == scales[:-1]:
        return (*codes[:-1], codes[-1] * 2) if codes[-1] == half * scales[-1] else None
    return None


def _paired(
    name: Name, scale: Name, inputs: tuple[Name, ...], tensors: Mapping[Name, TensorInfo]
) -> _Pair | str:
    codes, scales = tensors[name], tensors[scale]
    kind: ScaleKind = "real" if scales.dtype.name in _REAL else "exponent"
    if kind == "exponent" and scales.dtype.name not in ("uint8", _EXPONENT):
        return f"its scales {str(scale)!r} are {scales.dtype.name}"
    if codes.dtype.name == "uint8":
        shape = _mx_shape(codes.shape, scales.shape) or codes.shape
        groups = (*shape[:-1], shape[-1] // MX_BLOCK)
        return _Pair(name, scale, inputs, E2M1, shape, groups, kind)
    form = FORMS[codes.dtype.name]
    return _Pair(name, scale, inputs, form, codes.shape, scales.shape, kind)


def _fit(pairs: Sequence[_Pair], sizes: Sequence[int]) -> bool:
    """Return whether all blocks that are smaller than their tensor have a size."""
    for pair in pairs:
        if len(pair.shape) < 2 or len(pair.scale_shape) != len(pair.shape):
            continue
        ends = zip(pair.shape[-2:], pair.scale_shape[-2:], sizes, strict=True)
        if any(
            count not in (1, extent) and -(-extent // size) != count for extent, count, size in ends
        ):
            return False
    return True
