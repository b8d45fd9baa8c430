"""The configuration of a quantised model, as Hugging Face's libraries write it.

    {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], ...}, ...}

It lies in config.json beside the weights. What it says counts where the tensors leave it open: the
size of blocks. And it may name a scheme whose codes look like others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CONFIG, KEY = "config.json", "quantization_config"
# Methods whose tensors say all about them: a value is a code times a scale.
_UNDERSTOOD = ("fp8", "fbgemm_fp8", "mxfp4", "compressed-tensors", "modelopt")
_FORMATS = ("float-quantized", "naive-quantized", "mxfp4-pack-quantized", "mxfp8-quantized")


@dataclass(frozen=True, slots=True)
class Config:
    """A configuration: the size of blocks, if it says one, and why it is not understood, if so."""

    block: tuple[int, ...] = ()
    trouble: str | None = None


NO_CONFIG = Config()


def config_of(text: Mapping[str, Any]) -> Config:
    """Return what a config.json says of quantisation."""
    said = text.get(KEY)
    if not isinstance(said, dict):
        return NO_CONFIG
    method = said.get("quant_method")
    if method is not None and method not in _UNDERSTOOD:
        return Config(trouble=f"its config.json names the scheme {method!r}")
    style = said.get("format")
    if method == "compressed-tensors" and style is not None and style not in _FORMATS:
        return Config(trouble=f"its config.json names the format {style!r}")
    sizes = said.get("weight_block_size")
    if isinstance(sizes, list) and len(sizes) == 2:
        numbers = tuple(size for size in sizes if type(size) is int and size > 0)
        return Config(numbers if len(numbers) == 2 else ())
    return NO_CONFIG
