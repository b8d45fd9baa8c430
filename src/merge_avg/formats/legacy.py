"""Legacy checkpoints: what torch.save wrote before torch 1.6, and still writes on request.

    pickle   1950a86a20f9469cfc6c, the magic number
    pickle   1001, the version of the format
    pickle   {"protocol_version": 1001, "little_endian": True, "type_sizes": {...}}
    pickle   the object tree; it names storages by key
    pickle   ["94321", "94322", ...], the keys of the storages in the order of their bytes
    8 bytes  number of elements of the first storage   -.
    ...      its bytes                                  | for each storage, nothing between them
    8 bytes  ...                                       -'

Numbers and weights are little-endian. Nothing tells where a pickle ends but the pickle itself.

Specification: _legacy_save and _legacy_load in torch/serialization.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import BinaryIO

from merge_avg.checkpoint import BY_STORAGE, Archive, DType, File, FileLayout, Layout, Slot, Storage
from merge_avg.errors import MergeError
from merge_avg.formats import LEGACY_MAGIC
from merge_avg.formats.pickle.load import Loaded, load
from merge_avg.formats.pickle.tensors import with_classes
from merge_avg.formats.pickle.torch_objects import Objects, objects_at, refuse_root
from merge_avg.formats.pickle.values import CutShortError, Global, Value

_VERSION = 1001
# The pickles of most checkpoints take less than a megabyte. Where one goes on behind what was read,
# more is read, and parsing begins anew.
_FIRST_READ = 1 << 20
_LARGEST = 1 << 27  # bytes of all pickles together
_COUNT = 8  # bytes of a storage's number of elements
_OTHER = "it starts like a legacy checkpoint, but is not one"


def scan(file: BinaryIO, stamp: File, number: int = 0) -> Layout:
    """Return the layout of a legacy checkpoint; see `formats.scan`."""
    path = stamp.path
    try:
        data, start, objects, keys, names = _pickles(file, stamp.nbytes)
    except MergeError as error:
        raise error.at(path) from None
    refuse_root(objects, path)
    found: dict[str, Storage] = {}
    at = len(data)
    for key in keys:
        if key not in objects.storages or key in found:
            what = "twice" if key in found else "which nothing uses"
            raise MergeError(f"it lists the storage {key!r}, {what}", where=path)
        nbytes, dtype = objects.storages[key].storage.nbytes, objects.storages[key].dtype
        # The count is a second witness of the size, which catches files that were cut or joined.
        itemsize = dtype.itemsize if dtype else 1
        file.seek(at)
        count = int.from_bytes(file.read(_COUNT), "little")
        if at + _COUNT + nbytes > stamp.nbytes or count * itemsize != nbytes:
            what = f"storage {key!r} is damaged, or the file is cut short"
            raise MergeError(what, where=path, hint="fetch or save the file again")
        found[key] = Storage(key, at + _COUNT, nbytes, file=number)
        at += _COUNT + nbytes
    # Bytes behind the last storage are let through, as torch does.
    lacking = sorted(objects.storages.keys() - found.keys())
    if lacking:
        raise MergeError(f"it has no storage {lacking[0]!r}", where=path)
    tensors = objects.placed(lambda key, _, __: found[key])
    stop = start + objects.nbytes
    read = (data[start:stop], "", objects.classes, objects.frames)
    archive = Archive(
        tuple(found), tuple(found.values()), *read, around=(data[:start], data[stop:])
    )
    made = (path, "torch-legacy", (stamp,), tensors, objects.others, (), archive)
    callables = tuple((number, name) for name in names)
    return Layout(
        *made,
        scalars=objects.scalars,
        callables=callables,
        optimizers=objects.optimizers,
        arrays=objects.arrays,
    )


# The bytes of the five pickles, and where the fourth starts; its content; the keys of the fifth;
# and the callables of all five that are not known to be inert.
_Pickles = tuple[bytes, int, Objects, list[str], tuple[str, ...]]


def _pickles(file: BinaryIO, nbytes: int) -> _Pickles:
    size = _FIRST_READ
    while True:
        file.seek(0)
        data = file.read(min(size, nbytes))
        try:
            return _parsed(data)
        except CutShortError:
            if len(data) == nbytes:
                raise
        if size == _LARGEST:
            raise MergeError("its pickle is absurdly large")
        size = min(8 * size, _LARGEST)
        del data  # before more is read


def _parsed(data: bytes) -> _Pickles:
    start = 0
    callables: tuple[str, ...] = ()
    # The third, the note on the machine, may say anything: torch looks at none of it.
    for expected in (LEGACY_MAGIC, _VERSION, None):
        loaded = _plain(data, start)
        if expected not in (None, loaded.value):
            raise MergeError(_OTHER)
        start += loaded.nbytes
        callables += loaded.callables
    objects = objects_at(data, start)
    stop = start + objects.nbytes
    keys = _plain(data, stop)
    if not isinstance(keys.value, list) or not all(isinstance(k, str) for k in keys.value):
        raise MergeError("the list of its storages is damaged")
    callables += objects.callables + keys.callables
    return data[: stop + keys.nbytes], start, objects, keys.value, callables


def _plain(data: bytes, start: int) -> Loaded:
    return load(data, start, persistent=lambda _: None, call=_no_call)


def _no_call(_: Global, __: tuple[Value, ...]) -> None:
    raise MergeError(_OTHER)


def copy(
    layout: Layout,
    converted: Mapping[str, DType],
    averaged: set[str],
    *,
    recorded: bool = True,  # noqa: ARG001 - the format has no room for the provenance
) -> FileLayout:
    """Return the layout of a copy of a legacy checkpoint; see `formats.copy`."""
    archive = layout.archive
    if archive is None:
        raise ValueError("only a pickled checkpoint can be copied as one")
    pickle = with_classes(layout, archive, converted) if converted else archive.pickle
    classes = {one.storage: BY_STORAGE.get(one.cls.partition("\n")[2]) for one in archive.classes}
    before, after = archive.around
    literals = [(0, before + pickle + after)]
    # The keys in the last pickle keep their order, so that only the pickle's classes can change.
    slots: dict[str, Slot] = {}
    copies: list[tuple[Storage, Slot]] = []
    at = len(literals[0][1])
    for number, (name, storage) in enumerate(archive.records):
        dtype = classes[name]
        count = storage.nbytes // (dtype.itemsize if dtype else 1)
        nbytes = count * converted[name].itemsize if name in converted else storage.nbytes
        literals.append((at, count.to_bytes(_COUNT, "little")))
        slot = Slot(number, at + _COUNT, nbytes)
        if name in averaged:
            slots[name] = slot
        else:
            copies.append((storage, slot))
        at += _COUNT + nbytes
    return FileLayout(at, tuple(literals), slots, tuple(copies))
