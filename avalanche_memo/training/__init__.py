"""Strategies, and the template, plugins and losses that they are made of."""

from avalanche_memo.training.der import (
    DER,
    DER_CLASSIFIER,
    DER_REPRESENTATION,
    DynamicallyExpandableRepresentation,
)
from avalanche_memo.training.memo import MEMO, MEMO_FIRST, MEMO_LATER
from avalanche_memo.training.replay import Finetune, Replay
from avalanche_memo.training.template import IncrementalTemplate, Phase

__all__ = [
    "DER",
    "DER_CLASSIFIER",
    "DER_REPRESENTATION",
    "MEMO",
    "MEMO_FIRST",
    "MEMO_LATER",
    "DynamicallyExpandableRepresentation",
    "Finetune",
    "IncrementalTemplate",
    "Phase",
    "Replay",
]
