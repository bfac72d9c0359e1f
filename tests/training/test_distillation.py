import copy
import math
from functools import partial

import pytest
import torch
from avalanche.benchmarks import split_online_stream
from avalanche.core import SupervisedPlugin
from avalanche.models import SimpleMLP
from avalanche.training.supervised import Naive

from avalanche_memo.models import (
    CosineClassifier,
    ExpandableNetwork,
    FastPath,
    GrowingLinear,
    ProxyCosineClassifier,
    cifar_resnet,
)
from avalanche_memo.models.heads import class_proxies
from avalanche_memo.training.plugins import (
    GradientClampPlugin,
    HerdingReplayPlugin,
    ImprintingPlugin,
    LessForgetPlugin,
    MarginRankingPlugin,
    PODDistillationPlugin,
    PreviousModel,
    SoftmaxDistillationPlugin,
    WeightAlignmentPlugin,
)
from avalanche_memo.training.storage_policy import dataset_features
from tests.helpers import (
    APIS,
    ORDER,
    assert_same_tensors,
    make_benchmark,
    silent,
    tensors_of,
    tiny_backbone,
)
from tests.reference import losses as plain


class Step(SupervisedPlugin):
    """Keeps what the first step of an experience's loss is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = self.network = None

    def before_training_exp(self, strategy, **kwargs):
        self.network = None

    def before_backward(self, strategy, **kwargs):
        if self.network is None:
            self.images, self.targets = strategy.mb_x.clone(), strategy.mb_y.clone()
            self.network = copy.deepcopy(strategy.model)
            self.outputs = strategy.model.outputs
            self.loss = strategy.loss.item()
            self.main = strategy._criterion(strategy.mb_output, strategy.mb_y).item()


def naive(model, *plugins, lr=0.1) -> Naive:
    return Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=lr),
        train_mb_size=6,
        plugins=list(plugins),
        evaluator=silent(),
    )


def network(classifier=GrowingLinear, shared_stages: int = 3) -> ExpandableNetwork:
    torch.manual_seed(0)
    return ExpandableNetwork(tiny_backbone, shared_stages, make_classifier=classifier)


def added(plugin, model, api="nc", experiences=3, learns="all"):
    """Per experience after the first: what the plugin added to the loss, and what it is made of."""
    step = Step()
    strategy = naive(model, HerdingReplayPlugin(20), plugin, step)
    found = []
    for n, experience in enumerate(make_benchmark(api).train_stream[:experiences]):
        old = copy.deepcopy(model).eval()
        if learns == "classifier" and n > 0:
            model.requires_grad_(False)
            model.classifier.requires_grad_(True)
        strategy.train(experience)
        if n == 0:
            assert step.loss == pytest.approx(step.main, rel=1e-6)
            continue
        with torch.no_grad():
            old(step.images)
        found.append((step.loss - step.main, copy.copy(step), old))
    assert found
    return found


def doubles(tensors):
    return [t.detach().double() for t in tensors]


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize(
    ("options", "weight", "flat", "pooling"),
    [
        ({}, 3, 1, "spatial"),
        ({"pod_weight": 0}, 0, 1, "spatial"),
        ({"flat_weight": 0, "pooling": "gap"}, 3, 0, "gap"),
        ({"pod_weight": 2, "flat_weight": 0.5}, 2, 0.5, "spatial"),
    ],
)
def test_pod_is_added_from_the_second_experience_on(api, options, weight, flat, pooling):
    for loss, step, old in added(PODDistillationPlugin(**options), network(), api):
        new, teacher = step.outputs, old.outputs
        expected = 0.0
        if weight:
            maps = doubles(teacher.stage_maps), doubles(new.stage_maps)
            expected += weight * plain.pod(*maps, pooling, True).item()
        if flat:
            expected += flat * plain.less_forget(*doubles([teacher.features, new.features])).item()
        expected *= math.sqrt(len(step.network.classes) / 2)
        assert loss == pytest.approx(expected, rel=1e-4)


def test_features_are_not_distilled_where_the_classifier_alone_learns():
    for loss, *_ in added(PODDistillationPlugin(), network(), learns="classifier"):
        assert loss == 0


@pytest.mark.parametrize("options", [{}, {"kd_weight": 2.0, "temperature": 3.0, "adaptive": True}])
@pytest.mark.parametrize(("shared_stages", "learns"), [(1, "all"), (3, "all"), (3, "classifier")])
def test_softmax_distillation_sees_the_old_columns(options, shared_stages, learns):
    weight, temperature = options.get("kd_weight", 0.9), options.get("temperature", 10.0)
    plugin = SoftmaxDistillationPlugin(**options)
    for loss, step, old in added(plugin, network(shared_stages=shared_stages), learns=learns):
        columns = old.classes
        assert len(columns) == len(step.network.classes) - 2
        new, teacher = doubles([step.outputs.logits[:, columns], old.outputs.logits[:, columns]])
        factor = math.sqrt(len(step.network.classes) / 2) if options else 1
        expected = factor * weight * plain.distillation(new, teacher, temperature).item()
        assert loss == pytest.approx(expected, rel=1e-3, abs=3e-6)


@pytest.mark.parametrize(("options", "weight"), [({}, 5.0), ({"less_forget_weight": 2.0}, 2)])
def test_less_forget_weighs_old_against_new_classes(options, weight):
    for loss, step, old in added(LessForgetPlugin(**options), network(CosineClassifier)):
        features = doubles([old.outputs.features, step.outputs.features])
        factor = math.sqrt(len(old.classes) / 2)
        expected = weight * factor * plain.less_forget(*features).item()
        assert loss == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "k"), [({}, 2), ({"hard_negatives": 7, "margin": 0.2, "ranking_weight": 3.0}, 2)]
)
def test_margin_ranking_uses_similarities_before_scaling(options, k):
    model = network(partial(CosineClassifier, scale=4.0))
    for loss, step, old in added(MarginRankingPlugin(**options), model):
        similarities = (step.outputs.logits / step.network.classifier.scale).detach().double()
        seen = similarities[:, step.network.classes]
        targets = torch.tensor([step.network.classes.index(int(t)) for t in step.targets])
        old_rows = list(range(len(old.classes)))
        margin, weight = options.get("margin", 0.5), options.get("ranking_weight", 1.0)
        expected = weight * plain.margin_ranking(seen, targets, old_rows, k, margin).item()
        assert loss == pytest.approx(expected, rel=1e-4, abs=1e-6)


# --- the previous model -------------------------------------------------------------------------


def test_the_previous_model_is_frozen_while_the_network_learns():
    model, plugin = network(), PODDistillationPlugin()
    strategy = naive(model, plugin)
    stream = make_benchmark().train_stream
    strategy.train(stream[0])
    kept = tensors_of(model)
    assert_same_tensors(tensors_of(plugin.teacher.network), kept)
    seen = []

    class Watch(SupervisedPlugin):
        def after_training_epoch(self, strategy, **kwargs):
            seen.append(tensors_of(plugin.teacher.network))

    strategy.plugins.append(Watch())
    strategy.train(stream[1])
    assert_same_tensors(seen[0], kept)
    assert not any(p.requires_grad for p in plugin.teacher.network.parameters())
    assert not plugin.teacher.network.training


@pytest.mark.parametrize("size", [5, 4])  # Of parts of equal size Avalanche marks none as the last.
def test_the_previous_model_knows_nothing_of_the_present_online_experience(size):
    plugin = SoftmaxDistillationPlugin()
    strategy = naive(network(), plugin)
    stream = make_benchmark().train_stream
    strategy.train(stream[0])
    known = []
    for part in split_online_stream(stream[1:2], experience_size=size):
        known.append(set(plugin.teacher.network.classes))
        strategy.train(part)
    assert known == [set(ORDER[:2])] * 3
    assert set(plugin.teacher.network.classes) == set(ORDER[:4])


def test_plugins_that_share_a_previous_model_share_its_forward_pass():
    teacher = PreviousModel()
    plugins = [PODDistillationPlugin(teacher=teacher), SoftmaxDistillationPlugin(teacher=teacher)]
    alone = [PODDistillationPlugin(), SoftmaxDistillationPlugin()]
    results = []
    for group in (plugins, alone):
        model = network()
        strategy = naive(model, *group)
        torch.manual_seed(3)
        for experience in make_benchmark().train_stream[:3]:
            strategy.train(experience)
        results.append(tensors_of(model))
    assert_same_tensors(*results)
    images = torch.rand(4, 1, 8, 8)
    assert teacher.outputs(images) is teacher.outputs(images)
    assert teacher.outputs(images) is not teacher.outputs(images.clone())


@pytest.mark.parametrize("attention", ["cbam", None])
@pytest.mark.parametrize(("low", "tolerance"), [(False, 1e-4), (True, 0.1)])
def test_a_folded_previous_model_computes_the_same(attention, low, tolerance):
    torch.manual_seed(0)
    model = ExpandableNetwork(partial(cifar_resnet, 8, attention, last_relu=False), 3)
    model.grow([3, 1])
    images = torch.randn(8, 3, 16, 16)
    model.train()(images)
    plain_teacher, folded = PreviousModel(), PreviousModel()
    plain_teacher.keep(model)
    model.fast = FastPath(False, False, bfloat16=low, fold_frozen=True)
    folded.keep(model)
    assert not any("Norm" in type(m).__name__ for m in folded._running.modules())
    assert_same_tensors(tensors_of(folded.network), tensors_of(model))
    expected, got = plain_teacher.outputs(images), folded.outputs(images)
    pairs = zip([got.logits, *got.stage_maps], [expected.logits, *expected.stage_maps], strict=True)
    for own, other in pairs:
        torch.testing.assert_close(own, other, rtol=tolerance, atol=tolerance, check_dtype=not low)
    assert got.logits.dtype == torch.float32


@pytest.mark.parametrize("classifier", [GrowingLinear, partial(ProxyCosineClassifier, 2)])
@pytest.mark.parametrize("shared_stages", [1, 3])
def test_a_saved_previous_model_is_rebuilt(classifier, shared_stages, tmp_path):
    model = network(classifier, shared_stages)
    model.grow([7, 2])
    model.grow([5])
    teacher = PreviousModel()
    assert teacher.state_dict() == {"network": None}
    teacher.keep(model)
    images = torch.rand(4, 1, 8, 8)
    expected = teacher.outputs(images)
    torch.save(teacher.state_dict(), tmp_path / "teacher.pt")
    model.grow([0, 9])  # What it is rebuilt from has learned more by now.
    other = PreviousModel()
    other.load_state_dict(torch.load(tmp_path / "teacher.pt", weights_only=True))
    assert_same_tensors(
        {k: v for k, v in other.state_dict()["network"].items() if torch.is_tensor(v)},
        tensors_of(teacher.network),
    )
    other.restore(model)
    assert_same_tensors(tensors_of(other.network), tensors_of(teacher.network))
    assert other.network.classes == [7, 2, 5]
    got = other.outputs(images)
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.features, expected.features)


# --- imprinting and clamping --------------------------------------------------------------------


class Proxies(SupervisedPlugin):
    """Keeps the classifier and the network as they are before the first step."""

    def before_training_epoch(self, strategy, **kwargs):
        self.network = copy.deepcopy(strategy.model)


@pytest.mark.parametrize("api", APIS)
def test_new_proxies_are_imprinted_from_the_second_experience_on(api):
    model, before = network(partial(ProxyCosineClassifier, 3)), Proxies()
    strategy = naive(model, ImprintingPlugin(), before)
    for n, experience in enumerate(make_benchmark(api).train_stream[:3]):
        strategy.train(experience)
        found = before.network.classifier.weights[n]
        features = dataset_features(before.network, experience.dataset, "cpu")
        targets = torch.tensor(list(experience.dataset.targets))
        first = features[targets == before.network.new_classes[0]]
        cosines = torch.nn.functional.normalize(found[:3], dim=1) @ class_proxies(first, 3).T
        matched = cosines.max(dim=1).values.min().item() > 0.98
        assert matched == (n > 0)


def test_classes_that_another_strategy_has_learned_are_not_imprinted():
    model, before = network(CosineClassifier), Proxies()
    stream = make_benchmark().train_stream
    strategy = naive(model, ImprintingPlugin())
    for experience in stream[:2]:
        strategy.train(experience)
    learned = model.classifier.weight.detach().clone()
    naive(model, ImprintingPlugin(), before).train(stream[1])
    assert torch.equal(before.network.classifier.weight, learned)


def test_imprinting_goes_on_from_a_saved_state():
    model = network(CosineClassifier)
    stream = make_benchmark().train_stream
    first = ImprintingPlugin()
    strategy = naive(model, first)
    for experience in stream[:2]:
        strategy.train(experience)
    second, before = ImprintingPlugin(), Proxies()
    second.load_state_dict(first.state_dict())
    learned = model.classifier.weight.detach().clone()
    naive(model, second, before).train(stream[1])
    assert torch.equal(before.network.classifier.weight, learned)


def test_gradients_are_clamped_by_value():
    model = network()
    found = []

    class Watch(SupervisedPlugin):
        def __init__(self, wanted):
            super().__init__()
            self.wanted = wanted

        def before_update(self, strategy, **kwargs):
            gradients = [p.grad.clone() for p in strategy.model.parameters()]
            found.append((self.wanted, gradients))

    plugins = [Watch("before"), GradientClampPlugin(0.01), Watch("after")]
    naive(model, *plugins).train(make_benchmark().train_stream[0])
    for (_, before), (_, after) in zip(found[::2], found[1::2], strict=True):
        assert max(g.abs().max() for g in before) > 0.01
        for own, other in zip(after, before, strict=True):
            assert torch.equal(own, other.clamp(-0.01, 0.01))


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            partial(PODDistillationPlugin, -1),
            "^pod_weight: expected a number of at least 0, got -1",
        ),
        (partial(PODDistillationPlugin, 1, -2), "flat_weight: .*got -2"),
        (partial(PODDistillationPlugin, pooling="x"), "pooling: expected one of spatial.*'x'"),
        (partial(SoftmaxDistillationPlugin, -1), "^kd_weight: .*got -1"),
        (
            partial(SoftmaxDistillationPlugin, 1, 0),
            "temperature: expected a positive number, got 0",
        ),
        (partial(LessForgetPlugin, -1), "^less_forget_weight: .*got -1"),
        (
            partial(MarginRankingPlugin, 0),
            "hard_negatives: expected a whole number of at least 1, got 0",
        ),
        (partial(MarginRankingPlugin, margin=-1), "margin: .*got -1"),
        (partial(MarginRankingPlugin, ranking_weight=-1), "^ranking_weight: .*got -1"),
        (partial(GradientClampPlugin, 0), "^gradient_limit: expected a positive number, got 0"),
    ],
)
def test_refuses_numbers_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "plugin",
    [
        PODDistillationPlugin,
        SoftmaxDistillationPlugin,
        LessForgetPlugin,
        MarginRankingPlugin,
        ImprintingPlugin,
    ],
)
def test_refuses_another_model_before_training(plugin):
    model = SimpleMLP(input_size=64)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(
        TypeError, match=rf"model: {plugin.__name__} .*ExpandableNetwork.*SimpleMLP"
    ):
        naive(model, plugin()).train(make_benchmark().train_stream[0])
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("plugin", [MarginRankingPlugin, ImprintingPlugin])
def test_refuses_a_linear_classifier(plugin):
    with pytest.raises(TypeError, match=rf"model: {plugin.__name__} .*got a GrowingLinear"):
        naive(network(), plugin()).train(make_benchmark().train_stream[0])


def test_weight_alignment_refuses_a_cosine_classifier():
    with pytest.raises(TypeError, match=r"model: WeightAlignmentPlugin .*got a CosineClassifier"):
        naive(network(CosineClassifier), WeightAlignmentPlugin()).train(
            make_benchmark().train_stream[0]
        )


@pytest.mark.parametrize("plugin", [PODDistillationPlugin, LessForgetPlugin])
def test_refuses_a_network_that_adds_blocks(plugin):
    with pytest.raises(
        ValueError, match=rf"model: {plugin.__name__} .*shared_stages 3 of 3, got 2"
    ):
        naive(network(shared_stages=2), plugin()).train(make_benchmark().train_stream[0])
