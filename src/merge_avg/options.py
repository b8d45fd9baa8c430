"""The choices that a user has, by the words for them."""

from __future__ import annotations

from typing import Literal

# What becomes of tensors that not every checkpoint has.
Missing = Literal["error", "skip", "available"]
# What becomes of integers that differ.
IntPolicy = Literal["error", "template", "max", "mean"]
# What averaged float tensors can be converted to: both file formats, and every torch, can hold it.
FloatName = Literal["float64", "float32", "float16", "bfloat16"]
# The same, or what each of the template's tensors has.
ResultDtype = Literal["float64", "float32", "float16", "bfloat16", "template"]
# Whether a metric is better where it is lower, or where it is higher.
Mode = Literal["min", "max"]
# How a soup chooses its members.
Recipe = Literal["greedy"]
# The mean cosine between matrices below which the mean of networks is most likely none.
LEAST_AGREEMENT = 0.5
