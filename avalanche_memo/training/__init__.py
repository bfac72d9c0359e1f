"""Strategies, and the template, plugins and losses that they are made of."""

from avalanche_memo.training.compression import Compression
from avalanche_memo.training.der import (
    DER,
    DER_CLASSIFIER,
    DER_IMAGENET_CLASSIFIER,
    DER_IMAGENET_REPRESENTATION,
    DER_REPRESENTATION,
    DER_RESNET32_FIRST,
    DER_RESNET32_LATER,
    DynamicallyExpandableRepresentation,
)
from avalanche_memo.training.memo import MEMO, MEMO_FIRST, MEMO_LATER
from avalanche_memo.training.podnet import PODNET_BALANCED, PODNET_TRAINING, PODNet
from avalanche_memo.training.replay import Finetune, Replay
from avalanche_memo.training.storage_policy import MEMORY_RATES, MemoryRates
from avalanche_memo.training.template import IncrementalTemplate, Phase, ReplayTemplate
from avalanche_memo.training.ucir import UCIR, UCIR_BALANCED, UCIR_TRAINING

__all__ = [
    "DER",
    "DER_CLASSIFIER",
    "DER_IMAGENET_CLASSIFIER",
    "DER_IMAGENET_REPRESENTATION",
    "DER_REPRESENTATION",
    "DER_RESNET32_FIRST",
    "DER_RESNET32_LATER",
    "MEMO",
    "MEMORY_RATES",
    "MEMO_FIRST",
    "MEMO_LATER",
    "PODNET_BALANCED",
    "PODNET_TRAINING",
    "UCIR",
    "UCIR_BALANCED",
    "UCIR_TRAINING",
    "Compression",
    "DynamicallyExpandableRepresentation",
    "Finetune",
    "IncrementalTemplate",
    "MemoryRates",
    "PODNet",
    "Phase",
    "Replay",
    "ReplayTemplate",
]
