"""Master weights: copies of the weights that an optimizer keeps in float32.

    model      w              bfloat16   1.5  -2.25 ...
    optimizer  fp32_param.w   float32    1.5001 -2.2499 ...     rounds to w: a master
               exp_avg.w      float32    0.001  0.02 ...        does not: kept

After a step an optimizer copies its masters to the weights. So a resumed training would undo the
average if they stayed the template's. Frameworks agree on no name for them: content decides.
"""

from __future__ import annotations

import math
import re
import struct
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from merge_avg.checkpoint import Key, Layout, Name, Roles, TensorInfo, TreePath, assign
from merge_avg.io import Reader

_DTYPES = ("bfloat16", "float16", "float32")  # of weights
# Slots of torch.optim, which are not copies even where they are equal; and what copies of weights
# in float32 are called: those may be equal by chance, before the first step of a slow average, say.
_MOMENTS = re.compile(r"exp_avg|momentum_buffer|square_avg|grad_avg|acc_delta")
_CALLED_SO = re.compile(r"(?i)master|fp32|float32")
_MOST = 16  # elements that are compared, of the first row
_MOST_HALF = 65520  # from here on a float16 is infinite

Masters = Mapping[Name, Name | None]  # masters, each with the weight that it is one of, if known


def roles_of(layouts: Sequence[Layout], key: str | None = None) -> tuple[list[Roles], Masters]:
    """Return the roles of checkpoints, in which masters are weights if all have the same ones."""
    roles: list[Roles] = []
    for layout in layouts:
        # Those of a run most often share their tensors: see the readers of the formats.
        alike = (k for k, one in enumerate(layouts[: len(roles)]) if _shared(one, layout))
        known = next(alike, None)
        roles.append(assign(layout, key) if known is None else roles[known])
    found = _masters(layouts[0], roles[0]) if key is None else {}
    forms = [
        {info.path: (info.dtype, info.shape) for info in one.tensors if info.path in found}
        for one in (layouts if found else ())
    ]
    if not found or any(one != forms[0] for one in forms):
        return roles, {}
    roles = [one.promoted(layout, found) for one, layout in zip(roles, layouts, strict=True)]
    return roles, {Name(path[:-1], str(path[-1])): weight for path, weight in found.items()}


def _shared(a: Layout, b: Layout) -> bool:
    """Return whether all that decides the roles of two checkpoints is the same."""
    facts = (a.optimizers, a.named_files) == (b.optimizers, b.named_files)
    return a.tensors is b.tensors and facts


def _masters(layout: Layout, roles: Roles) -> dict[TreePath, Name | None]:
    weights = roles.weights.items()
    ours = {name: i for name, i in weights if i.dtype.name in _DTYPES and i.shape}
    shapes = {(info.shape, info.dtype.name) for info in ours.values()}
    # What belongs together, such as one slot of every parameter, is masters as a whole or not.
    groups: dict[TreePath, list[TensorInfo]] = defaultdict(list)
    names = {name.key for name in ours}
    for info in layout.tensors if ours else ():
        reason = roles.reasons.get(info.path)
        if reason and reason.text.startswith("optimizer") and info.dtype.name == "float32":
            group = tuple(_slot(key, names) for key in info.path)
            if not any(_MOMENTS.search(str(key)) for key in group):
                groups[group].append(info)
    if not groups:
        return {}
    reader = Reader(layout, layout.path)  # which writes nothing, as nothing is decoded here
    found: dict[TreePath, Name | None] = {}
    try:
        known = {
            (info.shape, info.dtype.name, _first(reader, info, info.dtype.name)): name
            for name, info in ours.items()
        }
        for group, infos in groups.items():
            called_so = any(_CALLED_SO.search(str(key)) for key in group)
            dtypes = _DTYPES if called_so else _DTYPES[:2]
            # Zeros say nothing: a bias may be zero, and so are moments before the first step.
            telling = [
                [(i.shape, one, bits) for one in dtypes if any(bits := _first(reader, i, one))]
                for i in infos
                if any((i.shape, dtype) in shapes for dtype in dtypes)
            ]
            named = [next((known[one] for one in some if one in known), None) for some in telling]
            silent = (not some or name for name, some in zip(named, telling, strict=True))
            if len(telling) == len(infos) and any(named) and all(silent):
                found |= {info.path: name for info, name in zip(infos, named, strict=True)}
    finally:
        reader.close()
    return found


def _slot(key: Key, names: Collection[str]) -> Key:
    """Return a part of a path without what tells parameters apart: a number, or a weight's name."""
    if not isinstance(key, str):
        return "*"
    parts = key.split(".")
    for start in range(len(parts)):
        if ".".join(parts[start:]) in names:
            return ".".join([*parts[:start], "*"])
    return key


def _first(reader: Reader, info: TensorInfo, dtype: str) -> tuple[int, ...]:
    """Return the bits of a tensor's first elements in a dtype; none where they are hard to get."""
    count, size = min(info.shape[-1], _MOST), info.dtype.itemsize
    # One read: as far as the elements of the first row lie in one piece of a file.
    while info.storage.tiles:
        info = next(tile for index, tile in info.storage.tiles if not any(index))
    pieces = info.storage.ranges
    at, end = info.start * size, (info.start + count) * size
    scattered = info.shape[-1] < count or (count > 1 and info.stride[-1] != 1)
    if scattered or not info.numel or end > pieces[0].nbytes or pieces[0].coded:
        return ()
    raw = bytearray(end - at)
    reader.read(memoryview(raw), pieces[0], at, again=True)
    if info.dtype.name == dtype:  # as it is
        return struct.unpack(f"<{count}{'I' if size == 4 else 'H'}", raw)
    if dtype == "bfloat16":  # to the nearest, of two to the even one
        return tuple((n + 0x7FFF + (n >> 16 & 1)) >> 16 for n in struct.unpack(f"<{count}I", raw))
    values = [n if abs(n) < _MOST_HALF else math.nan for n in struct.unpack(f"<{count}f", raw)]
    return struct.unpack(f"<{count}H", struct.pack(f"<{count}e", *values))
