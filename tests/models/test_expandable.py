import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from avalanche.benchmarks import split_online_stream
from avalanche.models.dynamic_modules import avalanche_model_adaptation
from avalanche.training.supervised import Naive
from torch import Tensor, nn

from avalanche_memo.budget import inference_bytes, parameter_bytes
from avalanche_memo.models import (
    ExpandableNetwork,
    FastPath,
    StagedBackbone,
    cifar_resnet,
    convnet2,
)
from avalanche_memo.training import MEMO
from tests.helpers import (
    APIS,
    ORDER,
    assert_same_tensors,
    make_benchmark,
    randomize_norms,
    silent,
    tensors_of,
    tiny_backbone,
)

DIM = 6  # features of tiny_backbone


def grown(
    experiences: int, shared_stages: int = 2, api: str = "nc", **options
) -> ExpandableNetwork:
    """A network adapted to the first experiences of the benchmark, as a strategy would do it."""
    network = ExpandableNetwork(tiny_backbone, shared_stages, **options)
    randomize_norms(network)
    for experience in make_benchmark(api).train_stream[:experiences]:
        network.train()
        avalanche_model_adaptation(network, experience)
    return network


def n_parameters(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def images(n: int = 5) -> Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def sgd(network: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)


def naive(network: nn.Module) -> Naive:
    return Naive(model=network, optimizer=sgd(network), train_mb_size=6, evaluator=silent())


def memo(network: ExpandableNetwork, **options) -> MEMO:
    return MEMO(
        model=network,
        optimizer=sgd(network),
        mem_size=20,
        train_mb_size=6,
        evaluator=silent(),
        fast=False,
        **options,
    )


# --- growth -------------------------------------------------------------------------------------


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize(
    ("shared_stages", "blocks"),
    [(0, [1, 2, 3]), (1, [1, 2, 3]), (2, [1, 2, 3]), (3, [1, 1, 1])],
    ids=["DER", "MEMO-2", "MEMO", "single"],
)
def test_grows_in_training_for_unseen_classes_only(api, shared_stages, blocks):
    network = ExpandableNetwork(tiny_backbone, shared_stages)
    seen: set[int] = set()
    for experience, n_blocks in zip(make_benchmark(api).train_stream[:3], blocks, strict=True):
        before = list(network.parameters())
        network.eval()
        avalanche_model_adaptation(network, experience)
        assert all(a is b for a, b in zip(before, network.parameters(), strict=True))
        assert set(network.classes) == seen

        network.train()
        avalanche_model_adaptation(network, experience)
        seen |= set(experience.classes_in_this_experience)
        assert set(network.classes) == seen
        assert set(network.new_classes) == set(experience.classes_in_this_experience)
        assert network.feature_dim == DIM * n_blocks
        assert network.extract_features(images()).shape == (5, DIM * n_blocks)


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("experiences", [1, 2])
def test_a_repeated_experience_does_not_grow(api, experiences):
    network = grown(experiences, api=api)
    parameters = list(network.parameters())
    for experience in make_benchmark(api).train_stream[:experiences]:
        avalanche_model_adaptation(network, experience)
    assert all(a is b for a, b in zip(parameters, network.parameters(), strict=True))


@pytest.mark.parametrize("api", APIS)
def test_grows_once_for_all_sub_experiences_of_an_online_stream(api):
    benchmark = make_benchmark(api, experiences=2)
    network = ExpandableNetwork(tiny_backbone, 2)
    strategy = memo(network)
    for experience in benchmark.train_stream:
        # Unshuffled, a sub-experience has images of one class alone.
        for part in split_online_stream([experience], experience_size=6, shuffle=False):
            strategy.train(part)
            strategy.eval(benchmark.test_stream)
    assert network.growth == [sorted(ORDER[:5]), sorted(ORDER[5:])]
    assert len(network.specialized) == 2


def test_an_experience_of_seen_and_unseen_classes_grows_for_the_unseen_ones():
    network = grown(1)
    # Classes 7 and 2 have been seen; this one has 7 and 4.
    mixed = make_benchmark(order=[7, 4, 2, 5, 0, 9, 1, 8, 3, 6]).train_stream[0]
    avalanche_model_adaptation(network, mixed)
    assert network.new_classes == [4]
    assert network(images()).shape == (5, 8)
    assert network.outputs.auxiliary_logits.shape == (5, 2)


def test_experiences_of_one_class():
    network = ExpandableNetwork(tiny_backbone, 2)
    strategy = memo(network)
    stream = make_benchmark(experiences=10).train_stream
    for experience in stream[:3]:
        strategy.train(experience)
    assert network.classes == ORDER[:3]
    assert network.train()(images()).isfinite().all()
    assert network.outputs.auxiliary_logits.shape == (5, 2)


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("trained", [0, 1, 2])
def test_evaluating_unseen_classes_never_changes_the_model(api, trained):
    benchmark = make_benchmark(api)
    network = ExpandableNetwork(tiny_backbone, 2)
    strategy = naive(network)
    for experience in benchmark.train_stream[:trained]:
        strategy.train(experience)
    tensors, names = tensors_of(network), [name for name, _ in network.named_parameters()]
    parameters, modes = list(network.parameters()), [m.training for m in network.modules()]

    results = strategy.eval(benchmark.test_stream)

    assert_same_tensors(tensors_of(network), tensors)
    assert [name for name, _ in network.named_parameters()] == names
    assert all(a is b for a, b in zip(parameters, network.parameters(), strict=True))
    assert [m.training for m in network.modules()] == modes
    assert len(network.classes) == 2 * trained
    assert all(torch.tensor(value).isfinite() for value in results.values())


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("trained", [0, 2])
def test_evaluating_draws_no_random_numbers(api, trained):
    # Without a strategy, whose data loaders draw a seed each.
    network = grown(trained, api=api).eval()
    logits = network(images())
    state = torch.get_rng_state()
    for experience in make_benchmark(api).test_stream:
        avalanche_model_adaptation(network, experience)
        classes = torch.tensor(sorted(experience.classes_in_this_experience))
        assert F.cross_entropy(network(images(2)), classes).isfinite()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(network(images())[:, : logits.shape[1]], logits)


@pytest.mark.parametrize("api", APIS)
def test_evaluation_reports_loss_and_accuracy_of_unseen_classes(api):
    from avalanche.evaluation.metrics import accuracy_metrics, loss_metrics
    from avalanche.training.plugins import EvaluationPlugin

    benchmark = make_benchmark(api)
    network = ExpandableNetwork(tiny_backbone, 2)
    evaluator = EvaluationPlugin(
        accuracy_metrics(experience=True), loss_metrics(experience=True), loggers=[]
    )
    strategy = Naive(model=network, optimizer=sgd(network), train_mb_size=6, evaluator=evaluator)
    strategy.train(benchmark.train_stream[0])
    results = strategy.eval(benchmark.test_stream)
    losses = [value for name, value in results.items() if name.startswith("Loss_Exp/eval")]
    unseen = [
        value
        for name, value in results.items()
        if name.startswith("Top1_Acc_Exp/eval") and not name.endswith("Exp000")
    ]
    assert len(losses) == 5
    assert all(0 < loss < float("inf") for loss in losses)
    assert unseen == [0.0] * 4


# --- columns ------------------------------------------------------------------------------------


@pytest.mark.parametrize("api", APIS)
def test_a_column_per_class_id(api):
    network = grown(3, api=api).eval()
    with torch.no_grad():
        logits = network(images())
        features = network.extract_features(images())
        weight = network.classifier.weight
        expected = {
            c: features @ weight[row] + network.classifier.bias[row]
            for row, c in enumerate(network.classes)
        }
    assert logits.shape == (5, 10)  # up to class 9
    assert set(expected) == set(ORDER[:6])
    for c, column in expected.items():
        torch.testing.assert_close(logits[:, c], column)


def test_columns_of_unseen_classes_can_never_win():
    network = grown(3).eval()
    avalanche_model_adaptation(network, make_benchmark().test_stream[4])
    nn.init.constant_(network.classifier.bias, -1000.0)
    logits = network(images())
    unseen = sorted(set(range(10)) - set(ORDER[:6]))
    assert set(logits.argmax(dim=1).tolist()) <= set(ORDER[:6])
    assert (logits.softmax(dim=1)[:, unseen] == 0).all()
    assert (0 * logits).isfinite().all()


@pytest.mark.parametrize("shared_stages", [2, 3])
def test_class_ids_are_names_only(shared_stages):
    """The same data under other ids: the same weights after training, and the logits permuted."""
    results = []
    for order in (ORDER, list(range(10))):
        torch.manual_seed(0)
        network = ExpandableNetwork(tiny_backbone, shared_stages)
        for n in range(1, 4):
            network.train()
            network.grow(order[2 * n - 2 : 2 * n])
            optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
            targets = torch.tensor(order[: 2 * n])[torch.arange(12) % (2 * n)]
            F.cross_entropy(network(images(12)), targets).backward()
            optimizer.step()
        results.append((tensors_of(network), network.eval()(images())[:, order[:6]]))
    (tensors, logits), (same_tensors, same_logits) = results
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, same_tensors[name])
    torch.testing.assert_close(logits, same_logits)


# --- what learns --------------------------------------------------------------------------------


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("train_generalized", [True, False])
def test_generalized_blocks_go_on_learning_unless_frozen(api, train_generalized):
    network = ExpandableNetwork(tiny_backbone, 2, train_generalized=train_generalized)
    strategy = memo(network)
    stream = make_benchmark(api).train_stream
    started = tensors_of(network.generalized)
    strategy.train(stream[0])
    first = tensors_of(network.generalized)
    assert not any(torch.equal(first[name], started[name]) for name in started)
    strategy.train(stream[1])
    second = tensors_of(network.generalized)
    if train_generalized:
        assert not any(torch.equal(first[name], second[name]) for name in first)
    else:
        assert_same_tensors(first, second)
        assert not any(p.requires_grad for p in network.generalized.parameters())


@pytest.mark.parametrize("shared_stages", [0, 1, 2])
def test_a_new_block_starts_from_the_previous_one(shared_stages):
    network = grown(2, shared_stages)
    nn.init.normal_(next(network.specialized[-1].parameters()))
    previous = tensors_of(network.specialized[-1])
    avalanche_model_adaptation(network, make_benchmark().train_stream[2])
    assert len(network.specialized) == 3
    assert_same_tensors(tensors_of(network.specialized[-1]), previous)
    shared = {id(p) for block in network.specialized[:-1] for p in block.parameters()}
    assert not shared & {id(p) for p in network.specialized[-1].parameters()}
    assert all(p.requires_grad for p in network.specialized[-1].parameters())


@pytest.mark.parametrize("make", [naive, memo], ids=["Naive", "MEMO"])
@pytest.mark.parametrize("shared_stages", [1, 2])
def test_older_blocks_stay_as_they_are(make, shared_stages):
    """No gradient, no weight decay, no momentum drift, no change of BatchNorm's statistics."""
    network = ExpandableNetwork(tiny_backbone, shared_stages)
    strategy = make(network)
    stream = make_benchmark().train_stream
    strategy.train(stream[0])
    first = tensors_of(network.specialized[0])
    strategy.train(stream[1])
    assert_same_tensors(tensors_of(network.specialized[0]), first)
    second = tensors_of(network.specialized[1])
    assert not any(torch.equal(second[name], first[name]) for name in first)
    strategy.train(stream[2])
    assert_same_tensors(tensors_of(network.specialized[0]), first)
    assert_same_tensors(tensors_of(network.specialized[1]), second)
    frozen = list(network.specialized[:-1].parameters())
    assert all(p.grad is None and not p.requires_grad for p in frozen)


def test_a_gradient_left_over_at_freezing_is_dropped():
    """With one, an optimizer moves a parameter by weight decay and momentum alone."""
    network = grown(1)
    F.cross_entropy(network(images(2)), torch.tensor([7, 2])).backward()
    avalanche_model_adaptation(network, make_benchmark().train_stream[1])
    before = tensors_of(network.specialized[0])
    optimizer = sgd(network)
    optimizer.step()
    assert_same_tensors(tensors_of(network.specialized[0]), before)


def test_older_blocks_have_no_optimizer_state():
    network = ExpandableNetwork(tiny_backbone, 2)
    strategy = memo(network)
    for experience in make_benchmark().train_stream[:3]:
        strategy.train(experience)
    state = strategy.optimizer.state
    assert not [p for p in network.specialized[:-1].parameters() if state.get(p)]
    learning = [*network.generalized.parameters(), *network.specialized[-1].parameters()]
    assert all("momentum_buffer" in state[p] for p in learning)


@pytest.mark.parametrize("train_generalized", [True, False])
def test_norms_of_frozen_blocks_stay_in_evaluation_mode(train_generalized):
    network = grown(3, train_generalized=train_generalized)
    before = tensors_of(network)
    for mode in (True, False, True):
        network.train(mode)
        network(10 * images())
    after = tensors_of(network)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    statistics = {name for name in before if "running" in name or "num_batches" in name}
    expected = {name for name in statistics if name.startswith("specialized.2.")}
    if train_generalized:
        expected |= {name for name in statistics if name.startswith("generalized.")}
    assert moved == expected


# --- gradients ----------------------------------------------------------------------------------


def plain_gradients(
    state: dict[str, Tensor], x: Tensor, rows: Tensor, *, detach: bool
) -> dict[str, Tensor]:
    """Cross-entropy's gradients with two blocks, the first one frozen, written out by hand.

    One generalized stage; blocks of two stages each. ``rows`` are the targets as rows of the
    classifier. With ``detach``, the frozen block's input is a constant.
    """
    learning = {
        name: tensor.clone().requires_grad_()
        for name, tensor in state.items()
        if tensor.is_floating_point() and "running" not in name
    }

    def stage(prefix: str, x: Tensor, training: bool) -> Tensor:
        x = F.conv2d(x, learning[f"{prefix}.0.weight"], learning[f"{prefix}.0.bias"], padding=1)
        if training:
            mean, variance = x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3), unbiased=False)
        else:
            mean, variance = (state[f"{prefix}.1.running_{name}"] for name in ("mean", "var"))
        x = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
        scale, shift = learning[f"{prefix}.1.weight"], learning[f"{prefix}.1.bias"]
        return (x * scale[:, None, None] + shift[:, None, None]).relu()

    shared = stage("generalized.0", x, True)
    features = []
    for block, training in ((0, False), (1, True)):
        maps = shared.detach() if detach and not training else shared
        for index in range(2):
            maps = stage(f"specialized.{block}.{index}", maps, training)
        features.append(maps.mean(dim=(2, 3)))
    weight = torch.cat([learning[f"classifier.weights.{block}"] for block in range(2)], dim=1)
    logits = torch.cat(features, dim=1) @ weight.T + learning["classifier.bias"]
    loss = -logits.log_softmax(dim=1)[torch.arange(len(rows)), rows].mean()
    loss.backward()
    return {name: tensor.grad for name, tensor in learning.items() if tensor.grad is not None}


def test_gradient_reaches_the_generalized_blocks_through_frozen_blocks():
    network = grown(2, shared_stages=1)
    stopped = grown(2, shared_stages=1, gradient_through_frozen=False)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    stopped.load_state_dict(network.state_dict())
    x, rows = images(12), torch.arange(12) % 4
    state = tensors_of(network)
    gradients = {}
    for name, model, detach in (("through", network, False), ("stopped", stopped, True)):
        expected = plain_gradients(state, x, rows, detach=detach)
        F.cross_entropy(model(x), torch.tensor(model.classes)[rows]).backward()
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.startswith("specialized.0"):
                assert parameter.grad is None
            elif not parameter_name.startswith("auxiliary"):
                torch.testing.assert_close(
                    parameter.grad, expected[parameter_name], rtol=1e-4, atol=1e-6
                )
        gradients[name] = expected["generalized.0.0.weight"]
    assert not torch.allclose(gradients["through"], gradients["stopped"], rtol=0.1)


# --- the heads ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("shared_stages", "blocks"), [(2, 3), (3, 1)])
def test_the_head_grows_in_both_directions_and_keeps_old_weights(shared_stages, blocks):
    network = ExpandableNetwork(tiny_backbone, shared_stages)
    strategy = naive(network)
    stream = make_benchmark().train_stream
    for experience in stream[:2]:
        strategy.train(experience)
    weight, bias = network.classifier.weight.detach().clone(), network.classifier.bias.clone()
    network.train()
    avalanche_model_adaptation(network, stream[2])
    assert network.classifier.weight.shape == (6, DIM * blocks)
    assert torch.equal(network.classifier.weight[:4, : weight.shape[1]], weight)
    assert torch.equal(network.classifier.bias[:4], bias)


def auxiliary_parameters(network: ExpandableNetwork) -> dict[str, Tensor]:
    return {n: p for n, p in network.named_parameters() if n.startswith("auxiliary")}


@pytest.mark.parametrize("shared_stages", [0, 1, 2])
@pytest.mark.parametrize("per_experience", [2, 5])
def test_the_auxiliary_head_sees_the_newest_block_alone(shared_stages, per_experience):
    network = ExpandableNetwork(tiny_backbone, shared_stages)
    randomize_norms(network)
    x = images()
    for experience in make_benchmark(experiences=10 // per_experience).train_stream[:2]:
        network.train()
        assert network(x).shape[0] == 5
        assert network.outputs.auxiliary_logits is None
        avalanche_model_adaptation(network, experience)
    network(x)
    weight, bias = auxiliary_parameters(network).values()
    assert weight.shape == (per_experience + 1, DIM)
    maps = x
    # In training mode, BatchNorm's output does not depend on its running statistics.
    for stage in (*network.generalized, *network.specialized[-1]):
        maps = stage(maps)
    expected = maps.mean(dim=(2, 3)) @ weight.T + bias
    torch.testing.assert_close(network.outputs.auxiliary_logits, expected)


def test_the_auxiliary_head_is_made_anew_for_each_block():
    network = grown(2)
    before = list(auxiliary_parameters(network).values())
    avalanche_model_adaptation(network, make_benchmark().train_stream[2])
    after = list(auxiliary_parameters(network).values())
    assert len(before) == len(after) == 2
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_auxiliary_head_is_for_training_only():
    network = grown(3).eval()
    logits = network(images())
    assert network.outputs.auxiliary_logits is None
    for parameter in auxiliary_parameters(network).values():
        nn.init.normal_(parameter)
    assert torch.equal(network(images()), logits)

    auxiliary = sum(p.numel() for p in auxiliary_parameters(network).values())
    assert auxiliary == 3 * DIM + 3
    counted = {id(p) for module in network.inference_modules() for p in module.parameters()}
    assert not counted & {id(p) for p in auxiliary_parameters(network).values()}
    assert parameter_bytes(network) == 4 * (n_parameters(network) - auxiliary)
    buffers = sum(
        b.numel() * b.element_size() for name, b in network.named_buffers() if "columns" not in name
    )
    assert inference_bytes(network) == parameter_bytes(network) + buffers


def test_a_network_that_shares_all_stages_has_no_auxiliary_head():
    network = grown(3, shared_stages=3)
    network(images())
    assert network.outputs.auxiliary_logits is None
    assert not auxiliary_parameters(network)


# --- outputs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared_stages", [0, 2, 4])
def test_a_stage_may_stand_in_several_places(shared_stages):
    pool = nn.MaxPool2d(2)
    backbone = StagedBackbone([nn.Conv2d(1, 4, 1), pool, nn.Conv2d(4, 4, 1), pool], 4)
    maps = backbone.stage_maps(images())
    network = ExpandableNetwork(lambda: copy.deepcopy(backbone), shared_stages)
    network.grow([0, 1])
    network(images())
    torch.testing.assert_close(network.outputs.stage_maps, maps)
    network.use(FastPath(bfloat16=False)).grow([2, 3])
    frozen_features = network.extract_features(images())[:, :4]
    torch.testing.assert_close(frozen_features, StagedBackbone.pool(maps[-1]))


@pytest.mark.parametrize("shared_stages", [0, 1, 2, 3])
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_outputs_are_of_the_same_forward_pass(shared_stages, mode):
    network = grown(2, shared_stages).train(mode)
    calls = []
    newest = [*network.generalized, *(network.specialized[-1] if shared_stages < 3 else [])]
    for stage in newest:
        stage.register_forward_hook(lambda *_: calls.append(1))
    logits = network(images())
    outputs = network.outputs
    assert len(calls) == 3
    assert outputs.logits is logits
    assert [tuple(m.shape) for m in outputs.stage_maps] == [(5, c, 8, 8) for c in (4, 5, 6)]
    torch.testing.assert_close(outputs.stage_maps[-1].mean(dim=(2, 3)), outputs.features[:, -DIM:])
    weight, bias = network.classifier.weight, network.classifier.bias
    torch.testing.assert_close(logits[:, network.classes], outputs.features @ weight.T + bias)
    if mode and shared_stages < 3:
        weight, bias = auxiliary_parameters(network).values()
        torch.testing.assert_close(
            outputs.auxiliary_logits, outputs.features[:, -DIM:] @ weight.T + bias
        )


def test_features_of_older_blocks_come_first():
    network = grown(2).eval()
    x = images()
    with torch.no_grad():
        shared = network.generalized[1](network.generalized[0](x))
        expected = [block[0](shared).mean(dim=(2, 3)) for block in network.specialized]
        torch.testing.assert_close(network.extract_features(x), torch.cat(expected, dim=1))


def test_deepcopy_after_a_training_forward():
    network = grown(2)
    F.cross_entropy(network(images()), torch.tensor([7, 2, 5, 0, 7])).backward()
    twin = copy.deepcopy(network)
    assert not {id(p) for p in network.parameters()} & {id(p) for p in twin.parameters()}
    assert torch.equal(twin.eval()(images()), network.eval()(images()))
    avalanche_model_adaptation(twin.train(), make_benchmark().train_stream[2])
    assert (len(twin.classes), len(network.classes)) == (6, 4)


# --- saving -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared_stages", [0, 2, 3])
@pytest.mark.parametrize("experiences", [0, 1, 3])
@pytest.mark.parametrize("train_generalized", [True, False])
def test_a_fresh_network_takes_a_saved_state(
    tmp_path, shared_stages, experiences, train_generalized
):
    network = grown(experiences, shared_stages, train_generalized=train_generalized).eval()
    torch.save(network.state_dict(), tmp_path / "network.pt")
    fresh = ExpandableNetwork(tiny_backbone, shared_stages, train_generalized=train_generalized)
    random_state = torch.get_rng_state()
    fresh.load_state_dict(torch.load(tmp_path / "network.pt", weights_only=True))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(fresh.eval()(images()), network(images()))
    assert fresh.classes == network.classes
    learning = {name: p.requires_grad for name, p in network.named_parameters()}
    assert {name: p.requires_grad for name, p in fresh.named_parameters()} == learning
    for model in (fresh, network):
        model.train()(images())  # moves the norms' statistics, but not those of frozen blocks
    assert_same_tensors(tensors_of(fresh), tensors_of(network))


def test_a_network_that_grew_otherwise_refuses_a_saved_state():
    other = ExpandableNetwork(tiny_backbone, 2)
    other.grow([1])
    with pytest.raises(ValueError, match=r"state_dict: .*but this one has learned \[\[1\]\]"):
        other.load_state_dict(grown(2).state_dict())


# --- arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shared_stages", [-1, 4])
def test_refuses_a_wrong_number_of_shared_stages(shared_stages):
    with pytest.raises(ValueError, match=f"shared_stages: expected 0 to 3.*got {shared_stages}"):
        ExpandableNetwork(tiny_backbone, shared_stages)


@pytest.mark.parametrize(
    ("make_backbone", "got"),
    [
        (lambda: nn.Linear(1, 1), "Linear"),
        (tiny_backbone(), "StagedBackbone"),
        (lambda: None, "NoneType"),
        ("resnet", "str"),
    ],
)
def test_refuses_what_makes_no_backbone(make_backbone, got):
    with pytest.raises(TypeError, match=f"make_backbone: expected a callable.*got {got}"):
        ExpandableNetwork(make_backbone, 1)


@pytest.mark.parametrize("classes", [[], [3, 3], [7]])
def test_refuses_to_grow_for_nothing_new(classes):
    with pytest.raises(ValueError, match="new_classes: expected"):
        grown(1).grow(classes)


def test_make_backbone_is_called_once():
    calls = []

    def make() -> StagedBackbone:
        calls.append(1)
        return tiny_backbone()

    network = ExpandableNetwork(make, 2)
    network.grow([0])
    network.grow([1])
    assert len(calls) == 1


# --- published counts ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shared_stages", "blocks", "features"),
    [
        (2, 112_016 + 10 * 351_488, 640),  # MEMO
        (0, 10 * 463_504, 640),  # DER
        (3, 463_504, 64),  # Replay
    ],
    ids=["MEMO", "DER", "Replay"],
)
def test_parameters_of_ten_experiences_with_resnet_32(shared_stages, blocks, features):
    network = ExpandableNetwork(partial(cifar_resnet, 32), shared_stages)
    for start in range(0, 100, 10):
        network.grow(range(start, start + 10))
    head = 100 * features + 100
    assert n_parameters(*network.inference_modules()) == blocks + head
    assert parameter_bytes(network) == 4 * (blocks + head)


def test_parameters_of_convnet2_after_four_experiences():
    network = ExpandableNetwork(convnet2, 1)
    for c in range(4):
        network.grow([c])
    assert parameter_bytes(network) == 4 * (1_920 + 4 * 37_056 + 4 * 256 + 4)
