"""Strategies, and the template, plugins and losses that they are made of."""

from avalanche_memo.training.bic import BIC_TRAINING, BiC
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
from avalanche_memo.training.icarl import ICARL_FIRST, ICARL_LATER, ICaRL
from avalanche_memo.training.joint import JOINT_TRAINING, Joint
from avalanche_memo.training.memo import MEMO, MEMO_FIRST, MEMO_LATER
from avalanche_memo.training.podnet import PODNET_BALANCED, PODNET_TRAINING, PODNet
from avalanche_memo.training.replay import Finetune, Replay
from avalanche_memo.training.storage_policy import MEMORY_RATES, MemoryRates
from avalanche_memo.training.template import IncrementalTemplate, Phase, ReplayTemplate
from avalanche_memo.training.ucir import UCIR, UCIR_BALANCED, UCIR_TRAINING
from avalanche_memo.training.wa import WA, WA_FIRST, WA_LATER

__all__ = [
    "BIC_TRAINING",
    "DER",
    "DER_CLASSIFIER",
    "DER_IMAGENET_CLASSIFIER",
    "DER_IMAGENET_REPRESENTATION",
    "DER_REPRESENTATION",
    "DER_RESNET32_FIRST",
    "DER_RESNET32_LATER",
    "ICARL_FIRST",
    "ICARL_LATER",
    "JOINT_TRAINING",
    "MEMO",
    "MEMORY_RATES",
    "MEMO_FIRST",
    "MEMO_LATER",
    "PODNET_BALANCED",
    "PODNET_TRAINING",
    "UCIR",
    "UCIR_BALANCED",
    "UCIR_TRAINING",
    "WA",
    "WA_FIRST",
    "WA_LATER",
    "BiC",
    "Compression",
    "DynamicallyExpandableRepresentation",
    "Finetune",
    "ICaRL",
    "IncrementalTemplate",
    "Joint",
    "MemoryRates",
    "PODNet",
    "Phase",
    "Replay",
    "ReplayTemplate",
]
