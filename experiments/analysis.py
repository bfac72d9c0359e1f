"""The three figures that motivate MEMO, from the models that a run kept (``keep_models: true``).

``python -m experiments.analysis RUN_FOLDER --out DIR`` draws figure 3 of Zhou et al., "A Model or
603 Exemplars" (ICLR 2023): the gradient norm, the shift and the similarity of a network's blocks.
For Replay, as in the paper's first two pictures, these are the blocks of the one network. For DER,
as in its third, they are those of the backbone that each experience added. For MEMO they are the
shared generalized blocks as they were then, and the specialized block that the experience added.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import DataLoader

from avalanche_memo.analysis import block_features, block_gradients, block_shift, linear_cka
from avalanche_memo.models import ExpandableNetwork
from avalanche_memo.training.plugins import HerdingReplayPlugin
from experiments.building import make_benchmark, make_network
from experiments.config import METHOD_NAMES, Config
from experiments.figures import new_figure, protocol_title, save_figure
from experiments.folders import stored_config, write
from experiments.kept_models import KeptModels
from experiments.machine import default_device

__all__ = ["analyse", "main"]


def analyse(folder: Path, images: int = 1000) -> dict[str, Any]:
    """Compare the blocks of the models that a run kept; return plain data, per experience.

    Gradients are those of the mean cross-entropy on a random sample of what the experience was
    learned from, new data and exemplars, in training mode and in batches of the run's size, but
    without augmentation and with new images uncompressed: after the first epoch and after the last.
    They are computed here, not recorded while training. The shift is between these two, as a mean
    over a block's parameters and as a sum. The similarity is between the models after their last
    epochs, for each block, by a random sample of test images of all classes. The samples are the
    same in every call.

    :param folder: a run's folder, of a finished run or of one that has finished an experience.
    :param images: the size of each sample.
    :raises ValueError: if the run kept no models of its first experience, or ``images`` is below 2.
    """
    if images < 2:
        raise ValueError(f"images: expected a number of at least 2, got {images}")
    config = stored_config(folder)
    kept, benchmark = KeptModels(folder), make_benchmark(config)
    train, test = benchmark.train_stream, benchmark.test_stream
    tested = torch.cat([x for x, _ in _sample([e.dataset for e in test], images, 128)])
    gradients: dict[str, list[dict[str, float]]] = {"first": [], "last": []}
    shifts: dict[str, list[dict[str, float]]] = {"mean": [], "sum": []}
    features = []
    for number, experience in enumerate(train):
        first, last = kept.load(number, "first"), kept.load(number, "last")
        if first is None or last is None:
            break
        sources = [experience.dataset, *_exemplars(config, last["memories"], train)]
        batches = _sample(sources, images, config.batch_size)
        networks = {"first": _network(config, first), "last": _network(config, last)}
        for epoch, network in networks.items():
            gradients[epoch].append(block_gradients(network.train(), batches))
        for reduction in ("mean", "sum"):
            shifts[reduction].append(block_shift(networks["first"], networks["last"], reduction))
        features.append(_features(networks["last"].eval(), tested))
    if not features:
        raise ValueError(
            "folder: expected the models of a run that kept them from its first experience on "
            f"(--keep_models true), got none in {kept.folder}"
        )
    return {
        "config": config.identity(),
        "images": images,
        "gradient_norm": gradients,
        "shift": shifts,
        "cka": {
            block: [[linear_cka(f[block], g[block]) for g in features] for f in features]
            for block in features[0]
        },
    }


def _network(config: Config, state: dict[str, Any]) -> ExpandableNetwork:
    network = make_network(config)
    network.load_state_dict(state["model"])
    network.to(default_device())
    return network


def _exemplars(config: Config, memories: list[Any], stream: Any) -> list[Any]:
    """Return the exemplars of saved memories, a data set each, from the stream they point into."""
    restored = [HerdingReplayPlugin(compression=config.compression) for _ in memories]
    for memory, state in zip(restored, memories, strict=True):
        memory.load_state_dict(state, stream)
    return [memory.buffer.buffer for memory in restored if memory.buffer.order]


def _sample(datasets: Sequence[Any], images: int, batch_size: int) -> list[tuple[Tensor, Tensor]]:
    """Return batches of a random sample of data sets together, with evaluation transforms."""
    whole = datasets[0].eval()
    for dataset in datasets[1:]:
        whole = whole.concat(dataset.eval())
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
    loader = DataLoader(
        whole.subset(order[:images].tolist()), batch_size, collate_fn=whole.collate_fn
    )
    return [(batch[0].to(default_device()), batch[1].to(default_device())) for batch in loader]


def _features(network: ExpandableNetwork, images: Tensor) -> dict[str, Tensor]:
    parts = [block_features(network, batch) for batch in images.split(128)]
    return {block: torch.cat([part[block] for part in parts]).cpu() for block in parts[0]}


def _new_figure(analysis: dict[str, Any], width: float) -> Figure:
    figure = new_figure(width, 4.2)
    config = analysis["config"]
    title = f"{METHOD_NAMES[config['method']]}: {protocol_title(config)}"
    figure.suptitle(title, fontsize=10)
    return figure


def _experiences(analysis: dict[str, Any]) -> int:
    return len(analysis["gradient_norm"]["last"])


def _colours(analysis: dict[str, Any]) -> ListedColormap:
    """Return a colour for each experience; viridis ends too pale for lines."""
    experiences = _experiences(analysis)
    return ListedColormap(
        [colormaps["viridis"](0.9 * i / max(1, experiences - 1)) for i in range(experiences)]
    )


def _draw_by_block(
    axes: Axes, analysis: dict[str, Any], rows: Sequence[dict[str, float]], first: int = 1
) -> None:
    """Draw a line over the blocks for each experience, from experience ``first`` on."""
    blocks, colours = list(analysis["cka"]), _colours(analysis)
    for number, row in enumerate(rows, start=first):
        axes.plot(
            range(len(blocks)),
            [row.get(block, float("nan")) for block in blocks],
            color=colours(number - 1),
            linestyle="--" if number == 1 else "-",
            marker="o",
            markersize=3,
            label="experience 1, from random weights" if number == 1 else None,
        )
    axes.set_xticks(range(len(blocks)), blocks, rotation=90, fontsize=8)
    axes.set_xlabel("block (stage.block; 1.0 is the stem)" if "1.0" in blocks else "stage")
    axes.grid(alpha=0.3)
    if first == 1:
        axes.legend(fontsize=8)


def _explain_colours(figure: Figure, axes: Sequence[Axes], analysis: dict[str, Any]) -> None:
    colours = _colours(analysis)
    bounds = [i + 0.5 for i in range(colours.N + 1)]
    scale = ScalarMappable(BoundaryNorm(bounds, colours.N), colours)
    ticks = range(1, colours.N + 1, 1 + colours.N // 15)
    figure.colorbar(scale, ax=list(axes), label="experience", ticks=list(ticks))


def gradient_figure(analysis: dict[str, Any], path: Path) -> None:
    """Draw each block's gradient norm after the first and after the last epoch of experiences."""
    figure = _new_figure(analysis, 9.6)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, epoch in zip(panels, ("first", "last"), strict=True):
        _draw_by_block(axes, analysis, analysis["gradient_norm"][epoch])
        axes.set_yscale("log")
        axes.set_title(f"after the {epoch} epoch", fontsize=9)
    panels[0].set_ylabel("L2 norm of the gradient")
    _explain_colours(figure, panels, analysis)
    save_figure(figure, path)


def shift_figure(analysis: dict[str, Any], path: Path) -> None:
    """Draw how far each block's weights moved from the first to the last epoch of experiences."""
    figure = _new_figure(analysis, 9.6)
    panels = figure.subplots(1, 2)
    for axes, reduction in zip(panels, ("mean", "sum"), strict=True):
        _draw_by_block(axes, analysis, analysis["shift"][reduction])
        axes.set_yscale("log")
        axes.set_title(f"{reduction} over the block", fontsize=9)
    panels[0].set_ylabel("squared difference of weights")
    _explain_colours(figure, panels, analysis)
    save_figure(figure, path)


def cka_figure(analysis: dict[str, Any], path: Path) -> None:
    """Draw the similarity of all models for two blocks, and of successive models for all blocks."""
    cka, experiences = analysis["cka"], _experiences(analysis)
    deep = list(cka)[-1]
    shallow = [block for block in cka if block.split(".")[0] == "1"][-1]
    figure = _new_figure(analysis, 11.0)
    matrix, lines = figure.subplots(1, 2)
    values = [
        [cka[shallow if j > i else deep][i][j] for j in range(experiences)]
        for i in range(experiences)
    ]
    image = matrix.imshow(values, vmin=0, vmax=1, cmap="viridis")
    for i in range(experiences):
        for j in range(experiences):
            style = {"color": "white" if values[i][j] < 0.6 else "black"}
            style |= {"fontsize": min(9, 70 / experiences), "ha": "center", "va": "center"}
            matrix.text(j, i, f"{values[i][j]:.2f}", **style)
    numbers = range(1, experiences + 1)
    matrix.set_xticks(range(experiences), numbers)
    matrix.set_yticks(range(experiences), numbers)
    matrix.set_xlabel("model after experience")
    matrix.set_ylabel("model after experience")
    matrix.set_title(f"block {shallow} above the diagonal, block {deep} below", fontsize=9)
    figure.colorbar(image, ax=matrix, label="linear CKA")
    successive = [
        {block: cka[block][number - 1][number] for block in cka} for number in range(1, experiences)
    ]
    _draw_by_block(lines, analysis, successive, first=2)
    lines.set_ylim(0, 1.02)
    lines.set_ylabel("linear CKA with the model before")
    lines.set_title("each model and the one before it", fontsize=9)
    _explain_colours(figure, [lines], analysis)
    save_figure(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Analyse a run's folder; write three figures and their numbers."""
    parser = argparse.ArgumentParser(prog="python -m experiments.analysis", description=__doc__)
    parser.add_argument("run_folder", type=Path, help="a folder of experiments.run")
    parser.add_argument("--out", type=Path, help="where the files go; RUN_FOLDER/analysis")
    parser.add_argument("--images", type=int, default=1000, help="images of a sample")
    options = parser.parse_args(arguments)
    folder: Path = options.run_folder
    if not (folder / "config.yaml").exists():
        parser.error(f"RUN_FOLDER: expected a run folder with a config.yaml, got {folder}")
    out: Path = options.out or folder / "analysis"
    try:
        analysis = analyse(folder, options.images)
        out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    write(out / "analysis.json", json.dumps(analysis, indent=1, allow_nan=False) + "\n")
    gradient_figure(analysis, out / "gradient_norm.png")
    shift_figure(analysis, out / "shift.png")
    cka_figure(analysis, out / "cka.png")
    print(f"Figures and numbers: {out}")


if __name__ == "__main__":
    main()
