"""Checks that tensors can be averaged: shapes, dtypes, shared memory, quantised codes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from merge_avg.checkpoint import Layout, Name, TensorInfo
from merge_avg.errors import MergeError, named
from merge_avg.plan._names import Aligned

# Siblings that hold the scales of quantised codes (bitsandbytes, GPTQ, AWQ, DeepSeek, torchao),
# after the name of the codes or in place of its last segment.
_SCALE = re.compile(
    r"[._](scales?|scale_inv|input_scale|absmax|quant_map|nested_absmax|quant_state.*|SCB|CB"
    r"|zeros?|zero_points?|qzeros|g_idx)$"
)
# The A of low-rank products, as PEFT and kohya name it.
LORA_A = re.compile(r"(^|[._])lora_(A|embedding_A|down)([._]|$)")
LORA_WARNING = (
    "these are LoRA factors: mean(B) @ mean(A) is not mean(B @ A); to average what they do, merge "
    "each adapter into its base model first"
)


def check_tensors(layouts: Sequence[Layout], aligned: Aligned, dtype: str | None) -> None:
    """Raise MergeError for tensors that cannot be averaged, or not with each other."""
    for name, row in aligned.rows.items():
        if name not in aligned.skipped:
            _check_row(layouts, name, row, dtype)
    refuse_quantised(layouts[0], aligned.rows)


def _check_row(
    layouts: Sequence[Layout], name: Name, row: Sequence[TensorInfo | None], dtype: str | None
) -> None:
    first = row[0]
    for layout, info in zip(layouts, row, strict=True):
        if info is None or first is None:
            continue
        if info.trouble:
            what = f"tensor {str(name)!r} is {info.trouble}, which cannot be averaged"
            hint = "convert it to a plain tensor before saving"
            raise MergeError(what, where=layout.where(info), hint=hint)
        if info.shape != first.shape:
            shapes = f"{list(info.shape)}, expected {list(first.shape)} as in {layouts[0].path}"
            what = f"tensor {str(name)!r} has the shape {shapes}"
            raise MergeError(what, where=layout.where(info))
        if info.dtype == first.dtype:
            continue
        names = f"{info.dtype.name}, in {layouts[0].path} it is {first.dtype.name}"
        what = f"tensor {str(name)!r} is {names}"
        if {info.dtype.kind, first.dtype.kind} != {"float"}:
            raise MergeError(what, where=layout.path, hint="save both with the same dtype")
        # The template's dtype may be the narrow one by accident: whoever mixes them has to say.
        if dtype is None:
            wide = "float64" if "float64" in (info.dtype.name, first.dtype.name) else "float32"
            hint = f"choose the dtype of the result, for example --dtype {wide}"
            raise MergeError(what, where=layout.path, hint=hint)


def refuse_quantised(template: Layout, rows: Mapping[Name, tuple[TensorInfo | None, ...]]) -> None:
    """Raise MergeError for tensors that hold the codes of quantised ones."""
    # Codes are plain int8 or uint8 (GPTQ packs them into int32), as other tensors are too. What
    # gives them away is a scale beside them; their mean would be of codes with different scales.
    keys = {name.key: name for name in rows}
    scaled = {_SCALE.sub("", key) for key in keys if _SCALE.search(key)}
    for key, name in keys.items():
        info = rows[name][0]
        if info is None or info.dtype.itemsize > (4 if key.endswith("qweight") else 1):
            continue
        stem = key.rpartition(".")[0]
        if (
            info.dtype.kind != "bool"
            and info.shape
            and (key in scaled or (stem in scaled and key.endswith(("weight", "qweight"))))
        ):
            what = f"tensor {str(name)!r} holds quantised codes, which have no mean"
            hint = "average the checkpoints before you quantise them"
            raise MergeError(what, where=template.path, hint=hint)


def check_shared(
    layouts: Sequence[Layout], aligned: Aligned, members: Sequence[tuple[Name, TensorInfo]]
) -> None:
    """Raise MergeError for tensors that share memory in the template, but cannot share a mean.

    All that share memory are averaged together or kept together, and every checkpoint has all of
    them with one dtype, or none.
    """
    if len(members) == 1:
        return
    template = layouts[0].path
    names = [name for name, _ in members]
    pair = named([str(name) for name in names], 2)
    if len({info.dtype for _, info in members}) > 1:
        raise MergeError(f"{pair} view the same bytes as different dtypes", where=template)
    kept = aligned.skipped.intersection(names)
    if kept and len(kept) < len(names):
        shared = named([str(name) for name in names if name not in kept])
        what = f"{named(sorted(map(str, kept)))} is to be kept, but shares memory with {shared}"
        hint = "keep all tensors that share memory, or none"
        raise MergeError(what, where=template, hint=hint)
    for number, layout in enumerate(layouts):
        infos = [aligned.rows[name][number] for name in names]
        absent = [str(name) for name, info in zip(names, infos, strict=True) if info is None]
        if 0 < len(absent) < len(names):
            what = f"{named(absent)}, which shares memory with other tensors in the template"
            raise MergeError(f"it lacks {what}", where=layout.path, hint="use --missing skip")
        if len({info.dtype for info in infos if info is not None}) > 1:
            what = f"{pair} have different dtypes, but share memory in {template}"
            hint = "save them with one dtype, or choose a template where they are apart: --template"
            raise MergeError(what, where=layout.path, hint=hint)


def check_copied(
    layouts: Sequence[Layout], number: int, members: Sequence[tuple[Name, TensorInfo]]
) -> None:
    """Raise MergeError where tensors of a checkpoint cannot be copied into the template's geometry.

    A tensor that overlaps itself there has one place for several of its elements here.
    """
    for name, info in members:
        if info.overlaps_itself:
            what = f"tensor {str(name)!r} overlaps itself in {layouts[0].path}, but not here"
            raise MergeError(what, where=layouts[number].path, hint="save it as .contiguous()")
