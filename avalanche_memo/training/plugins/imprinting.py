"""Imprinting: new classes' proxies start as the centres of their features."""

from typing import Any

import torch
from avalanche.training.plugins import SupervisedPlugin

from avalanche_memo.models.heads import ProxyCosineClassifier
from avalanche_memo.training.plugins.checks import check_network
from avalanche_memo.training.storage_policy import dataset_features

__all__ = ["ImprintingPlugin"]


class ImprintingPlugin(SupervisedPlugin):
    """Set new classes' proxies by K-means of their features, from the second experience on.

    PODNet (Douillard et al., ECCV 2020), section 3.2, and with a single proxy UCIR; the features
    are those of the network before it learns the classes. The first experience's classes start at
    random, as in the authors' codes.

    :raises TypeError: before training, if the model is no ``ExpandableNetwork`` with a cosine
        classifier.
    """

    def __init__(self) -> None:
        super().__init__()
        self._imprinted: int | None = None

    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """Check the model."""
        check_network(strategy.model, "ImprintingPlugin", classifier=ProxyCosineClassifier)
        if self._imprinted is None:  # What the network knows already it has learned.
            self._imprinted = len(strategy.model.growth)

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Imprint, once per growth."""
        network, dataset = strategy.model, strategy.experience.dataset
        if len(network.growth) > max(1, self._imprinted or 0):
            features = dataset_features(network, dataset, strategy.device)
            targets = torch.as_tensor(list(dataset.targets), device=features.device)
            seed = int(torch.randint(2**31 - 1, ()))
            of_classes = [features[targets == c] for c in network.new_classes]
            network.classifier.imprint(of_classes, seed)
        self._imprinted = len(network.growth)

    def state_dict(self) -> dict[str, Any]:
        """Return how many growths have been imprinted."""
        return {"imprinted": self._imprinted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        self._imprinted = state["imprinted"]
