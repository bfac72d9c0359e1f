"""Classifiers that grow with the classes and with the features of an expandable network."""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import Tensor, nn

__all__ = [
    "BiasCorrectedLinear",
    "CosineClassifier",
    "GrowingClassifier",
    "GrowingLinear",
    "ProxyCosineClassifier",
    "class_proxies",
]

log = logging.getLogger("avalanche_memo")


class GrowingClassifier(nn.Module, ABC):
    """What an expandable network asks of its classifier: features ``[B, D]`` to logits ``[B, C]``.

    Rows are classes in order of appearance.
    """

    @abstractmethod
    def grow(self, new_features: int = 0, new_classes: int = 0) -> None:
        """Add a block of features, rows for classes, or both."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Start afresh at the present size."""

    def _check_growth(self, new_features: int, new_classes: int) -> None:
        if new_features < 0 or new_classes < 0:
            raise ValueError(
                "new_features, new_classes: expected numbers of at least 0, "
                f"got {new_features} and {new_classes}"
            )


class GrowingLinear(GrowingClassifier):
    """A linear layer that grows in both directions: features ``[B, D]`` to logits ``[B, C]``.

    A new class adds a row, a new block adds columns; the weight of an old (class, feature) pair is
    kept, and everything new starts as in a fresh ``nn.Linear`` of the grown size, within
    ``1 / sqrt(D)``. In MEMO's, PyCIL's and DER's code new weights have three times that variance,
    and biases, if any, are 0; so there the auxiliary head's. The weight is held as one parameter
    per block of features: Avalanche's optimizers and regularisers follow parameters by name and
    accept growth along one dimension only.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList()
        self.bias = nn.Parameter(torch.empty(0))

    @property
    def in_features(self) -> int:
        """The number of features D."""
        return sum(weight.shape[1] for weight in self.weights)

    @property
    def out_features(self) -> int:
        """The number of classes C."""
        return len(self.bias)

    @property
    def weight(self) -> Tensor:
        """The whole weight ``[C, D]``."""
        return torch.cat(list(self.weights), dim=1)

    @torch.no_grad()
    def grow(self, new_features: int = 0, new_classes: int = 0) -> None:
        """Add a block of features, rows for classes, or both.

        :param new_features: columns to add as a new block, 0 for none.
        :param new_classes: rows to add.
        :raises ValueError: if a number is negative.
        """
        self._check_growth(new_features, new_classes)
        old_classes = self.out_features
        if new_features:
            self.weights.append(nn.Parameter(self.bias.new_empty(old_classes, new_features)))
        bound = 1 / math.sqrt(max(1, self.in_features))
        for index, weight in enumerate(self.weights):
            grown = weight.new_empty(old_classes + new_classes, weight.shape[1])
            grown.uniform_(-bound, bound)
            if not (new_features and index == len(self.weights) - 1):
                grown[:old_classes] = weight
            self.weights[index] = nn.Parameter(grown)
        bias = self.bias.new_empty(old_classes + new_classes).uniform_(-bound, bound)
        bias[:old_classes] = self.bias
        self.bias = nn.Parameter(bias)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start afresh, as a new ``nn.Linear`` of this size."""
        bound = 1 / math.sqrt(max(1, self.in_features))
        for parameter in (self.bias, *self.weights):
            parameter.uniform_(-bound, bound)

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits ``[B, C]`` of features ``[B, D]``."""
        return F.linear(features, self.weight, self.bias)


class BiasCorrectedLinear(GrowingLinear):
    """BiC's classifier: a linear layer, and two parameters that correct the newest logits.

    Wu et al., "Large Scale Incremental Learning" (CVPR 2019): a logit o of the newest classes
    becomes ``alpha * o + beta``. No optimizer trains the pair: it is the identity until
    :meth:`correct` sets it, and again when new classes come.

    The pair acts in evaluation mode, in the readout and where the network is distilled from; what
    learns are the logits themselves, as in the authors' code. PyCIL keeps the pairs of all growths,
    in training too, where after a short schedule they multiply gradients by tens or hundreds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.newest = 0
        """The number of classes of the latest growth."""
        self.correction = nn.Parameter(torch.tensor([1.0, 0.0]), requires_grad=False)
        """Their alpha and beta."""

    def grow(self, new_features: int = 0, new_classes: int = 0) -> None:
        """Add a block of features, rows for classes with a pair of their own, or both."""
        super().grow(new_features, new_classes)
        if new_classes:
            self.newest = new_classes
            self._uncorrect()

    def reset_parameters(self) -> None:
        """Start afresh, uncorrected."""
        super().reset_parameters()
        self._uncorrect()

    def requires_grad_(self, requires_grad: bool = True) -> "BiasCorrectedLinear":
        """Let the weights learn or not; the correction never does."""
        super().requires_grad_(requires_grad)
        self.correction.requires_grad_(False)
        return self

    @torch.no_grad()
    def correct(self, alpha: float, beta: float) -> None:
        """Correct the newest classes' logits, as they are now, to ``alpha * logit + beta``."""
        self.correction.mul_(alpha).add_(self.correction.new_tensor([0.0, beta]))

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits ``[B, C]`` of features ``[B, D]``, corrected in evaluation mode."""
        logits = super().forward(features)
        if self.training:
            return logits
        old, new = logits.tensor_split([self.out_features - self.newest], dim=1)
        alpha, beta = self.correction
        return torch.cat([old, alpha * new + beta], dim=1)

    @torch.no_grad()
    def _uncorrect(self) -> None:
        self.correction.copy_(self.correction.new_tensor([1.0, 0.0]))


class ProxyCosineClassifier(GrowingClassifier):
    """PODNet's local similarity classifier: cosine similarity with several proxies of each class.

    Douillard et al., "PODNet" (ECCV 2020), section 3.2: with the cosine ``s_k`` of the feature and
    the class's proxy k, the class's similarity is ``sum_k softmax_k(gamma s)_k s_k``. The logits
    are the similarities times a learnable scale eta. Features ``[B, D]`` to logits ``[B, C]``.

    The proxies of each growth are a parameter ``[new classes * proxies, D]`` of their own, by which
    Avalanche's optimizers follow them and by which old ones are frozen.

    :param proxies: proxies per class, K.
    :param gamma: sharpness of the softmax over a class's proxies.
    :param scale: eta to begin with (the authors' 1).
    :param squared_distance: whether a proxy's similarity is ``2 s_k - 2``, as in the authors' code:
        minus its squared distance from the feature, both of length 1. So gamma and eta act as if
        they were twice as large, and eta learns four times as fast.
    :param freeze_old: whether the proxies of older classes stop learning when new ones come, as in
        the authors' code. A phase that trains the classifier alone trains them all, as there.
    :raises ValueError: if a number is not positive.
    """

    def __init__(
        self,
        proxies: int = 10,
        *,
        gamma: float = 1.0,
        scale: float = 1.0,
        squared_distance: bool = False,
        freeze_old: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(proxies, int) or proxies < 1:
            raise ValueError(f"proxies: expected a whole number of at least 1, got {proxies}")
        for name, value in (("gamma", gamma), ("scale", scale)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        self.proxies = proxies
        self.gamma = gamma
        self.initial_scale = scale
        self.squared_distance = squared_distance
        self.freeze_old = freeze_old
        self.in_features = 0
        self.weights = nn.ParameterList()
        self.scale = nn.Parameter(torch.tensor([float(scale)]))

    @property
    def out_features(self) -> int:
        """The number of classes C."""
        return sum(len(weight) for weight in self.weights) // self.proxies

    @property
    def weight(self) -> Tensor:
        """All proxies ``[C * K, D]``, those of one class side by side."""
        return torch.cat([self.scale.new_empty(0, self.in_features), *self.weights])

    @torch.no_grad()
    def grow(self, new_features: int = 0, new_classes: int = 0) -> None:
        """Add a block of features, proxies for classes, or both; what is new starts at random.

        But proxies that are frozen by that start with none of the new features.

        :param new_features: columns to add, 0 for none.
        :param new_classes: classes to add.
        :raises ValueError: if a number is negative.
        """
        self._check_growth(new_features, new_classes)
        self.in_features += new_features
        if new_features:
            for index, weight in enumerate(self.weights):
                columns = self._random(len(weight), new_features)
                if new_classes and self.freeze_old:
                    columns.zero_()  # They are not to learn.
                grown = torch.cat([weight, columns], dim=1)
                self.weights[index] = nn.Parameter(grown, requires_grad=weight.requires_grad)
        if new_classes:
            if self.freeze_old:
                self.weights.requires_grad_(False).zero_grad()
            fresh = self._random(new_classes * self.proxies, self.in_features)
            self.weights.append(nn.Parameter(fresh))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start afresh: random proxies and the first scale."""
        for weight in self.weights:
            weight.copy_(self._random(*weight.shape))
        self.scale.fill_(self.initial_scale)

    @torch.no_grad()
    def imprint(self, features: Sequence[Tensor], seed: int = 0) -> None:
        """Set the newest classes' proxies to the centres of their features.

        The proxies get the mean length of the older ones: as in UCIR's code; in PODNet's, times the
        centres' own, which are shorter than 1. The log
        says where a class has too few samples (:func:`class_proxies`); without any, as in an online
        stream's first sub-experience, its proxies stay as they are.

        :param features: for each class of the latest growth, in order, its samples' features
            ``[n, D]``.
        :param seed: of K-means.
        :raises ValueError: if the number of classes differs from the latest growth's.
        """
        newest = self.weights[-1]
        if len(features) * self.proxies != len(newest):
            raise ValueError(
                f"features: expected {len(newest) // self.proxies} classes, got {len(features)}"
            )
        few = sum(0 < len(f) < self.proxies for f in features)
        if few:
            log.warning(
                "proxies: %d classes have fewer samples than their %d proxies, by which each "
                "sample serves as a proxy",
                *(few, self.proxies),
            )
        length = torch.cat(list(self.weights[:-1]) or [newest]).norm(dim=1).mean()
        for proxies, own in zip(newest.split(self.proxies), features, strict=True):
            if len(own):
                proxies.copy_(class_proxies(own, self.proxies, seed).to(newest) * length)

    def similarities(self, features: Tensor) -> Tensor:
        """Return the similarities ``[B, C]`` of features ``[B, D]``.

        Each is from -1 to 1, or from -4 to 0 as minus a squared distance.
        """
        similarity = F.linear(F.normalize(features, dim=1), F.normalize(self.weight, dim=1))
        if self.squared_distance:
            similarity = 2 * similarity - 2
        if self.proxies == 1:
            return similarity
        similarity = similarity.view(len(similarity), self.out_features, self.proxies)
        return (F.softmax(self.gamma * similarity, dim=2) * similarity).sum(dim=2)

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits ``[B, C]`` of features ``[B, D]``: scale times similarity."""
        return self.scale * self.similarities(features)

    def _random(self, rows: int, columns: int) -> Tensor:
        # Rows of length about 1, as Kaiming's initialisation of a linear layer gives them.
        return self.scale.new_empty(rows, columns).normal_() / math.sqrt(max(1, self.in_features))


class CosineClassifier(ProxyCosineClassifier):
    """UCIR's classifier: cosine similarity with one vector per class, times a learnable scale.

    Hou et al., "Learning a Unified Classifier Incrementally via Rebalancing" (CVPR 2019),
    equation 4. Features ``[B, D]`` to logits ``[B, C]``.

    :param scale: eta to begin with (the authors' 1).
    :param freeze_old: whether the vectors of older classes stop learning when new ones come, as in
        the authors' code under the less-forget constraint.
    :raises ValueError: if the scale is not positive.
    """

    def __init__(self, *, scale: float = 1.0, freeze_old: bool = True) -> None:
        super().__init__(1, scale=scale, freeze_old=freeze_old)


def class_proxies(features: Tensor, proxies: int, seed: int = 0) -> Tensor:
    """Return the centres ``[K, D]``, of length 1, of the K-means clusters of a class's features.

    A single proxy is the mean. A class with fewer samples than proxies can't be clustered: each
    sample's feature serves as a proxy, over and over.

    :param features: ``[n, D]``; they are normalised first.
    :param proxies: K.
    :param seed: of K-means.
    :raises ValueError: if there is no sample.
    """
    if not len(features):
        raise ValueError("features: expected at least one sample, got none")
    features = F.normalize(features.detach().float(), dim=1).cpu()
    if proxies == 1:
        centres = features.mean(dim=0, keepdim=True)
    elif len(features) < proxies:
        centres = features[torch.arange(proxies) % len(features)]
    else:
        means = KMeans(proxies, n_init=10, random_state=seed).fit(features.numpy())
        centres = torch.from_numpy(means.cluster_centers_)
    return F.normalize(centres, dim=1)
