"""Class-incremental learning for Avalanche: expandable networks at an equal memory budget."""

from avalanche_memo.training import DER, MEMO, UCIR, Finetune, PODNet, Replay

__all__ = ["DER", "MEMO", "UCIR", "Finetune", "PODNet", "Replay"]
