"""The template that all strategies share: Avalanche's loop, run in phases."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Literal

import torch
from avalanche.models import DynamicModule
from avalanche.training.plugins import AGEMPlugin, EarlyStoppingPlugin, GSS_greedyPlugin
from avalanche.training.plugins.evaluation import default_evaluator
from avalanche.training.templates import SupervisedTemplate
from avalanche.training.templates.base_sgd import PeriodicEval
from torch import nn
from torch.nn import CrossEntropyLoss
from torch.optim import Optimizer

from avalanche_memo.models import ExpandableNetwork, FastPath
from avalanche_memo.training.checkpoint import Checkpoint, restore_progress
from avalanche_memo.training.compression import Compression
from avalanche_memo.training.loading import shuffled_loader
from avalanche_memo.training.plugins.herding_replay import HerdingReplayPlugin
from avalanche_memo.training.plugins.resident_batches import ResidentBatches
from avalanche_memo.training.plugins.sparsity import SparsityPlugin
from avalanche_memo.training.storage_policy import MemoryRates, balanced_choice

__all__ = ["IncrementalTemplate", "Phase", "ReplayTemplate"]


@dataclass(frozen=True)
class Phase:
    """A part of an experience's training: what learns, on what, for how long, at which rate.

    The optimizer's state and learning rate start afresh at each phase.

    :param epochs: passes over the phase's data.
    :param lr: learning rate; ``None`` keeps the optimizer's own.
    :param weight_decay: likewise.
    :param milestones: after how many epochs of the phase the rate is multiplied by ``gamma``.
    :param gamma: the factor at a milestone, above 0.
    :param cosine: cosine annealing to 0, after the warm-up, instead of milestones.
    :param warmup_epochs: epochs over which the rate first rises linearly to its full value.
    :param learns: ``"all"``, or ``"classifier"`` alone, the rest in evaluation mode.
    :param batch_norm: where the classifier alone learns, whether BatchNorm is ``"frozen"``, in
        evaluation mode, or ``"updated"``, as in training.
    :param data: ``"all"``; or a random ``"balanced"`` subset in which each class has as many
        samples as the rarest; or, where the classifier alone learns, the ``"exemplars"`` that the
        memory would hold if the experience ended when the phase begins.
    :param images: of these, how many an epoch has at most, drawn anew each time; so epochs can have
        equally many steps however much a memory holds.
    :param temperature: what the logits are divided by in the loss.
    :param reset_classifier: whether the classifier starts afresh.
    :raises ValueError: if a value is outside its range.
    """

    epochs: int
    lr: float | None = None
    weight_decay: float | None = None
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    cosine: bool = False
    warmup_epochs: int = 0
    learns: Literal["all", "classifier"] = "all"
    batch_norm: Literal["frozen", "updated"] = "frozen"
    data: Literal["all", "balanced", "exemplars"] = "all"
    images: int | None = None
    temperature: float = 1.0
    reset_classifier: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", tuple(self.milestones))

        def expect(name: str, expected: str, good: bool) -> None:
            _check(good, name, expected, getattr(self, name))

        def counts(number: Any) -> bool:
            return isinstance(number, Integral) and not number < 1

        expect("epochs", "a whole number of at least 1", counts(self.epochs))
        expect("lr", "a positive rate or None", self.lr is None or 0 < self.lr < math.inf)
        decays = self.weight_decay is None or 0 <= self.weight_decay < math.inf
        expect("weight_decay", "a number of at least 0 or None", decays)
        rising = list(self.milestones) == sorted({m for m in self.milestones if m > 0})
        expect("milestones", "rising epoch numbers above 0", rising)
        expect("milestones", "none beside cosine", not (self.cosine and self.milestones))
        warms_up = 0 <= self.warmup_epochs <= self.epochs
        expect("warmup_epochs", f"0 to the phase's {self.epochs} epochs", warms_up)
        expect("gamma", "a positive number", 0 < self.gamma < math.inf)
        expect("learns", "'all' or 'classifier'", self.learns in ("all", "classifier"))
        moves = self.batch_norm == "updated" and self.learns == "classifier"
        expected = "'frozen', or 'updated' where learns is 'classifier'"
        expect("batch_norm", expected, moves or self.batch_norm == "frozen")
        known = self.data in ("all", "balanced", "exemplars")
        expect("data", "'all', 'balanced' or 'exemplars'", known)
        fits = self.data != "exemplars" or self.learns == "classifier"
        expect("data", "'exemplars' only where learns is 'classifier'", fits)
        some = self.images is None or counts(self.images)
        expect("images", "a whole number of at least 1 or None", some)
        expect("temperature", "a positive number", 0 < self.temperature < math.inf)
        for name in ("lr", "weight_decay", "gamma", "temperature"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, float(value))

    @property
    def scheduled(self) -> bool:
        """Whether the rate changes from epoch to epoch."""
        return bool(self.milestones) or self.cosine or self.warmup_epochs > 0

    def rate(self, epoch: int, base: float) -> float:
        """Return the learning rate of an epoch, counted from 0 within the phase.

        :param epoch: the epoch.
        :param base: the rate to start from.
        """
        if epoch < self.warmup_epochs:
            return base * (epoch + 1) / self.warmup_epochs
        if self.cosine:
            done = (epoch - self.warmup_epochs) / (self.epochs - self.warmup_epochs)
            return base * (1 + math.cos(math.pi * done)) / 2
        return base * self.gamma ** sum(epoch >= milestone for milestone in self.milestones)


class IncrementalTemplate(SupervisedTemplate):
    """An Avalanche strategy that trains each experience in phases and can be resumed at any epoch.

    :param model: the network.
    :param optimizer: an optimizer with one parameter group; its class, and its settings as they are
        when an experience begins, serve each phase, which may set its own rate and weight decay.
    :param criterion: the main loss.
    :param method_plugins: the plugins that make the method; they run before the user's.
    :param first_phases: phases of the first experience; one of ``train_epochs`` by default, which
        may then be changed between experiences.
    :param later_phases: phases of the later ones; likewise. Later is all that follows the first
        experience given to ``train``, even if that one is given again.
    :param closing_phases: what follows the phase of ``train_epochs`` in the later experiences where
        no ``later_phases`` are given. A scheduler of the user's steps through their epochs, too.
    :param fast: the parts of the fast path that are on: all, none, or a :class:`FastPath`.
    :param checkpoint: where to save after epochs, or ``None``.
    :raises ValueError: for an optimizer with several groups, for no epochs or no phases, for phases
        or a checkpoint that are something else, for a checkpoint of a model with parts of
        Avalanche's that grow, for a phase on the exemplars without a memory, for one that is about
        the classifier with a model without, for one that sets a weight decay with an optimizer
        without, for a network with masks without a ``SparsityPlugin``, and before training for an
        experience with no data or another than the one within which a restored state was saved.
    :raises TypeError: if ``fast`` is something else.
    :raises FloatingPointError: if a loss is not finite.
    """

    adapted_dataset: Any
    dataloader: Any
    train_epochs: int
    first_phases: tuple[Phase, ...]
    later_phases: tuple[Phase, ...]

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        criterion: Any = CrossEntropyLoss(),  # noqa: B008 (Avalanche's signature)
        method_plugins: Sequence[Any] = (),
        first_phases: Sequence[Phase] | None = None,
        later_phases: Sequence[Phase] | None = None,
        closing_phases: Sequence[Phase] = (),
        train_mb_size: int = 1,
        train_epochs: int = 1,
        eval_mb_size: int | None = None,
        device: str | torch.device = "cpu",
        plugins: Sequence[Any] | None = None,
        evaluator: Any = default_evaluator,
        eval_every: int = -1,
        fast: bool | FastPath = True,
        checkpoint: Checkpoint | None = None,
        **base_kwargs: Any,
    ) -> None:
        for name, phases in (("first_phases", first_phases), ("later_phases", later_phases)):
            good = isinstance(phases, Sequence) and len(phases) > 0
            good = good and all(isinstance(phase, Phase) for phase in phases or ())
            _check(phases is None or good, name, "a list of at least one Phase or None", phases)
        good = isinstance(train_epochs, Integral) and train_epochs >= 1
        _check(good, "train_epochs", "a whole number of at least 1", train_epochs)
        growing = [
            type(part).__name__
            for part in model.modules()
            if isinstance(part, DynamicModule) and not isinstance(part, ExpandableNetwork)
        ]
        good = checkpoint is None or isinstance(checkpoint, Checkpoint)
        _check(good, "checkpoint", "a Checkpoint or None", repr(checkpoint))
        good = checkpoint is None or not growing
        _check(good, "checkpoint", f"None for a model with {growing}, which grow", checkpoint)
        groups = len(optimizer.param_groups)
        _check(groups == 1, "optimizer", "one parameter group", groups)
        parts = FastPath.of(fast)
        if any(isinstance(plugin, (AGEMPlugin, GSS_greedyPlugin)) for plugin in plugins or ()):
            # They flatten gradients by a view.
            parts = replace(parts, channels_last=False)
        if isinstance(model, ExpandableNetwork):
            model.use(parts)
        own = any(isinstance(plugin, ResidentBatches) for plugin in plugins or ())
        loading = []
        if parts.resident_batches and not own:
            loading = [ResidentBatches(eval_batch_size=eval_mb_size)]
        super().__init__(
            model=model,
            optimizer=optimizer,
            criterion=criterion,
            train_mb_size=train_mb_size,
            train_epochs=train_epochs,
            eval_mb_size=eval_mb_size,
            device=device,
            plugins=[*method_plugins, *(plugins or []), *loading],
            evaluator=evaluator,
            eval_every=eval_every,
            **base_kwargs,
        )
        self._first = (Phase(train_epochs),)
        self._later = (*self._first, *closing_phases)
        self.first_phases = self._first if first_phases is None else tuple(first_phases)
        self.later_phases = self._later if later_phases is None else tuple(later_phases)
        self._check_parts()
        self.checkpoint = checkpoint
        self.phase: Phase | None = None
        self.phase_index = 0
        self.phase_epoch = 0
        """Epochs of the present phase that are done."""
        self.phase_seed = 0
        self.resume_from: dict[str, Any] | None = None
        self.settings = self.optimizer_settings()
        """What the optimizer was set to when the present experience began."""
        self._bad_step = torch.tensor(-1)

    def _check_parts(self) -> None:
        """Check that model, plugins and phases go together."""
        masked = getattr(self.model, "masked", False)
        good = not masked or any(isinstance(plugin, SparsityPlugin) for plugin in self.plugins)
        needed = "a SparsityPlugin for a network with masked=True (DER: a sparsity_weight above 0)"
        _check(good, "plugins", needed, "none")
        kind, classifier = type(self.model).__name__, getattr(self.model, "classifier", None)
        optimizer = type(self.optimizer).__name__
        for phase in self.first_phases + self.later_phases:
            good = phase.data != "exemplars" or bool(self._memories)
            _check(good, "data", "a HerdingReplayPlugin for a phase on the exemplars", "none")
            good = phase.learns == "all" or classifier is not None
            _check(good, "model", "one with a `classifier` for a phase that trains it alone", kind)
            good = phase.weight_decay is None or "weight_decay" in self.optimizer.param_groups[0]
            _check(good, "optimizer", "one with weight_decay for a phase that sets it", optimizer)
            good = not phase.reset_classifier or hasattr(classifier, "reset_parameters")
            _check(good, "model", "one whose `classifier` has reset_parameters for a phase", kind)

    def optimizer_settings(self) -> dict[str, Any]:
        """Return a copy of what the optimizer is set to: its learning rate and all that."""
        own = self.optimizer.param_groups[0].items()
        return copy.deepcopy({k: v for k, v in own if k not in ("params", "param_names")})

    def _set_phases(self) -> None:
        """Where no phases were given, train as long as ``train_epochs`` says now."""
        first = (Phase(self.train_epochs),)
        later = (*first, *self._later[1:])
        self.first_phases = first if self.first_phases is self._first else self.first_phases
        self.later_phases = later if self.later_phases is self._later else self.later_phases
        self._first, self._later = first, later

    def model_adaptation(self, model: nn.Module | None = None) -> nn.Module:
        """Adapt a model to the present experience; no network grows while evaluating.

        :param model: the strategy's own if not given; a plugin may hold another, in training mode.
        """
        model = self.model if model is None else model
        grows = isinstance(model, ExpandableNetwork) and model.training and not self.is_training
        adapted: nn.Module = super().model_adaptation(model.eval() if grows else model)
        return adapted.train() if grows else adapted

    def make_optimizer(self, **kwargs: Any) -> None:
        """Start the optimizer afresh on all parameters that learn."""
        self._start_optimizer(self.optimizer_settings())
        self.optimized_param_id: dict[str, Any] = {}

    def make_train_dataloader(self, **kwargs: Any) -> None:
        """Make the loader: every sample once an epoch, shuffled, whatever the task labels.

        Or as many samples as the phase says.
        """
        images = None if self.phase is None else self.phase.images
        self.dataloader = shuffled_loader(self, images, **kwargs)

    def criterion(self) -> Any:
        """Return the main loss, at the phase's temperature while training."""
        if self.is_training and self.phase is not None and self.phase.temperature != 1:
            return self._criterion(self.mb_output / self.phase.temperature, self.mb_y)
        return super().criterion()

    def _before_training_exp(self, **kwargs: Any) -> None:
        number = self.experience.current_experience
        if len(self.experience.dataset) == 0:
            raise ValueError(f"experience: expected data to train on, experience {number} has none")
        saved = self.resume_from["phase"]["experience"] if self.resume_from else number
        _check(saved == number, "experience", f"{saved}, within which the state was saved", number)
        self._set_phases()
        super()._before_training_exp(**kwargs)
        self._set_phases()  # A plugin may have changed the epochs.
        for plugin in self.plugins:
            if isinstance(plugin, PeriodicEval):
                # Also where the last epoch is evaluated: classifier and memory change after it.
                plugin.do_final = plugin.eval_every > -1

    @property
    def _memories(self) -> list[Any]:
        return [plugin for plugin in self.plugins if hasattr(plugin, "exemplars_after")]

    @property
    def _phases(self) -> tuple[Phase, ...]:
        return self.later_phases if self.clock.train_exp_counter else self.first_phases

    def _train_exp(self, experience: Any, eval_streams: Any = None, **kwargs: Any) -> None:
        resume, self.resume_from = self.resume_from, None
        all_data, all_loader = self.adapted_dataset, self.dataloader
        own_epochs = self.train_epochs
        self.settings = resume["settings"] if resume else self.optimizer_settings()
        for index, phase in enumerate(self._phases):
            if resume and index < resume["phase"]["index"]:
                continue
            self.phase_index, self.phase = index, phase
            learning = [(p, p.requires_grad) for p in self.model.parameters()]
            try:
                self._enter_phase(phase, resume, **kwargs)
                resume = None
                self.train_epochs = phase.epochs - self.phase_epoch
                super()._train_exp(experience, eval_streams, **kwargs)
            finally:  # Whoever interrupts a phase may train on.
                for parameter, learns in learning:
                    parameter.grad = None
                    parameter.requires_grad_(learns)
                self.adapted_dataset, self.dataloader = all_data, all_loader
                self.train_epochs = own_epochs
                own = ["lr"] if phase.lr is not None or phase.scheduled else []
                own += ["weight_decay"] if phase.weight_decay is not None else []
                put_back = {name: self.settings[name] for name in own if name in self.settings}
                self.optimizer.param_groups[0].update(copy.deepcopy(put_back))
                self.phase = None
                # An early stop ends a phase, not the phases after it.
                self._stop_training = False
                self.model.train()

    def _enter_phase(self, phase: Phase, resume: dict[str, Any] | None, **kwargs: Any) -> None:
        self.phase_epoch = 0
        if phase.reset_classifier and not resume:
            self.model.classifier.reset_parameters()
        if phase.learns == "classifier":
            self.model.requires_grad_(False)
        if phase.learns == "classifier" or phase.reset_classifier:
            self.model.classifier.requires_grad_(True)
        if phase.data == "balanced":
            # A seed of its own, saved along, so that a resumed phase draws the same subset.
            self.phase_seed = resume["phase"]["seed"] if resume else int(torch.randint(2**62, ()))
            targets = torch.as_tensor(list(self.adapted_dataset.targets))
            chosen = balanced_choice(targets, 1.0, self.phase_seed)
            self.adapted_dataset = self.adapted_dataset.subset(chosen.tolist())
        elif phase.data == "exemplars":
            self.adapted_dataset = self._memories[0].exemplars_after(self, again=bool(resume))
        if phase.data != "all" or phase.images is not None:
            self.make_train_dataloader(**kwargs)
            for plugin in self.plugins:
                if isinstance(plugin, ResidentBatches):
                    plugin.before_training_exp(self, **kwargs)
        own = {"lr": phase.lr, "weight_decay": phase.weight_decay}
        own = {name: value for name, value in own.items() if value is not None}
        self._start_optimizer(copy.deepcopy(self.settings) | own)
        for plugin in self.plugins:
            if isinstance(plugin, EarlyStoppingPlugin) and self.phase_index:
                # Neither the last phase's best state nor its last accuracy is one of this phase.
                plugin.before_training_exp(self)
                self.evaluator.reset_last_metrics()
        if resume:
            restore_progress(self, resume)

    def _before_training_epoch(self, **kwargs: Any) -> None:
        phase = self.phase
        assert phase is not None
        self.model.train()
        if phase.learns == "classifier" and phase.batch_norm == "frozen":
            for module in self.model.children():
                module.train(module is self.model.classifier)
        if phase.scheduled or phase.lr is not None:
            base = self.settings["lr"] if phase.lr is None else phase.lr
            self.optimizer.param_groups[0]["lr"] = phase.rate(self.phase_epoch, base)
        self._bad_step = torch.tensor(-1, device=self.device)
        super()._before_training_epoch(**kwargs)

    def _after_training_iteration(self, **kwargs: Any) -> None:
        # Kept on the device: reading the loss at every step would make the host wait for it.
        step = self.clock.train_epoch_iterations
        bad = ~torch.isfinite(self.loss.detach()).all() & (self._bad_step < 0)
        self._bad_step = torch.where(bad, step, self._bad_step)
        super()._after_training_iteration(**kwargs)

    def _after_training_epoch(self, **kwargs: Any) -> None:
        if self._bad_step >= 0:
            raise FloatingPointError(
                f"loss: not finite in experience {self.experience.current_experience}, "
                f"epoch {self.clock.train_exp_epochs}, step {int(self._bad_step)}; "
                "a lower learning rate may help"
            )
        super()._after_training_epoch(**kwargs)
        self.phase_epoch += 1
        assert self.phase is not None
        last = self.phase_epoch == self.phase.epochs
        if self.checkpoint is not None and (last or self.checkpoint.due()):
            self.checkpoint.save(self)

    def _start_optimizer(self, settings: dict[str, Any]) -> None:
        """Empty the user's optimizer and give it the parameters that learn.

        The object stays the same, so that a scheduler of the user's goes on steering it; so do
        further groups, which a plugin may have added.
        """
        learning = [p for p in self.model.parameters() if p.requires_grad]
        group = self.optimizer.param_groups[0]
        group.pop("param_names", None)
        group.update(settings, params=learning)
        self.optimizer.state.clear()


class ReplayTemplate(IncrementalTemplate):
    """A strategy with a memory of herded exemplars.

    :param mem_size: exemplars in all.
    :param exemplars_per_class: a fixed number per class instead.
    :param memory_rates: what the memory may hold beyond that, by experience.
    :param compression: how exemplars are kept; as raw pixels if not given.
    :param spend_remainder: whether the first classes hold one more each, so that none of the memory
        is left over.
    :param rerank: whether older classes are herded again with the present features.
    :param method_plugins: the plugins that make the method; they run after the memory's.
    :param base_kwargs: the arguments of :class:`IncrementalTemplate`.
    """

    def __init__(
        self,
        *,
        mem_size: int = 2000,
        exemplars_per_class: int | None = None,
        memory_rates: MemoryRates | None = None,
        compression: Compression | None = None,
        spend_remainder: bool = False,
        rerank: bool = False,
        method_plugins: Sequence[Any] = (),
        **base_kwargs: Any,
    ) -> None:
        memory = HerdingReplayPlugin(
            mem_size,
            exemplars_per_class=exemplars_per_class,
            rates=memory_rates,
            compression=compression,
            spend_remainder=spend_remainder,
            rerank=rerank,
        )
        super().__init__(method_plugins=[memory, *method_plugins], **base_kwargs)


def _check(good: bool, name: str, expected: str, got: Any) -> None:
    if not good:
        raise ValueError(f"{name}: expected {expected}, got {got}")
