"""What motivates MEMO: how much each block of a network learns, moves, and differs from the others.

Zhou et al., "A Model or 603 Exemplars" (ICLR 2023), section 4.3 and figure 3: gradient norm and
shift of the residual blocks, and the similarity of what they compute. None of it is in the authors'
released code; what the text leaves open is said in each function.
"""

import copy
from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avalanche_memo.models import ExpandableNetwork, StagedBackbone
from avalanche_memo.models.staged import in_order

__all__ = ["block_features", "block_gradients", "block_shift", "linear_cka", "network_blocks"]


def network_blocks(network: ExpandableNetwork) -> dict[str, nn.Module]:
    """Return the blocks that an image passes through, first to last, by name.

    They are the generalized blocks and then the newest specialized one's: the backbone that learned
    the latest experience. Run one after the other, they map images to the last stage's maps. A
    stage made of residual blocks is cut into them: ``"2.1"`` is the first of stage 2, and ``"1.0"``
    the stem. Any other stage is one block, ``"2"``.

    :param network: the network; the blocks are its own modules, not copies.
    """
    newest = [stage for block in network.specialized[-1:] for stage in in_order(block)]
    blocks = {}
    for number, stage in enumerate([*network.generalized, *newest], start=1):
        parts = _parts(stage)
        if not parts:
            blocks[f"{number}"] = stage
        # The first stage begins with the stem.
        for i, part in enumerate(parts, start=0 if number == 1 else 1):
            blocks[f"{number}.{i}"] = part
    return blocks


def block_gradients(
    network: ExpandableNetwork, batches: Iterable[tuple[Tensor, Tensor]]
) -> dict[str, float]:
    """Return the L2 norm of the loss's gradient with respect to each block's parameters.

    The loss is the mean cross-entropy over all samples of the batches; a method's other losses are
    left out. The network runs in the mode in which it comes, on a copy: in training mode, BatchNorm
    uses each batch's own statistics, as in the steps of training. Blocks that do not learn, having
    been frozen, are left out.

    :param network: a network that returns logits, with a column per class id.
    :param batches: images ``[B, C, H, W]`` and class ids ``[B]``, on the network's device.
    :raises ValueError: if there is no sample.
    """
    network = copy.deepcopy(network)
    network.zero_grad()
    samples = 0
    for images, targets in batches:
        F.cross_entropy(network(images), targets, reduction="sum").backward()  # type: ignore[no-untyped-call]
        samples += len(targets)
    if not samples:
        raise ValueError("batches: expected at least one sample, got none")
    norms = {}
    for name, block in network_blocks(network).items():
        gradients = [p.grad.flatten() for p in block.parameters() if p.grad is not None]
        if gradients:
            norms[name] = float(torch.cat(gradients).norm() / samples)
    return norms


@torch.no_grad()
def block_shift(
    first: ExpandableNetwork, last: ExpandableNetwork, reduction: Literal["mean", "sum"] = "mean"
) -> dict[str, float]:
    """Return the mean squared difference of each block's parameters between two networks.

    BatchNorm's statistics are no parameters. The paper compares the network after the first epoch
    of an experience with the one after its last.

    :param first: the one network.
    :param last: the other.
    :param reduction: ``"mean"``, as the paper's text says; ``"sum"`` is the squared distance that a
        block as a whole has moved, which grows with its number of parameters.
    :raises ValueError: if the networks' blocks differ in number or size.
    """
    before, after = (
        {
            name: nn.utils.parameters_to_vector(block.parameters())
            for name, block in network_blocks(network).items()
        }
        for network in (first, last)
    )
    sizes = [{name: len(weights) for name, weights in net.items()} for net in (before, after)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"last: expected blocks of the sizes {sizes[0]}, got {sizes[1]}")
    return {
        name: float(F.mse_loss(after[name], weights, reduction=reduction))
        for name, weights in before.items()
    }


@torch.no_grad()
def block_features(network: ExpandableNetwork, images: Tensor) -> dict[str, Tensor]:
    """Return each block's output for images, averaged over space: ``[B, C_b]`` by block.

    The paper compares "feature maps" and does not say how they become vectors; an average is what
    the classifier sees of the last one. The network runs in the mode in which it comes.

    :param images: ``[B, C, H, W]``, on the network's device.
    """
    features = {}
    for name, block in network_blocks(network).items():
        images = block(images)
        features[name] = StagedBackbone.pool(images)
    return features


@torch.no_grad()
def linear_cka(x: Tensor, y: Tensor) -> float:
    """Return the linear centred kernel alignment of two representations, from 0 to 1.

    ``||Y'X||^2 / (||X'X|| ||Y'Y||)`` in Frobenius norms, with centred columns: Kornblith et al.,
    "Similarity of Neural Network Representations Revisited" (ICML 2019), section 3. Orthogonal
    transforms and scaling of either do not change it. Computed in float64, from whichever products
    are smaller, those of the features or those of the samples.

    :param x: features ``[n, D]`` of n samples.
    :param y: features ``[n, E]`` of the same samples.
    :raises ValueError: if they are not matrices of equally many rows, or one has the same features
        in all rows or features that are not finite.
    """
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ValueError(
            "x, y: expected matrices [n, D] and [n, E], "
            f"got shapes {tuple(x.shape)} and {tuple(y.shape)}"
        )
    x, y = _centred("x", x), _centred("y", y)
    return float(_alignment(x, y) / (_alignment(x, x) * _alignment(y, y)).sqrt())


def _centred(name: str, features: Tensor) -> Tensor:
    features = features.double()
    centred = features - features.mean(dim=0)
    if not centred.norm() > 1e-12 * features.norm():
        raise ValueError(
            f"{name}: expected finite features that vary from sample to sample, got {features}"
        )
    return centred


def _alignment(x: Tensor, y: Tensor) -> Tensor:
    """Return ``||Y'X||^2 = <XX', YY'>`` by the smaller of the two forms."""
    if x.shape[1] * y.shape[1] <= len(x) ** 2:
        return (y.T @ x).square().sum()
    return ((x @ x.T) * (y @ y.T)).sum()


def _parts(stage: nn.Module) -> list[nn.Module]:
    """Cut a stage between its blocks, modules that are made of others; a ReLU belongs to the next.

    A stage that does not end with a block, such as one of plain convolutions, has none.
    """
    if isinstance(pruned := getattr(stage, "pruned", None), nn.Module):
        # What makes its maps wide again follows it, and is a part of its last block.
        within, after = _parts(pruned), list(stage.children())[1:]
        return [*within[:-1], *(nn.Sequential(last, *after) for last in within[-1:])]
    parts: list[nn.Module] = []
    rest: list[nn.Module] = []
    if isinstance(stage, nn.Sequential):
        for child in stage:
            rest.append(child)
            if any(True for _ in child.children()):
                parts.append(nn.Sequential(*rest) if rest[1:] else child)
                rest = []
    return [] if rest else parts
