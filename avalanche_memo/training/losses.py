"""The published losses as pure functions: one equation each, with its source."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from avalanche_memo.training.ranges import at_least_zero, positive

__all__ = [
    "POOLINGS",
    "NCALoss",
    "auxiliary_targets",
    "less_forget_loss",
    "margin_ranking_loss",
    "nca_loss",
    "nca_loss_released",
    "pod_loss",
    "softmax_distillation_loss",
    "sparsity_loss",
]


def auxiliary_targets(targets: Tensor, new_classes: Sequence[int] | Tensor) -> Tensor:
    """Return the targets of the auxiliary classifier: all old classes as one, each new one alone.

    DER (Yan et al., CVPR 2021), section 3.2: the newest block's features are classified into
    ``|new classes| + 1`` categories.

    :param targets: class ids ``[B]``, in any order and with gaps.
    :param new_classes: ids of the experience's new classes.
    :return: ``[B]``: 0 for every other class, ``i + 1`` for ``new_classes[i]``.
    """
    matches = targets.unsqueeze(1) == torch.as_tensor(new_classes, device=targets.device)
    positions = torch.arange(1, matches.shape[1] + 1, device=targets.device)
    return (matches * positions).sum(dim=1)


def _without_height(squares: Tensor) -> Tensor:
    return squares.sum(dim=2).flatten(1)


def _without_width(squares: Tensor) -> Tensor:
    return squares.sum(dim=3).flatten(1)


POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "spatial": lambda squares: torch.cat(
        [_without_width(squares), _without_height(squares)], dim=1
    ),
    "width": _without_height,
    "height": _without_width,
    "channels": lambda squares: squares.sum(dim=1).flatten(1),
    "gap": lambda squares: squares.mean(dim=(2, 3)),
}
"""Poolings of :func:`pod_loss`: squares ``[B, C, H, W]`` to vectors. ``width`` keeps the width (and
sums over the height), ``height`` keeps the height, ``spatial`` has both, ``channels`` sums the
channels away, ``gap`` averages over space."""


def pod_loss(
    old_maps: Sequence[Tensor],
    new_maps: Sequence[Tensor],
    pooling: str = "spatial",
    normalize: bool = True,
) -> Tensor:
    """Return the pooled outputs distillation between two networks' stages.

    PODNet (Douillard et al., ECCV 2020), section 3.1, as the authors' code computes it: activations
    are squared, pooled, and L2-normalised per sample; the loss is the norm of their difference,
    averaged over the batch and the stages.

    :param old_maps: outputs ``[B, C_s, H_s, W_s]`` of the old network's stages.
    :param new_maps: those of the new one, of the same shapes.
    :param pooling: a key of :data:`POOLINGS`.
    :param normalize: whether the pooled vectors are normalised.
    :return: the loss, a scalar in float32.
    :raises ValueError: for an unknown pooling, no stage, or shapes that differ.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling: expected one of {', '.join(POOLINGS)}, got {pooling!r}")
    shapes = [tuple(m.shape) for m in old_maps], [tuple(m.shape) for m in new_maps]
    if not old_maps or shapes[0] != shapes[1] or any(len(shape) != 4 for shape in shapes[0]):
        raise ValueError(
            "old_maps, new_maps: expected as many maps [B, C, H, W] of the same shapes, "
            f"at least one, got {shapes[0]} and {shapes[1]}"
        )
    distances = []
    for maps in zip(old_maps, new_maps, strict=True):
        # In float32: squares and norms of bfloat16 maps would lose half of their digits.
        pooled = [POOLINGS[pooling](m.float().square()) for m in maps]
        if normalize:
            pooled = [F.normalize(vectors, dim=1) for vectors in pooled]
        distances.append(torch.linalg.vector_norm(pooled[0] - pooled[1], dim=1).mean())
    return torch.stack(distances).mean()


def nca_loss(
    similarities: Tensor,
    targets: Tensor,
    scale: Tensor | float = 1.0,
    margin: Tensor | float = 0.6,
    hinge: bool = True,
) -> Tensor:
    """Return the classification loss of PODNet, derived from neighbourhood component analysis.

    PODNet (Douillard et al., ECCV 2020), section 3.2, the mean over the batch of
    ``[ -log( exp(eta (y_t - delta)) / sum_{i != t} exp(eta y_i) ) ]_+``. The right class is
    missing from the sum, so a class alone has a loss of 0. The authors' code computes another one:
    :func:`nca_loss_released`.

    :param similarities: ``[B, W]``.
    :param targets: columns of the right classes ``[B]``.
    :param scale: eta.
    :param margin: delta.
    :param hinge: whether a sample's loss stops at 0.
    :raises ValueError: if they are no matrix with a column.
    """
    _check_columns(similarities)
    scaled = scale * similarities
    if similarities.shape[1] == 1:
        return 0 * scaled.sum()
    columns = targets.unsqueeze(1)
    right = scaled.gather(1, columns).squeeze(1) - scale * margin
    losses = scaled.scatter(1, columns, -torch.inf).logsumexp(dim=1) - right
    return (losses.clamp(min=0) if hinge else losses).mean()


def nca_loss_released(similarities: Tensor, targets: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """Return the loss that PODNet's released code computes in place of :func:`nca_loss`.

    It subtracts the margin from every class and then the largest value from all, so that the
    margin cancels out: there is none here. It leaves the right class out of the sum by setting its
    exponent to 0, which adds 1. So the loss is ``-z_t + log(1 + sum_{i != t} exp(z_i))`` with
    ``z_i = eta (y_i - max_j y_j)``: the cross-entropy where the right class is the largest;
    elsewhere the largest wrong one counts twice and the right one not at all. It is never negative.

    :param similarities: ``[B, W]``.
    :param targets: columns of the right classes ``[B]``.
    :param scale: eta.
    :raises ValueError: if they are no matrix with a column.
    """
    _check_columns(similarities)
    scaled = scale * similarities
    shifted = scaled - scaled.max(dim=1, keepdim=True).values
    columns = targets.unsqueeze(1)
    right = shifted.gather(1, columns).squeeze(1)
    return (shifted.scatter(1, columns, 0.0).logsumexp(dim=1) - right).mean()


class NCALoss:
    """:func:`nca_loss` or :func:`nca_loss_released` as a strategy's criterion.

    A network's logits are its similarities times its classifier's learnable scale eta; the margin
    takes the same scale, which is therefore read from the network at each step. Eta learns from the
    similarities alone: the margin's part of the equation's gradient, ``delta``, lowers eta while
    the similarities are small, in trials to below 0, where the hinge ends all learning.

    :param model: an ``ExpandableNetwork`` with a classifier that has a ``scale``.
    :param margin: delta, on the similarities; without effect in the released form.
    :param nca: ``"equation"`` or ``"released"``.
    :raises ValueError: for a negative margin or another ``nca``.
    """

    def __init__(
        self, model: torch.nn.Module, margin: float = 0.6, *, nca: str = "equation"
    ) -> None:
        at_least_zero("margin", margin)
        if nca not in ("equation", "released"):
            raise ValueError(f"nca: expected 'equation' or 'released', got {nca!r}")
        self.model, self.margin, self.nca = model, margin, nca

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of logits ``[B, W]``, which hold the scale already."""
        if self.nca == "released":
            return nca_loss_released(logits, targets)
        scale = self.model.get_submodule("classifier").get_parameter("scale")
        return nca_loss(logits, targets, 1.0, scale.detach() * self.margin)


def softmax_distillation_loss(new_logits: Tensor, old_logits: Tensor, temperature: float) -> Tensor:
    """Return the divergence of a new network's softened predictions from an old one's.

    Hinton et al., "Distilling the Knowledge in a Neural Network" (2015): ``T^2 KL(p_old || p_new)``
    with ``p = softmax(logits / T)``, the mean over the batch.

    :param new_logits: ``[B, C]``, of the classes that the old network knows.
    :param old_logits: ``[B, C]``, the same columns.
    :param temperature: T.
    :raises ValueError: if the temperature is not above 0 or the shapes differ.
    """
    positive("temperature", temperature)
    _check_alike("new_logits, old_logits", "[B, C]", new_logits, old_logits)
    new = F.log_softmax(new_logits / temperature, dim=1)
    old = F.log_softmax(old_logits / temperature, dim=1)
    return F.kl_div(new, old, reduction="batchmean", log_target=True) * temperature**2


def less_forget_loss(old_features: Tensor, new_features: Tensor) -> Tensor:
    """Return how far features have turned: ``1 - cos(old, new)``, the mean over the batch.

    UCIR (Hou et al., CVPR 2019), equation 6. It is half the squared distance of the normalised
    features, and what PODNet's released code computes as POD-flat.

    :param old_features: ``[B, D]``.
    :param new_features: ``[B, D]``.
    :raises ValueError: if the shapes differ.
    """
    _check_alike("old_features, new_features", "[B, D]", old_features, new_features)
    return (1 - F.cosine_similarity(old_features, new_features, dim=1)).mean()


def margin_ranking_loss(
    similarities: Tensor,
    targets: Tensor,
    old_classes: Sequence[int] | Tensor,
    k: int = 2,
    margin: float = 0.5,
) -> Tensor:
    """Return the loss that keeps old classes' samples apart from the new classes.

    UCIR (Hou et al., CVPR 2019), equation 8: for each sample of an old class, the hinge
    ``[margin - y_t + y_j]_+`` with each of the k new classes j that it is most similar to; the mean
    over those samples and the k classes, as in the authors' code (the equation sums); 0 where the
    batch has no such sample.

    :param similarities: ``[B, W]``, before scaling, a column per class id; columns of unseen
        classes far below the others.
    :param targets: class ids ``[B]``.
    :param old_classes: the ids of the old classes; every other column is a new one.
    :param k: hard negatives of a sample.
    :param margin: by how much the right class is to be ahead.
    :raises ValueError: if k is not between 1 and the number of new columns.
    """
    old = torch.as_tensor(old_classes, device=targets.device)
    new_columns = similarities.shape[1] - len(old)
    if not 1 <= k <= new_columns:
        raise ValueError(f"k: expected 1 to {new_columns}, the number of new columns, got {k}")
    hardest = similarities.index_fill(1, old, -torch.inf).topk(k, dim=1).values
    right = similarities.gather(1, targets.unsqueeze(1))
    losses = (margin - right + hardest).clamp(min=0).mean(dim=1)
    is_old = torch.isin(targets, old)
    # Without reading how many there are, for which the host would have to wait.
    return losses.where(is_old, 0.0).sum() / is_old.sum().clamp(min=1)


def sparsity_loss(
    masks: Sequence[Tensor],
    kernel_areas: Sequence[int],
    sources: Sequence[int | None],
    in_channels: int = 3,
) -> Tensor:
    """Return about the part of a block's weights that its channel masks leave in use.

    DER (Yan et al., CVPR 2021), section 3.3: ``sum_l K_l |m_{l-1}|_1 |m_l|_1`` over
    ``sum_l K_l c_{l-1} c_l``. Where layers form no chain, l - 1 is the layer that feeds layer l;
    behind a residual sum the residual's last, though pruning keeps what either summand has open.
    With half of a ResNet-32's channels open at random it is 0.26, and 0.34 of the weights stay.

    :param masks: the mask ``[c_l]`` of each layer, from 0 to 1.
    :param kernel_areas: K_l, the kernel's pixels.
    :param sources: for each layer, the number of the layer that feeds it; ``None`` for the block's
        input.
    :param in_channels: channels of the block's input, all in use.
    :return: the loss, a scalar.
    """
    used = [mask.sum() for mask in masks]
    terms = [
        area * (in_channels if source is None else used[source]) * own
        for area, source, own in zip(kernel_areas, sources, used, strict=True)
    ]
    weights = sum(
        area * (in_channels if source is None else len(masks[source])) * len(mask)
        for area, source, mask in zip(kernel_areas, sources, masks, strict=True)
    )
    return torch.stack(terms).sum() / weights


def _check_alike(names: str, shape: str, one: Tensor, other: Tensor) -> None:
    if one.shape != other.shape or one.ndim != 2:
        raise ValueError(
            f"{names}: expected the same shape {shape}, "
            f"got {tuple(one.shape)} and {tuple(other.shape)}"
        )


def _check_columns(similarities: Tensor) -> None:
    if similarities.ndim != 2 or similarities.shape[1] < 1:
        raise ValueError(
            "similarities: expected [B, W] with at least one column, "
            f"got shape {tuple(similarities.shape)}"
        )
