"""Channel masks: a learned gate per channel, which decides what a block keeps.

DER (Yan et al., CVPR 2021), section 3.3, after HAT (Serra et al., "Overcoming Catastrophic
Forgetting with Hard Attention to the Task", ICML 2018), sections 2.3 to 2.5.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "EMBEDDING_LIMIT",
    "MaskedBatchNorm2d",
    "annealed_scale",
    "channel_mask",
    "compensated_slope",
]

EMBEDDING_LIMIT = 6.0
"""Embeddings are kept in ``[-6, 6]``, the active range of the sigmoid (HAT, section 2.5)."""

_EXPONENT_LIMIT = 50.0


def annealed_scale(batch: int, batches: int, s_max: float) -> float:
    """Return the scale s of a batch: from ``1 / s_max``, all gates half open, to ``s_max``.

    DER, section 3.3: ``s = 1/s_max + (s_max - 1/s_max) (b - 1) / (B - 1)`` within each epoch. An
    epoch of a single batch has ``s_max``.

    :param batch: b, from 1 to ``batches``.
    :param batches: B, the batches of an epoch.
    :param s_max: the last batch's scale.
    """
    if batches == 1:
        return s_max
    return 1 / s_max + (s_max - 1 / s_max) * (batch - 1) / (batches - 1)


def compensated_slope(embedding: Tensor, scale: float, rate: float = 1.0) -> Tensor:
    """Return what stands for the derivative of ``sigmoid(s e)`` by e.

    The derivative itself, ``s sigmoid'(s e)``, vanishes where s is large. HAT multiplies it by
    ``s_max sigmoid'(e) / (s sigmoid'(s e))``, in which ``|s e|`` is clamped to 50; DER leaves
    ``s_max`` out. The product is computed at once here: in float32 the derivative of an open gate
    is 0 from ``s e = 17`` on, and no factor brings it back.

    :param embedding: e, of any shape.
    :param scale: s.
    :param rate: the constant factor: 1 in DER's equation, ``s_max`` in HAT's.
    :return: of the same shape; ``rate sigmoid'(e)`` where ``|s e| <= 50``.
    """
    slope = rate * torch.sigmoid(embedding) * torch.sigmoid(-embedding)
    return slope * torch.exp((_EXPONENT_LIMIT - (scale * embedding).abs()).clamp(max=0))


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, embedding: Tensor, scale: float, rate: float) -> Tensor:
        ctx.save_for_backward(embedding)
        ctx.scale, ctx.rate = scale, rate
        return torch.sigmoid(scale * embedding)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (embedding,) = ctx.saved_tensors
        return gradient * compensated_slope(embedding, ctx.scale, ctx.rate), None, None


def channel_mask(embedding: Tensor, scale: float, rate: float = 1.0) -> Tensor:
    """Return the mask ``m = sigmoid(s e)``, differentiated with :func:`compensated_slope`.

    :param embedding: e ``[C]``.
    :param scale: s.
    :param rate: as for :func:`compensated_slope`.
    """
    mask: Tensor = _Gate.apply(embedding, scale, rate)
    return mask


class MaskedBatchNorm2d(nn.BatchNorm2d):
    """A BatchNorm whose output channels are multiplied by a mask: ``[B, C, H, W]`` to the same.

    A closed channel is exactly 0, the norm's shift included. The mask multiplies the norm's scale
    and shift, so that no feature map is read once more. While learning, the mask is soft; in
    evaluation it is 0 or 1. At least one channel is open, in both: a network that learned without
    it would be another one, with it.

    :param channels: C.
    :param eps: as for a BatchNorm.
    :param momentum: likewise.
    """

    momentum: float
    num_batches_tracked: Tensor

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(channels, eps, momentum)
        self.embedding = nn.Parameter(torch.empty(channels))
        self.scale = 1.0
        """The scale s of the gates, set at every training step."""
        self.rate = 1.0
        """The rate of :func:`compensated_slope`."""
        self.reset_mask()

    @classmethod
    def of(cls, norm: nn.BatchNorm2d) -> "MaskedBatchNorm2d":
        """Return a norm like another one, with a fresh mask."""
        assert norm.momentum is not None
        masked = cls(norm.num_features, norm.eps, norm.momentum).to(norm.weight)
        masked.load_state_dict(masked.state_dict() | norm.state_dict())
        return masked

    @torch.no_grad()
    def reset_mask(self) -> None:
        """Draw the embedding from 0 to 2: every channel starts open.

        So does HAT in its compression experiments (the authors' released code); its others start
        from the standard normal distribution, which closes every second channel at once.
        """
        self.embedding.uniform_(0, 2)

    def open_channels(self) -> Tensor:
        """Return which channels ``[C]`` are open: where the embedding is positive.

        If that is nowhere, the first one with the largest embedding is.
        """
        channels = torch.arange(self.num_features, device=self.embedding.device)
        return (self.embedding > 0) | (channels == self.embedding.argmax())

    def mask(self) -> Tensor:
        """Return the mask ``[C]``: 0 or 1, but soft while the embedding learns."""
        is_open = self.open_channels()
        if not (self.training and self.embedding.requires_grad):
            return is_open.to(self.weight.dtype)
        soft = channel_mask(self.embedding, self.scale, self.rate)
        return torch.where(is_open & (self.embedding <= 0), 1, soft)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised and masked feature map."""
        mask = self.mask()
        if self.training:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            mask * self.weight,
            mask * self.bias,
            self.training,
            self.momentum,
            self.eps,
        )

    def pruned(self, kept: list[int]) -> nn.BatchNorm2d:
        """Return a plain norm of some of the channels."""
        norm = nn.BatchNorm2d(len(kept), eps=self.eps, momentum=self.momentum).to(self.weight)
        state = self.state_dict()
        norm.load_state_dict(
            {k: v[kept] if v.dim() else v for k, v in state.items() if k != "embedding"}
        )
        return norm
