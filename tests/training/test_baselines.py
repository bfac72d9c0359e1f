"""iCaRL, WA, BiC and joint training."""

import copy
import math
from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from avalanche.core import SupervisedPlugin
from avalanche.training.supervised import Naive
from torchvision import transforms as T

from avalanche_memo.models import (
    BiasCorrectedLinear,
    CosineClassifier,
    ExpandableNetwork,
    GrowingLinear,
)
from avalanche_memo.training import (
    BIC_TRAINING,
    ICARL_FIRST,
    ICARL_LATER,
    JOINT_TRAINING,
    WA,
    WA_FIRST,
    WA_LATER,
    BiC,
    ICaRL,
    Joint,
    MemoryRates,
    Phase,
    Replay,
)
from avalanche_memo.training.plugins import (
    BiasCorrectionPlugin,
    FreshStartPlugin,
    HerdingReplayPlugin,
    SoftmaxDistillationPlugin,
    WeightAlignmentPlugin,
    bias_correction,
)
from avalanche_memo.training.plugins.bias_correction import fit_correction
from avalanche_memo.training.storage_policy import balanced_choice
from tests.helpers import (
    APIS,
    ORDER,
    assert_same_tensors,
    grey_images,
    make_benchmark,
    silent,
    tensors_of,
    tiny_backbone,
)
from tests.reference import losses as plain

FAST = pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])


def make(
    strategy: Any,
    *plugins: Any,
    classifier: Any = GrowingLinear,
    backbone: Any = tiny_backbone,
    **options: Any,
) -> Any:
    torch.manual_seed(0)
    kind = BiasCorrectedLinear if strategy is BiC else classifier
    model = ExpandableNetwork(backbone, 3, make_classifier=kind)
    memory = {} if strategy is Joint else {"mem_size": 24}
    return strategy(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4),
        plugins=list(plugins),
        evaluator=silent(),
        **{"train_mb_size": 6, "fast": False, **memory, **options},
    )


class Steps(SupervisedPlugin):
    """Keeps each step's images, targets and logits, its loss and the loss's gradient by them."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[torch.Tensor, ...]] = []

    def before_training_exp(self, strategy, **kwargs):
        self.steps.clear()

    def before_backward(self, strategy, **kwargs):
        logits = strategy.mb_output
        (slope,) = torch.autograd.grad(strategy.loss.sum(), logits, retain_graph=True)
        batch = strategy.mb_x, strategy.mb_y, logits, strategy.loss, slope
        self.steps.append(tuple(tensor.detach().clone() for tensor in batch))


def pixels(image: torch.Tensor) -> tuple[int, ...]:
    return tuple((255 * image).round().int().flatten().tolist())


def images_of(dataset: Any) -> list[tuple[int, ...]]:
    return [(int(label), *pixels(image)) for image, label, *_ in dataset.eval()]


# --- the losses ---------------------------------------------------------------------------------


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize(
    ("strategy", "options", "mixed", "weight", "temperature"),
    [
        (ICaRL, {}, False, 1.0, 2.0),
        (ICaRL, {"kd_weight": 3.0, "temperature": 5.0}, False, 3.0, 5.0),
        (WA, {}, True, 1.0, 2.0),
        (WA, {"kd_weight": 0.5, "temperature": 3.0}, True, 0.5, 3.0),
        (BiC, {}, True, 1.0, 2.0),
    ],
)
def test_the_loss_is_the_published_one(strategy, options, mixed, weight, temperature, api):
    """Value and gradient by the logits, at each step of three experiences."""
    steps = Steps()
    trainer = make(strategy, steps, **options)
    for n, experience in enumerate(make_benchmark(api).train_stream[:3]):
        old = copy.deepcopy(trainer.model).eval()
        trainer.train(experience)
        seen = trainer.model.classes
        share = len(old.classes) / len(seen) if mixed else 1.0
        for images, targets, logits, loss, slope in steps.steps:
            logits = logits[:, seen].double().requires_grad_()
            rows = torch.tensor([seen.index(int(t)) for t in targets])
            expected = plain.cross_entropy(logits, rows)
            entropy = 0.0
            if n:
                with torch.no_grad():
                    teacher = old(images)[:, old.classes].double()
                new = logits[:, : len(old.classes)]
                distilled = plain.soft_cross_entropy(new, teacher, temperature)
                expected = (1 - share if mixed else 1) * expected + share * weight * distilled
                # The divergence lacks what does not depend on the network that learns.
                entropy = plain.soft_cross_entropy(teacher, teacher, temperature).item()
            (gradient,) = torch.autograd.grad(expected, logits)
            value = expected.item() - (share * weight * entropy if n else 0.0)
            assert loss.item() == pytest.approx(value, rel=1e-4, abs=1e-5)
            torch.testing.assert_close(slope[:, seen].double(), gradient, rtol=1e-3, atol=1e-6)
        assert len(steps.steps) > 1


@pytest.mark.parametrize(
    ("phase", "epochs", "rates", "weight_decay"),
    [
        (ICARL_FIRST, 200, {0: 0.1, 60: 1e-2, 120: 1e-3, 170: 1e-4}, 5e-4),
        (ICARL_LATER, 170, {0: 0.1, 79: 0.1, 80: 1e-2, 120: 1e-3, 169: 1e-3}, 2e-4),
        (WA_FIRST, 200, {0: 0.1, 60: 1e-2, 120: 1e-3, 170: 1e-4}, 5e-4),
        (WA_LATER, 170, {59: 0.1, 60: 1e-2, 100: 1e-3, 140: 1e-4}, 2e-4),
        (BIC_TRAINING, 170, {59: 0.1, 60: 1e-2, 100: 1e-3, 140: 1e-4}, 2e-4),
        (JOINT_TRAINING, 200, {0: 0.1, 60: 1e-2, 120: 1e-3, 170: 1e-4}, 5e-4),
    ],
)
def test_published_schedules(phase, epochs, rates, weight_decay):
    assert (phase.epochs, phase.weight_decay) == (epochs, weight_decay)
    assert {epoch: phase.rate(epoch, phase.lr) for epoch in rates} == pytest.approx(rates)


# --- WA -----------------------------------------------------------------------------------------


def norms(model: ExpandableNetwork) -> list[float]:
    return [math.sqrt(sum(w * w for w in row)) for row in model.classifier.weight.tolist()]


@pytest.mark.parametrize("api", APIS)
def test_wa_aligns_the_network_that_it_is_read_out_from_and_distilled_from(api):
    trainer = make(WA)
    (distillation,) = [p for p in trainer.plugins if isinstance(p, SoftmaxDistillationPlugin)]
    for experience in make_benchmark(api).train_stream[:3]:
        trainer.train(experience)
        *old, first, second = norms(trainer.model)
        if old:
            assert (first + second) / 2 == pytest.approx(sum(old) / len(old), rel=1e-5)
        assert_same_tensors(tensors_of(distillation.teacher.network), tensors_of(trainer.model))


def test_wa_is_its_two_halves():
    """Up to the first alignment, the halves are the whole without it and replay aligned."""

    def train(trainer, experiences):
        for experience in make_benchmark().train_stream[:experiences]:
            trainer.train(experience)
        return norms(trainer.model), tensors_of(trainer.model)

    aligned, _ = train(make(WA, clip_weights=False), 2)
    before, _ = train(make(WA, align_weights=False), 2)
    gamma = sum(before[:2]) / sum(before[2:])
    assert not 0.98 < gamma < 1.02
    assert aligned == pytest.approx([*before[:2], *(gamma * norm for norm in before[2:])])
    replay = train(make(Replay, WeightAlignmentPlugin(clip=True)), 3)
    assert_same_tensors(train(make(WA, kd_weight=0), 3)[1], replay[1])


def test_wa_clips_weights_unless_told_otherwise():
    class Lowest(SupervisedPlugin):
        def __init__(self) -> None:
            super().__init__()
            self.weights: list[float] = []
            self.biases: list[float] = []

        def after_update(self, strategy, **kwargs):
            self.weights.append(strategy.model.classifier.weight.min().item())
            self.biases.append(strategy.model.classifier.bias.min().item())

    for clip, options in ((True, {}), (False, {"clip_weights": False})):
        lowest = Lowest()
        trainer = make(WA, lowest, **options)
        for experience in make_benchmark().train_stream[:2]:
            trainer.train(experience)
        assert len(lowest.weights) > 2
        assert all((low == 0) if clip else (low < 0) for low in lowest.weights)
        assert min(lowest.biases) < 0


# --- BiC: the fit -------------------------------------------------------------------------------


def plain_objective(alpha, beta, logits, targets, new) -> float:
    """Cross-entropy of corrected logits, and a normal prior of log(alpha) that weighs as one."""
    total = 0.0
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        row = [alpha * o + beta if c in new else o for c, o in enumerate(row)]
        top = max(row)
        total += top + math.log(sum(math.exp(o - top) for o in row)) - row[target]
    return (total + math.log(alpha) ** 2 / 2) / len(targets)


def noisy_logits(
    n: int, classes: int, seed: int, margin: float = 2.0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(n) % classes
    logits = 2 * torch.randn(n, classes, generator=generator)
    logits[torch.arange(n), targets] += margin
    return logits, targets


@pytest.mark.parametrize("seed", range(3))
def test_the_fit_is_the_minimum_of_the_corrected_cross_entropy(seed):
    logits, targets = noisy_logits(60, 5, seed)
    new = [1, 4]
    logits[:, new] = 1.5 * logits[:, new] + 3
    alpha, beta = fit_correction(logits, targets, new)
    least = plain_objective(alpha, beta, logits, targets, new)
    for da, db in ((1e-3, 0), (-1e-3, 0), (0, 1e-3), (0, -1e-3)):
        assert plain_objective(alpha + da, beta + db, logits, targets, new) > least
    for a in np.linspace(0.1, 3, 12):
        for b in np.linspace(-8, 8, 12):
            assert plain_objective(a, b, logits, targets, new) > least


def test_the_fit_undoes_a_known_bias():
    """Labels drawn from the softmax of logits, which then are distorted: 0.4 (2.5 o + 2.5) - 1."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 6, generator=generator)
    targets = torch.multinomial(logits.softmax(dim=1), 1, generator=generator).flatten()
    new = [5, 2, 3]
    logits[:, new] = 2.5 * logits[:, new] + 2.5
    alpha, beta = fit_correction(logits, targets, new)
    assert alpha == pytest.approx(0.4, rel=0.03)
    assert beta == pytest.approx(-1.0, abs=0.05)


@pytest.mark.parametrize(("scale", "shift"), [(1, 12), (3, 20), (1, -12), (0.1, -9)])
def test_the_fit_mends_a_biased_classifier(scale, shift):
    """However inflated or deflated the new classes' logits: no class is at 0 % for it."""
    logits, targets = noisy_logits(400, 8, seed=5, margin=5)
    fair = (logits.argmax(dim=1) == targets).float().mean()
    new = [6, 7, 1]
    logits[:, new] = scale * logits[:, new] + shift
    held_out = torch.arange(400) < 80

    def by_class(predictions):
        right = [(predictions == c)[(targets == c) & ~held_out].float().mean() for c in range(8)]
        return torch.stack(right)

    assert by_class(logits.argmax(dim=1)).min() == 0
    alpha, beta = fit_correction(logits[held_out], targets[held_out], new)
    logits[:, new] = alpha * logits[:, new] + beta
    mended = by_class(logits.argmax(dim=1))
    assert mended.min() > 0.6
    assert mended.mean() == pytest.approx(fair.item(), abs=0.05)


@pytest.mark.parametrize("right", [True, False], ids=["told apart", "all wrong"])
def test_a_few_samples_without_error_or_all_wrong_leave_a_usable_correction(right):
    """One sample of each class: no pair minimises the cross-entropy alone."""
    logits = torch.full((4, 4), -6.0)
    logits[torch.arange(4), torch.arange(4) if right else torch.tensor([1, 0, 3, 2])] = 6.0
    alpha, beta = fit_correction(logits, torch.arange(4), [2, 3])
    assert 0.05 < alpha < 20
    assert abs(beta) < 10


def test_a_fit_to_logits_that_are_not_finite_says_so():
    logits, targets = noisy_logits(12, 4, seed=0)
    logits[3, 1] = torch.inf
    with pytest.raises(FloatingPointError, match="logits: expected finite numbers"):
        fit_correction(logits, targets, [2, 3])


def test_columns_of_unseen_classes_do_not_count():
    logits, targets = noisy_logits(60, 5, seed=1)
    expected = fit_correction(logits, targets, [1, 4])
    wide = torch.full((60, 9), -1e4)
    wide[:, [0, 2, 3, 6, 8]] = logits
    relabelled = torch.tensor([0, 2, 3, 6, 8])[targets]
    assert fit_correction(wide, relabelled, [2, 8]) == pytest.approx(expected, rel=1e-6)


# --- BiC: the held-out part ---------------------------------------------------------------------


def test_a_balanced_choice_has_a_share_of_the_rarest_class():
    targets = torch.tensor([5] * 30 + [2] * 71 + [9] * 40)
    # 0.7 * 30 is 20.999999999999996 in floating point.
    for share, each in ((0.1, 3), (0.01, 1), (0.5, 15), (0.7, 21), (1.0, 30)):
        chosen = balanced_choice(targets, share, seed=3)
        assert Counter(targets[chosen].tolist()) == {5: each, 2: each, 9: each}
        assert len(set(chosen.tolist())) == 3 * each
    first, again, other = (balanced_choice(targets, 0.1, seed).tolist() for seed in (1, 1, 2))
    assert first == again != other


class HeldOut:
    """Stands in for the fit and keeps what it is given, by experience."""

    def __init__(self, monkeypatch: Any, pair: tuple[float, float] = (0.5, -1.0)) -> None:
        self.calls: list[tuple[torch.Tensor, torch.Tensor, list[int]]] = []
        self.pair = pair
        monkeypatch.setattr(bias_correction, "fit_correction", self)

    def __call__(self, logits, targets, new_classes):
        self.calls.append((logits, targets, list(new_classes)))
        return self.pair


@FAST
@pytest.mark.parametrize("api", APIS)
def test_the_held_out_part_is_balanced_and_not_trained_on(api, fast, monkeypatch):
    steps, held = Steps(), HeldOut(monkeypatch)
    trainer = make(BiC, steps, fast=fast, mem_size=60, train_epochs=2, held_out=0.3)
    memory = trainer.plugins[0].buffer
    for n, experience in enumerate(make_benchmark(api, per_class=20).train_stream[:3]):
        exemplars = images_of(memory.buffer) if n else []
        available = Counter(images_of(experience.dataset) + exemplars)
        trainer.train(experience)
        trained = Counter(
            (int(y), *pixels(x))
            for images, targets, *_ in steps.steps
            for x, y in zip(images, targets, strict=True)
        )
        kept_out = available - trained
        assert set(trained.values()) == {2}  # epochs
        assert trained.keys() | kept_out.keys() == available.keys()
        # 60 exemplars of 2 classes are 20 each, all that there are; of 4 they are 15 each.
        each = [0, 6, 4][n]
        seen = ORDER[: 2 * n + 2]
        assert Counter(label for label, *_ in kept_out) == (dict.fromkeys(seen, each) if n else {})
        if n:
            _, targets, new = held.calls[n - 1]
            assert Counter(targets.tolist()) == dict.fromkeys(seen, each)
            assert set(new) == set(ORDER[2 * n : 2 * n + 2])
        # All of the experience's data may be chosen for the memory, the held-out part included.
        assert set(images_of(memory.buffer)) <= available.keys()
    assert len(held.calls) == 2


def test_another_part_is_held_out_in_each_experience(monkeypatch):
    """Drawn with a seed of its own, which would give the same positions of the same data."""
    seeds = []

    def choice(targets, share, seed):
        seeds.append(seed)
        return balanced_choice(targets, share, seed)

    HeldOut(monkeypatch)
    monkeypatch.setattr(bias_correction, "balanced_choice", choice)
    trainer = make(BiC, mem_size=120, held_out=0.3)
    for experience in make_benchmark(per_class=12).train_stream[:4]:
        trainer.train(experience)
    assert len(seeds) == len(set(seeds)) == 3


@FAST
@pytest.mark.parametrize("api", APIS)
def test_the_fit_sees_the_logits_of_evaluation(api, fast, monkeypatch):
    """Eval-mode logits of images as they are, although training sees them turned."""
    held = HeldOut(monkeypatch)
    turned = T.Compose([T.RandomHorizontalFlip(p=1.0), T.ToTensor()])
    trainer = make(BiC, fast=fast, held_out=0.3)
    benchmark = make_benchmark(api, transform=turned)
    for experience in benchmark.train_stream[:2]:
        trainer.train(experience)
    logits, targets, _ = held.calls[0]
    raw = copy.deepcopy(trainer.model)
    raw.classifier.correction.copy_(torch.tensor([1.0, 0.0]))
    images = {}
    for image, label in grey_images(seed=1):
        images.setdefault(label, []).append(raw.eval()(T.ToTensor()(image)[None])[0])
    for row, target in zip(logits, targets.tolist(), strict=True):
        assert any(torch.allclose(row, own, rtol=1e-2, atol=1e-2) for own in images[target])
    assert trainer.model.classifier.correction.tolist() == [0.5, -1.0]


def test_the_newest_classes_are_corrected_in_the_readout_and_in_the_teacher(monkeypatch):
    held = HeldOut(monkeypatch)
    trainer = make(BiC)
    stream = make_benchmark().train_stream
    for pair, experience in zip(((9, 9), (0.5, -1.0), (2.0, 3.0)), stream[:3], strict=True):
        held.pair = pair
        trainer.train(experience)
        (distillation,) = [p for p in trainer.plugins if isinstance(p, SoftmaxDistillationPlugin)]
        assert_same_tensors(tensors_of(distillation.teacher.network), tensors_of(trainer.model))
    classifier = trainer.model.classifier
    assert classifier.correction.tolist() == [2, 3]
    # By hand: W x + b, and then the pair of the newest classes.
    images = torch.rand(4, 1, 8, 8)
    features = trainer.model.eval().extract_features(images)
    expected = (features @ classifier.weight.T + classifier.bias).detach()
    expected[:, 4:6] = 2 * expected[:, 4:6] + 3
    columns = trainer.model.classes
    torch.testing.assert_close(trainer.model(images)[:, columns].detach(), expected)
    torch.testing.assert_close(distillation.teacher.outputs(images).logits[:, columns], expected)


def naive_bic(*plugins: Any) -> Any:
    torch.manual_seed(0)
    model = ExpandableNetwork(tiny_backbone, 3, make_classifier=BiasCorrectedLinear)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Naive(model=model, optimizer=optimizer, plugins=list(plugins), evaluator=silent())


def test_old_classes_that_all_come_again_are_held_out_too():
    trainer = make(BiC)
    first, both = (
        make_benchmark(experiences=n, order=ORDER, per_class=12).train_stream[0] for n in (5, 2)
    )
    trainer.train(first)
    trainer.train(both)
    assert trainer.model.new_classes == sorted(set(ORDER[:5]) - set(ORDER[:2]))
    assert trainer.model.classifier.correction.tolist() != [1.0, 0.0]


def test_bic_refuses_a_memory_that_comes_after_it():
    strategy = naive_bic(BiasCorrectionPlugin(), HerdingReplayPlugin(24))
    before = tensors_of(strategy.model)
    with pytest.raises(ValueError, match=r"plugins: .*after HerdingReplayPlugin, got it before"):
        strategy.train(make_benchmark().train_stream[0])
    assert_same_tensors(tensors_of(strategy.model), before)


def test_bic_refuses_to_go_on_without_exemplars():
    strategy = naive_bic(BiasCorrectionPlugin())
    stream = make_benchmark().train_stream
    strategy.train(stream[0])
    with pytest.raises(ValueError, match=r"experience: .* exemplars .*got new data alone"):
        strategy.train(stream[1])


def recalls(model: Any, stream: Any) -> list[float]:
    """The share of each class's images that are recognised."""
    hits: dict[int, list[bool]] = {}
    for image, label in (sample[:2] for e in stream for sample in e.dataset.eval()):
        hits.setdefault(label, []).append(int(model.eval()(image[None]).argmax()) == label)
    return [sum(found) / len(found) for found in hits.values()]


@pytest.mark.parametrize("inflation", [30.0, -30.0])
def test_bic_corrects_what_would_leave_all_old_or_new_classes_at_zero(inflation):
    """The new classes' logits are raised, or lowered, beyond all others at the end of training."""

    class Inflate(SupervisedPlugin):
        def after_training_epoch(self, strategy, **kwargs):
            if strategy.clock.train_exp_epochs == 7 and strategy.clock.train_exp_counter:
                with torch.no_grad():
                    strategy.model.classifier.bias[-5:] += inflation

    wide = partial(tiny_backbone, (16, 24, 32))
    trainer = make(BiC, Inflate(), backbone=wide, mem_size=100, train_epochs=8)
    benchmark = make_benchmark(per_class=20, experiences=2)
    for experience in benchmark.train_stream:
        trainer.train(experience)
    corrected = recalls(trainer.model, benchmark.test_stream)
    assert min(np.mean(corrected[:5]), np.mean(corrected[5:])) > 0.4
    trainer.model.classifier.correction.copy_(torch.tensor([1.0, 0.0]))
    uncorrected = recalls(trainer.model, benchmark.test_stream)
    assert max(uncorrected[:5] if inflation > 0 else uncorrected[5:]) == 0


# --- joint training -----------------------------------------------------------------------------


@FAST
@pytest.mark.parametrize("api", APIS)
def test_joint_training_starts_afresh_on_all_data(api, fast):
    class Start(SupervisedPlugin):
        """Keeps the network at each experience's first step."""

        def before_training_epoch(self, strategy, **kwargs):
            if strategy.clock.train_exp_epochs == 0:
                self.blocks = tensors_of(strategy.model.generalized)
                self.weight = strategy.model.classifier.weight.detach().clone()

    start, steps = Start(), Steps()
    trainer = make(Joint, start, steps, fast=fast, train_epochs=2)
    first = tensors_of(trainer.model.generalized)
    weight, everything = torch.zeros(0, 6), Counter()
    stream = make_benchmark(api).train_stream
    for experience in stream[:3]:
        trainer.train(experience)
        assert_same_tensors(start.blocks, first)
        assert not (start.weight[: len(weight)] == weight).any()
        weight = trainer.model.classifier.weight.detach().clone()
        everything.update(images_of(experience.dataset))
        seen = Counter(
            (int(y), *pixels(x))
            for images, targets, *_ in steps.steps
            for x, y in zip(images, targets, strict=True)
        )
        assert seen == Counter({image: 2 * n for image, n in everything.items()})
        assert trainer.plugins[0].buffer.exemplar_bytes == 64 * sum(everything.values())
    # Given again, an experience's own images are in the memory already.
    trainer.train(stream[0])
    assert len(steps.steps) == 2 * 36 / 6


def test_joint_training_learns_what_growth_has_frozen():
    """Cosine classifiers freeze the older classes' vectors, which a fresh start draws anew."""

    class Learned(SupervisedPlugin):
        def before_training_epoch(self, strategy, **kwargs):
            self.before = strategy.model.classifier.weight.detach().clone()

    learned = Learned()
    trainer = make(Joint, learned, classifier=CosineClassifier)
    for experience in make_benchmark().train_stream[:2]:
        trainer.train(experience)
    assert (trainer.model.classifier.weight != learned.before).any(dim=1).all()


def test_a_fresh_start_works_in_avalanches_naive():
    torch.manual_seed(0)
    model = ExpandableNetwork(tiny_backbone, 3)
    first = tensors_of(model.generalized)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fresh = FreshStartPlugin(model)
    strategy = Naive(model=model, optimizer=optimizer, plugins=[fresh], evaluator=silent())
    stream = make_benchmark().train_stream
    strategy.train(stream[0])
    assert not torch.equal(tensors_of(model.generalized)["0.0.weight"], first["0.0.weight"])
    fresh.before_training_exp(strategy)
    assert_same_tensors(tensors_of(model.generalized), first)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (partial(make, ICaRL, kd_weight=-1), "weight: expected a number of at least 0, got -1"),
        (partial(make, ICaRL, temperature=0), "temperature: expected a positive number, got 0"),
        (partial(make, WA, kd_weight=-1), "weight: .*got -1"),
        (partial(make, WA, temperature=-2), "temperature: .*got -2"),
        (partial(make, BiC, kd_weight=-0.1), "weight: .*got -0.1"),
        (partial(make, BiC, temperature=0), "temperature: .*got 0"),
        (partial(make, BiC, held_out=0), "held_out: expected a share above 0 and below 1, got 0"),
        (partial(make, BiC, held_out=1.0), "held_out: .*got 1.0"),
    ],
)
def test_refuses_options_out_of_range(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_joint_training_refuses_to_freeze_what_starts_afresh():
    model = ExpandableNetwork(tiny_backbone, 3, train_generalized=False)
    with pytest.raises(ValueError, match=r"model: .*train_generalized=True, got False"):
        Joint(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def test_joint_training_has_no_size_of_memory():
    with pytest.raises(TypeError, match="mem_size"):
        make(Joint, mem_size=20)


def test_bic_needs_its_classifier():
    model = ExpandableNetwork(tiny_backbone, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    message = r"model: BiC .*returns a BiasCorrectedLinear, got a GrowingLinear"
    with pytest.raises(TypeError, match=message):
        BiC(model=model, optimizer=optimizer)
    plugin = BiasCorrectionPlugin()
    naive = Naive(model=model, optimizer=optimizer, plugins=[plugin], evaluator=silent())
    with pytest.raises(TypeError, match=r"model: BiasCorrectionPlugin .*got a GrowingLinear"):
        naive.train(make_benchmark().train_stream[0])


@pytest.mark.parametrize(
    ("options", "good"),
    [
        ({"mem_size": 15}, False),
        ({"mem_size": 16}, True),
        ({"exemplars_per_class": 1}, False),
        ({"mem_size": 10, "memory_rates": MemoryRates((0, 0, 1, 1, 0), 2, 6)}, True),
        ({"mem_size": 10, "memory_rates": MemoryRates((0, 1, 1, 0, 1), 2, 6)}, False),
    ],
)
def test_bic_needs_two_exemplars_of_each_old_class_before_training(options, good):
    """Eight classes are old when the last experience begins."""
    trainer = make(BiC, **options)
    stream = make_benchmark().train_stream
    if good:
        for experience in stream:
            trainer.train(experience)
        return
    before = tensors_of(trainer.model)
    message = r"mem_size: .*at least two exemplars of each old class .*got one"
    with pytest.raises(ValueError, match=message):
        trainer.train(stream[0])
    assert_same_tensors(tensors_of(trainer.model), before)


def test_bic_has_no_phase_on_exemplars_that_it_holds_out():
    exemplars = Phase(1, learns="classifier", data="exemplars")
    trainer = make(BiC, later_phases=[Phase(1), exemplars])
    with pytest.raises(ValueError, match=r"data: BiasCorrectionPlugin expected phases on 'all'"):
        trainer.train(make_benchmark().train_stream[0])


def test_bic_needs_two_samples_of_each_class():
    trainer = make(BiC, exemplars_per_class=2)
    stream = make_benchmark(per_class=1).train_stream
    trainer.train(stream[0])
    with pytest.raises(ValueError, match=r"experience: .*two samples of each class.* of class \d"):
        trainer.train(stream[1])


def test_all_take_phases():
    for strategy in (ICaRL, WA, BiC, Joint):
        trainer = make(strategy, first_phases=[Phase(1)], later_phases=[Phase(1), Phase(1)])
        for experience in make_benchmark().train_stream[:2]:
            trainer.train(experience)
        assert trainer.clock.train_exp_counter == 2
