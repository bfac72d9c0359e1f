"""Training from scratch in each experience, as joint training does."""

from typing import Any

from avalanche.training.plugins import SupervisedPlugin

from avalanche_memo.models import ExpandableNetwork
from avalanche_memo.training.plugins.checks import check_network

__all__ = ["FreshStartPlugin"]


class FreshStartPlugin(SupervisedPlugin):
    """Give a network back its first weights before each experience, and a new classifier.

    :param network: the network, as it is to begin.
    :raises TypeError: if it is no ``ExpandableNetwork``.
    :raises ValueError: if it would add blocks, or freeze what starts afresh.
    """

    def __init__(self, network: ExpandableNetwork) -> None:
        super().__init__()
        check_network(network, "FreshStartPlugin", shares="all")
        if not network.train_generalized:
            raise ValueError(
                "model: FreshStartPlugin expected a network with train_generalized=True, got False"
            )
        weights = network.generalized.state_dict()
        self._first = {name: tensor.clone() for name, tensor in weights.items()}

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Start afresh, but for an experience that goes on after an interruption."""
        if getattr(strategy, "resume_from", None) is None:
            strategy.model.generalized.load_state_dict(self._first)
            strategy.model.classifier.reset_parameters()
        # Growth may have frozen the older classes' part.
        strategy.model.classifier.requires_grad_(True)

    def state_dict(self) -> dict[str, Any]:
        """Return the first weights."""
        return {"first": self._first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        self._first = state["first"]
