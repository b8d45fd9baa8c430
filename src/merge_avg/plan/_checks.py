"""Checks that tensors can be averaged: shapes and dtypes, quantised codes, low-rank factors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from merge_avg.checkpoint import Layout, Name, TensorInfo
from merge_avg.errors import MergeError


def check_alike(
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
        if dtype is None:
            hint = f"choose the dtype of the result, for example --dtype {_wider(info, first)}"
            raise MergeError(what, where=layout.path, hint=hint)


def _wider(a: TensorInfo, b: TensorInfo) -> str:
    return "float64" if "float64" in (a.dtype.name, b.dtype.name) else "float32"


# Siblings that hold the scales of quantised codes (bitsandbytes, GPTQ, AWQ, DeepSeek, torchao),
# after the name of the codes or in the place of its last segment.
_SCALE = re.compile(
    r"[._](scales?|scale_inv|input_scale|absmax|quant_map|nested_absmax|quant_state.*|SCB|CB"
    r"|zeros?|zero_points?|qzeros|g_idx)$"
)
LORA_A = re.compile(r"(^|[._])lora_(A|embedding_A|down)([._]|$)")
LORA_WARNING = (
    "these are LoRA factors: mean(B) @ mean(A) is not mean(B @ A); to average what they do, merge "
    "each adapter into its base model first"
)


def refuse_quantised(template: Layout, rows: Mapping[Name, tuple[TensorInfo | None, ...]]) -> None:
    """Raises MergeError for tensors that hold the codes of quantised ones."""
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
