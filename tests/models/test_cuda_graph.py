"""CUDA graphs on a GPU, and without one on a stand-in that notes operations and does them again."""

import copy
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from avalanche_memo.models import ExpandableNetwork, FastPath, cifar_resnet, expandable
from tests.helpers import randomize_norms

GRAPHS = FastPath(bfloat16=False)
EAGER = FastPath(bfloat16=False, cuda_graphs=False)


def tensors(output):
    return [leaf for leaf in tree_leaves(output) if torch.is_tensor(leaf)]


def aliases(func, write):
    return any(r.alias_info and r.alias_info.is_write == write for r in func._schema.returns)


class NotedOperations(TorchDispatchMode):
    """Stands for a CUDA graph: while noting, nothing has an effect; replayed, all of it has."""

    def __init__(self):
        super().__init__()
        self.operations, self.before = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten.native_batch_norm.default:
            written = args[3:5]
        else:
            named = zip(func._schema.arguments, args, strict=False)
            written = [a for s, a in named if s.alias_info and s.alias_info.is_write]
        self.before += [(t, t.clone()) for t in tensors(written)]
        output = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, output))
        return output

    def pool(self):
        return None

    def fresh(self, func, output):
        if aliases(func, write=True) or aliases(func, write=False):
            return []
        return tensors(output)

    def undo(self):
        for tensor, value in reversed(self.before):
            tensor.data.copy_(value)
        for func, _, _, output in self.operations:
            for tensor in self.fresh(func, output):
                if tensor.is_floating_point():
                    tensor.data.fill_(torch.nan)

    def replay(self):
        with torch.no_grad():
            for func, args, kwargs, output in self.operations:
                if aliases(func, write=False):
                    continue
                again = func(*args, **kwargs)
                for old, new in zip(self.fresh(func, output), tensors(again), strict=False):
                    old.data.copy_(new)


@pytest.fixture(params=["stand-in", "cuda"])
def device(request, monkeypatch):
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")
        return "cuda"

    @contextmanager
    def graph(noted, pool=None, capture_error_mode="global"):
        with noted:
            yield
        with torch.no_grad():
            noted.undo()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", NotedOperations)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(expandable, "recordable", lambda x: True)
    return "cpu"


def network(shared, device, fast, experiences=3, **options):
    torch.manual_seed(0)
    made = ExpandableNetwork(partial(cifar_resnet, 8), shared, **options)
    randomize_norms(made)
    for i in range(experiences):
        made.grow([2 * i, 2 * i + 1])
    return made.to(device).use(fast).train()


def batches(sizes, device, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for size in sizes:
        images = torch.randn(size, 3, 16, 16, generator=generator)
        yield images.to(device), torch.randint(0, 6, (size,), generator=generator).to(device)


def classify(model, images, targets):
    return F.cross_entropy(model(images), targets)


def distil(model, images, targets):
    """A loss on some of the stage maps, in every other batch."""
    loss = classify(model, images, targets)
    maps = model.outputs.stage_maps
    return loss + maps[0].float().square().mean() if targets[0] % 2 else loss


def twice(model, images, targets):
    """A second forward pass before the first one's backward pass."""
    return classify(model, images, targets) + classify(model, images.flip(0), targets)


def train(model, sizes, device, loss=classify):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for images, targets in batches(sizes, device):
        optimizer.zero_grad()
        value = loss(model, images, targets)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def recordings(model):
    return {shape[0]: graphed for shape, graphed in model._passes._graphed.items()}


def assert_same(model, other):
    expected = other.state_dict()
    for name, tensor in model.state_dict().items():
        if torch.is_tensor(tensor):
            assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("loss", [classify, distil, twice])
@pytest.mark.parametrize("shared", [0, 2, 3])
def test_a_recorded_network_learns_the_same_numbers(device, shared, loss):
    graphed, eager = network(shared, device, GRAPHS), network(shared, device, EAGER)
    sizes = [8, 8, 5] * 4
    assert train(graphed, sizes, device, loss) == train(eager, sizes, device, loss)
    assert set(recordings(graphed)) == {8, 5}
    assert not recordings(eager)
    assert_same(graphed, eager)
    for model in (graphed, eager):
        torch.manual_seed(0)
        model.grow([6, 7])
    assert train(graphed, sizes, device, loss) == train(eager, sizes, device, loss)
    assert_same(graphed, eager)


def test_gradients_may_be_summed_over_batches(device):
    gradients = []
    for fast in (GRAPHS, EAGER):
        model = network(2, device, fast)
        for images, targets in batches([8] * 5, device):
            classify(model, images, targets).backward()
        assert bool(recordings(model)) is fast.cuda_graphs
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in gradients[1].items():
        if gradient is not None:
            torch.testing.assert_close(gradients[0][name], gradient, rtol=0, atol=0)


def test_what_would_be_wrong_is_refused(device):
    model = network(2, device, GRAPHS)
    train(model, [8] * 3, device)
    (first, targets), (second, _) = batches([8, 8], device)
    loss = classify(model, first, targets)
    loss.backward(retain_graph=True)
    model(second)
    with pytest.raises(RuntimeError, match="expected the backward pass of the latest batch"):
        loss.backward()


def test_features_outlive_the_next_batch(device):
    model = network(2, device, GRAPHS)
    train(model, [8] * 3, device)
    (first, _), (second, _) = batches([8, 8], device)
    model(first).sum().backward()
    features = model.outputs.features
    kept = features.clone()
    model(second)
    assert torch.equal(features, kept)


def test_evaluation_leaves_the_recording_as_it_is(device):
    model = network(2, device, GRAPHS)
    train(model, [8] * 3, device)
    before = recordings(model)
    with torch.no_grad():
        for images, _ in batches([8] * 4, device):
            model.eval()(images)
    assert recordings(model) == before
    assert before[8] is recordings(model.train())[8]


@pytest.mark.parametrize("change", ["hook", "freeze", "mode", "weights", "precision"])
def test_a_changed_network_is_not_run_as_it_was(device, change):
    models = [network(2, device, fast) for fast in (GRAPHS, EAGER)]
    seen = []
    for model in models:
        train(model, [8] * 4, device)
        if change == "hook":
            model.generalized[0].register_forward_hook(lambda *_: seen.append(1))
        elif change == "freeze":
            model.generalized.requires_grad_(False)
        elif change == "mode":
            model.generalized.eval()
        elif change == "weights":
            block = model.generalized[0]
            state = {k: v.clone() * 0.5 for k, v in block.state_dict().items()}
            block.load_state_dict(state, assign=True)
        else:
            model.use(FastPath(cuda_graphs=model.fast.cuda_graphs))
    assert train(models[0], [8] * 4, device) == train(models[1], [8] * 4, device)
    assert_same(*models)
    assert len(seen) == (8 if change == "hook" else 0)


def test_a_network_without_anything_to_learn_is_recorded_forward(device):
    model, expected = (network(3, device, fast, 2).eval() for fast in (GRAPHS, EAGER))
    for each in (model, expected):
        each.requires_grad_(False)
    for images, _ in batches([8] * 5, device):
        with torch.no_grad():
            assert torch.equal(model(images), expected(images))
    assert set(recordings(model)) == {8}


def test_masks_are_not_recorded(device):
    model = network(0, device, GRAPHS, masked=True)
    train(model, [8] * 4, device)
    assert not recordings(model)


def test_a_copy_records_for_itself(device):
    model = network(2, device, GRAPHS)
    train(model, [8] * 3, device)
    copied = copy.deepcopy(model)
    assert recordings(model)
    assert not recordings(copied)
    train(copied, [8], device)
    assert model._passes is not copied._passes


def test_what_cannot_be_recorded_runs_as_it_is_and_the_log_says_so(device, monkeypatch, caplog):
    def refuse(*args, **options):
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    graphed, eager = network(2, device, GRAPHS), network(2, device, EAGER)
    assert train(graphed, [8] * 5, device) == train(eager, [8] * 5, device)
    assert caplog.messages == [
        "cuda_graphs: not recorded, the network runs as it is: operation not permitted"
    ]
