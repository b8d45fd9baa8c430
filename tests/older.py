"""What the tests use of torch that its older releases lack: importing this module adds it."""

import functools
import inspect
import warnings
from importlib import metadata

import pytest
import torch

TORCH = tuple(map(int, torch.__version__.split("+")[0].split(".")[:2]))
SAFETENSORS, TYPER = (
    tuple(map(int, metadata.version(name).split(".")[:2])) for name in ("safetensors", "typer")
)
# The library and the command line are those that the lowest requirements give, or later ones.
ordered = pytest.mark.skipif(SAFETENSORS < (0, 6), reason="safetensors 0.6 tells the order")
typed = pytest.mark.skipif(SAFETENSORS < (0, 8), reason="safetensors 0.8 has every dtype")
worded = pytest.mark.skipif(TYPER < (0, 27), reason="older releases of typer word it otherwise")


def since(major, minor, what):
    """Mark a test that needs a newer torch than the oldest that is supported."""
    reason = f"needs torch {major}.{minor}, {what}"
    return pytest.mark.skipif((major, minor) > TORCH, reason=reason)


def has(name):
    """Mark a test of something that torch has by a name, such as a dtype, or has not yet."""
    return pytest.mark.skipif(not hasattr(torch, name), reason=f"torch {TORCH} has no {name}")


if TORCH < (2, 6):
    # A plain torch.load unpickles weights only since 2.6, and warns before.
    _load = torch.load

    @functools.wraps(_load)
    def load(*args, **options):
        return _load(*args, **{"weights_only": True} | options)

    torch.load = load

if torch.distributed.is_available():
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict_loader, state_dict_saver

    def _alone(function):
        """Return a function that takes `no_dist`, as it does since 2.9, and is not surprised."""

        @functools.wraps(function)
        def called(*args, no_dist=False, **options):
            with warnings.catch_warnings():
                if no_dist:
                    warnings.filterwarnings("ignore", "torch.distributed is|TypedStorage is")
                return function(*args, **options)

        return called

    for _module, _name in ((state_dict_saver, "save"), (state_dict_loader, "load")):
        if "no_dist" not in inspect.signature(getattr(_module, _name)).parameters:
            _new = _alone(getattr(_module, _name))
            setattr(_module, _name, _new)
            setattr(dcp, _name, _new)
