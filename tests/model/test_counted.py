"""Positions that do not count are not scored: losses and gradients are those of a weight of zero."""

import dataclasses

import numpy as np
import pytest
import torch

from hstu.config import HSTUConfig, LossConfig, from_dict
from hstu.config_embedding import EmbeddingConfig
from hstu.distributed import Engine, World
from hstu.feature_tables import has_torchrec
from hstu.item_rows import UNKNOWN
from hstu.model.retrieval import DROPOUT_SEED, NEGATIVES_SEED, RetrievalModel
from hstu.optim import set_learning_rate
from hstu.seeding import derive
from tests.model.test_encoders import CONFIGS, NUM_ITEMS, make_batch
from tests.model.test_shares import LENGTHS, MIXTURE, SPLITS, make_model, make_triton_model, with_dropout
from tests.ranks import run_ranks
from tests.shares import assert_same_step, share_of, step, summed_step

LOSSES = {
    "sampled": {"name": "sampled_softmax"},
    "bank": {"name": "shared_bank", "logq_correction": True},
    "in-batch": {"name": "in_batch", "logq_correction": True},
    "full": {"name": "full_softmax"},
}
COUNTED = [2, 7, 8, 22, 30]
"""Positions of users 0, 1 (twice), 1 and 3 of the batch; of users 2 and 4 none."""


def batches(weighted=False):
    """The batch with zeros for weights, and the one that says which positions count."""
    old = make_batch(LENGTHS)
    weights = torch.zeros(old.num_events)
    weights[COUNTED] = torch.tensor([0.5, 1.0, 2.0, 0.25, 1.0]) if weighted else 1.0
    counted = torch.tensor(COUNTED)
    return (
        dataclasses.replace(old, weights=weights),
        dataclasses.replace(old, weights=weights if weighted else None, counted=counted),
    )


def assert_equal_steps(found, expected, rtol=1e-6):
    """To ``rtol`` of the loss and of each gradient's own scale: weights are summed in float32."""
    assert found[0].item() == pytest.approx(expected[0].item(), rel=rtol) and expected[0] > 0
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).abs().max() <= rtol * gradient.abs().max(), name


@pytest.mark.parametrize("weighted", [False, True], ids=["mean", "weighted"])
@pytest.mark.parametrize("loss", LOSSES)
def test_equal_to_weights_of_zero(loss, weighted):
    """Dropout and negatives are those that the positions have in the whole batch."""
    model = make_model(with_dropout(CONFIGS["hstu"]), **LOSSES[loss])
    old, new = batches(weighted)
    assert_equal_steps(step(model, new), step(model, old))
    shifted = dataclasses.replace(new, random_rows=torch.arange(old.num_events) + 1)
    assert abs(step(model, shifted)[0] - step(model, old)[0]) > 1e-4


@pytest.mark.parametrize("loss", LOSSES)
def test_what_counts_nowhere_changes_nothing(loss):
    model = make_model(with_dropout(CONFIGS["hstu"]), **LOSSES[loss])
    batch = make_batch(LENGTHS)
    every = dataclasses.replace(batch, counted=torch.arange(batch.num_events))
    (one, first), (other, second) = step(model, batch), step(model, every)
    assert torch.equal(one, other) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("loss", LOSSES)
def test_on_ranks_of_which_one_has_no_position_that_counts(loss):
    model, (_, batch) = make_model(with_dropout(CONFIGS["hstu"]), **LOSSES[loss]), batches()
    shares = [[share_of(batch, users) for users in split] for split in (*SPLITS, [[2, 4], [1, 0, 3]])]
    assert [[len(share.predicted_items) for share in split] for split in shares] == [[3, 2], [3, 0, 2, 0], [0, 5]]
    for split in shares:
        assert_same_step(model, batch, split)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_in_which_nothing_counts(loss):
    """A loss of 0 that reaches every parameter with a gradient of zero, on one rank and on two."""
    model = make_model(with_dropout(CONFIGS["hstu"]), **LOSSES[loss])
    batch = dataclasses.replace(make_batch(LENGTHS), counted=torch.zeros(0, dtype=torch.int64))
    for value, gradients in (step(model, batch), summed_step(model, [share_of(batch, u) for u in SPLITS[0]])):
        assert value == 0.0 and all(gradient.abs().max() == 0 for gradient in gradients.values())


@pytest.mark.parametrize("loss", ["sampled_softmax", "shared_bank", "full_softmax"])
@pytest.mark.parametrize("counted", [[0, 2], []], ids=["some", "none"])
def test_triton_kernels(loss, counted):
    """They draw by place as well, and take no position at all."""
    model = make_triton_model(loss)
    batch = make_batch([2, 1])
    weights = torch.zeros(3).index_fill(0, torch.tensor(counted, dtype=torch.int64), 1.0)
    old = step(model, dataclasses.replace(batch, weights=weights))
    new = step(model, dataclasses.replace(batch, counted=weights.nonzero()[:, 0]))
    assert (old[0] > 0) == bool(counted)
    torch.testing.assert_close(new, old, rtol=2e-5, atol=1e-6)


def gradients_on_rank(loss, split):
    """As data-parallel ranks average them, of a loss that is this rank's part times their number."""
    world, (_, batch) = World.current(), batches()
    model = make_model(with_dropout(CONFIGS["hstu"]), **LOSSES[loss]).train()
    engine = Engine(model, world)
    (engine.loss(share_of(batch, split[world.rank]), 5, None) * world.size).backward()
    return {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("loss", ["sampled", "full"])
def test_data_parallel_ranks_of_which_one_has_no_position_that_counts(loss):
    _, expected = step(make_model(with_dropout(CONFIGS["hstu"]), **LOSSES[loss]), batches()[1])
    for gradients in run_ranks(2, gradients_on_rank, loss, [[2, 4], [1, 0, 3]]):
        for name, gradient in expected.items():
            assert (torch.from_numpy(gradients[name]) - gradient).abs().max() <= 1e-9 * gradient.abs().max(), name


def test_an_empty_batch_is_refused():
    batch = share_of(make_batch(LENGTHS), [])
    with pytest.raises(ValueError, match="batch has no event: expected at least one"):
        make_model(CONFIGS["hstu"]).loss(batch, 5)


@pytest.mark.parametrize("auxiliary", [False, True], ids=["alone", "auxiliary"])
def test_mixture_of_logits(auxiliary):
    """The auxiliary losses are means over the positions that count; without them it is as with weights of zero."""
    mixture = MIXTURE if auxiliary else dataclasses.replace(MIXTURE, balance_weight=0.0, user_norm_weight=0.0)
    config = with_dropout(CONFIGS["hstu"])
    config = dataclasses.replace(config, similarity="mixture_of_logits", mixture=mixture, l2_normalize=False)
    model, (old, new) = make_model(config, temperature=1.0), batches()
    for split in (*SPLITS, [[2, 4], [1, 0, 3]]):
        assert_same_step(model, new, [share_of(new, users) for users in split])
    if auxiliary:
        some = share_of(new, [0, 1, 3])  # of the other users nothing counts
        assert_equal_steps(step(model, new), step(model, some))
        assert abs(step(model, new)[0] - step(model, old)[0]) > 1e-3
    else:
        assert_equal_steps(step(model, new), step(model, old))


@pytest.mark.skipif(not has_torchrec(), reason="needs torchrec")
@pytest.mark.parametrize("loss", LOSSES)
def test_labels_without_a_row(loss):
    """Of managed ids: they have a weight of zero, on top of what does not count anyway."""
    model = managed_model(loss)
    rows, (_, batch) = model.table.item_rows, batches()
    rows.take_in(batch.labels[COUNTED[1:3]])
    labels = rows.rows(batch.labels)
    known = (labels != UNKNOWN) & torch.isin(torch.arange(batch.num_events), batch.counted)
    assert 2 <= known.sum() < len(COUNTED) and (labels[~known] != UNKNOWN).any()
    inner, _ = model.table.for_loss(batch.predicted())
    queries = model.encode(batch, None, derive(5, DROPOUT_SEED))
    expected = model.loss_fn(queries, labels, known.float(), inner, derive(5, NEGATIVES_SEED))
    names, parameters = zip(*((n, p) for n, p in model.named_parameters()), strict=True)
    gradients = dict(zip(names, torch.autograd.grad(expected, parameters), strict=True))
    assert_equal_steps(step(model, batch), (expected, gradients))


def managed_model(loss):
    torch.manual_seed(0)
    embedding = EmbeddingConfig(ids="managed", rows=12)
    losses = LossConfig(**({"num_negatives": 5, "temperature": 0.5} | LOSSES[loss]))
    return RetrievalModel(with_dropout(CONFIGS["hstu"]), NUM_ITEMS, losses, embedding).double()


# Sharded tables


def train_on_rank(loss, embedding, split, as_weights=False, nothing=False):
    """Losses of three steps, and the item table [V, D] before and after them. split: users of each rank."""
    from hstu.sharded.tables import shard
    from hstu.table_optim import Rule, TableOptimizer

    world, model_config = World.current(), HSTUConfig(dim=8, num_blocks=1, qk_dim=8, v_dim=8, max_len=32)
    torch.manual_seed(0)
    losses = LossConfig(**({"num_negatives": 5, "temperature": 0.5} | LOSSES[loss]))
    model = RetrievalModel(model_config, NUM_ITEMS, losses, embedding)
    config = dataclasses.replace(from_dict({}), model=model_config, embedding=embedding)
    tables = shard(model, config, world)
    if tables is None:
        rule = Rule("sgd")
        tables = TableOptimizer([model.table.weight], rule, 0.3, 0.3 / config.optim.lr)
    old, new = batches()
    batch = share_of(old if as_weights else new, split[world.rank])
    if nothing:
        batch = dataclasses.replace(batch, counted=batch.labels[:0])
    found, first = [], whole(model.table, world).copy()
    for number in range(3):
        set_learning_rate(tables, config.optim.lr)
        tables.zero_grad()
        value = model.loss(batch, number, world=world)
        (value * world.size).backward()
        tables.step()
        found.append(float(world.sum(value.detach())))
    return found, first, whole(model.table, world)


def whole(table, world):
    if hasattr(table, "weight"):
        return table.weight.detach().numpy()
    found = torch.zeros(table.num_items + 1, table.dim)
    for part in table.state_dict()["weight"].local_shards():
        (row, column), (rows, columns) = part.metadata.shard_offsets, part.metadata.shard_sizes
        found[row : row + rows, column : column + columns] = part.tensor.detach()
    return world.sum(found).numpy()


@pytest.mark.skipif(not has_torchrec(), reason="needs torchrec")
@pytest.mark.parametrize("split", [[[0, 1, 2, 3, 4]], *SPLITS, [[2, 4], [1, 0, 3]]], ids=["1", "2", "4", "none-on-0"])
@pytest.mark.parametrize("loss", LOSSES)
def test_sharded_tables_learn_as_a_local_one_does_from_weights(loss, split):
    embedding = EmbeddingConfig(kind="local", optimizer="sgd", lr=0.3)
    expected, first, table = train_on_rank(loss, embedding, [[0, 1, 2, 3, 4]], as_weights=True)
    embedding = dataclasses.replace(embedding, kind="sharded", sharding="row_wise")
    assert np.abs(table - first).max() > 1e-3
    for losses, _, own in run_ranks(len(split), train_on_rank, loss, embedding, split):
        assert losses == pytest.approx(expected, rel=2e-5)
        np.testing.assert_allclose(own, table, rtol=1e-4, atol=2e-6)


@pytest.mark.skipif(not has_torchrec(), reason="needs torchrec")
@pytest.mark.parametrize("split", [[[0, 1, 2, 3, 4]], SPLITS[0]], ids=["1", "2"])
@pytest.mark.parametrize("loss", LOSSES)
def test_sharded_tables_stay_where_nothing_counts(loss, split):
    embedding = EmbeddingConfig(kind="sharded", sharding="row_wise", optimizer="sgd", lr=0.3)
    for losses, first, own in run_ranks(len(split), train_on_rank, loss, embedding, split, False, True):
        assert losses == [0.0, 0.0, 0.0] and np.array_equal(own, first)


def expected_rows(loss):
    """Ids that each rank fetches for the loss of the batch, and those of its labels and all."""
    from hstu.sharded.losses import scored_by

    world = World.current()
    _, new = batches()
    share = share_of(new, [[2, 4], [1, 0, 3]][world.rank])
    losses = LossConfig(**({"num_negatives": 5} | LOSSES[loss]))
    p = share.predicted()
    scored = scored_by(losses, world, p.labels, p.random_rows, NUM_ITEMS, 3, p.every)
    return len(scored.labels), world.gather(scored.ids).tolist(), new.labels.tolist()


@pytest.mark.skipif(not has_torchrec(), reason="needs torchrec")
def test_ranks_fetch_rows_for_positions_that_count():
    for num, ids, _ in run_ranks(2, expected_rows, "sampled"):
        assert num == len(COUNTED) and len(ids) <= 6 * len(COUNTED)
    for num, ids, labels in run_ranks(2, expected_rows, "in-batch"):
        assert num == len(COUNTED) and ids == sorted(set(labels))
