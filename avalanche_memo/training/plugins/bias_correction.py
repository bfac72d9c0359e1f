"""Bias correction: Wu et al., "Large Scale Incremental Learning", CVPR 2019."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor

from avalanche_memo.models.expandable import experience_classes
from avalanche_memo.models.heads import BiasCorrectedLinear
from avalanche_memo.training.plugins.checks import check_network
from avalanche_memo.training.plugins.herding_replay import HerdingReplayPlugin
from avalanche_memo.training.storage_policy import balanced_choice, dataset_logits

__all__ = ["BiasCorrectionPlugin", "fit_correction"]


@torch.enable_grad()
def fit_correction(
    logits: Tensor, targets: Tensor, new_classes: Sequence[int]
) -> tuple[float, float]:
    """Return the alpha and beta by which ``alpha * logit + beta`` best corrects the new classes.

    They minimise the cross-entropy of the corrected logits, averaged over the samples. Where new
    classes and old ones can be told apart without error that has no minimum: alpha would grow for
    ever. So ``log(alpha)`` has a standard normal prior, which weighs as much as a single sample;
    and alpha is never below 0, where the new classes' order would turn round.

    :param logits: ``[n, W]``, a column per class id.
    :param targets: class ids ``[n]``, of old and new classes in equal parts.
    :param new_classes: the columns to correct.
    :raises FloatingPointError: if a logit is not finite.
    """
    logits, targets = logits.detach().double().cpu(), targets.cpu()
    if not logits.isfinite().all():
        raise FloatingPointError("logits: expected finite numbers, got others; lower the rate")
    is_new = torch.zeros(logits.shape[1], dtype=torch.bool)
    is_new[list(new_classes)] = True
    pair = torch.zeros(2, dtype=torch.double, requires_grad=True)
    optimizer: torch.optim.Optimizer = torch.optim.LBFGS(
        [pair], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
    )

    def loss() -> float:
        corrected = torch.where(is_new, pair[0].exp() * logits + pair[1], logits)
        prior = pair[0].square() / (2 * len(targets))
        total = F.cross_entropy(corrected, targets) + prior
        (pair.grad,) = torch.autograd.grad(total, pair)
        return total.item()

    optimizer.step(loss)
    log_alpha, beta = pair.tolist()
    return math.exp(log_alpha), beta


class BiasCorrectionPlugin(SupervisedPlugin):
    """Hold out a part of the data, and correct the newest classes' logits on it after training.

    From the second experience on, as many random samples of each class, exemplars and new data
    alike, are kept out of training: a share of what the rarest class has. On them the pair of the
    newest classes is fitted when the experience ends (:func:`fit_correction`), in evaluation mode
    and without augmentation.

    The part is drawn anew in each experience, as in PyCIL, so that an exemplar held out now may
    have been trained on earlier; the authors' code keeps the same samples out for good. It fits by
    SGD and adds ``0.05 beta^2``; PyCIL fits by SGD with augmentation, and takes the softmax twice.
    In both BatchNorm is in training mode meanwhile.

    Put this plugin after the one that adds exemplars to the data.

    :param held_out: the share, above 0 and below 1; at least one sample is held out.
    :raises ValueError: if the share is out of range; before training, if a phase is on the
        exemplars, of which some are held out, or the memory comes after this plugin, or has room
        for less than two exemplars of each old class in an experience of the stream; before an
        experience, if no exemplars were added to the data, or a class has a single sample.
    :raises TypeError: before training, if the model is no ``ExpandableNetwork`` with a
        :class:`BiasCorrectedLinear`.
    """

    def __init__(self, held_out: float = 0.1) -> None:
        super().__init__()
        if not 0 < held_out < 1:
            raise ValueError(f"held_out: expected a share above 0 and below 1, got {held_out}")
        self.held_out = held_out
        self._seed: int | None = None
        self._part: Any = None

    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """Check the model."""
        check_network(strategy.model, "BiasCorrectionPlugin", classifier=BiasCorrectedLinear)

    def before_train_dataset_adaptation(self, strategy: Any, **kwargs: Any) -> None:
        """Check phases and memory against the whole stream, before anything is trained."""
        phases = (*getattr(strategy, "first_phases", ()), *getattr(strategy, "later_phases", ()))
        if any(phase.data == "exemplars" for phase in phases):
            raise ValueError(
                "data: BiasCorrectionPlugin expected phases on 'all' or 'balanced' data, of which "
                "it holds a part out, got 'exemplars'"
            )
        plugins = strategy.plugins
        memories = [p for p in plugins if isinstance(p, HerdingReplayPlugin)]
        if any(plugins.index(memory) > plugins.index(self) for memory in memories):
            raise ValueError(
                "plugins: expected BiasCorrectionPlugin after HerdingReplayPlugin, got it before"
            )
        if any(memory.fewest_exemplars(strategy) < 2 for memory in memories):
            raise ValueError(
                "mem_size: BiasCorrectionPlugin expected at least two exemplars of each old class "
                "in each experience of the stream, one of them to hold out, got one"
            )

    def after_train_dataset_adaptation(self, strategy: Any, **kwargs: Any) -> None:
        """Hold out a part of new data and exemplars, once there are both."""
        self._part = None
        if self._seed is None:
            self._seed = int(torch.randint(2**62, ()))
        dataset = strategy.adapted_dataset
        targets = torch.as_tensor(list(dataset.targets))
        classes, counts = torch.unique(targets, return_counts=True)
        known = set(strategy.model.classes)
        # An experience given again brings none.
        newest = set(experience_classes(strategy.experience)) - known
        newest = newest or set(strategy.model.new_classes)
        if newest.issuperset(classes.tolist()):
            if known - newest:
                raise ValueError(
                    "experience: BiasCorrectionPlugin expected exemplars of old classes among the "
                    "data, got new data alone; put it after the plugin that adds them"
                )
            return
        if counts.min() < 2:
            raise ValueError(
                "experience: BiasCorrectionPlugin expected at least two samples of each class, "
                f"one of them to hold out, got one of class {int(classes[counts.argmin()])}"
            )
        # Another part in each experience, and the same one where an experience is resumed.
        seed = self._seed + strategy.clock.train_exp_counter
        held_out = balanced_choice(targets, self.held_out, seed)
        trained = torch.ones(len(targets), dtype=torch.bool)
        trained[held_out] = False
        self._part = dataset.subset(held_out.tolist())
        strategy.adapted_dataset = dataset.subset(trained.nonzero().flatten().tolist())

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Correct the newest classes' logits."""
        if self._part is not None:
            network = strategy.model
            logits = dataset_logits(network, self._part, strategy.device)
            targets = torch.as_tensor(list(self._part.targets))
            network.classifier.correct(*fit_correction(logits, targets, network.new_classes))
            self._part = None

    def state_dict(self) -> dict[str, Any]:
        """Return the seed of the parts."""
        return {"seed": self._seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        self._seed = state["seed"]
