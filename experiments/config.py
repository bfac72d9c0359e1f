"""The configuration of a run, from the command line and YAML files."""

import argparse
import difflib
import hashlib
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import yaml

from avalanche_memo.training import Compression, Phase
from avalanche_memo.training.checkpoint import written_whole

__all__ = ["EXPANDING", "METHOD_NAMES", "Config", "from_options", "nearest", "parse", "read_yaml"]

Method = Literal[
    "memo", "der", "podnet", "ucir", "icarl", "wa", "bic", "replay", "finetune", "joint"
]

METHOD_NAMES = {
    "memo": "MEMO",
    "der": "DER",
    "podnet": "PODNet",
    "ucir": "UCIR",
    "icarl": "iCaRL",
    "wa": "WA",
    "bic": "BiC",
    "replay": "Replay",
    "finetune": "Finetune",
    "joint": "Joint",
}
"""Methods as figures and tables call them, in their order there."""

EXPANDING = ("memo", "der")
"""Methods whose networks grow by a block in each experience."""

_LATER_ONLY = (
    *("later", "mem_size", "exemplars_per_class", "memory_rates", "spend_remainder"),
    *("auxiliary_weight", "train_generalized", "gradient_through_frozen"),
    *("pod_weight", "flat_weight", "pooling", "flat_distillation", "kd_weight", "kd_temperature"),
    "kd_adaptive",
    *("less_forget_weight", "ranking_weight"),
)


@dataclass
class Config:
    """One method on one protocol; the defaults are MEMO on scikit-learn's digits.

    :param method: what to train.
    :param against: further methods to train with the same settings, for comparison.
    :param benchmark: the data; ``image_folder`` is a folder with ``train/`` and ``val/``.
    :param data_root: the folder of CIFAR-100 or of the images; the environment variable
        AVALANCHE_MEMO_DATA where it is not given.
    :param base: classes of the first experience; 0 for as many as in the later ones.
    :param increment: classes of each later experience.
    :param classes: learn only the first so many classes of the order.
    :param samples_per_class: use only so many images of each class (CIFAR-100).
    :param image_size: side of the images, in pixels (image_folder).
    :param class_order_seed: seed of the class order; MEMO's and PyCIL's is 1993.
    :param class_order: the order itself, all class ids, instead of a seed's.
    :param backbone: resnet8 to resnet110 (CIFAR's), four_stage_resnet, convnet2,
        imagenet_resnet10 to imagenet_resnet50 (for small images imagenet_resnet18_cifar_stem and
        so on), or convnet4.
    :param attention: cbam puts it into every block (resnet*, four_stage_resnet).
    :param shared_stages: stages shared; the method's own number where it is not given (all but
        the last for MEMO).
    :param train_generalized: whether the generalized blocks learn after the first experience
        (MEMO).
    :param gradient_through_frozen: whether the loss reaches them through the frozen blocks (MEMO).
    :param mem_size: exemplars in all.
    :param exemplars_per_class: a fixed number per class instead.
    :param memory_rates: per experience, what the memory may hold beyond that, as a part of an
        increment's images; default takes the documented list for the number of steps.
    :param spend_remainder: whether the first classes hold one exemplar more each, so that none of
        the memory is left.
    :param compression: how exemplars are kept (codec, quality, new_images, max_distance,
        short_side); as raw pixels where it is not given.
    :param auxiliary_weight: weight of the auxiliary loss (MEMO, DER).
    :param sparsity_weight: weight of the sparsity loss; 0 is without masks and pruning (MEMO, DER).
    :param mask_s_max: scale of the masks at an epoch's end (MEMO, DER).
    :param mask_rate: how much faster than weights the masks learn (MEMO, DER).
    :param proxies: proxies of a class (PODNet).
    :param squared_distance: whether similarities are minus the squared distance, as in the authors'
        code, instead of the cosine (PODNet).
    :param nca: the paper's equation, or what the authors' released code computes (PODNet).
    :param pod_weight: weight of the distillation of the stages' outputs (PODNet).
    :param flat_weight: weight of the distillation of the features (PODNet).
    :param pooling: spatial, width, height, channels or gap (PODNet).
    :param flat_distillation: of features (pod), of predictions (kd), or both (PODNet).
    :param kd_weight: weight of the distillation of predictions (PODNet, iCaRL, WA, BiC); the
        method's own where it is not given.
    :param kd_temperature: its temperature; likewise.
    :param kd_adaptive: whether its weight grows with the classes, as the other distillations' do
        (PODNet).
    :param clip_weights: whether the classifier's weights are clipped at 0 after each step (WA); as
        in the paper where it is not given, in PyCIL's code they are not.
    :param less_forget_weight: weight of the less-forget constraint (UCIR).
    :param ranking_weight: weight of the margin ranking loss (UCIR).
    :param batch_size: images per training step.
    :param lr: learning rate where a phase sets none.
    :param momentum: of SGD.
    :param weight_decay: where a phase sets none.
    :param first: phases of the first experience.
    :param later: phases of the later ones.
    :param seed: of everything random but the class order.
    :param device: auto takes a GPU where there is one.
    :param fast: whether the fast path is on.
    :param keep_models: whether the model is kept after the first and the last epoch of each
        experience, for ``python -m experiments.analysis``.
    :param start_from: the folder of a run whose first experience is the same, to begin after it.
    :param run_folder: where results go; named after the configuration where it is not given.
    """

    method: Method = "memo"
    against: list[Method] = field(default_factory=lambda: ["finetune"])
    benchmark: Literal["digits", "cifar100", "image_folder"] = "digits"
    data_root: str | None = None
    base: int = 0
    increment: int = 2
    classes: int | None = None
    samples_per_class: int | None = None
    image_size: int = 224
    class_order_seed: int = 1993
    class_order: list[int] | None = None
    backbone: str = "resnet8"
    attention: Literal["cbam"] | None = None
    shared_stages: int | None = None
    train_generalized: bool = True
    gradient_through_frozen: bool = True
    mem_size: int = 200
    exemplars_per_class: int | None = None
    memory_rates: Literal["default"] | list[float] | None = None
    spend_remainder: bool = False
    compression: Compression | None = None
    auxiliary_weight: float = 1.0
    sparsity_weight: float = 0.0
    mask_s_max: float = 100.0
    mask_rate: float = 1.0
    proxies: int = 10
    squared_distance: bool = False
    nca: Literal["equation", "released"] = "released"
    pod_weight: float = 3.0
    flat_weight: float = 1.0
    pooling: Literal["spatial", "width", "height", "channels", "gap"] = "spatial"
    flat_distillation: Literal["pod", "kd", "both"] = "pod"
    kd_weight: float | None = None
    kd_temperature: float | None = None
    kd_adaptive: bool = False
    clip_weights: bool | None = None
    less_forget_weight: float = 5.0
    ranking_weight: float = 1.0
    batch_size: int = 64
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    first: list[Phase] = field(default_factory=lambda: [Phase(8, milestones=(5, 7))])
    later: list[Phase] = field(default_factory=lambda: [Phase(8, milestones=(5, 7))])
    seed: int = 1993
    device: str = "auto"
    fast: bool = True
    keep_models: bool = False
    start_from: str | None = None
    run_folder: str | None = None

    def __post_init__(self) -> None:
        """Check what no other part checks before training.

        :raises ValueError: if a value is outside its range.
        """
        if self.method in self.against or len(set(self.against)) < len(self.against):
            raise ValueError(
                f"against: expected methods other than {self.method}, each once, got {self.against}"
            )
        for name in ("seed", "class_order_seed", "lr", "weight_decay", "momentum"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name}: expected a number of at least 0, got {getattr(self, name)}"
                )
        for name in ("seed", "class_order_seed"):
            if getattr(self, name) >= 2**32:
                raise ValueError(f"{name}: expected less than 2**32, got {getattr(self, name)}")
        if self.momentum >= 1:
            raise ValueError(f"momentum: expected less than 1, got {self.momentum}")
        if self.run_folder == "":
            raise ValueError("run_folder: expected a folder's name, got an empty one")
        if self.batch_size < 1:
            raise ValueError(f"batch_size: expected a number of at least 1, got {self.batch_size}")
        if not self.first or not self.later:
            raise ValueError("first, later: expected at least one phase each")
        for each in fields(self):  # As YAML gives them back: a run is known by their text.
            value = getattr(self, each.name)
            if each.type in (float, float | None) and value is not None:
                setattr(self, each.name, float(value))
        if isinstance(self.memory_rates, list):
            self.memory_rates = [float(rate) for rate in self.memory_rates]

    @property
    def folder(self) -> Path:
        """Where the run's results go."""
        if self.run_folder is not None:
            return Path(self.run_folder)
        protocol = f"{self.benchmark}-b{self.base}-inc{self.increment}"
        # What the name does not say: runs that differ in the seed alone have it in common.
        others = hashlib.sha256(replace(self, seed=0).fingerprint().encode()).hexdigest()[:6]
        return Path("runs") / f"{protocol}-{self.method}-{self.backbone}-{others}-seed{self.seed}"

    def identity(self) -> dict[str, Any]:
        """Return what makes two runs the same run, as plain data."""
        plain = asdict(self)
        for name in ("run_folder", "against", "data_root", "start_from", "keep_models"):
            del plain[name]
        for phase in (*plain["first"], *plain["later"]):
            phase["milestones"] = list(phase["milestones"])
        return plain

    def first_experience(self) -> dict[str, Any]:
        """Return the part of the identity that the first experience's training depends on."""
        plain = self.identity()
        if any(phase.data == "exemplars" for phase in self.first):
            return plain
        if self.compression is not None and self.compression.new_images == 0:
            plain["compression"] = None
        return {k: v for k, v in plain.items() if k not in _LATER_ONLY}

    def fingerprint(self) -> str:
        """Return the identity as text: what is not as by default, so that options may be added."""
        usual = Config().identity()
        return json.dumps({k: v for k, v in self.identity().items() if v != usual[k]})

    def save(self, path: Path) -> None:
        """Write the configuration as YAML that :func:`parse` reads."""
        own = {"data_root": self.data_root, "keep_models": self.keep_models, "against": []}
        plain = self.identity() | own
        with written_whole(path) as file:
            yaml.safe_dump(plain, file, sort_keys=False, encoding="utf-8")


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that comes twice, of which YAML's own loader keeps the second."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        # Later, when it is constructed, a mapping has what it merges, too.
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(
                    f"{key}: expected once in a mapping, got it twice{node.start_mark}"
                )
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        # Else what a merged mapping has merged itself would win over its own.
        node.value = list({str(key.value): (key, value) for key, value in node.value}.values())


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds.

    :raises ValueError: if it is no text, or a key comes twice.
    :raises yaml.YAMLError: if it is no YAML; it names the file.
    """
    try:
        with path.open(encoding="utf-8") as file:
            return yaml.load(file, _UniqueKeys)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8, got {error}") from None


class _Parser(jsonargparse.ArgumentParser):
    """Adds the nearest known key to the message about an unknown one."""

    def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]
        known = [f.name for f in fields(Config)] + [f.name for f in fields(Phase)]
        unknown = re.search(
            r"(?:[Uu]nrecognized arguments?: --|(?:[Kk]ey|[Oo]ption) ')([\w.]+)", message
        )
        if unknown:
            key = unknown[1].split(".")[-1]
            others = [name for name in known if name != key]  # A phase's own may be misplaced.
            message += f"; the nearest known key is '{nearest(key, others)}'"
        value = re.search(r"Literal\[(.*)\]\. Got value: (\w+)", message)
        if value:
            allowed = re.findall(r"\w+", value[1])
            message += f"; the nearest is '{nearest(value[2], allowed)}'"
        super().error(message, ex)


def nearest(name: str, known: Sequence[str]) -> str:
    """Return the known name that is most like another."""
    return difflib.get_close_matches(name, known, n=1, cutoff=0)[0]


def from_options(options: dict[str, Any]) -> Config:
    """Return the configuration of plain data, as in a YAML file.

    :raises ValueError: if an option is unknown or a value outside its range.
    """
    parser = _Parser(exit_on_error=False)
    parser.add_class_arguments(Config, as_group=False)
    try:
        return _config(parser, parser.parse_object(options))
    except argparse.ArgumentError as error:
        raise ValueError(" ".join(str(error).split())) from None


def parse(arguments: Sequence[str] | None = None) -> Config:
    """Return the configuration of a command line: ``--config FILE``, ``--any.option value``.

    Options count more than the file, wherever they stand. ``--resume FOLDER`` takes the
    configuration that a run folder holds instead.
    """
    parser = _Parser(
        prog="python -m experiments.run",
        description="Train class-incrementally.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="a YAML file of the options below")
    parser.add_argument("--resume", metavar="FOLDER", help="continue the run of a folder")
    parser.add_class_arguments(Config, as_group=False)
    given = list(arguments if arguments is not None else sys.argv[1:])
    apart = argparse.ArgumentParser(prog=parser.prog, add_help=False, allow_abbrev=False)
    apart.add_argument("--config", action="append", default=[])
    known, others = apart.parse_known_args(given)
    files: list[str] = known.config
    if len(files) > 1:
        parser.error(f"--config: expected one file, got {', '.join(files)}")
    for file in files:
        _check_file(parser, Path(file))
    namespace = parser.parse_args(
        [*(f"--config={file}" for file in files), *_with_wholes_emptied(others)]
    )
    if namespace.resume is not None:
        stored = Path(namespace.resume) / "config.yaml"
        if not stored.exists():
            parser.error(
                f"--resume: expected a run folder with a config.yaml, got {namespace.resume}"
            )
        if given not in ([f"--resume={namespace.resume}"], ["--resume", namespace.resume]):
            parser.error(f"--resume: expected a folder and no further options, got {given}")
        _check_file(parser, stored)
        namespace = parser.parse_args(["--config", str(stored), "--run_folder", namespace.resume])
    return _config(parser, namespace)


def _check_file(parser: _Parser, path: Path) -> None:
    """Check what the parser would pass over, or say without the file's name."""
    try:
        if path.is_file() and not isinstance(content := read_yaml(path), dict):
            raise ValueError(f"{path}: expected options and their values, got {content}")
    except (ValueError, yaml.YAMLError) as error:
        parser.error(str(error))


def _with_wholes_emptied(arguments: Sequence[str]) -> Iterator[str]:
    """Empty a list of phases, or a compression, before another is given.

    The parser would take what the new one leaves out from the old one in its place.
    """
    empty = {"--first": "[]", "--later": "[]", "--compression": "null"}
    for argument in arguments:
        name = argument.partition("=")[0]
        if name in empty:
            yield f"{name}={empty[name]}"
        yield argument


def _config(parser: _Parser, namespace: jsonargparse.Namespace) -> Config:
    try:
        values = parser.instantiate_classes(namespace).as_dict()
        return Config(**{f.name: values[f.name] for f in fields(Config)})
    except ValueError as error:
        parser.error(str(error))
