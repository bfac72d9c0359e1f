"""Class-incremental learning for Avalanche: expandable networks at an equal memory budget."""

from avalanche_memo.training import DER, MEMO, UCIR, WA, BiC, Finetune, ICaRL, Joint, PODNet, Replay

__all__ = ["DER", "MEMO", "UCIR", "WA", "BiC", "Finetune", "ICaRL", "Joint", "PODNet", "Replay"]
