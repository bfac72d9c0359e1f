"""Plugins: each concern of a method, usable on any Avalanche strategy."""

from avalanche_memo.training.plugins.auxiliary_loss import AuxiliaryLossPlugin
from avalanche_memo.training.plugins.bias_correction import BiasCorrectionPlugin
from avalanche_memo.training.plugins.distillation import (
    LessForgetPlugin,
    PODDistillationPlugin,
    PreviousModel,
    SoftmaxDistillationPlugin,
)
from avalanche_memo.training.plugins.fresh_start import FreshStartPlugin
from avalanche_memo.training.plugins.gradient_clamp import GradientClampPlugin
from avalanche_memo.training.plugins.herding_replay import HerdingReplayPlugin
from avalanche_memo.training.plugins.imprinting import ImprintingPlugin
from avalanche_memo.training.plugins.margin_ranking import MarginRankingPlugin
from avalanche_memo.training.plugins.resident_batches import ResidentBatches
from avalanche_memo.training.plugins.sparsity import SparsityPlugin
from avalanche_memo.training.plugins.weight_alignment import WeightAlignmentPlugin

__all__ = [
    "AuxiliaryLossPlugin",
    "BiasCorrectionPlugin",
    "FreshStartPlugin",
    "GradientClampPlugin",
    "HerdingReplayPlugin",
    "ImprintingPlugin",
    "LessForgetPlugin",
    "MarginRankingPlugin",
    "PODDistillationPlugin",
    "PreviousModel",
    "ResidentBatches",
    "SoftmaxDistillationPlugin",
    "SparsityPlugin",
    "WeightAlignmentPlugin",
]
