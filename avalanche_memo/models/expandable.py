"""The expandable network of MEMO and DER: blocks that are shared, and blocks that are added.

MEMO: Zhou et al., "A Model or 603 Exemplars: Towards Memory-Efficient Class-Incremental Learning",
ICLR 2023. DER: Yan et al., "DER: Dynamically Expandable Representation for Class Incremental
Learning", CVPR 2021.
"""

import copy
import logging
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from avalanche.models import DynamicModule
from torch import Tensor, nn

from avalanche_memo.models.cuda_graph import GraphedPasses, recordable
from avalanche_memo.models.fast_path import (
    FastPath,
    FoldedBlock,
    has_bfloat16,
)
from avalanche_memo.models.heads import GrowingClassifier, GrowingLinear
from avalanche_memo.models.pruning import (
    MaskedLayer,
    mask_channels,
    masked_layers,
    prune_channels,
)
from avalanche_memo.models.staged import StagedBackbone, stage_maps

__all__ = ["UNSEEN_LOGIT", "ExpandableNetwork", "NetworkOutputs", "experience_classes"]

log = logging.getLogger("avalanche_memo")

UNSEEN_LOGIT = -1e4
"""The logit of a class not seen yet: its softmax is exactly 0 in float32, and it stays finite in
products with 0, which -inf would turn into NaN in distillation losses."""


@dataclass(frozen=True)
class NetworkOutputs:
    """What one forward pass computed, for plugins and metrics that need more than the logits.

    :param logits: ``[B, W]``, a column per class id.
    :param features: ``[B, D]``, the blocks' features side by side, oldest block first.
    :param stage_maps: the outputs ``[B, C_s, H_s, W_s]`` of the generalized stages and then of the
        newest specialized block's stages.
    :param auxiliary_logits: ``[B, 1 + new classes]`` of the newest block, column 0 for every older
        class; ``None`` before the first expansion and in evaluation mode.
    """

    logits: Tensor
    features: Tensor
    stage_maps: list[Tensor]
    auxiliary_logits: Tensor | None


class ExpandableNetwork(DynamicModule):
    """A network that grows a specialized block for each experience with new classes.

    The first ``shared_stages`` stages of the backbone, the generalized blocks, are shared; a fresh
    copy of the others is added per experience, starting from the previous copy's weights, and the
    older ones are frozen: no gradient for their parameters, BatchNorm in evaluation mode, while the
    loss still reaches the generalized blocks through them. With ``n`` stages, ``shared_stages=0``
    is DER's network, ``n - 1`` MEMO's, ``n - 2`` MEMO-2's, and ``n`` a single network whose
    classifier alone grows.

    Growth is Avalanche's model adaptation, in training mode only. Class ids may come in any order
    and with gaps: the logits have a column per class id, and columns of classes not seen yet hold
    :data:`UNSEEN_LOGIT`. The classifier has rows for the seen classes alone, in order of
    appearance, so neither its size nor its initialisation depends on how classes are numbered.
    Only a criterion that spreads weight over all columns, such as label smoothing, needs classes
    numbered from 0 in order of appearance. Parameters are float32.

    :param make_backbone: called once, returns the :class:`StagedBackbone` to share and to copy.
    :param shared_stages: number of stages shared, 0 to all.
    :param train_generalized: whether the generalized blocks go on learning after the first
        experience, as published for Base-0; ``False`` freezes them, as published for Base-50.
    :param gradient_through_frozen: whether the loss reaches the generalized blocks through the
        older specialized blocks, as published. ``False`` is faster: the generalized blocks then
        learn from the newest block alone.
    :param make_classifier: called once, returns the classifier.
    :param masked: whether the newest block's channels have masks, by which :meth:`prune` cuts it. A
        block is pruned when it is frozen, at the latest. The next one starts from the weights that
        the block had before, so these are kept until then; inference does not need them.
    :raises TypeError: if ``make_backbone`` does not return a :class:`StagedBackbone`, or
        ``make_classifier`` a :class:`GrowingClassifier`.
    :raises ValueError: if the backbone has too few stages for ``shared_stages``; for masks where no
        block is added, or on layers that can't have them.
    """

    columns: Tensor
    """The class ids seen so far: the columns of the logits that count."""

    def __init__(
        self,
        make_backbone: Callable[[], StagedBackbone],
        shared_stages: int,
        *,
        train_generalized: bool = True,
        gradient_through_frozen: bool = True,
        make_classifier: Callable[[], GrowingClassifier] = GrowingLinear,
        masked: bool = False,
    ) -> None:
        super().__init__()
        factory = callable(make_backbone) and not isinstance(make_backbone, nn.Module)
        backbone = make_backbone() if factory else make_backbone
        if not factory or not isinstance(backbone, StagedBackbone):
            raise TypeError(
                "make_backbone: expected a callable that returns a StagedBackbone, "
                f"got {type(backbone).__name__}"
            )
        if not 0 <= shared_stages <= len(backbone.stages):
            raise ValueError(
                f"shared_stages: expected 0 to {len(backbone.stages)} for a backbone of "
                f"{len(backbone.stages)} stages, got {shared_stages}"
            )
        self.stages = len(backbone.stages)
        self.shared_stages = shared_stages
        self.block_dim = backbone.feature_dim
        self.train_generalized = train_generalized
        self.gradient_through_frozen = gradient_through_frozen
        self.masked = masked
        self.growth: list[list[int]] = []
        self.kept: list[list[list[int]]] = []
        """For each pruned block, oldest first: the channels that each of its layers has kept."""
        self._evaluation_width = 0
        self.outputs: NetworkOutputs | None = None
        self.fast = FastPath.of(False)
        # Neither a module: they are no part of the model's state, nor of its bytes.
        self._folded: list[FoldedBlock] = []
        self._passes = GraphedPasses()

        self.generalized = nn.Sequential(*backbone.stages[:shared_stages])
        self.specialized = nn.ModuleList()
        if masked and not self.expands:
            raise ValueError("masked: expected False where all stages are shared, got True")
        if self.expands:
            block: nn.Module = nn.Sequential(*backbone.stages[shared_stages:])
            self.specialized.append(mask_channels(block) if masked else block)
        # Empty, or the newest block as it was before it was pruned.
        self.unpruned = nn.ModuleList()
        if masked and not self.masks():
            raise ValueError(
                "masked: expected False where the stages that are added have no convolution, "
                "got True"
            )
        classifier = make_classifier()
        if not isinstance(classifier, GrowingClassifier):
            raise TypeError(
                "make_classifier: expected a callable that returns a GrowingClassifier, "
                f"got {type(classifier).__name__}"
            )
        self.classifier = classifier
        # A plain list, too: what empty_copy() starts from.
        self._first_classifier = [copy.deepcopy(classifier)]
        self.classifier.grow(new_features=self.block_dim)
        self.auxiliary = nn.ModuleDict()
        self.register_buffer("columns", torch.empty(0, dtype=torch.long), persistent=False)

    @property
    def expands(self) -> bool:
        """Whether the network adds blocks, or is a single one."""
        return self.shared_stages < self.stages

    @property
    def classes(self) -> list[int]:
        """The class ids seen so far, in order of appearance."""
        return [c for new in self.growth for c in new]

    @property
    def width(self) -> int:
        """The columns of the logits while learning: the largest class id seen, plus one."""
        return max(self.classes, default=-1) + 1

    @property
    def new_classes(self) -> list[int]:
        """The class ids that the latest growth added."""
        return self.growth[-1] if self.growth else []

    @property
    def feature_dim(self) -> int:
        """The number of features D, all blocks together."""
        return self.block_dim * max(1, len(self.specialized))

    @torch.no_grad()
    def empty_copy(self) -> "ExpandableNetwork":
        """Return a copy that has learned no class yet, to load another state of this network into.

        Its weights are of no use before that.
        """
        copied = copy.deepcopy(self)
        copied.growth, copied.kept, copied._evaluation_width = [], [], 0
        # The last of them is one that no channel was cut out of.
        copied.specialized = nn.ModuleList([*copied.specialized, *copied.unpruned][-1:])
        copied.unpruned = nn.ModuleList()
        copied.auxiliary.clear()
        copied.classifier = copy.deepcopy(self._first_classifier[0]).to(self._adaptation_device)
        copied.classifier.grow(new_features=self.block_dim)
        copied.columns = self.columns[:0]
        return copied

    def inference_modules(self) -> list[nn.Module]:
        """Return the modules that inference needs.

        Neither the auxiliary head is one, nor the newest block as it was before it was pruned.
        """
        return [self.generalized, self.specialized, self.classifier]

    def adaptation(self, experience: Any) -> None:
        """Grow for an experience's unseen classes; in evaluation mode only widen the logits.

        :param experience: an Avalanche experience.
        :raises ValueError: if the experience has no data, or class ids below 0.
        """
        classes = experience_classes(experience)
        if not self.training:
            self._evaluation_width = max(self._evaluation_width, classes[-1] + 1)
        else:
            new = [c for c in classes if c not in set(self.classes)]
            if new:
                self.grow(new)

    @torch.no_grad()
    def grow(self, new_classes: Sequence[int]) -> None:
        """Add rows for new classes and, but for the first time, a specialized block.

        :param new_classes: ids of classes not seen before.
        :raises ValueError: if there is none, or one was seen before.
        """
        seen_before = sorted(set(new_classes) & set(self.classes))
        if not new_classes or seen_before or len(set(new_classes)) < len(new_classes):
            raise ValueError(
                "new_classes: expected ids of classes not seen before, each once, "
                f"got {list(new_classes)} after {self.classes}"
            )
        first = not self.growth
        self.growth.append([int(c) for c in new_classes])
        expand = self.expands and not first
        if expand:
            self.prune()
            newest = self.specialized[-1]
            self.specialized.append(copy.deepcopy(self.unpruned[0] if self.masked else newest))
            _freeze(newest)
            if self.masked:
                self.unpruned = nn.ModuleList()
                self.specialized[-1].requires_grad_(True)
                for layer in self.masks():
                    layer.norm.reset_mask()
            device = self._adaptation_device
            # A name of its own each time: under one name the head would have to shrink when an
            # experience has fewer classes than the last, which Avalanche's plugins refuse.
            self.auxiliary.clear()
            self.auxiliary[str(len(self.specialized) - 1)] = nn.Linear(
                self.block_dim, len(new_classes) + 1, device=device
            )
        if not first and not self.train_generalized:
            _freeze(self.generalized)
        self.classifier.grow(self.block_dim if expand else 0, len(new_classes))
        self.columns = torch.tensor(self.classes, device=self._adaptation_device)
        # Avalanche calls train() before it adapts the model, so the block frozen here missed it.
        self.train(self.training)

    def masks(self) -> list[MaskedLayer]:
        """Return the newest block's masked layers, as they are or were when it was pruned."""
        return masked_layers([*self.specialized, *self.unpruned][-1]) if self.masked else []

    @torch.no_grad()
    def prune(self, kept: Sequence[Sequence[int]] | None = None) -> None:
        """Cut the channels out of the newest block that are closed; once per block.

        :param kept: for each of :meth:`masks`, the numbers of the channels to keep instead.
        :raises ValueError: if these are not some of each layer's channels, at least one, each once.
        """
        if not self.masked or len(self.kept) == len(self.specialized):
            return
        newest = self.specialized[-1]
        if kept is None:
            kept = [self._open_channels(layer) for layer in self.masks()]
        self.specialized[-1] = prune_channels(newest, kept)
        self.unpruned.append(newest)
        _freeze(newest)
        self.kept.append([list(channels) for channels in kept])
        self.use(self.fast).train(self.training)

    def _open_channels(self, layer: MaskedLayer) -> list[int]:
        if not (layer.norm.embedding > 0).any():
            log.warning(
                "pruning: block %d would keep no channel of layer %s; it keeps the best one",
                *(len(self.specialized), layer.name),
            )
        channels: list[int] = layer.norm.open_channels().nonzero()[:, 0].tolist()
        return channels

    def train(self, mode: bool = True) -> "ExpandableNetwork":
        """Set training mode, but keep frozen blocks in evaluation mode."""
        super().train(mode)
        for block in self.specialized[:-1]:
            block.eval()
        if len(self.growth) > 1 and not self.train_generalized:
            self.generalized.eval()
        return self

    def extract_features(self, x: Tensor) -> Tensor:
        """Return the features ``[B, D]`` of images ``[B, C, H, W]``."""
        return self._features(x)[0]

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``[B, W]`` of images ``[B, C, H, W]``, and keep :attr:`outputs`."""
        features, stage_maps = self._features(x)
        logits = self._to_columns(self.classifier(features))
        auxiliary_logits = None
        if self.training and self.auxiliary:
            head = self.auxiliary[str(len(self.specialized) - 1)]
            auxiliary_logits = head(features[:, -self.block_dim :])
        self.outputs = NetworkOutputs(logits, features, stage_maps, auxiliary_logits)
        return logits

    def use(self, fast: bool | FastPath) -> "ExpandableNetwork":
        """Choose the parts of the fast path to run on; a network starts with none."""
        self.fast = FastPath.of(fast)
        layout = torch.channels_last if self.fast.channels_last else torch.contiguous_format
        for blocks in (self.generalized, self.specialized, self.unpruned):
            blocks.to(memory_format=layout)
        self._folded = []
        return self

    def _features(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        graphed = None
        if self.fast.cuda_graphs and recordable(x):
            blocks = _Blocks(self)
            state = blocks.state(x)
            graphed = None if state is None else self._passes.recorded(state, blocks, x)
        features, *maps = (graphed or self._run)(x)
        return features, maps

    def _run(self, x: Tensor) -> list[Tensor]:
        """Return the features and the stage maps."""
        low = self.runs_in_bfloat16(x.device)
        if self.fast.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with _precision(x.device, low):
            maps = stage_maps(self.generalized, x)
            shared = maps[-1] if maps else x
            if not self.expands:
                return [StagedBackbone.pool(shared.float()), *maps]
            newest = stage_maps(self.specialized[-1], shared)
        frozen_input = shared if self.gradient_through_frozen else shared.detach()
        outputs = [*self._frozen_maps(frozen_input, low), newest[-1]]
        features = [StagedBackbone.pool(output.float()) for output in outputs]
        return [torch.cat(features, dim=1), *maps, *newest]

    def _frozen_maps(self, x: Tensor, low: bool) -> list[Tensor]:
        """Return the last maps of the older blocks, oldest first."""
        if self.fast.fold_frozen:
            self._fold(low)
        if not self.fast.fold_frozen or any(block.hooked() for block in self._folded):
            with _precision(x.device, low):
                return [block(x) for block in self.specialized[:-1]]
        blocks = [block.current() for block in self._folded]
        x = x.to(torch.bfloat16 if low else torch.float32)
        return [block(x) for block in blocks]

    def runs_in_bfloat16(self, device: torch.device) -> bool:
        """Return whether blocks on a device run in bfloat16."""
        return self.fast.bfloat16 and has_bfloat16(device)

    def _fold(self, low: bool) -> None:
        dtype = torch.bfloat16 if low else torch.float32
        new = self.specialized[len(self._folded) : -1]
        self._folded += [FoldedBlock(block, dtype) for block in new]

    def _apply(self, fn: Any, recurse: bool = True) -> "ExpandableNetwork":
        self._folded = []  # The model moves to another device or type.
        super()._apply(fn, recurse)
        return self

    def _to_columns(self, logits: Tensor) -> Tensor:
        # Labels of unseen classes come in evaluation alone; while learning, the width depends on
        # what was learned, not on what was evaluated, and so does the rounding of every sum.
        width = self.width if self.training else max(self.width, self._evaluation_width)
        columns = logits.new_full((len(logits), width), UNSEEN_LOGIT)
        return columns.index_copy(1, self.columns, logits)

    def get_extra_state(self) -> dict[str, Any]:
        """Return the structure: the classes of each growth, and what pruning has kept."""
        structure: dict[str, Any] = {"growth": [list(new) for new in self.growth]}
        return structure | ({"kept": copy.deepcopy(self.kept)} if self.masked else {})

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Grow a fresh network to a saved structure, so that ``load_state_dict`` alone restores it.

        :raises ValueError: if this network has grown or was pruned otherwise.
        """
        kept = state.get("kept", [])
        if self.masked != ("kept" in state) or self.kept != kept[: len(self.kept)]:
            raise ValueError(
                f"state_dict: expected one of a network with masked={self.masked} that was pruned "
                "as this one was, got another"
            )
        if self.growth != state["growth"][: len(self.growth)]:
            raise ValueError(
                f"state_dict: made by a network that learned {state['growth']}, "
                f"but this one has learned {self.growth}"
            )
        self._folded = []
        device = self._adaptation_device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            self._prune_as(kept)
            for new_classes in state["growth"][len(self.growth) :]:
                self.grow(new_classes)
                self._prune_as(kept)

    def _prune_as(self, kept: list[list[list[int]]]) -> None:
        newest = len(self.specialized) - 1
        if self.masked and newest < len(kept):
            self.prune(kept[newest])

    def __getstate__(self) -> dict[str, Any]:
        # Avalanche's plugins deep-copy models; tensors inside an autograd graph can't be copied.
        return {**self.__dict__, "outputs": None, "_folded": [], "_passes": GraphedPasses()}


class _Blocks(nn.Module):
    """A network without its heads, as a module whose parameters can be exchanged for a call."""

    def __init__(self, network: ExpandableNetwork) -> None:
        super().__init__()
        self.generalized, self.specialized = network.generalized, network.specialized
        self._network = [network]  # A list, so that it is no module of this one.

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the features and the stage maps."""
        return self._network[0]._run(x)

    def state(self, x: Tensor) -> Hashable | None:
        """Return what a recording of this depends on; ``None`` if it must not be recorded."""
        network = self._network[0]
        running: list[nn.Module] = [self.generalized, *self.specialized]
        copies: list[nn.Module] = []
        if network.fast.fold_frozen:
            network._fold(network.runs_in_bfloat16(x.device))
            if any(block.hooked() for block in network._folded):
                return None
            copies = [block.current() for block in network._folded]
            running = [self.generalized, *self.specialized[-1:]]
        modules = [module for block in running for module in block.modules()]
        tensors = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values())]
        learns = any(t.requires_grad for t in tensors if t is not None)
        if (
            network.masked
            or x.requires_grad
            # An evaluation amid training would take the place of what training recorded.
            or (learns and not (network.training and torch.is_grad_enabled()))
            or any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in modules)
        ):
            return None
        return (
            (x.dtype, x.device, network.fast, torch.is_autocast_enabled(x.device.type)),
            tuple(copies),
            tuple((module, module.training) for module in modules),
            tuple((t.data_ptr(), t.requires_grad) for t in tensors if t is not None),
        )


def _precision(device: torch.device, low: bool) -> AbstractContextManager[Any]:
    """Autocast to bfloat16; otherwise a user's own autocast, if any, stays in force."""
    return torch.autocast(device.type, torch.bfloat16) if low else nullcontext()


def _freeze(module: nn.Module) -> None:
    # A left-over gradient would let weight decay and momentum move a parameter.
    module.requires_grad_(False).zero_grad()


def experience_classes(experience: Any) -> list[int]:
    """Return the class ids of an Avalanche experience of either benchmark API, ascending.

    An online sub-experience has those of the experience that it was cut from.

    :raises ValueError: if there is none, or one is below 0.
    """
    experience = getattr(experience, "origin_experience", experience)
    classes = getattr(experience, "classes_in_this_experience", None)
    if classes is None:
        classes = set(experience.dataset.targets)
    classes = sorted({int(c) for c in classes})
    if not classes:
        raise ValueError("experience: expected at least one class, got an experience with no data")
    if classes[0] < 0:
        raise ValueError(f"experience: expected class ids of at least 0, got {classes[0]}")
    return classes
