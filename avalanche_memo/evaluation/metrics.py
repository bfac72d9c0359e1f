"""Avalanche metrics of class-incremental learning: accuracy over the classes seen, and memory.

The two readouts are the classifier ("cnn") and, as in iCaRL (Rebuffi et al., 2017, algorithm 1),
the nearest mean of exemplars ("nme"). Both come from one pass over the evaluated samples.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from numbers import Integral
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from avalanche.evaluation import PluginMetric
from avalanche.evaluation.metric_results import MetricValue
from avalanche.evaluation.metric_utils import (
    default_metric_name_template,
    generic_get_metric_name,
    get_metric_name,
)
from torch import Tensor

from avalanche_memo.budget import inference_bytes, parameter_bytes
from avalanche_memo.evaluation.functional import (
    average_incremental_accuracy,
    forgetting_rate,
    group_classes,
)

__all__ = [
    "ChannelMasks",
    "ClassIncrementalAccuracy",
    "MemoryUsage",
    "Readout",
    "class_incremental_metrics",
    "memory_metrics",
]

Readout = Literal["cnn", "nme"]

_READOUTS: tuple[Readout, ...] = get_args(Readout)
_GROUP_SIZE = 10
_MEGABYTE = 2**20

_ClassMeans = tuple[Sequence[int], Tensor]
# What was counted ("samples", "cnn_top1", "nme_top5", ...) -> class id -> number of samples.
_Counts = dict[str, dict[int, int]]
# Id of an evaluated experience -> its counts.
_Row = dict[int, _Counts]
# Readout -> class id -> predicted class id -> number of samples, where there are any.
_Confusions = dict[Readout, dict[int, dict[int, int]]]


class _EmittingMetric(PluginMetric):
    """A metric whose result are the values emitted last, by full name."""

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        """Forget the last values."""
        self._last: dict[str, Any] = {}

    def result(self) -> dict[str, Any]:
        """Return the values emitted last, by full name."""
        return dict(self._last)

    def __str__(self) -> str:
        return type(self).__name__

    def _emit(self, strategy: Any, values: Mapping[str, Any]) -> list[MetricValue]:
        self._last.update(values)
        x = strategy.clock.train_iterations
        return [MetricValue(self, name, value, x) for name, value in values.items()]


class ClassIncrementalAccuracy(_EmittingMetric):
    """Accuracy over the classes seen so far, by classifier and by nearest mean of exemplars.

    Evaluate any part of a stream, unseen classes included: their samples are not counted and their
    logits cannot win. Values are fractions in 0..1 of the samples, so a class weighs as many
    samples as it has.

    Emitted after each evaluated experience with samples of seen classes (R is CNN or NME):
    ``Top1_Acc_R_Exp/eval_phase/test_stream/Task000/Exp003``, without the task where the benchmark
    has no task labels. Emitted after an evaluation, per stream and never per task, for instance
    ``Top1_Acc_CNN_Stream/eval_phase/test_stream``:

    - ``Top1_Acc_R_Stream``, and ``Top5_Acc_R_Stream`` once more than five classes have been seen;
    - ``Top1_Acc_R_Group/eval_phase/test_stream/Classes00-09`` and so on, tens in order of
      appearance (not class ids);
    - ``AverageIncrementalAcc_R`` and ``ForgettingRate_R`` over the stream's history, as in
      :mod:`avalanche_memo.evaluation.functional`; forgetting over the classes evaluated now.

    Where things come from:

    - The seen classes are ``strategy.model.classes``, in order of appearance; for a model without
      it, the classes of the experiences trained, ascending within an experience.
    - CNN reads ``strategy.mb_output`` ``[B, width]``, a column per class id.
    - NME reads ``strategy.model.outputs.features`` ``[B, D]`` of the same forward pass and picks,
      once they are L2-normalised, the class with the nearest mean. The means come from the first
      plugin whose ``class_means(strategy)`` returns class ids and L2-normalised means ``[C, D]``
      rather than None; it is asked once per evaluation. Without means, or where D differs, no NME
      value is emitted. A seen class that has no mean yet counts as wrong.

    The history has a row for each number of experiences trained. A later evaluation overwrites,
    in the present row, the experiences that it evaluates: one in the midst of an experience is
    thus replaced by the one at its end. Each stream has its own history. An experience cut into
    online sub-experiences, or trained several times in a row, counts once. Which class was
    taken for which is kept for the last row.
    """

    _counter: "_Counter | None"

    def reset(self) -> None:
        """Forget everything, the history included."""
        self._trained = 0
        self._experience: int | None = None
        self._seen: list[int] = []
        self._history: dict[str, dict[int, _Row]] = {}
        self._confusions: dict[str, dict[int, _Confusions]] = {}
        self._evaluated: dict[str, _Row] = {}
        self._confused: dict[str, dict[int, _Confusions]] = {}
        self._counter = None
        super().reset()

    # The history as plain data. Of the arguments that all of these share, `readout` is "cnn" or
    # "nme", `top` is 1 or 5 (ValueError otherwise), `stream` is the name of the evaluated stream.

    def evaluated_after(self, stream: str = "test") -> list[int]:
        """Return, for each row, the number of experiences trained."""
        return sorted(self._history.get(stream, {}))

    def evaluated_experiences(self, stream: str = "test") -> list[int]:
        """Return, for each column of the matrix, the experience (``current_experience``)."""
        return sorted(set().union(*self._rows(stream)))

    def accuracy_matrix(
        self, readout: Readout = "cnn", *, top: int = 1, stream: str = "test"
    ) -> list[list[float]]:
        """Return accuracies ``[rows, experiences evaluated]``; NaN where nothing was measured."""
        what = _quantity(readout, top)
        experiences = self.evaluated_experiences(stream)
        return [
            [_ratio(_sums([row[e]], what)) if e in row else math.nan for e in experiences]
            for row in self._rows(stream)
        ]

    def overall_accuracies(
        self, readout: Readout = "cnn", *, top: int = 1, stream: str = "test"
    ) -> list[float]:
        """Return each row's accuracy over all seen classes; NaN where it was not measured."""
        what = _quantity(readout, top)
        return [_ratio(_sums(row.values(), what)) for row in self._rows(stream)]

    def class_accuracies(
        self, readout: Readout = "cnn", *, top: int = 1, stream: str = "test"
    ) -> list[dict[int, float]]:
        """Return each row's accuracy per class id, of the classes measured."""
        what = _quantity(readout, top)
        return [
            {c: hits / samples for c, (hits, samples) in _sums(row.values(), what).items()}
            for row in self._rows(stream)
        ]

    def group_accuracies(
        self, readout: Readout = "cnn", *, top: int = 1, stream: str = "test"
    ) -> list[list[float]]:
        """Return accuracies ``[rows, groups of ten classes]``, groups in order of appearance.

        NaN where no class of the group was measured.
        """
        what = _quantity(readout, top)
        groups = group_classes(self._seen, _GROUP_SIZE)
        sums = [_sums(row.values(), what) for row in self._rows(stream)]
        return [[_ratio(row, group) for group in groups] for row in sums]

    def confusion_matrix(
        self, readout: Readout = "cnn", *, stream: str = "test"
    ) -> list[list[int]]:
        """Return the last row's samples ``[C, C]``, by class and by predicted class.

        Classes are those seen, in order of appearance. All 0 where the readout was not measured.
        """
        _quantity(readout, 1)
        place = {c: i for i, c in enumerate(self._seen)}
        matrix = [[0] * len(place) for _ in place]
        for confusions in self._confusions.get(stream, {}).values():
            for c, predicted in confusions.get(readout, {}).items():
                for other, samples in predicted.items():
                    matrix[place[c]][place[other]] += samples
        return matrix

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs, as dicts and lists of strings and ints."""
        return {
            "trained": self._trained,
            "experience": self._experience,
            "classes": list(self._seen),
            "history": deepcopy(self._history),
            "confusions": deepcopy(self._confusions),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned.

        :raises ValueError: if a key is missing or unknown.
        """
        expected = {"trained", "experience", "classes", "history", "confusions"}
        if set(state) != expected:
            raise ValueError(f"state: expected the keys {sorted(expected)}, got {sorted(state)}")
        self.reset()
        self._trained = state["trained"]
        self._experience = state["experience"]
        self._seen = list(state["classes"])
        self._history = deepcopy(state["history"])
        self._confusions = deepcopy(state["confusions"])

    # Avalanche's callbacks.

    def before_training_exp(self, strategy: Any) -> None:
        """Count the experience and note its classes."""
        experience = strategy.experience
        first = getattr(experience, "is_first_subexp", True)
        # An online sub-experience knows its classes through the one that it was cut from.
        experience = getattr(experience, "origin_experience", experience)
        number = getattr(experience, "current_experience", None)
        classes = getattr(experience, "classes_in_this_experience", None)
        if classes is None:
            classes = getattr(getattr(experience, "dataset", None), "targets", None) or ()
        # int: numpy's integers are not plain data.
        fresh = {int(c) for c in classes} - set(self._seen)
        again = number is not None and number == self._experience and not fresh
        self._trained += bool(first and not again)
        self._experience = number
        self._seen += sorted(fresh)

    def before_eval(self, strategy: Any) -> None:
        """Settle which classes have been seen and where their means are."""
        classes = getattr(strategy.model, "classes", None)
        if isinstance(classes, list | tuple) and all(isinstance(c, Integral) for c in classes):
            self._seen = [int(c) for c in classes]
        self._last = {}
        self._evaluated = {}
        self._confused = {}
        self._counter = None
        if self._seen:
            self._counter = _Counter(self._seen, _class_means(strategy), strategy.device)

    def before_eval_exp(self, strategy: Any) -> None:
        """Start counting at zero."""
        if self._counter is not None:
            self._counter.start()

    def after_eval_iteration(self, strategy: Any) -> None:
        """Count one batch, on the device."""
        if self._counter is not None:
            features = getattr(getattr(strategy.model, "outputs", None), "features", None)
            self._counter.update(strategy.mb_output, strategy.mb_y, features)

    def after_eval_exp(self, strategy: Any) -> list[MetricValue]:
        """Read the counts back and emit the experience's accuracies."""
        if self._counter is None or not (counts := self._counter.read()):
            return []
        experience = strategy.experience
        stream, number = experience.origin_stream.name, experience.current_experience
        self._evaluated.setdefault(stream, {})[number] = counts
        self._confused.setdefault(stream, {})[number] = self._counter.read_confusions()
        values = {
            f"Top1_Acc_{readout.upper()}_Exp": _ratio(_sums([counts], _quantity(readout, 1)))
            for readout in _READOUTS
        }
        return self._emit(
            strategy,
            {
                get_metric_name(name, strategy, add_experience=True): value
                for name, value in values.items()
            },
        )

    def after_eval(self, strategy: Any) -> list[MetricValue]:
        """Write the history and emit what concerns whole streams."""
        values: dict[str, float] = {}
        for stream, row in self._evaluated.items():
            history = self._history.setdefault(stream, {})
            if self._trained not in history:  # One for each row would swell the checkpoints.
                self._confusions[stream] = {}
            history.setdefault(self._trained, {}).update(row)
            self._confusions[stream].update(self._confused[stream])
            for readout in _READOUTS:
                values.update(self._stream_values(stream, row, readout))
        self._counter = None  # Its tensors have no place in a pickled strategy.
        return self._emit(strategy, values)

    def _emit(self, strategy: Any, values: Mapping[str, float]) -> list[MetricValue]:
        measured = {name: value for name, value in values.items() if not math.isnan(value)}
        return super()._emit(strategy, measured)

    def _rows(self, stream: str) -> Iterator[_Row]:
        history = self._history.get(stream, {})
        return (history[trained] for trained in sorted(history))

    def _stream_values(
        self, stream: str, row: _Row, readout: Readout
    ) -> Iterator[tuple[str, float]]:
        """Yield a readout's names and values: of this evaluation (``row``), then of the history."""
        label = readout.upper()
        top1 = _sums(row.values(), _quantity(readout, 1))
        top5 = _sums(row.values(), _quantity(readout, 5))
        if not top1:
            return
        yield _stream_name(f"Top1_Acc_{label}_Stream", stream), _ratio(top1)
        yield _stream_name(f"Top5_Acc_{label}_Stream", stream), _ratio(top5)
        for index, group in enumerate(group_classes(self._seen, _GROUP_SIZE)):
            # The full range even while the group is not full, so that its curve keeps its name.
            first, last = index * _GROUP_SIZE, (index + 1) * _GROUP_SIZE - 1
            name = _stream_name(f"Top1_Acc_{label}_Group", stream)
            yield f"{name}/Classes{first:02d}-{last:02d}", _ratio(top1, group)
        overall = [a for a in self.overall_accuracies(readout, stream=stream) if not math.isnan(a)]
        yield (
            _stream_name(f"AverageIncrementalAcc_{label}", stream),
            average_incremental_accuracy(overall),
        )
        # What a class that is not evaluated now has lost, nobody knows.
        history = [
            {c: accuracy for c, accuracy in accuracies.items() if c in top1}
            for accuracies in self.class_accuracies(readout, stream=stream)
        ]
        yield _stream_name(f"ForgettingRate_{label}", stream), forgetting_rate(history)


class MemoryUsage(_EmittingMetric):
    """Memory of the model and of the exemplars, in MB of 2**20 bytes, after each evaluation.

    Emits, for instance as ``ParameterMemory_MB/eval_phase/test_stream``, ``ParameterMemory_MB`` and
    ``InferenceMemory_MB`` (the two accountings of :mod:`avalanche_memo.budget`),
    ``ExemplarMemory_MB`` and ``TotalMemory_MB`` (parameters + exemplars). The latter two need a
    plugin whose ``buffer`` has ``exemplar_bytes``. Without one they are not emitted, since a memory
    of another kind may hold exemplars that nobody has accounted for.
    """

    def after_eval(self, strategy: Any) -> list[MetricValue]:
        """Measure and emit."""
        if strategy.experience is None:  # Nothing was evaluated: there is no stream to name.
            return []
        parameters = parameter_bytes(strategy.model)
        sizes = {"Parameter": parameters, "Inference": inference_bytes(strategy.model)}
        buffers: list[Any] = [getattr(plugin, "buffer", None) for plugin in strategy.plugins]
        accounted = [b.exemplar_bytes for b in buffers if hasattr(b, "exemplar_bytes")]
        if accounted:
            sizes |= {"Exemplar": sum(accounted), "Total": parameters + sum(accounted)}
        stream = strategy.experience.origin_stream.name
        self._last = {}
        values = {f"{kind}Memory_MB": size / _MEGABYTE for kind, size in sizes.items()}
        return self._emit(strategy, {_stream_name(k, stream): v for k, v in values.items()})


class ChannelMasks(_EmittingMetric):
    """The newest block's masks after each experience: a histogram per layer.

    Emits, for instance as ``ChannelMask/train_phase/train_stream/Task000/0.1.residual.3``, the mask
    ``[C]`` of each of the model's ``masks()``, soft, at the scale that they learned with last.
    """

    def after_training_exp(self, strategy: Any) -> list[MetricValue]:
        """Emit the masks."""
        layers = strategy.model.masks() if hasattr(strategy.model, "masks") else []
        name = get_metric_name("ChannelMask", strategy)
        self._last = {}
        masks = {
            layer.name: torch.sigmoid(layer.norm.scale * layer.norm.embedding.detach()).cpu()
            for layer in layers
        }
        return self._emit(strategy, {f"{name}/{layer}": mask for layer, mask in masks.items()})


def class_incremental_metrics() -> list[PluginMetric]:
    """Return the accuracy metrics of a class-incremental run, for an ``EvaluationPlugin``."""
    return [ClassIncrementalAccuracy()]


def memory_metrics() -> list[PluginMetric]:
    """Return the memory metrics, for an ``EvaluationPlugin``."""
    return [MemoryUsage()]


class _Counter:
    """Samples and hits per seen class of one experience, counted on the device.

    Nothing waits for the device before :meth:`read`: shapes depend on Python's numbers only.

    :param seen: ids of the seen classes; at least one.
    :param means: class ids and L2-normalised means ``[C, D]``, or None.
    """

    def __init__(self, seen: Sequence[int], means: _ClassMeans | None, device: Any) -> None:
        # Ascending: of equal logits the lowest class id wins, as with argmax over all columns.
        self.seen = sorted(seen)
        self.classes = torch.tensor(self.seen, device=device)
        # Class id -> its counter; every unseen class falls into one more, at the end.
        slots = [len(seen)] * (self.seen[-1] + 2)
        for slot, c in enumerate(self.seen):
            slots[c] = slot
        self.slots = torch.tensor(slots, device=device)
        self.tops = (1, 5) if len(seen) > 5 else (1,)
        self.means: Tensor | None = None
        kept = [i for i, c in enumerate(means[0]) if c in set(seen)] if means else []
        if means and kept:
            self.mean_classes = torch.tensor([int(means[0][i]) for i in kept], device=device)
            self.means = means[1][kept].to(device, torch.float32)
        self.start()

    def start(self) -> None:
        """Count from zero."""
        self.counts: dict[str, Tensor] = {}
        self.confusions: dict[Readout, Tensor] = {}

    def update(self, logits: Tensor, targets: Tensor, features: Any) -> None:
        """Count a batch: logits ``[B, width]``, targets ``[B]``, features ``[B, D]`` if any."""
        targets = targets.long()
        columns = self.classes[: bisect_left(self.seen, logits.shape[1])]
        best: dict[Readout, Tensor] = {"cnn": self._best(logits[:, columns], columns)}
        if self.means is not None:
            if isinstance(features, Tensor) and features.shape == (
                len(targets),
                self.means.shape[1],
            ):
                # The order of distances is that of their squares. Not through a matrix product,
                # whose rounding would blur means that lie close together.
                distances = torch.cdist(
                    F.normalize(features.float()),
                    self.means,
                    compute_mode="donot_use_mm_for_euclid_dist",
                )
                best["nme"] = self._best(-distances, self.mean_classes)
            else:  # An accuracy over a part of the samples would be none: no NME from here on.
                self.means = None
                self.counts = {k: v for k, v in self.counts.items() if not k.startswith("nme")}
                self.confusions.pop("nme", None)
        slots = self.slots[targets.clamp(max=len(self.slots) - 1)]
        ones = torch.ones_like(slots)
        hits = {"samples": ones}
        width = len(self.seen) + 1
        for readout, classes in best.items():
            right = classes == targets[:, None]
            hits |= {_quantity(readout, top): right[:, :top].any(dim=1) for top in self.tops}
            if readout not in self.confusions:
                self.confusions[readout] = slots.new_zeros(width * width)
            # No class is the best where no seen class has a column.
            for first in classes[:, :1].unbind(dim=1):
                self.confusions[readout].index_add_(0, slots * width + self.slots[first], ones)
        for name, hit in hits.items():
            if name not in self.counts:
                self.counts[name] = slots.new_zeros(width)
            self.counts[name].index_add_(0, slots, hit.long())

    def _best(self, scores: Tensor, classes: Tensor) -> Tensor:
        """Return each sample's classes of the best ``scores`` ``[B, C]``, best first."""
        # Stable: of equal scores, frequent in bfloat16, the first wins on every device.
        order = scores.sort(dim=1, descending=True, stable=True).indices[:, : self.tops[-1]]
        return classes[order]

    def read(self) -> _Counts:
        """Return the counts of the classes that had samples; empty if there were none."""
        if not self.counts:
            return {}
        rows = torch.stack(list(self.counts.values())).tolist()
        counts = {
            name: {c: n for c, n, total in zip(self.seen, row, rows[0], strict=False) if total}
            for name, row in zip(self.counts, rows, strict=True)
        }
        return counts if counts["samples"] else {}

    def read_confusions(self) -> _Confusions:
        """Return which class was taken for which, and how often."""
        confusions: _Confusions = {}
        for readout, samples in self.confusions.items():
            rows = samples.view(len(self.seen) + 1, -1).tolist()
            confusions[readout] = {
                c: {other: n for other, n in zip(self.seen, row, strict=False) if n}
                for c, row in zip(self.seen, rows, strict=False)
                if any(row)
            }
        return confusions


def _class_means(strategy: Any) -> _ClassMeans | None:
    for plugin in strategy.plugins:
        # Avalanche's ICaRL has an attribute of this name that is no function.
        if callable(class_means := getattr(plugin, "class_means", None)):
            means: _ClassMeans | None = class_means(strategy)
            if means is not None:
                return means
    return None


def _quantity(readout: Readout, top: int) -> str:
    if readout not in _READOUTS:
        raise ValueError(f"readout: expected one of {_READOUTS}, got {readout!r}")
    if top not in (1, 5):
        raise ValueError(f"top: expected 1 or 5, got {top!r}")
    return f"{readout}_top{top}"


def _sums(cells: Iterable[_Counts], quantity: str) -> dict[int, tuple[int, int]]:
    """Return hits and samples per class, over the cells that measured the quantity."""
    sums: dict[int, tuple[int, int]] = {}
    for counts in cells:
        for c, hits in counts.get(quantity, {}).items():
            earlier_hits, earlier_samples = sums.get(c, (0, 0))
            sums[c] = earlier_hits + hits, earlier_samples + counts["samples"][c]
    return sums


def _ratio(sums: Mapping[int, tuple[int, int]], classes: Iterable[int] | None = None) -> float:
    """Return hits / samples, of all classes or of some; NaN where there are no samples."""
    chosen = [sums[c] for c in (sums if classes is None else classes) if c in sums]
    samples = sum(n for _, n in chosen)
    return sum(hits for hits, _ in chosen) / samples if samples else math.nan


def _stream_name(metric: str, stream: str) -> str:
    info = {"metric_name": metric, "phase_name": "eval", "stream_name": stream}
    return str(generic_get_metric_name(default_metric_name_template, info))
