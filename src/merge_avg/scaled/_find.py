"""Finding scaled tensors in all checkpoints of a merge, with what is beside them in files."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merge_avg.checkpoint import Composed, DType, Layout, Name, TensorInfo
from merge_avg.errors import MergeError, counted, named
from merge_avg.formats import bounded
from merge_avg.scaled._config import CONFIG, KEY, config_of
from merge_avg.scaled._forms import E2M1, FORMS
from merge_avg.scaled._recognise import Group, recognise
from merge_avg.scaled._scaled import Scaled

Columns = Sequence[Mapping[Name, TensorInfo]]  # the weights of each checkpoint, by template's names

# What a layer that is quantised has beside it to say so: ComfyUI's JSON, as bytes, and its word on
# a whole file.
_MARK = re.compile(r".*_quant|scaled_fp8")


@dataclass(frozen=True)
class Found:
    """The scaled tensors of a merge, and what the output's files have to say of them."""

    tensors: tuple[Scaled, ...]
    texts: Mapping[str, bytes]  # of files, by their path in the template's directory
    notes: tuple[str, ...]


def may_have(weights: Mapping[Name, TensorInfo]) -> bool:
    """Return whether there may be scaled tensors among some weights."""
    return any(i.dtype.name == "uint8" or i.dtype.name in FORMS for i in weights.values())


def refuse_scaled(layout: Layout, weights: Mapping[Name, TensorInfo], template: Path) -> None:
    """Raise MergeError for a checkpoint with scaled tensors where the template has numbers."""
    if not may_have(weights):
        return
    for one in recognise(weights, config_of({})).groups:
        name = str(one.codes)
        what = f"tensor {name!r} holds codes with scales, and in {template} it does not"
        hint = "write it without scales first: merge it alone with --dtype and --allow-trivial"
        raise MergeError(what, where=layout.path, hint=hint, tensor=name)


def find(
    layouts: Sequence[Layout],
    columns: Columns,
    counting: Sequence[int],
    is_chosen: Callable[[Name], bool],
    dtype: DType | None,
    outputs: int,
    *,
    allow_nonfinite: bool,
) -> Found:
    """Return the scaled tensors among the weights of checkpoints, the template's first.

    Those with the numbers `counting` have a weight in some of the outputs. With a `dtype`, results
    have it and no scales.

    Raises:
        MergeError: some scales are not understood, or not all checkpoints have the same tensors.
    """
    template = layouts[0]
    folders: dict[Path, dict[Name, TensorInfo]] = {}
    for name, info in columns[0].items():
        folders.setdefault(template.where(info).parent, {})[name] = info
    tensors: list[Scaled] = []
    texts: dict[str, bytes] = {}
    notes: list[str] = []
    paths = tuple(layout.path for layout in layouts)
    marks = [name for name in columns[0] if _MARK.fullmatch(name.key.rpartition(".")[2])]
    for folder, weights in folders.items():
        said = _read(folder / CONFIG)
        found = recognise(weights, config_of(said))
        for name, why in found.refused.items():
            if is_chosen(name):
                what = f"tensor {str(name)!r} holds quantised codes that are not understood: {why}"
                hint = "average the checkpoints before you quantise them"
                raise MergeError(what, where=template.where(weights[name]), hint=hint, tensor=name)
        groups = [one for one in found.groups if _is_whole(template, one, weights, is_chosen)]
        made = [_scaled(layouts, columns, counting, paths, one, dtype) for one in groups]
        tensors += [replace(o, allow_nonfinite=allow_nonfinite, outputs=outputs) for o in made]
        if made and dtype is not None and KEY in said:
            if template.members:
                place = (folder / CONFIG).relative_to(template.path).as_posix()
                texts[place] = _unquantised(said, dtype)
            else:
                notes.append(f"the {CONFIG} beside the output has to be without {KEY!r}")
    if tensors and dtype is not None:
        gone = [name for name in marks if is_chosen(name) and _is_stale(name, columns[0], tensors)]
        tensors[0] = _marked(tensors[0], columns, counting, gone)
    return Found(tuple(tensors), texts, (*notes, *_notes(tensors)))


def _read(path: Path) -> dict[str, Any]:
    """Return what a configuration says; nothing where there is none, or none that is understood."""
    if not path.is_file():
        return {}
    try:
        return bounded.loads(bounded.read(path))
    except ValueError:
        return {}


def _unquantised(said: Mapping[str, Any], dtype: DType) -> bytes:
    """Return a configuration of a model whose weights have a dtype, and no scales."""
    left = {key: value for key, value in said.items() if key != KEY}
    for key in ("torch_dtype", "dtype"):
        if isinstance(left.get(key), str):
            left[key] = dtype.name
    return json.dumps(left, indent=2).encode() + b"\n"


def _is_whole(
    template: Layout,
    group: Group,
    weights: Mapping[Name, TensorInfo],
    is_chosen: Callable[[Name], bool],
) -> bool:
    """Return whether a group is averaged; MergeError where only some of its tensors would be."""
    chosen = [name for name in group.names if is_chosen(name)]
    if chosen and len(chosen) < len(group.names):
        kept = next(name for name in group.names if name not in chosen)
        what = f"{str(kept)!r} is to be kept, and {str(chosen[0])!r}, which belongs to it, averaged"
        module = group.codes.key.rpartition(".")[0]
        hint = f"choose both: --exclude '{module}.*' keeps them"
        raise MergeError(what, where=template.where(weights[kept]), hint=hint, tensor=kept)
    return bool(chosen)


def _scaled(
    layouts: Sequence[Layout],
    columns: Columns,
    counting: Sequence[int],
    paths: tuple[Path, ...],
    group: Group,
    dtype: DType | None,
) -> Scaled:
    sources: list[tuple[TensorInfo, ...]] = []
    first = tuple(columns[0][name] for name in group.names)
    for number, layout in enumerate(layouts):
        infos = [columns[number].get(name) for name in group.names]
        for name, ours, info in zip(group.names, first, infos, strict=True):
            _check(layout, layouts[0], name, ours, info)
        theirs = tuple(info for info in infos if info is not None)
        # Of many tensors in many checkpoints of a run, one tuple each.
        alike = all(a is b for a, b in zip(theirs, first, strict=True))
        sources.append(() if number not in counting else first if alike else theirs)
    results = [Composed(n, i.dtype, i.shape) for n, i in zip(group.names, first, strict=True)]
    transposed = False
    if dtype is not None:
        name, transposed = _unpacked(group)
        if name != group.codes and name in columns[0]:
            what = f"tensor {str(group.codes)!r} would become {str(name)!r}, which there is already"
            raise MergeError(what, where=layouts[0].path, tensor=name)
        shape = group.shape
        if transposed:
            shape = (*shape[:-2], shape[-1], shape[-2])
        results = [Composed(name, dtype, shape)]
    return Scaled(
        name=str(group.codes),
        consumed=group.names,
        sources=tuple(sources),
        results=tuple(results),
        shape=group.shape,
        form=group.form,
        blocks=group.blocks,
        scale_kind=group.scale_kind,
        rule=group.rule,
        inputs=len(group.inputs),
        paths=paths,
        dense=dtype,
        transposed=transposed,
    )


def _unpacked(group: Group) -> tuple[Name, bool]:
    """Return the name of numbers without scales, and whether they lie transposed."""
    name = group.codes
    if group.form is not E2M1:
        return name, False
    # The experts of transformers' GPT-OSS multiply from the other side than its blocks say; those
    # of OpenAI's own code, whose names end in .blocks, do not.
    key = re.sub(r"[._](blocks|packed)$", "", name.key)
    return Name(name.state_dict, key), name.key.endswith("_blocks") and len(group.shape) > 2


def _check(
    layout: Layout, template: Layout, name: Name, ours: TensorInfo, info: TensorInfo | None
) -> None:
    """Raise MergeError for a tensor that is not as the template's, or does not lie in one run."""
    if info is None:
        what = f"it lacks {str(name)!r}, which {template.path} has"
        hint = "average checkpoints that are quantised alike"
        raise MergeError(what, where=layout.path, hint=hint, tensor=name)
    where = layout.where(info)
    if info.shape != ours.shape:
        shapes = f"{list(info.shape)}, expected {list(ours.shape)} as in {template.path}"
        what = f"tensor {str(name)!r} has the shape {shapes}"
        raise MergeError(what, where=where, tensor=name)
    if info.dtype != ours.dtype:
        what = (
            f"tensor {str(name)!r} is {info.dtype.name}, in {template.path} it is {ours.dtype.name}"
        )
        hint = "average checkpoints that are quantised alike"
        raise MergeError(what, where=where, hint=hint, tensor=name)
    size = info.numel * info.dtype.itemsize
    whole = info is not ours or (info.storage.tiles or size == info.storage.nbytes)
    # Exponents are no numbers by themselves, but they are here.
    trouble = info.trouble and info.dtype.kind != "code"
    if trouble or info.storage.tiles or not info.contiguous or not whole:
        what = f"tensor {str(name)!r} is quantised, and does not lie in one piece of its own"
        hint = "save it as .clone(), or in a .safetensors file"
        raise MergeError(what, where=where, hint=hint, tensor=name)


def _is_stale(mark: Name, weights: Mapping[Name, TensorInfo], tensors: Sequence[Scaled]) -> bool:
    """Return whether a mark is wrong without scales; what stays quantised keeps its own."""
    home = mark.state_dict, mark.key.rpartition(".")[0]
    taken = {name for one in tensors for name in one.consumed}
    if mark.key.rpartition(".")[2] == "scaled_fp8":
        coded = (n for n, i in weights.items() if i.dtype.name in FORMS and n != mark)
        return taken.issuperset(coded)
    modules = {(name.state_dict, name.key.rpartition(".")[0]) for name in taken}
    return weights[mark].dtype.itemsize == 1 and home in modules


def _marked(
    one: Scaled, columns: Columns, counting: Sequence[int], marks: Sequence[Name]
) -> Scaled:
    """Return a scaled tensor with marks of quantisation, which results without scales lack."""
    known = [name for name in marks if all(name in columns[k] for k in counting)]
    more = [
        (*some, *(columns[k][name] for name in known)) if some else ()
        for k, some in enumerate(one.sources)
    ]
    return replace(one, consumed=(*one.consumed, *known), sources=tuple(more))


def _notes(tensors: Sequence[Scaled]) -> Iterator[str]:
    kinds = Counter((one.form.name, one.dense and one.dense.name) for one in tensors)
    for (form, dense), count in kinds.items():
        what = f"{counted(count, 'tensor')} of {form} with scales"
        lot = "get codes and scales anew" if dense is None else f"become {dense}, without scales"
        yield f"{what}: averaged by the numbers that they stand for, which {lot}"
    inputs = [
        name for one in tensors if one.dense is None for name in one.consumed[2 : 2 + one.inputs]
    ]
    if inputs:
        what = "the largest of the checkpoints', so that no activation is cut off that was not"
        yield f"scales of activations are {what}: {named(inputs)}"
