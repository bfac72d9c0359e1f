"""The samples of an Avalanche data set: where each one comes from, and through which transforms."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from avalanche.benchmarks.datasets.external_datasets.mnist import TensorMNIST
from avalanche.benchmarks.utils import concat_datasets
from avalanche.benchmarks.utils.data import AvalancheDataset, _FlatDataWithTransform
from avalanche.benchmarks.utils.flat_data import FlatData
from avalanche.benchmarks.utils.transforms import TupleTransform
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset
from torchvision import transforms as T

from avalanche_memo.training.batch_transforms import UnsupportedError, unfold_transforms

__all__ = [
    "Part",
    "original_image",
    "own_transforms",
    "pil_image",
    "pixel_array",
    "sample_origins",
    "sample_parts",
    "with_images",
]

Indices = npt.NDArray[np.int64]


@dataclass
class Part:
    """The samples of a data set that come from one leaf along one path of transforms.

    :param leaf: the innermost data set.
    :param indices: which of the leaf's samples, ``[n]``.
    :param positions: where they are in the outer data set, ``[n]``.
    :param chain: the transforms along the path, innermost first.
    """

    leaf: Any
    indices: Indices
    positions: Indices
    chain: list[Any]


def sample_parts(
    node: Any, indices: Indices, positions: Indices, group: str | None
) -> Iterator[Part]:
    """Follow subsets and concatenations down to the leaves, as `__getitem__` does.

    Avalanche's own `single_flat_dataset` cannot be used: it asks each inner node for its current
    transform group, while indexing applies the outermost node's group everywhere. For the `eval()`
    of a training set it reports the training transforms.

    :param group: the transform group; None to ignore transforms (for attributes such as targets).
    """
    chain: list[Any] = []
    if isinstance(node, FlatData):
        if node._indices is not None:
            indices = np.array([node._indices[i] for i in indices.tolist()], np.int64)
        if group is not None:
            if not isinstance(node, _FlatDataWithTransform):
                raise UnsupportedError(f"a nested {type(node).__name__}")
            chain = [node._frozen_transform_groups[group], node._transform_groups[group]]
        children = node._datasets
    elif type(node) is Subset:
        indices, children = np.asarray(node.indices, np.int64)[indices], [node.dataset]
    elif type(node) is ConcatDataset:
        children = node.datasets
    elif group is None and isinstance(node, AvalancheDataset):
        yield from sample_parts(node._flat_data, indices, positions, None)
        return
    elif group is not None and isinstance(node, (AvalancheDataset, Subset, ConcatDataset)):
        raise UnsupportedError(f"a nested {type(node).__name__}")
    else:
        yield Part(node, indices, positions, chain)
        return
    ends = np.cumsum([len(child) for child in children])
    owner = np.searchsorted(ends, indices, side="right")
    for k in np.unique(owner):
        child, mine = children[k], owner == k
        inner = indices[mine] - (ends[k - 1] if k else 0)
        for part in sample_parts(child, inner, positions[mine], group):
            yield Part(part.leaf, part.indices, part.positions, part.chain + chain)


def sample_origins(dataset: AvalancheDataset) -> list[tuple[int, int]]:
    """Return, per sample, which innermost data set (its `id`) it is of, and which one there."""
    origins = np.empty((len(dataset), 2), np.int64)
    everything = np.arange(len(dataset))
    for part in sample_parts(dataset._flat_data, everything, everything, None):
        origins[part.positions, 0] = id(part.leaf)
        origins[part.positions, 1] = part.indices
    return [(leaf, index) for leaf, index in origins.tolist()]


def pixel_array(leaf: Any) -> Any | None:
    """Return the uint8 images ``[N, H, W]`` or ``[N, H, W, 3]`` that a leaf holds, if it does.

    Not those of a user's own class, whose `__getitem__` may do anything with them.
    """
    data = getattr(leaf, "data", None)
    maker = getattr(type(leaf).__getitem__, "__module__", "").partition(".")[0]
    known = (
        maker in ("torchvision", "avalanche", "avalanche_memo")
        and isinstance(data, (np.ndarray, Tensor))
        and data.dtype in (np.uint8, torch.uint8)
        and (data.ndim == 3 or (data.ndim == 4 and data.shape[3] == 3))
        and len(data) == len(leaf)
    )
    return data if known else None


def own_transforms(leaf: Any) -> list[Any]:
    """Return the transforms that a leaf such as a torchvision data set applies itself.

    :raises UnsupportedError: if it has any and its raw images cannot be reached.
    """
    own = getattr(leaf, "transforms", None)
    if own is None:
        own = TupleTransform(
            [getattr(leaf, "transform", None), getattr(leaf, "target_transform", None)]
        )
    steps = unfold_transforms(own)
    if steps and pixel_array(leaf) is None:
        raise UnsupportedError(f"{type(leaf).__name__} transforms its images itself")
    if hasattr(leaf, "ffcv_info"):
        raise UnsupportedError("FFCV loads this data set")
    # Avalanche's MNIST turns its bytes into a float tensor before any transform.
    return [T.ToTensor(), *steps] if isinstance(leaf, TensorMNIST) else steps


def pil_image(leaf: Any, index: int) -> Image.Image:
    """Return an image of a leaf, before any transform.

    :raises UnsupportedError: if it is no PIL image.
    """
    array = pixel_array(leaf)
    if array is None or not own_transforms(leaf):
        image = leaf[index][0]
    else:
        image = Image.fromarray(np.asarray(array[index]))
    if not isinstance(image, Image.Image):
        raise UnsupportedError(f"samples of {type(leaf).__name__} are not PIL images")
    return image


def original_image(dataset: Any, index: int) -> Image.Image:
    """Return an image of an Avalanche data set, before any transform.

    :raises UnsupportedError: if it can't be reached, or is no PIL image.
    """
    at = np.array([index])
    part = next(sample_parts(dataset._flat_data, at, at, None))
    own_transforms(part.leaf)
    return pil_image(part.leaf, int(part.indices[0]))


def with_images(dataset: Any, make_leaf: Callable[[Part, list[int]], Any]) -> Any:
    """Return the data set with other images: its transforms, targets and task labels stay.

    :param dataset: an `AvalancheDataset` of PIL images.
    :param make_leaf: given the samples that have one leaf, and their targets, returns the data set
        of ``(PIL image, target)`` that takes its place, in the same order.
    :raises UnsupportedError: if the data set is nested or transformed in a way that is not known.
    """
    everything = np.arange(len(dataset))
    parts = {}
    for group in _group_names(dataset._flat_data):
        with suppress(KeyError):  # A group that not all nested data sets have is of no use.
            parts[group] = list(sample_parts(dataset._flat_data, everything, everything, group))
    pieces = []
    for number, part in enumerate(parts["train"]):
        positions = part.positions.tolist()
        chains = {
            group: [step for t in same[number].chain for step in unfold_transforms(t)]
            for group, same in parts.items()
        }
        own = own_transforms(part.leaf)
        attributes = [a.subset(positions) for a in dataset._data_attributes.values()]
        targets = next(list(a) for a in attributes if a.name == "targets")
        pieces.append(
            type(dataset)(
                [make_leaf(part, targets)],
                data_attributes=attributes,
                transform_groups={
                    group: TupleTransform([T.Compose(own + chain), None])
                    for group, chain in chains.items()
                },
                collate_fn=dataset.collate_fn,
            )
        )
    order = np.argsort(np.concatenate([part.positions for part in parts["train"]]))
    return concat_datasets(pieces).subset(order.tolist())


def _group_names(node: Any) -> set[str]:
    """Return the transform groups of a data set and of those nested in it."""
    names = {"train", "eval"}
    if isinstance(node, _FlatDataWithTransform):
        names |= {*node._transform_groups.transform_groups}
    for child in node._datasets if isinstance(node, FlatData) else []:
        names |= _group_names(child)
    return names
