"""Finding the factors of adapters, and what scales their products, whoever wrote the file.

    PEFT       base_model.model.X.lora_A.weight, .lora_B.weight       adapter_config.json
    torchtune  X.lora_a.weight, X.lora_b.weight                       the same
    kohya      lora_unet_X.lora_down.weight, .lora_up.weight          lora_unet_X.alpha
    diffusers  unet.X.lora.down.weight, transformer.X.lora_A.weight   alpha, or the metadata

A and "down" come first: A is (rank, n) and B is (m, rank). Those of convolutions have more
dimensions, of which A's all belong to its columns.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from xxhash import xxh3_128

from merge_avg.adapters._product import Product
from merge_avg.adapters._settings import (
    CONFIG,
    METADATA,
    SCALING,
    Settings,
    components,
    number_of,
    read_settings,
    refusal,
)
from merge_avg.checkpoint import Composed, DType, Layout, Name, TensorInfo, TreePath, row_major
from merge_avg.errors import MergeError, named
from merge_avg.io import Reader

_FACTOR = re.compile(
    r"(?i)(?P<stem>.*?)(?P<family>[._]?lora\d*)(_embedding)?[._](?P<side>A|B|down|up)"
    r"(?P<rest>(\.[\w-]+)?(\.weight)?)"
)
_A = {"a", "down"}
# What belongs to an adapter and is neither a factor nor its alpha: magnitudes, middle factors,
# biases, and factors of products of another kind. kohya's names begin with "lora_".
_OTHER = re.compile(r"(?i)(?:^|[._])(dora|hada|loha|lokr)[._]|[._]lora\d*[._]")
_PEFT = "base_model.model."
_BLOCK = 1 << 20

Columns = Sequence[Mapping[Name, TensorInfo]]  # the weights of each checkpoint, by template's names
_Key = tuple[TreePath, str, str]


@dataclass(frozen=True)
class _Factors:
    """The factors of one product in one checkpoint."""

    module: str  # as settings call it
    a: Name
    b: Name
    alpha: Name | None

    @property
    def names(self) -> tuple[Name, ...]:
        return (self.a, self.b) if self.alpha is None else (self.a, self.b, self.alpha)


@dataclass(frozen=True)
class Adapters:
    """The products of adapters, and what their files have to say in an output."""

    products: tuple[Product, ...]
    texts: Mapping[str, bytes]  # of files, by their path in the template's directory
    metadata: Mapping[str, str]  # of a file
    notes: tuple[str, ...]


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
    found = _factors(template, path)
    if not found:
        settings = read_settings((path if layouts[0].members else path.parent) / CONFIG)
        if settings is not None:
            settings.refuse_others()
        hint = "leave out --lora; a mean of whole weights needs no such choice"
        raise MergeError("it has no LoRA factors", where=path, hint=hint)
    readers = {k: Reader(layouts[k], layouts[k].path) for k in {0, *counted}}
    try:
        products = [*_products(layouts, columns, counted, found, readers)]
        if rank is None:
            products = [_grouped(one, readers) for one in products]
    finally:
        for reader in readers.values():
            reader.close()
    products = [_sized(one, rank, dtype or one.factor(0, 0).dtype) for one in products]
    stays = {} if not kept else _factors(kept, path)
    pairs = [(one, kept[one.a]) for one in stays.values()]
    made = _described(layouts[0], products, found, pairs, folder=folder)
    return replace(made, notes=(*made.notes, *_differences(layouts, [0, *counted])))


def _factors(weights: Mapping[Name, TensorInfo], path: Path) -> dict[_Key, _Factors]:
    """Return the factors in some weights by what their names have in common."""
    sides: dict[_Key, dict[str, Name]] = defaultdict(dict)
    stems: dict[tuple[TreePath, str], list[_Key]] = defaultdict(list)
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
    found: dict[_Key, _Factors] = {}
    for key, pair in sides.items():
        if len(pair) < 2:
            (alone,) = pair.values()
            what = f"the other factor of {str(alone)!r} is missing"
            raise MergeError(what, where=path, tensor=alone)
        state_dict, stem, family = key
        bases = stem, stem + family.removesuffix(".weight")
        spelled = (Name(state_dict, f"{base}.alpha") for base in bases)
        alpha = next((name for name in spelled if name in weights), None)
        found[key] = _Factors(stem, pair["A"], pair["B"], alpha)
        stems[state_dict, stem].append(key)
    known = {name for one in found.values() for name in one.names}
    for name in weights:
        if name not in known and _OTHER.search(name.key):
            raise refusal(path, repr(str(name)))
    return found


def _products(
    layouts: Sequence[Layout],
    columns: Columns,
    counted: Sequence[int],
    found: Mapping[_Key, _Factors],
    readers: Mapping[int, Reader],
) -> Iterator[Product]:
    """Yield the products of all checkpoints, each with its scaling there."""
    scales = {k: _Scales(layouts[k], columns[k], readers[k]) for k in readers}
    others = {k: _factors(columns[k], layouts[k].path) for k in counted if k}
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
    factors: _Factors,
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


class _Scales:
    """What scales the products of a checkpoint: tensors called alpha, settings, or nothing."""

    def __init__(self, layout: Layout, weights: Mapping[Name, TensorInfo], reader: Reader) -> None:
        self._layout, self._weights, self._reader = layout, weights, reader
        self._known: dict[tuple[int, str], Settings | None] = {}

    def of(self, factors: _Factors, rank: int) -> Fraction:
        """Return the scaling of a product of a rank."""
        settings = self.settings(factors)
        if settings is not None:
            settings.refuse_others()
        if factors.alpha is not None:
            info = self._weights[factors.alpha]
            return Fraction(str(self._value(info, factors.alpha))) / rank
        if settings is None:
            return Fraction(1)
        return settings.scaling(_module(factors, settings), rank, self._layout.path)

    def settings(self, factors: _Factors) -> Settings | None:
        """Return the settings that are about a product."""
        number = self._weights[factors.a].storage.ranges[0].file
        key = number, factors.module.partition(".")[0]
        if key not in self._known:
            self._known[key] = settings_of(self._layout, number, factors.module)
        found = self._known[key]
        if found is None and factors.alpha is None and factors.module.startswith(_PEFT):
            hint = f"put the {CONFIG} of each adapter into its folder"
            what = f"what scales it is not known, as there is no {CONFIG} beside it"
            raise MergeError(what, where=self._layout.files[number].path, hint=hint)
        return found

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


def _module(factors: _Factors, settings: Settings) -> str:
    return factors.module.removeprefix(_PEFT).removeprefix(settings.prefix)


def settings_of(layout: Layout, number: int, module: str) -> Settings | None:
    """Return the settings beside file `number` of a checkpoint, or in its metadata."""
    file = layout.files[number]
    found = read_settings(file.path.parent / CONFIG)
    if found is not None:
        return found
    text = _metadata(layout, number).get(METADATA)
    if text is None:
        return None
    prefix = module.partition(".")[0] + "."
    values = components(text, file.path)
    ours = {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
    return Settings(file.path, ours, prefix) if ours else None


def _metadata(layout: Layout, number: int) -> dict[str, str]:
    member = layout.members[number] if layout.members else layout
    return {} if member is None else dict(member.metadata)


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


def _described(
    template: Layout,
    products: Sequence[Product],
    found: Mapping[_Key, _Factors],
    stays: Sequence[tuple[_Factors, TensorInfo]],
    *,
    folder: bool,
) -> Adapters:
    """Return the products with what the files of an output have to say of them."""
    texts: dict[str, bytes] = {}
    metadata: dict[str, str] = {}
    notes: list[str] = []
    for settings, number, modules in _changed(template, products, found, stays, folder=folder):
        values = settings.rewritten(modules)
        if settings.path.name != CONFIG:
            said = metadata.get(METADATA) or _metadata(template, number)[METADATA]
            whole = components(said, settings.path)
            whole |= {settings.prefix + key: value for key, value in values.items()}
            metadata[METADATA] = json.dumps(whole, sort_keys=True, indent=2)
        elif folder:
            name = settings.path.relative_to(template.path).as_posix()
            texts[name] = json.dumps(values, indent=2).encode() + b"\n"
        else:
            told = f"r={values['r']}, lora_alpha={values['lora_alpha']}, use_rslora=false"
            if values["rank_pattern"] or values["alpha_pattern"]:
                told += ", and patterns for some modules: average folders, to have it written"
            notes.append(f"the {CONFIG} beside the output has to say {told}")
    # kohya's scripts write the rank and alpha of all modules also into the metadata.
    if "ss_network_dim" in dict(template.metadata):
        pairs = {(one.rank, one.scaling * one.rank) for one in products}
        rank, alpha = pairs.pop() if len(pairs) == 1 else ("Dynamic", None)
        metadata["ss_network_dim"] = str(rank)
        metadata["ss_network_alpha"] = "Dynamic" if alpha is None else str(number_of(alpha))
    return Adapters(tuple(products), texts, metadata, tuple(notes))


def _differences(layouts: Sequence[Layout], counted: Sequence[int]) -> Iterator[str]:
    """Yield a note on settings that differ, beside those of scaling, which all count."""
    found = [read_settings(layouts[k].path / CONFIG) for k in counted if layouts[k].members]
    values = [one.values for one in found if one is not None]
    keys = sorted({key for one in values for key in one} - SCALING)
    differ = [key for key in keys if any(one.get(key) != values[0].get(key) for one in values)]
    if differ:
        yield f"{CONFIG} differs in {named(differ)}; the template's is kept"


def _changed(
    template: Layout,
    products: Sequence[Product],
    found: Mapping[_Key, _Factors],
    stays: Sequence[tuple[_Factors, TensorInfo]],
    *,
    folder: bool,
) -> Iterator[tuple[Settings, int, dict[str, tuple[int, Fraction]]]]:
    """Yield settings that no longer hold, with the number of a file and the modules in it."""
    about: dict[tuple[Path, str], tuple[Settings, int]] = {}
    modules: dict[tuple[Path, str], dict[str, tuple[int, Fraction]]] = defaultdict(dict)
    stale: set[tuple[Path, str]] = set()
    for product, factors in zip(products, found.values(), strict=True):
        number = product.template[0].storage.ranges[0].file
        settings = settings_of(template, number, factors.module)
        if settings is None or factors.alpha is not None:
            continue
        key = settings.path, settings.prefix
        about[key] = settings, number
        modules[key][_module(factors, settings)] = product.rank, product.scaling * product.rank
        # A file has no settings beside it yet, where the template's are in its folder.
        lost = bool(template.members) and not folder
        stale |= {key} if lost or product.rank != product.template[0].shape[0] else set()
    for factors, a in stays:
        settings = settings_of(template, a.storage.ranges[0].file, factors.module)
        if settings is not None and (key := (settings.path, settings.prefix)) in stale:
            module, rank = _module(factors, settings), a.shape[0]
            scaling = settings.scaling(module, rank, template.path)
            modules[key][module] = rank, scaling * rank
    for key in sorted(stale):
        yield *about[key], modules[key]
