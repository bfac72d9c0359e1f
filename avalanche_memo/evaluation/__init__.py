"""Evaluation: figures that sum up a class-incremental run, and the metrics that measure them."""

from avalanche_memo.evaluation.functional import (
    area_under_budget,
    average_incremental_accuracy,
    forgetting_rate,
    group_classes,
)
from avalanche_memo.evaluation.metrics import (
    ChannelMasks,
    ClassIncrementalAccuracy,
    MemoryUsage,
    class_incremental_metrics,
    memory_metrics,
)
from avalanche_memo.evaluation.training import ResumableForgetting, TrainingAverages

__all__ = [
    "ChannelMasks",
    "ClassIncrementalAccuracy",
    "MemoryUsage",
    "ResumableForgetting",
    "TrainingAverages",
    "area_under_budget",
    "average_incremental_accuracy",
    "class_incremental_metrics",
    "forgetting_rate",
    "group_classes",
    "memory_metrics",
]
