"""Adapters described anew: what the files of an output say of the ranks and scalings in it."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from merge_avg.adapters._factors import Factors
from merge_avg.adapters._product import Product
from merge_avg.adapters._scaling import Scales, metadata_of, module_of
from merge_avg.adapters._settings import (
    CONFIG,
    METADATA,
    SCALING,
    Settings,
    components,
    number_of,
    read_settings,
)
from merge_avg.checkpoint import Layout, TensorInfo
from merge_avg.errors import named

# Settings that no longer hold, the number of a file that they are about, and the rank and alpha of
# each module.
Changed = tuple[Settings, int, dict[str, tuple[int, Fraction]]]


@dataclass(frozen=True)
class Adapters:
    """The products of adapters, and what their files have to say in an output."""

    products: tuple[Product, ...]
    texts: Mapping[str, bytes]  # of files, by their path in the template's directory
    metadata: Mapping[str, str]  # of a file
    notes: tuple[str, ...]


def described(
    template: Layout, changed: Sequence[Changed], products: Sequence[Product], *, folder: bool
) -> Adapters:
    """Return the products with what the files of an output have to say of them."""
    texts: dict[str, bytes] = {}
    metadata: dict[str, str] = {}
    notes: list[str] = []
    for settings, number, modules in changed:
        values = settings.rewritten(modules)
        if settings.path.name != CONFIG:
            said = metadata.get(METADATA) or metadata_of(template, number)[METADATA]
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


def differences(layouts: Sequence[Layout], counted: Sequence[int]) -> Iterator[str]:
    """Yield a note on settings that differ, beside those of scaling, which all count."""
    found = [read_settings(layouts[k].path / CONFIG) for k in counted if layouts[k].members]
    values = [one.values for one in found if one is not None]
    keys = sorted({key for one in values for key in one} - SCALING)
    differ = [key for key in keys if any(one.get(key) != values[0].get(key) for one in values)]
    if differ:
        yield f"{CONFIG} differs in {named(differ)}; the template's is kept"


def changed_settings(
    template: Layout,
    scales: Scales,
    products: Sequence[Product],
    found: Sequence[Factors],
    stays: Sequence[tuple[Factors, TensorInfo]],
    *,
    folder: bool,
) -> Iterator[Changed]:
    """Yield settings that no longer hold, with the number of a file and the modules in it."""
    about: dict[tuple[Path, str], tuple[Settings, int]] = {}
    modules: dict[tuple[Path, str], dict[str, tuple[int, Fraction]]] = defaultdict(dict)
    stale: set[tuple[Path, str]] = set()
    for product, factors in zip(products, found, strict=True):
        number = product.template[0].storage.ranges[0].file
        settings = scales.settings(factors, number)
        if settings is None or factors.alpha is not None:
            continue
        key = settings.path, settings.prefix
        about[key] = settings, number
        modules[key][module_of(factors, settings)] = product.rank, product.scaling * product.rank
        # A file has no settings beside it yet, where the template's are in its folder.
        lost = bool(template.members) and not folder
        stale |= {key} if lost or product.rank != product.template[0].shape[0] else set()
    for factors, a in stays:
        settings = scales.settings(factors, a.storage.ranges[0].file)
        if settings is not None and (key := (settings.path, settings.prefix)) in stale:
            module, rank = module_of(factors, settings), a.shape[0]
            scaling = settings.scaling(module, rank, template.path)
            modules[key][module] = rank, scaling * rank
    for key in sorted(stale):
        yield *about[key], modules[key]
