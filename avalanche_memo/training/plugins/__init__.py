"""Plugins: each concern of a method, usable on any Avalanche strategy."""

from avalanche_memo.training.plugins.auxiliary_loss import AuxiliaryLossPlugin
from avalanche_memo.training.plugins.herding_replay import HerdingReplayPlugin
from avalanche_memo.training.plugins.weight_alignment import WeightAlignmentPlugin

__all__ = ["AuxiliaryLossPlugin", "HerdingReplayPlugin", "WeightAlignmentPlugin"]
