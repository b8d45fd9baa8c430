"""The callables that a pickle names: refused, known to be inert, or carried on and named.

    collections.OrderedDict, torch._utils._rebuild_tensor_v2      inert: it makes a plain value
    os.system, torch.hub.load, numpy.f2py.crackfortran.myeval     known to run code: refused
    omegaconf.dictconfig.DictConfig, mycode.Model                 all others: named

Reading a pickle here runs nothing. But a copy carries its template's pickle on, and whoever loads
the copy may run it. No list of what is dangerous is ever complete, so what is not known to be inert
is named to the user. What is inert makes, out of inert arguments, a value and nothing else: it
looks nothing up by a name, opens no file, and calls nothing that the pickle did not name as well.

Lists of the dangerous: those of fickling and picklescan, and trying every public callable of torch,
NumPy and the standard library.
"""

from __future__ import annotations

import _compat_pickle
import re
import typing
from functools import lru_cache

Verdict = typing.Literal["inert", "unknown", "dangerous"]

_CLASS = re.compile(r"[A-Z]\w+")


def _table(text: str) -> dict[str, frozenset[str]]:
    """Return names by module, from lines of a module and its names."""
    rows = (line.split() for line in text.strip().splitlines())
    return {module: frozenset(names) for module, *names in rows}


_STORAGES = " ".join(
    f"{kind}Storage"
    for kind in "BFloat16 Bool Byte Char ComplexDouble ComplexFloat Double Float Half Int Long "
    "QInt32 QInt8 QUInt2x4 QUInt4x2 QUInt8 Short Typed Untyped".split()
)
_DTYPES = (
    "float64 double float32 float float16 half bfloat16 complex128 complex64 complex32 int64 long "
    "int32 int int16 short int8 uint8 uint16 uint32 uint64 bool quint8 qint8 qint32 quint4x2 "
    "quint2x4 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu "
    "float4_e2m1fn_x2"
)
# Reviewed one by one. A class that other packages name by an older module is listed there too.
INERT = _table(
    f"""
    builtins bool bytearray bytes complex dict float frozenset int list object range set slice str \
tuple
    collections Counter OrderedDict defaultdict deque
    copyreg _reconstructor __newobj__ __newobj_ex__
    _codecs encode
    argparse Namespace
    datetime date datetime time timedelta timezone
    decimal Decimal
    fractions Fraction
    pathlib Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath
    pathlib._local Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath
    types SimpleNamespace
    uuid SafeUUID UUID
    torch Size Tensor device {_STORAGES} {_DTYPES}
    torch.cuda {_STORAGES}
    torch.storage {_STORAGES}
    torch.serialization _get_layout
    torch._tensor Tensor _rebuild_from_type_v2
    torch._utils _rebuild_tensor _rebuild_tensor_v2 _rebuild_tensor_v3 _rebuild_parameter \
_rebuild_parameter_with_state _rebuild_sparse_tensor _rebuild_sparse_csr_tensor _rebuild_qtensor \
_rebuild_nested_tensor _rebuild_meta_tensor_no_storage _rebuild_wrapper_subclass \
_rebuild_device_tensor_from_numpy _rebuild_device_tensor_from_cpu_tensor _rebuild_xla_tensor
    torch.torch_version TorchVersion
    torch.nn.parameter Parameter Buffer UninitializedBuffer UninitializedParameter
    torch.distributed.checkpoint.metadata BytesStorageMetadata ChunkStorageMetadata Metadata \
MetadataIndex StorageMeta TensorProperties TensorStorageMetadata _MEM_FORMAT_ENCODING
    torch.distributed.tensor.placement_types Partial Replicate Shard _StridedShard
    torch.distributed.checkpoint.filesystem _StorageInfo _StoragePrefix
    lightning_fabric.utilities.data AttributeDict
    lightning.fabric.utilities.data AttributeDict
    pytorch_lightning.utilities.parsing AttributeDict
    numpy bool_ bytes_ complex128 complex64 dtype float16 float32 float64 int16 int32 int64 int8 \
longlong ndarray str_ uint16 uint32 uint64 uint8 ulonglong
    numpy.core.multiarray _reconstruct scalar
    numpy._core.multiarray _reconstruct scalar
    numpy.core.numeric _frombuffer
    numpy._core.numeric _frombuffer
    numpy.random._pickle __bit_generator_ctor __generator_ctor __randomstate_ctor
    numpy.random.bit_generator SeedSequence __pyx_unpickle_SeedSequence
    numpy.random._mt19937 MT19937
    numpy.random._pcg64 PCG64 PCG64DXSM
    numpy.random._philox Philox
    numpy.random._sfc64 SFC64
    """.replace("\\\n", " ")
)
# Packages whose capitalised names are classes of layers, of optimizers and of dtypes, beside types
# that annotate them.
INERT_CLASSES = ("torch.nn.modules", "torch.optim", "numpy.dtypes")
# Enums, whose members Python 3.11.0 to 3.11.3 pickle as getattr(class, name).
ENUMS = frozenset({"torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING"})

# Every name in these modules, and in modules below them, is dangerous...
_MODULES = frozenset(
    """
    aix_support osx_support posixsubprocess pyrepl thread winapi aiohttp antigravity asyncio bdb
    cProfile cgitb code codeop commands concurrent ctypes dbm dill distutils doctest ensurepip
    fileinput ftplib http httplib idlelib imaplib imp importlib frozen_importlib
    frozen_importlib_external lib2to3 linecache logging.config mailcap marshal modulefinder
    multiprocessing nntplib nt ntpath os pdb pickle cloudpickle joblib pip pkg_resources pkgutil
    poplib posix posixpath profile pstats pty pyclbr pydoc requests requests_oauthlib rlcompleter
    runpy setuptools shelve shutil site smtplib socket socketserver sqlite3 ssl subprocess sys
    tarfile telnetlib tempfile test.support threading timeit tkinter trace turtle unittest urllib
    urllib2 venv webbrowser winreg xmlrpc zipapp zipfile zipimport
    numpy.distutils numpy.f2py numpy.testing
    sympy.parsing
    torch._export torch._inductor torch.distributed.elastic torch.distributed.launch
    torch.distributed.rpc torch.distributed.run torch.export torch.fx.graph_module torch.hub
    torch.multiprocessing torch.onnx torch.package torch.testing torch.utils.benchmark
    torch.utils.bottleneck torch.utils.collect_env torch.utils.cpp_extension
    torch.utils.model_dump torch.utils.model_zoo
    """.split()
)
# ... and these, in modules that are harmless otherwise.
_NAMES = _table(
    """
    builtins __build_class__ __import__ apply breakpoint compile delattr dir eval exec execfile \
exit file getattr globals help input locals open quit raw_input reload setattr vars
    codecs open
    functools partialmethod reduce
    io FileIO open open_code
    operator attrgetter itemgetter methodcaller
    types CodeType FunctionType
    uuid _get_command_stdout
    torch compile load
    torch.serialization load
    torch.storage _load_from_bytes
    torch.jit load
    torch.jit.unsupported_tensor_ops execWrapper
    torch.utils.data._utils.worker _worker_loop
    numpy fromfile load loadtxt genfromtxt save savetxt savez savez_compressed
    numpy.lib.npyio load loadtxt genfromtxt save savetxt
    numpy.lib.utils safe_eval
    pandas eval read_pickle
    pandas.io.pickle read_pickle
    sympy sympify
    sympy.core.sympify sympify
    """.replace("\\\n", " ")
)
# Attributes that are never harmless: modules that an innocent one has imported are found by
# `_MODULES`, and these lead from any object to all.
_PARTS = frozenset({"builtins", "gi_frame", "tb_frame", "f_globals", "f_builtins", "func_globals"})
_DUNDER = re.compile(r"__\w+__")


@lru_cache(maxsize=4096)
def verdict(module: str, name: str) -> Verdict:
    """Return what is known of a callable that a pickle names, in any spelling that a loader takes.

    A dotted name reaches through attributes, so that each part of it counts.
    """
    # Below protocol 3, Python's own loader turns names of Python 2 into those of Python 3.
    moved, renamed = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
    moved = _compat_pickle.IMPORT_MAPPING.get(moved, moved)
    for one, called in {(module, name), (moved, renamed)}:
        if _is_dangerous(one.split("."), called.split(".")):
            return "dangerous"
    return "inert" if is_inert(moved, renamed) else "unknown"


def is_inert(module: str, name: str) -> bool:
    """Return whether a callable makes a plain value and does nothing else."""
    inside = any(module == one or module.startswith(f"{one}.") for one in INERT_CLASSES)
    is_class = inside and _CLASS.fullmatch(name) is not None and name not in typing.__all__
    return is_class or name in INERT.get(module, ())


def _is_dangerous(module: list[str], attributes: list[str]) -> bool:
    special = (part for part in attributes if _DUNDER.fullmatch(part) or part in _PARTS)
    if any(not is_inert(".".join(module), part) for part in special):
        return True
    # Modules that import others make them their attributes, often below an underscore: random._os
    # is os. And six.moves has the standard library's under the names of Python 2.
    parts = module + attributes
    starts = {0, *(k + 1 for k, part in enumerate(module) if part == "moves")}
    starts.update(range(len(module), len(parts)))
    return any(_names_danger(parts[start:]) for start in starts)


def _names_danger(parts: list[str]) -> bool:
    first = _compat_pickle.IMPORT_MAPPING.get(parts[0], parts[0]).lstrip("_")
    parts = [*first.split("."), *parts[1:]]
    for count in range(1, len(parts) + 1):
        known = ".".join(parts[:count])
        if known in _MODULES or _NAMES.get(known, frozenset()) & set(parts[count:]):
            return True
    return False
