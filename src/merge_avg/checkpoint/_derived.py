"""Values that follow from other values, so that the mean of each is not what their mean gives.

    spectral norm     W / (u W v)      u and v of unit length, found by power iteration
    pruning           W * mask         the mask of zeros and ones
    low-rank product  B @ A            a factor with few rows, and one with as few columns
    weight norm       g * v / |v|      a length a row, and directions
    quantised         codes * scale    a scale a tensor, a row, a column or a block

A tensor's part follows from its shape and those of its siblings; of what is left, some names and a
look at the values (`engine`) tell. Averages that are kept beside weights, such as BatchNorm's or
those of a codebook, are none of these: they have a mean.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain, combinations, product

from merge_avg.checkpoint._layout import Layout, TensorInfo, TreePath
from merge_avg.checkpoint._roles import Name
from merge_avg.errors import MergeError, named

Tensors = Mapping[Name, TensorInfo]
Home = tuple[TreePath, str]  # a state dict, and a module in it
Pair = frozenset[Name]

# torch.nn.utils.parametrize: X.original is a sibling of what X.0, X.1, ... hold.
_PARAMETRIZED = re.compile(r"(.*\bparametrizations\.[^.]+)\.\d+")
_PARAMETRIZATIONS = re.compile(r"\bparametrizations\.")
# Names that torch's own modules give their parameters: such a vector is neither u, v nor a scale.
_OWN = re.compile(r"(.*_)?(bias|weight)\d*|bias_.*|logit_scale")
_SCALE_WORD = re.compile("scale|absmax|scb|zero", re.IGNORECASE)
_MASK_WORD = re.compile("mask|perm", re.IGNORECASE)
# Families of low-rank products (LoRA, LoHa, LoKr), whatever their rank and what lies beside them.
_FAMILIES = {"lora", "loha", "hada", "lokr"}
_FAMILY = re.compile(rf"(?i)((?:.*[._])?(?:{'|'.join(_FAMILIES)}))((?:[._].*)?)")
_LORA_A = re.compile(r"(?i)(^|[._])lora_(embedding_)?(A|down)([._]|$)")
# Words by which the names of two factors differ.
_SIDE = re.compile(r"(?i)(?:(?<=[._])|^)(a|b|down|up|in|out|left|right|u|v|w1|w2)(?=[._]|$)")
_MOST_BESIDE = 16  # matrices of a module that are looked at in pairs
_MOST_SIBLINGS = 64  # tensors of a module that are looked at as scales of each other


def _last(name: Name) -> str:
    return name.key.rpartition(".")[2]


def _module(name: Name) -> Home:
    return name.state_dict, name.key.rpartition(".")[0]


def _home(name: Name) -> Home:
    state_dict, module = _module(name)
    # The expression takes longer than the rest, and there may be very many names.
    parametrized = _PARAMETRIZED.fullmatch(module) if "parametrizations." in module else None
    return state_dict, parametrized[1] if parametrized else module


def _by_home(tensors: Tensors) -> dict[Home, list[Name]]:
    homes: dict[Home, list[Name]] = defaultdict(list)
    for name in tensors:
        homes[_home(name)].append(name)
    return homes


@lru_cache  # layers repeat the names of their tensors
def _mask_word(last: str) -> bool:
    return bool(_MASK_WORD.search(last))


@lru_cache
def _plain(last: str) -> bool:
    return bool(_OWN.fullmatch(last)) and not _mask_word(last)


def _matrix(info: TensorInfo) -> tuple[int, int] | None:
    """Return the rows and columns of a tensor of two dimensions or more, as layers use it."""
    if len(info.shape) < 2 or not info.numel or info.dtype.kind not in ("float", "complex"):
        return None
    return info.shape[0], info.numel // info.shape[0]


def unit_or_mask(tensors: Tensors) -> dict[Name, bool]:
    """Return what may be of unit length, or a mask: the values tell, unless it is certain."""
    found: dict[Name, bool] = {}
    for home, names in _by_home(tensors).items():
        # Modules of nothing but weights and biases, as nearly all are, hold neither.
        if all(_plain(_last(name)) and "parametrizations." not in name.key for name in names):
            continue
        wide = [i for i in map(tensors.__getitem__, names) if _matrix(i) and max(i.shape) < i.numel]
        # A transposed convolution has its rows in the second dimension.
        rows = [(info.numel, extent) for info in wide for extent in info.shape[:2]]
        lengths = {length for numel, extent in rows for length in (extent, numel // extent)}
        spelled = {_last(name) for name in names}
        for name in names:
            info, last = tensors[name], _last(name)
            if info.dtype.kind != "float":
                continue
            inner = _module(name) != home  # in X.0 of a parametrization of X
            vector = 1 < info.numel == max(info.shape, default=1) and info.numel in lengths
            if inner or _mask_word(last) or (vector and not _OWN.fullmatch(last)):
                stem = last.removesuffix("_u").removesuffix("_v")
                known = inner and last in ("_u", "_v")
                known |= stem != last and not spelled.isdisjoint((f"{stem}_orig", f"{stem}_bar"))
                found[name] = vector and known
    return found


def parts_note(tensors: Tensors) -> Iterator[str]:
    """Yield a note on weights that a model computes from parts which are averaged."""
    found = []
    for (_, module), names in _by_home(tensors).items():
        spelled = {_last(name) for name in names}
        stems = {last[:-2] for last in spelled if last.endswith("_g")}
        found += [f"{module}.{stem}".lstrip(".") for stem in stems if f"{stem}_v" in spelled]
        # A weight times a mask that is the same everywhere has the mean that it should.
        parts = () if any(map(_mask_word, spelled)) else ("original", "original0")
        if _PARAMETRIZATIONS.search(module) and not spelled.isdisjoint(parts):
            found.append(_PARAMETRIZATIONS.sub("", module))
    if found:
        what = "is computed from parts, as in weight norm, and the parts are averaged"
        how = "to average the weights, remove the parametrization before saving"
        yield f"{named(found)} {what}; {how}"


def low_rank(tensors: Tensors) -> frozenset[Pair]:
    """Return the pairs of factors; a factor A alone where its product has another shape."""
    pairs = {*_named_factors(tensors)}
    matrices = {name: matrix for name, info in tensors.items() if (matrix := _matrix(info))}
    held = Counter(_module(name) for name, info in tensors.items() if info.numel > 1)
    homes: dict[Home, list[Name]] = defaultdict(list)
    for name in matrices:
        parents = name.key.split(".")[:-1]
        for depth in range(len(parents), max(len(parents) - 3, -1), -1):
            homes[name.state_dict, ".".join(parents[:depth])].append(name)
    inner: dict[tuple[Name, Name], int] = {}  # of modules that hold nothing but pairs, the rank
    known: set[Name] = set()
    for home, names in sorted(homes.items(), key=lambda item: -item[0][1].count(".")):
        if not 1 < len(names) <= _MOST_BESIDE:
            continue
        flat = [name for name in names if 2 * matrices[name][0] <= matrices[name][1]]
        tall = [name for name in names if 2 * matrices[name][1] <= matrices[name][0]]
        products = {
            (a, b): (matrices[b][0], matrices[a][1])
            for a, b in product(flat, tall)
            if matrices[a][0] == matrices[b][1] and _bare(home, (a, b), held)
        }
        for full in names if products else ():
            shapes = matrices[full], matrices[full][::-1]
            some = [pair for pair, shape in products.items() if shape in shapes]
            # The two layers of a bottleneck have another one between or beside them.
            if {*chain(*some)} == {*names} - {full}:
                pairs |= {*map(frozenset, some)}
        parted = [pair for pair in products if known.isdisjoint(pair)]
        if {*chain(*parted)} == {*names} - known:
            inner |= {(a, b): matrices[a][0] for a, b in parted}
            known.update(*parted)
    # In place of full weights: nearly all matrices of an adapter are factors, whose names tell, or
    # that have one rank, which is very small.
    opposed = {(a, b) for a, b in inner if _sides(a.key)[0] == _sides(b.key)[0]}
    # Layers that lead to more dimensions and back are none.
    upward = {(a, b) for a, b in opposed if _sides(a.key)[1] in ("up", "out")}
    inner = {pair: rank for pair, rank in inner.items() if pair not in upward}
    small = [p for p, r in inner.items() if 8 * r <= min(matrices[p[0]][1], matrices[p[1]][0])]
    alike = small if len(inner) > 1 and len({*inner.values()}) == 1 else []
    for factors in (opposed - upward, alike):
        if 10 * len({*chain(*factors)}) >= 9 * len(matrices):
            pairs |= {*map(frozenset, factors)}
    return frozenset(pairs)


def _named_factors(tensors: Tensors) -> Iterator[Pair]:
    """Yield pairs of factors of one family whose names differ by opposites behind its name."""
    groups: dict[tuple[TreePath, str, str], list[Name]] = defaultdict(list)
    for name, info in tensors.items():
        # The layers "up" and "down" may both have factors: what differs there names none.
        family = _FAMILY.fullmatch(name.key)
        rest, side = _sides(family[2]) if family else ("", "")
        if family and side and (_matrix(info) or _LORA_A.search(name.key)):
            groups[name.state_dict, family[1], rest].append(name)
    for names in groups.values():
        if len(names) > 1:
            yield from map(frozenset, combinations(names[:_MOST_BESIDE], 2))
        elif _LORA_A.search(names[0].key):
            yield frozenset(names)


def _sides(key: str) -> tuple[str, str]:
    """Return a name without the words for one side or the other, and the last of these."""
    return _SIDE.sub("*", key), (_SIDE.findall(key) or [""])[-1].lower()


def _bare(home: Home, pair: Sequence[Name], held: Mapping[Home, int]) -> bool:
    """Return whether factors have modules that hold nothing else, unless they lie in `home`."""
    modules = [*map(_module, pair)]  # the layers of a bottleneck have biases
    return all(one == home or held[one] == modules.count(one) for one in modules)


def refuse_quantised(
    template: Layout, tensors: Tensors, skipped: Container[Name] = frozenset()
) -> None:
    """Raise MergeError for tensors that hold the codes of quantised ones, unless they are skipped.

    Codes are float8 or small integers, as other tensors are too (GPTQ packs them into int32). What
    gives them away is a scale beside or below them: their mean would be of codes of other scales.
    """
    codes = [name for name, info in tensors.items() if _may_be_codes(name, info)]
    if not codes:
        return
    homes = _by_home(tensors)
    named_alike: dict[str, list[Name]] = defaultdict(list)
    for name in tensors:
        named_alike[name.key].append(name)
    marked = any(_last(name) == "scaled_fp8" for name in tensors)  # ComfyUI's word on a whole file
    coded = Counter(map(_home, codes))
    ordered = {home: sorted(homes[home], key=str) for home in coded}
    for name in (one for one in codes if one not in skipped):
        info, home = tensors[name], _home(name)
        beside = ordered[home]
        if len(beside) > _MOST_SIBLINGS:
            beside = beside[bisect_left(beside, str(name), key=str) :][:_MOST_SIBLINGS]
        scaled = (name.state_dict, name.key) in homes  # what lies below it is about it
        scaled |= marked and info.dtype.kind == "float" and len(info.shape) > 1
        scaled |= any(
            other != name and _is_scale(other, tensors[other], name, info, only=coded[home] == 1)
            for other in (*beside, *named_alike[name.key][:_MOST_SIBLINGS])
        )
        if scaled:
            what = f"tensor {str(name)!r} holds quantised codes, which have no mean"
            hint = "average the checkpoints before you quantise them"
            raise MergeError(what, where=template.where(info), hint=hint, tensor=name)


def _may_be_codes(name: Name, info: TensorInfo) -> bool:
    last, dtype = _last(name), info.dtype
    narrow = dtype.itemsize == 1 and dtype.kind in ("float", "int")
    packed = dtype.name == "int32" and (len(info.shape) == 2 or last == "qweight")
    mask = dtype.kind == "int" and _MASK_WORD.search(last)
    return (narrow or packed) and info.numel > 1 and not mask and not re.search("bias", last)


def _is_scale(name: Name, info: TensorInfo, codes: Name, coded: TensorInfo, *, only: bool) -> bool:
    """Return whether a tensor is a scale of another, the only one of its module that has codes."""
    last, dtype = _last(name), info.dtype
    told = bool(_SCALE_WORD.search(last)) or name.key == codes.key
    if _OWN.fullmatch(last) and not (told and last != "logit_scale"):
        return False
    if dtype.itemsize == 1 and dtype.name != "float8_e8m0fnu":  # powers of two, also as uint8
        blocks = len(info.shape) > 1 and info.shape == coded.shape[:-1]
        return dtype.name == coded.dtype.name == "uint8" and blocks
    if dtype.kind not in ("float", "code") or _FAMILY.fullmatch(name.key):
        return False
    told |= last.startswith(_last(codes))
    if coded.dtype.itemsize > 1:
        packed = bool(re.search("qweight|pack", _last(codes)))
        return told and (packed or _scales_packed(info.shape, coded.shape))
    # A list of blocks may have any length that divides the codes: only a name tells it.
    listed = bool(_SCALE_WORD.search(last)) and not coded.numel % max(info.numel, 1)
    told |= only and len(coded.shape) > 1
    return listed or (told and (info.numel == 1 or _scales_blocks(info.shape, coded.shape)))


def _scales_blocks(ours: Sequence[int], theirs: Sequence[int]) -> bool:
    """Return whether a shape is that of a value a row, a column or a block of codes."""
    wide = [extent for extent in ours if extent > 1]
    if len(wide) == 1 and len(theirs) > 1 and wide[0] < math.prod(theirs):
        return wide[0] in (theirs[0], theirs[-1])
    fits = (a and (b % a == 0 or a == -(-b // 128)) for a, b in zip(ours, theirs, strict=False))
    return len(ours) == len(theirs) and ours != theirs and all(fits)


def _scales_packed(ours: Sequence[int], theirs: Sequence[int]) -> bool:
    """Return whether a shape is that of scales of codes that are packed into larger integers."""
    # Eight codes of 4 bits, or four of 8, along one dimension; and a scale for 16 of them or more.
    fits = [a > 0 and 8 * b % a == 0 for a, b in zip(ours, theirs, strict=False)]
    return 1 < 2 * math.prod(ours) <= math.prod(theirs) and len(ours) == 2 and all(fits)
