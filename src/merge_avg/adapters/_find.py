"""Finding the products of adapters in all checkpoints of a merge, and what becomes of each."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

from xxhash import xxh3_128

from merge_avg.adapters._described import Adapters, changed_settings, described, differences
from merge_avg.adapters._factors import Factors, Key, factors_in
from merge_avg.adapters._product import Product
from merge_avg.adapters._scaling import Scales
from merge_avg.adapters._settings import CONFIG, read_settings
from merge_avg.checkpoint import Composed, DType, Layout, Name, TensorInfo, row_major
from merge_avg.errors import MergeError, named
from merge_avg.io import Reader

_BLOCK = 1 << 20

Columns = Sequence[Mapping[Name, TensorInfo]]  # the weights of each checkpoint, by template's names


def find(
    layouts: Sequence[Layout],
    columns: Columns,
    counted: Sequence[int],
    rank: int | None,
    dtype: DType | None,
    kept: Mapping[Name, TensorInfo],
    *,
    folder: bool,
) -> Adapters:
    """Return the products in the weights of checkpoints, the template's first.

    Those with the numbers `counted` have a weight in some output. Products are averaged as the best
    ones of a `rank`, or exactly if that is None. Results have the dtype, by default the template's.
    What is `kept` of the template stays as it is. The output is a `folder` like the template, or a
    file.

    Raises:
        MergeError: there are none, not all checkpoints have the same, or some are of another kind.
    """
    template, path = columns[0], layouts[0].path
    found = factors_in(template, path)
    if not found:
        settings = read_settings((path if layouts[0].members else path.parent) / CONFIG)
        if settings is not None:
            settings.refuse_others()
        hint = "leave out --lora; a mean of whole weights needs no such choice"
        raise MergeError("it has no LoRA factors", where=path, hint=hint)
    readers = {k: Reader(layouts[k], layouts[k].path) for k in {0, *counted}}
    try:
        scales = {k: Scales(layouts[k], columns[k], reader) for k, reader in readers.items()}
        products = [*_products(layouts, columns, counted, found, scales)]
        if rank is None:
            products = [_grouped(one, readers) for one in products]
    finally:
        for reader in readers.values():
            reader.close()
    products = [_sized(one, rank, dtype or one.factor(0, 0).dtype) for one in products]
    stays = [(one, kept[one.a]) for one in (factors_in(kept, path) if kept else {}).values()]
    known = products, [*found.values()], stays
    changed = [*changed_settings(layouts[0], scales[0], *known, folder=folder)]
    made = described(layouts[0], changed, products, folder=folder)
    return replace(made, notes=(*made.notes, *differences(layouts, [0, *counted])))


def _products(
    layouts: Sequence[Layout],
    columns: Columns,
    counted: Sequence[int],
    found: Mapping[Key, Factors],
    scales: Mapping[int, Scales],
) -> Iterator[Product]:
    """Yield the products of all checkpoints, each with its scaling there."""
    others = {k: factors_in(columns[k], layouts[k].path) for k in counted if k}
    for k, theirs in others.items():
        extra = [str(theirs[key].a) for key in theirs.keys() - found.keys()]
        lacking = [str(found[key].a) for key in found.keys() - theirs.keys()]
        if extra or lacking:
            what = f"it has {named(sorted(extra))}, which {layouts[0].path} lacks"
            if lacking:
                what = f"it lacks {named(sorted(lacking))}, which {layouts[0].path} has"
            hint = "leave it out, or average what all have with --include"
            raise MergeError(what, where=layouts[k].path, hint=hint)
    for key, ours in found.items():
        sources: list[tuple[TensorInfo, ...]] = []
        scalings: list[Fraction] = []
        for k, layout in enumerate(layouts):
            if k not in counted and k:
                sources.append(())
                scalings.append(Fraction(1))
                continue
            factors = ours if not k else others[k][key]
            a, b = columns[k][factors.a], columns[k][factors.b]
            _check(layout, factors, (a, b), columns[0][ours.a], columns[0][ours.b])
            scalings.append(scales[k].of(factors, a.shape[0]))
            more = () if factors.alpha is None else (columns[k][factors.alpha],)
            sources.append((a, b, *more))
        scaling = scalings[0]
        used = tuple(one if k in counted else () for k, one in enumerate(sources))
        yield Product(
            name=ours.module,
            consumed=ours.names,
            template=sources[0],
            sources=used,
            scalings=tuple(one / scaling for one in scalings),
            scaling=scaling,
        )


def _check(
    layout: Layout,
    factors: Factors,
    infos: tuple[TensorInfo, TensorInfo],
    first_a: TensorInfo,
    first_b: TensorInfo,
) -> None:
    """Raise MergeError for factors that do not go with each other, or with the template's."""
    for name, info in zip(factors.names, infos, strict=False):
        plain = info.dtype.kind == "float" and not (info.trouble or info.storage.tiles)
        if not plain or len(info.shape) < 2 or info.stride != row_major(info.shape):
            what = f"tensor {str(name)!r} is no plain matrix of floats, as a factor is"
            hint = "save it as .contiguous()"
            raise MergeError(what, where=layout.where(info), hint=hint, tensor=name)
    a, b = infos
    if b.numel != b.shape[0] * a.shape[0] or b.shape[1] != a.shape[0] or not (a.numel and b.numel):
        what = f"{str(factors.b)!r} of {list(b.shape)} and {str(factors.a)!r} of {list(a.shape)}"
        hint = "use --lora factors, or merge each adapter into its base model"
        raise MergeError(f"{what} have no product", where=layout.path, hint=hint, tensor=factors.b)
    for name, info, first, outer in (
        (factors.a, a, first_a, slice(1, None)),
        (factors.b, b, first_b, slice(0, 1)),
    ):
        if info.shape[outer] != first.shape[outer] or len(info.shape) != len(first.shape):
            what = f"tensor {str(name)!r} has the shape {list(info.shape)}"
            what += f", which does not go with {list(first.shape)} of the template"
            raise MergeError(what, where=layout.where(info), tensor=name)


def _grouped(product: Product, readers: Mapping[int, Reader]) -> Product:
    """Return a product with groups of checkpoints that have one factor in common, to the bit."""
    groups: list[tuple[int, tuple[int, ...]]] = []
    left = [k for k, some in enumerate(product.sources) if some]
    for side in (0, 1):
        alike: dict[object, list[int]] = defaultdict(list)
        for k in left:
            info = product.sources[k][side]
            alike[_digest(readers[k], info), info.dtype, info.shape].append(k)
        # With one factor in common, the others have a mean. What is alone is in no group of B's.
        groups += [(side, tuple(some)) for some in alike.values() if side or len(some) > 1]
        left = [some[0] for some in alike.values() if len(some) == 1]
    return replace(product, groups=tuple(sorted(groups, key=lambda group: group[1])))


def _digest(reader: Reader, info: TensorInfo) -> int:
    size = info.dtype.itemsize
    start, stop = info.start * size, info.stop * size
    digest, room = xxh3_128(), memoryview(bytearray(min(_BLOCK, stop - start)))
    for at in range(start, stop, _BLOCK):
        part = room[: min(_BLOCK, stop - at)]
        reader.read(part, info.storage, at, again=True)
        digest.update(part)
    return digest.intdigest()


def _sized(product: Product, rank: int | None, dtype: DType) -> Product:
    """Return a product with the rank and the tensors of its result."""
    a, b = product.template[:2]
    m, n = product.shape
    total = sum(one[0].shape[0] for one in product.sources if one)
    if rank is None:
        rank = sum(product.sources[some[0]][0].shape[0] for _, some in product.groups)
    else:
        rank = min(rank, total, m, n)
    results = [
        Composed(product.consumed[0], dtype, (rank, *a.shape[1:])),
        Composed(product.consumed[1], dtype, (b.shape[0], rank, *b.shape[2:])),
    ]
    alpha = None
    if len(product.template) > 2:
        # The nearest number of its dtype; what the factors are scaled by makes up for the rest.
        info = product.template[2]
        alpha = _rounded(product.scaling * rank, info.dtype)
        results.append(Composed(product.consumed[2], info.dtype, info.shape))
    scaling = product.scaling if alpha is None else alpha / rank
    change = product.scaling / scaling
    scalings = tuple(one * change for one in product.scalings)
    about = replace(product, scalings=scalings, scaling=scaling)
    return replace(about, results=tuple(results), rank=rank, alpha=alpha)


def _rounded(value: Fraction, dtype: DType) -> Fraction:
    if dtype.kind == "int":
        return Fraction(max(round(value), 1))
    digits = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}[dtype.name]
    mantissa, exponent = math.frexp(value)
    return Fraction(round(mantissa * 2**digits)) * Fraction(2) ** (exponent - digits)
