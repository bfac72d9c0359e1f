"""The published losses as pure functions: one equation each, with its source."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["auxiliary_targets"]


def auxiliary_targets(targets: Tensor, new_classes: Sequence[int]) -> Tensor:
    """Return the targets of the auxiliary classifier: all old classes as one, each new one alone.

    DER (Yan et al., CVPR 2021), section 3.2: the newest block's features are classified into
    ``|new classes| + 1`` categories.

    :param targets: class ids ``[B]``, in any order and with gaps.
    :param new_classes: ids of the experience's new classes.
    :return: ``[B]``: 0 for every other class, ``i + 1`` for ``new_classes[i]``.
    """
    matches = targets.unsqueeze(1) == torch.as_tensor(list(new_classes), device=targets.device)
    positions = torch.arange(1, matches.shape[1] + 1, device=targets.device)
    return (matches * positions).sum(dim=1)
