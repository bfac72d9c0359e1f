"""Metrics that Avalanche has, here without waiting for the device and able to resume."""

from typing import Any

import torch
from avalanche.evaluation import PluginMetric
from avalanche.evaluation.metric_results import MetricValue
from avalanche.evaluation.metric_utils import get_metric_name
from avalanche.evaluation.metrics import StreamForgetting

__all__ = ["ResumableForgetting", "TrainingAverages"]


class TrainingAverages(PluginMetric):
    """Loss and accuracy over each training epoch, and the learning rate.

    Avalanche's accuracy and loss metrics read their value back at every step; here sums stay on
    the device until the epoch ends. The loss is the whole one, auxiliary terms included.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        """Start at zero."""
        self._sums: Any = 0
        self._samples = 0

    def result(self) -> list[float]:
        """Return the loss and the accuracy (a fraction) since the epoch began."""
        return (self._sums / self._samples).tolist() if self._samples else [0.0, 0.0]

    def __str__(self) -> str:
        return "TrainingAverages"

    def before_training_epoch(self, strategy: Any) -> None:
        """Start at zero."""
        self.reset()

    def after_training_iteration(self, strategy: Any) -> None:
        """Add a batch."""
        right = (strategy.mb_output.detach().argmax(dim=1) == strategy.mb_y).sum()
        loss = strategy.loss.detach().mean() * len(strategy.mb_y)
        self._sums = self._sums + torch.stack([loss, right])
        self._samples += len(strategy.mb_y)

    def after_training_epoch(self, strategy: Any) -> list[MetricValue]:
        """Emit the epoch's values."""
        loss, accuracy = self.result()
        values = {
            "Loss_Epoch": loss,
            "Top1_Acc_Epoch": accuracy,
            "LearningRate_Epoch": float(strategy.optimizer.param_groups[0]["lr"]),
        }
        x = strategy.clock.train_iterations
        return [
            MetricValue(self, get_metric_name(name, strategy), value, x)
            for name, value in values.items()
        ]


class ResumableForgetting(StreamForgetting):
    """Avalanche's ``StreamForgetting``, with a state that a checkpoint can hold."""

    def state_dict(self) -> dict[str, Any]:
        """Return the accuracies that forgetting is measured from, as plain data."""
        return {
            "initial": {int(k): float(v) for k, v in self.forgetting.initial.items()},
            "last": {int(k): float(v) for k, v in self.forgetting.last.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        self.forgetting.initial = dict(state["initial"])
        self.forgetting.last = dict(state["last"])
