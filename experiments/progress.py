"""A progress bar over a whole run, with the time left."""

from typing import Any

from avalanche.training.plugins import SupervisedPlugin
from tqdm import tqdm

__all__ = ["ProgressBar"]


class ProgressBar(SupervisedPlugin):
    """Shows the images trained on of all that the run will train on.

    :param title: what is trained.
    :param sizes: of each experience, an epoch's images by :attr:`Phase.data`.
    """

    def __init__(self, title: str, sizes: list[dict[str, int]]) -> None:
        super().__init__()
        self.title = title
        self.sizes = sizes
        self.bar: Any = None

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """Open the bar when training begins, or goes on, and say where it is."""
        done = strategy.clock.train_exp_counter
        if self.bar is None:
            images = [
                [
                    min(size[phase.data], phase.images or size[phase.data])
                    for phase in (strategy.later_phases if i else strategy.first_phases)
                    for _ in range(phase.epochs)
                ]
                for i, size in enumerate(self.sizes)
            ]
            before = sum(map(sum, images[:done]))
            before += sum(images[done][: strategy.clock.train_exp_epochs])
            total = sum(map(sum, images))
            self.bar = tqdm(total=total, initial=before, unit="img", unit_scale=True)
        phase, epoch = strategy.phase, strategy.phase_epoch + 1
        self.bar.set_description(
            f"{self.title} experience {done + 1}/{len(self.sizes)}, epoch {epoch}/{phase.epochs}"
        )

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Count a batch."""
        self.bar.update(len(strategy.mb_y))

    def close(self) -> None:
        """End the bar."""
        if self.bar is not None:
            self.bar.close()
