"""Losses against sums written out, and the config entry that picks each.

Legend: L total events, D model width, V items.
"""

import math

import pytest
import torch

from hstu.config import LossConfig
from hstu.embedding import LocalItemTable
from hstu.errors import UserError
from hstu.model.losses import LOSSES, make_loss
from hstu.model.losses.shared_bank import draw_bank
from kernels.sampled_softmax.cpu import draw_negatives

L, V, D = 23, 11, 6
NAMES = sorted(LOSSES)


@pytest.fixture
def setup():
    g = torch.Generator().manual_seed(0)
    table = LocalItemTable(V, D, generator=g)
    queries = torch.randn(L, D, generator=g)
    labels = torch.randint(1, V + 1, (L,), generator=g)
    weights = torch.rand(L, generator=g) + 0.1
    return table, queries, labels, weights


def logits(table, queries, temperature):
    """All logits [L, V + 1] in float64."""
    q, e = queries.double(), table.weight.detach().double()
    return torch.nn.functional.normalize(q, dim=1) @ torch.nn.functional.normalize(e, dim=1).T / temperature


def by_hand(all_logits, labels, weights, terms):
    """Weighted mean of ln(e^s_label + sum of terms(row)) - s_label; terms gives (item, log factor) pairs."""
    total = norm = 0.0
    for row, label in enumerate(labels.tolist()):
        own, others = terms(row, label)
        positive = all_logits[row, label].item() + own
        denominator = math.exp(positive) + sum(math.exp(all_logits[row, i].item() + f) for i, f in others)
        weight = 1.0 if weights is None else weights[row].item()
        total += weight * (math.log(denominator) - positive)
        norm += weight
    return total / norm


@pytest.fixture(params=[False, True], ids=["unweighted", "weighted"])
def chosen_weights(request, setup):
    return setup[3] if request.param else None


def test_sampled_softmax_by_hand(setup, chosen_weights):
    table, queries, labels, _ = setup
    loss = make_loss(LossConfig(num_negatives=5, temperature=0.3))(queries, labels, chosen_weights, table, 7)
    negatives = draw_negatives(L, 5, V, 7, torch.device("cpu")).tolist()
    terms = lambda row, label: (0.0, [(i, 0.0) for i in negatives[row] if i != label])  # noqa: E731
    assert loss.item() == pytest.approx(by_hand(logits(table, queries, 0.3), labels, chosen_weights, terms), rel=1e-6)


@pytest.mark.parametrize("corrected", [False, True], ids=["plain", "logq"])
def test_shared_bank_by_hand(setup, chosen_weights, corrected):
    table, queries, labels, _ = setup
    config = LossConfig(name="shared_bank", num_negatives=8, temperature=0.3, logq_correction=corrected)
    loss = make_loss(config)(queries, labels, chosen_weights, table, 7)
    bank = draw_bank(V, 8, 7, torch.device("cpu")).tolist()
    factor = -math.log(8 / V) if corrected else 0.0
    terms = lambda row, label: (0.0, [(i, factor) for i in bank if i != label])  # noqa: E731
    assert loss.item() == pytest.approx(by_hand(logits(table, queries, 0.3), labels, chosen_weights, terms), rel=1e-6)


@pytest.mark.parametrize("corrected", [False, True], ids=["plain", "logq"])
def test_in_batch_by_hand(setup, chosen_weights, corrected):
    """The bank is the list of labels, repeats included; each logit loses the log of its frequency if corrected."""
    table, queries, labels, _ = setup
    config = LossConfig(name="in_batch", temperature=0.3, logq_correction=corrected)
    loss = make_loss(config)(queries, labels, chosen_weights, table, 7)
    items = labels.tolist()
    log_q = {i: math.log(items.count(i) / L) if corrected else 0.0 for i in items}
    terms = lambda row, label: (-log_q[label], [(i, -log_q[i]) for i in items if i != label])  # noqa: E731
    assert loss.item() == pytest.approx(by_hand(logits(table, queries, 0.3), labels, chosen_weights, terms), rel=1e-6)


def test_full_softmax_by_hand(setup, chosen_weights):
    table, queries, labels, _ = setup
    config = LossConfig(name="full_softmax", temperature=0.3)
    loss = make_loss(config)(queries, labels, chosen_weights, table, 7)
    terms = lambda row, label: (0.0, [(i, 0.0) for i in range(1, V + 1) if i != label])  # noqa: E731
    assert loss.item() == pytest.approx(by_hand(logits(table, queries, 0.3), labels, chosen_weights, terms), rel=1e-6)


def test_corrected_bank_estimates_the_full_softmax(setup):
    table, queries, labels, _ = setup
    full = make_loss(LossConfig(name="full_softmax", temperature=0.5))(queries, labels, None, table, 0).item()
    value = {}
    for corrected in (True, False):
        config = LossConfig(name="shared_bank", num_negatives=20_000, temperature=0.5, logq_correction=corrected)
        value[corrected] = make_loss(config)(queries, labels, None, table, 3).item()
    assert value[True] == pytest.approx(full, rel=0.01)
    assert value[False] > full + 5


@pytest.mark.parametrize("name", NAMES)
def test_pure_function_of_its_arguments(setup, name):
    table, queries, labels, weights = setup
    loss = make_loss(LossConfig(name=name, num_negatives=4))
    first = loss(queries, labels, weights, table, 1)
    torch.manual_seed(123)
    assert torch.equal(loss(queries, labels, weights, table, 1), first)
    drawn = name in ("sampled_softmax", "shared_bank")
    assert torch.equal(loss(queries, labels, weights, table, 2), first) != drawn


@pytest.mark.parametrize("name", NAMES)
def test_scalar_float32_and_gradients_reach_both(setup, name):
    table, queries, labels, weights = setup
    queries = queries.bfloat16().requires_grad_()
    loss = make_loss(LossConfig(name=name, num_negatives=4))(queries, labels, weights, table, 1)
    loss.backward()
    assert loss.shape == () and loss.dtype == torch.float32
    assert queries.grad.dtype == torch.bfloat16 and queries.grad.abs().max() > 0
    assert table.weight.grad.dtype == torch.float32 and table.weight.grad.abs().max() > 0
    assert table.weight.grad[0].abs().max() == 0


@pytest.mark.parametrize("name", NAMES)
def test_weights(setup, name):
    """Equal weights change nothing; a weight of zero takes a position out of the mean."""
    table, queries, labels, _ = setup
    loss = make_loss(LossConfig(name=name, num_negatives=4))
    plain = loss(queries, labels, None, table, 1).item()
    assert loss(queries, labels, torch.full((L,), 3.0), table, 1).item() == pytest.approx(plain, rel=1e-6)
    single = torch.zeros(L)
    single[4] = 2.0
    queries.requires_grad_()
    value = loss(queries, labels, single, table, 1)
    (gradient,) = torch.autograd.grad(value, queries)
    assert (gradient != 0).any(dim=1).nonzero().flatten().tolist() == [4]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weighted", [False, True], ids=["mean", "weighted"])
def test_without_a_position_the_loss_is_zero(setup, name, weighted):
    table, queries, labels, weights = setup
    queries.requires_grad_()
    loss = make_loss(LossConfig(name=name, num_negatives=4))
    value = loss(queries[:0], labels[:0], weights[:0] if weighted else None, table, 1, every=labels)
    value.backward()
    assert value.item() == 0.0 and value.dtype == torch.float32
    assert queries.grad.abs().max() == 0 and table.weight.grad.abs().max() == 0


@pytest.mark.parametrize("name", NAMES)
def test_gradient_step_lowers_the_loss(setup, name):
    table, queries, labels, weights = setup
    queries = queries.clone().requires_grad_()
    loss = make_loss(LossConfig(name=name, num_negatives=4, temperature=0.5))
    optimizer = torch.optim.Adam([queries, *table.parameters()], lr=0.01)
    before = loss(queries, labels, weights, table, 5)
    for _ in range(20):
        optimizer.zero_grad()
        value = loss(queries, labels, weights, table, 5)
        value.backward()
        optimizer.step()
    assert value.item() < 0.8 * before.item()


@pytest.mark.parametrize("name", NAMES)
def test_without_normalisation(setup, name):
    _, queries, labels, _ = setup
    plain = LocalItemTable(V, D, l2_normalize=False, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # all scores are zero: every candidate counts the same
        plain.weight.zero_()
    loss = make_loss(LossConfig(name=name, num_negatives=4))(queries, labels, None, plain, 1).item()
    if name == "full_softmax":
        assert loss == pytest.approx(math.log(V))
    else:
        assert 0 < loss <= math.log(1 + L)


@pytest.mark.parametrize("name", NAMES)
def test_errors(setup, name):
    table, queries, labels, _ = setup
    loss = make_loss(LossConfig(name=name, num_negatives=4))
    with pytest.raises(ValueError, match=r"weights has shape \[2\]: expected \[23\], one per position"):
        loss(queries, labels, torch.ones(2), table, 0)


def test_unknown_loss():
    with pytest.raises(UserError, match="loss.name='hinge': expected one of"):
        LossConfig(name="hinge")
    config = LossConfig()
    config.name = "hinge"
    with pytest.raises(ValueError, match="loss.name='hinge': expected one of"):
        make_loss(config)
