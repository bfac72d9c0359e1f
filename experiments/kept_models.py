"""The models that a run keeps: of each experience, after its first and after its last epoch."""

from pathlib import Path
from typing import Any, Literal

import torch
from avalanche.training.plugins import SupervisedPlugin

from avalanche_memo.training.checkpoint import written_whole

__all__ = ["KeptModels"]


class KeptModels(SupervisedPlugin):
    """Keeps the states of models as files, two for each experience: tensors and plain data.

    With a state goes the memory that the experience was learned with, as positions of exemplars.

    :param run_folder: a run's folder; the files are in its folder ``models``.
    """

    def __init__(self, run_folder: Path) -> None:
        super().__init__()
        self.folder = run_folder / "models"

    def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """Keep the model if the epoch was the first or the last of the experience."""
        experience, epoch = strategy.clock.train_exp_counter, strategy.clock.train_exp_epochs
        phases = strategy.later_phases if experience else strategy.first_phases
        if epoch == 0:
            self._save(strategy, self.path(experience, "first"))
        if epoch + 1 == sum(phase.epochs for phase in phases):
            self._save(strategy, self.path(experience, "last"))

    def _save(self, strategy: Any, path: Path) -> None:
        memories = [p.state_dict() for p in strategy.plugins if hasattr(p, "exemplars_after")]
        with written_whole(path) as file:
            torch.save({"model": strategy.model.state_dict(), "memories": memories}, file)

    def path(self, experience: int, epoch: Literal["first", "last"]) -> Path:
        """Return the file of an experience, counted from 0."""
        return self.folder / f"{experience + 1:03d}-{epoch}.pt"

    def load(self, experience: int, epoch: Literal["first", "last"]) -> dict[str, Any] | None:
        """Return the kept state, on the CPU, or None where there is none."""
        path = self.path(experience, epoch)
        if not path.exists():
            return None
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return content
