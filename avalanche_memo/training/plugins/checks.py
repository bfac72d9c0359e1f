"""What strategies and plugins share: checks of the model, and what they note while it trains."""

from typing import Any, Literal

from avalanche.training.plugins import SupervisedPlugin

from avalanche_memo.models.expandable import ExpandableNetwork, NetworkOutputs
from avalanche_memo.models.heads import GrowingClassifier

__all__ = [
    "BatchOutputs",
    "ExperienceEnd",
    "check_network",
]


def check_network(
    model: Any,
    user: str,
    *,
    shares: Literal["none", "some", "all", "not all"] | None = None,
    classifier: type[GrowingClassifier] = GrowingClassifier,
) -> ExpandableNetwork:
    """Return the model if it is the expandable network that ``user`` needs.

    :param model: what was given.
    :param user: the strategy or plugin that needs it, for the message.
    :param shares: how many of its stages it must share; ``None`` for any number.
    :param classifier: the class of its classifier.
    :raises TypeError: if it is no ``ExpandableNetwork``, or has another classifier.
    :raises ValueError: if it shares another number of stages.
    """
    if not isinstance(model, ExpandableNetwork):
        raise TypeError(
            f"model: {user} expected an avalanche_memo.models.ExpandableNetwork, "
            f"got {type(model).__name__}"
        )
    accepted = {
        "none": range(1),
        "some": range(1, model.stages),
        "all": range(model.stages, model.stages + 1),
        "not all": range(model.stages),
        None: range(model.stages + 1),
    }[shares]
    if model.shared_stages not in accepted:
        raise ValueError(
            f"model: {user} expected a network with shared_stages "
            f"{' or '.join(map(str, accepted))} of {model.stages}, got {model.shared_stages}"
        )
    if not isinstance(model.classifier, classifier):
        kinds = (kind.__name__ for kind in (classifier, *classifier.__subclasses__()))
        raise TypeError(
            f"model: {user} expected a network whose make_classifier returns a "
            f"{' or a '.join(kinds)}, got a {type(model.classifier).__name__}"
        )
    return model


class BatchOutputs(SupervisedPlugin):
    """Notes what the network computed for the batch: until the loss, others may run it again."""

    def __init__(self) -> None:
        super().__init__()
        self._outputs: NetworkOutputs | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Tensors inside an autograd graph can't be copied.
        return {**self.__dict__, "_outputs": None}

    def after_forward(self, strategy: Any, **kwargs: Any) -> None:
        """Note the outputs."""
        self._outputs = strategy.model.outputs

    def outputs(self) -> NetworkOutputs:
        """Return the outputs, once: they hold all that the backward pass needs."""
        noted, self._outputs = self._outputs, None
        assert noted is not None
        return noted


class ExperienceEnd:
    """Tells whether an experience is a whole one, or the last of its online sub-experiences.

    These are counted: Avalanche 0.6.0 marks none as the last where all have the same size, unless
    it was told ``drop_last=True``. The count is not saved with a run.
    """

    def __init__(self) -> None:
        self._parts = 0

    def comes_with(self, experience: Any) -> bool:
        """Return whether it ends with this experience; to be called once after each."""
        if getattr(experience, "is_first_subexp", True):
            self._parts = 0
        self._parts += 1
        last = getattr(experience, "is_last_subexp", True)
        return bool(last or self._parts == experience.sub_stream_length)
