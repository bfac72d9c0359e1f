import copy

import pytest
import torch
from torch import nn

from avalanche_memo.models.channel_mask import (
    MaskedBatchNorm2d,
    annealed_scale,
    channel_mask,
)
from tests.helpers import randomize_norms
from tests.reference import masks as plain


def masked_norm(embedding: list[float]) -> MaskedBatchNorm2d:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(len(embedding))
    randomize_norms(norm)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    masked = MaskedBatchNorm2d.of(norm)
    with torch.no_grad():
        masked.embedding.copy_(torch.tensor(embedding))
    return masked


# --- the scale ----------------------------------------------------------------------------------


def test_the_scale_rises_linearly_within_an_epoch():
    # 1/10 to 10 in four equal steps of 2.475.
    scales = [annealed_scale(b, 5, 10.0) for b in range(1, 6)]
    assert scales == pytest.approx([0.1, 2.575, 5.05, 7.525, 10.0])


def test_an_epoch_of_one_batch_has_the_last_scale():
    assert annealed_scale(1, 1, 10.0) == 10.0


# --- the mask and its gradient ------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.01, 1.0, 7.5, 100.0])
def test_the_mask_is_the_sigmoid_of_the_scaled_embedding(scale):
    embedding = torch.tensor([-6.0, -0.3, 0.0, 0.02, 2.0])
    mask = channel_mask(embedding, scale)
    expected = [plain.sigmoid(scale * e) for e in embedding.tolist()]
    torch.testing.assert_close(mask, torch.tensor(expected))


@pytest.mark.parametrize("scale", [0.01, 1.0, 7.5, 100.0])
@pytest.mark.parametrize("hat", [False, True], ids=["DER", "HAT"])
def test_the_gradient_is_compensated(scale, hat):
    """HAT's formula; DER's leaves its factor s_max out. Open gates are no worse off than closed."""
    s_max = 100.0
    embedding = torch.tensor([-6.0, -0.55, -0.3, 0.0, 0.02, 0.3, 0.55, 2.0], requires_grad=True)
    gradient = torch.tensor([1.0, -2.0, 3.0, 0.5, -1.0, 2.0, 1.5, -0.25])
    channel_mask(embedding, scale, s_max if hat else 1.0).backward(gradient)
    expected = [
        plain.hat_gradient(g, e, scale, s_max) / (1 if hat else s_max)
        for g, e in zip(gradient.tolist(), embedding.tolist(), strict=True)
    ]
    torch.testing.assert_close(embedding.grad, torch.tensor(expected), rtol=1e-4, atol=1e-12)


def test_without_compensation_sharp_gates_would_not_learn():
    embedding = torch.tensor([0.5], requires_grad=True)
    torch.sigmoid(100 * embedding).backward()
    assert embedding.grad.item() == 0
    embedding.grad = None
    channel_mask(embedding, 100.0).backward()
    assert embedding.grad.item() == pytest.approx(plain.sigmoid(0.5) * plain.sigmoid(-0.5))


# --- the masked norm ----------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.5, 20.0])
def test_while_learning_the_norms_output_is_multiplied_by_the_mask(scale):
    masked = masked_norm([-1.0, 0.1, 0.4])
    norm = nn.BatchNorm2d(3)
    norm.load_state_dict({k: v for k, v in masked.state_dict().items() if k != "embedding"})
    masked.scale = scale
    x = torch.randn(6, 3, 4, 4)
    mask = torch.sigmoid(scale * masked.embedding.detach())[:, None, None]
    torch.testing.assert_close(masked(x), norm(x) * mask)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(masked, name), getattr(norm, name))


def test_the_gradients_are_those_of_the_multiplied_output():
    masked = masked_norm([-1.0, 0.1, 0.4]).double()
    masked.scale = 3.0
    x = torch.randn(6, 3, 4, 4, dtype=torch.double)
    weights = torch.randn_like(x)
    (masked(x) * weights).sum().backward()
    norm, embedding = copy.deepcopy(masked), masked.embedding.detach().requires_grad_()
    output = nn.functional.batch_norm(x, None, None, norm.weight, norm.bias, training=True)
    norm.zero_grad()
    mask = torch.sigmoid(3.0 * embedding).detach().requires_grad_()
    (output * mask[:, None, None] * weights).sum().backward()
    torch.testing.assert_close(masked.weight.grad, norm.weight.grad)
    torch.testing.assert_close(masked.bias.grad, norm.bias.grad)
    slope = torch.sigmoid(embedding) * (1 - torch.sigmoid(embedding))
    torch.testing.assert_close(masked.embedding.grad, mask.grad * slope.detach())


def test_in_evaluation_channels_are_open_or_exactly_zero():
    masked = masked_norm([-0.01, 0.01, -3.0, 2.0]).eval()
    x = torch.randn(6, 4, 4, 4)
    output = masked(x)
    assert (output[:, [0, 2]] == 0).all()
    norm = nn.BatchNorm2d(4).eval()
    norm.load_state_dict({k: v for k, v in masked.state_dict().items() if k != "embedding"})
    assert torch.equal(output[:, [1, 3]], norm(x)[:, [1, 3]])


def test_a_mask_that_does_not_learn_is_open_or_zero_in_training_too():
    masked = masked_norm([-0.01, 0.01, -3.0, 2.0])
    assert masked.training
    masked.embedding.requires_grad_(False)
    assert masked.mask().tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("embedding", [[-0.3, -0.1, -0.2], [-6.0, -5.0, -5.0]])
def test_where_all_channels_would_close_one_is_open(embedding):
    assert masked_norm(embedding).eval().mask().tolist() == [0, 1, 0]


def test_where_all_channels_would_close_one_is_open_while_learning_too():
    masked = masked_norm([-0.3, -0.1, -0.2])
    masked.scale = 100.0
    x = torch.randn(6, 3, 4, 4)
    norm = nn.BatchNorm2d(3)
    norm.load_state_dict({k: v for k, v in masked.state_dict().items() if k != "embedding"})
    output = masked(x)
    torch.testing.assert_close(output[:, 1], norm(x)[:, 1])
    assert output[:, [0, 2]].abs().max() < 1e-3


def test_embeddings_are_drawn_open():
    torch.manual_seed(0)
    masked = MaskedBatchNorm2d(10_000)
    for _ in range(2):
        assert 0 <= masked.embedding.min() < 0.01
        assert 1.99 < masked.embedding.max() <= 2
        assert masked.embedding.mean().item() == pytest.approx(1, abs=0.04)
        before = masked.embedding.detach().clone()
        masked.reset_mask()
        assert not torch.equal(masked.embedding, before)
