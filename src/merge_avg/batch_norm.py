"""BatchNorm after averaging: the mean of running statistics is not the statistics of the mean."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn


def recalibrate_batch_norm(
    model: nn.Module,
    loader: Iterable[Tensor | tuple[Tensor, ...] | list[Tensor]],
    device: torch.device | str | None = None,
) -> None:
    """Computes the running statistics of a model's BatchNorm layers anew, in place.

    This is torch's `update_bn` (Izmailov et al. 2018, arXiv:1803.05407, section 3.2): one pass over
    the data in training mode, without gradients, after which the model's own mode is restored.

    Args:
        model: the averaged model.
        loader: batches of training inputs, or tuples or lists that begin with one.
        device: where the batches are moved to first, if anywhere.
    """
    update_bn(loader, model, None if device is None else torch.device(device))
