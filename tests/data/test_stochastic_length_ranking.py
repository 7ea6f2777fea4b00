"""Stochastic length over items and their actions: pairs stay together, and the fused form predicts every event."""

import dataclasses

import numpy as np
import pytest
import torch

from hstu.config import Config, HSTUConfig, RunConfig, StochasticLengthConfig
from hstu.config_ranking import ActionConfig, RankingConfig, TaskConfig
from hstu.data.ranking import RankingData
from hstu.data.ranking_batches import ProgressiveBatches, RankingBatches
from hstu.data.splits import make_split
from hstu.errors import UserError
from hstu.model.ranking import RankingModel
from tests.serving import small_store

LENGTHS = (12, 3, 2, 7, 1, 0, 40, 33, 25)
NUM_EVENTS = sum(LENGTHS)


@pytest.fixture
def store(tmp_path):
    """The time of an event is its row, so that an event is recognised wherever it turns up."""
    rows = np.arange(NUM_EVENTS)
    return small_store(tmp_path / "store", LENGTHS, timestamps=rows, actions=(rows % 3 == 0).astype(np.float32))


def batches(store, form, alpha, selection="uniform", max_len=100, **ranking):
    config = Config(
        model=HSTUConfig(dim=8, num_blocks=1, qk_dim=4, v_dim=4, max_len=max_len),
        run=RunConfig(batch_users=4, stochastic_length=StochasticLengthConfig(alpha, selection)),
        ranking=RankingConfig(form, {"like": TaskConfig()}, {"actions": ActionConfig()}, **ranking),
    )
    return RankingBatches(RankingData(store, config.ranking), make_split(store, "reference"), config)


def all_batches(data, epoch):
    return [data.batch(epoch, step) for step in range(data.num_steps(epoch))]


@pytest.mark.parametrize("selection", ["recent", "uniform", "recency"])
@pytest.mark.parametrize("form", ["interleaved", "fused"])
def test_pairs_stay_together_and_in_order(store, form, selection):
    data = batches(store, form, 1.2, selection)
    assert len(np.unique(data.data.action_bits(np.arange(NUM_EVENTS)), axis=0)) == 2
    for batch in all_batches(data, 0) + all_batches(data, 1):
        rows = batch.timestamps
        assert torch.equal(batch.item_ids, torch.from_numpy(store.item_ids[rows.numpy()]).long())
        assert torch.equal(batch.action_bits, torch.from_numpy(data.data.action_bits(rows.numpy())).float())
        assert torch.equal(batch.rows, rows[batch.targets])
        assert torch.equal(batch.labels["like"], (batch.rows % 3 == 0).float())
        assert int(batch.num_targets.sum()) == len(batch.targets) and batch.max_len == int(batch.offsets.diff().max())
        for user, first, stop in zip(batch.users, batch.offsets[:-1], batch.offsets[1:], strict=True):
            mine = rows[first:stop]
            assert (mine.diff() > 0).all()
            assert ((mine >= store.offsets[user]) & (mine < store.offsets[user + 1])).all()
    assert 0 < data.savings(0)["tokens_dropped"] < data.savings(0)["attention_work_saved"] < 1


@pytest.mark.parametrize("selection", ["recent", "uniform"])
def test_the_fused_form_predicts_every_training_event_once(store, selection):
    data = batches(store, "fused", 1.1, selection, targets=4)
    predicted = np.sort(torch.cat([b.rows for b in all_batches(data, 0)]).numpy())
    training = np.concatenate([np.arange(store.offsets[u], e) for u, e in zip(data.users, data.ends, strict=True)])
    np.testing.assert_array_equal(predicted, training)


def test_the_interleaved_form_predicts_what_is_left(store):
    data, whole = batches(store, "interleaved", 1.2), batches(store, "interleaved", None)
    left = sum(b.num_events for b in all_batches(data, 0))
    total = sum(b.num_events for b in all_batches(whole, 0))
    assert left == pytest.approx(total * (1 - data.savings(0)["tokens_dropped"]))
    assert whole.savings(0) == {}


@pytest.mark.parametrize("form", ["interleaved", "fused"])
def test_alpha_2_changes_nothing_and_batches_are_a_function_of_epoch_and_step(store, form):
    for one, two in ((None, 2.0), (1.2, 1.2)):
        first, second = batches(store, form, one), batches(store, form, two)
        last = all_batches(first, 2)[-1]
        again = second.batch(2, second.num_steps(2) - 1)
        for field in dataclasses.fields(last):
            a, b = getattr(last, field.name), getattr(again, field.name)
            if isinstance(a, torch.Tensor):
                assert torch.equal(a, b), field.name


@pytest.mark.parametrize("selection", ["recent", "uniform", "recency"])
def test_every_cut_sequence_predicts_something(store, selection):
    data = batches(store, "interleaved", 1.05, selection, max_len=10, stride=2)  # mostly context, cut to 3 events
    for epoch in range(5):
        for batch in all_batches(data, epoch):
            assert (batch.num_targets > 0).all()


@pytest.mark.parametrize("form", ["interleaved", "fused"])
def test_a_cut_batch_trains(store, form):
    data = batches(store, form, 1.1)
    model = RankingModel(data.config.model, data.config.ranking, data.data)
    batch = data.batch(0, 0)
    loss = model.loss(batch, 0, model.plan(batch))
    loss.backward()
    assert torch.isfinite(loss)


def test_progressive_validation_refuses_it(store):
    data = batches(store, "fused", 1.5, mode="progressive")
    with pytest.raises(UserError, match=r"run.stochastic_length.alpha=1.5: expected null with ranking.mode"):
        ProgressiveBatches(data.data, data.config)
