"""The checks of the model that strategies and plugins share."""

from typing import Any, Literal

from avalanche_memo.models.expandable import ExpandableNetwork
from avalanche_memo.models.heads import GrowingClassifier, ProxyCosineClassifier

__all__ = ["check_classifier", "check_cosine_classifier", "check_network", "ends_experience"]


def check_network(
    model: Any, user: str, *, shares: Literal["none", "some", "all", "not all"] | None = None
) -> ExpandableNetwork:
    """Return the model if it is the expandable network that ``user`` needs.

    :param model: what was given.
    :param user: the strategy or plugin that needs it, for the message.
    :param shares: how many of its stages it must share; ``None`` for any number.
    :raises TypeError: if it is no ``ExpandableNetwork``.
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
    return model


def check_classifier(
    model: Any, user: str, kind: type[GrowingClassifier], names: str | None = None
) -> None:
    """Check that the model is an expandable network with a classifier of a kind.

    :param model: what was given.
    :param user: the strategy or plugin that needs it, for the message.
    :param kind: the classifier's class.
    :param names: of what will do, for the message; the class's own where not given.
    :raises TypeError: if it is another network, or has another classifier.
    """
    classifier = check_network(model, user).classifier
    if not isinstance(classifier, kind):
        raise TypeError(
            f"model: {user} expected a network whose make_classifier returns a "
            f"{names or kind.__name__}, got a {type(classifier).__name__}"
        )


def check_cosine_classifier(model: Any, user: str) -> None:
    """Check that the model is an expandable network with a cosine classifier.

    :raises TypeError: if it is another network, or has another classifier.
    """
    check_classifier(
        model, user, ProxyCosineClassifier, "ProxyCosineClassifier or a CosineClassifier"
    )


def ends_experience(experience: Any) -> bool:
    """Return whether an experience is a whole one, or the last of its online sub-experiences.

    Avalanche 0.6.0 marks none of these as the last where all have the same size, unless it was told
    ``drop_last=True``.
    """
    return bool(getattr(experience, "is_last_subexp", True))
