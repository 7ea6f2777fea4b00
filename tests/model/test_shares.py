"""One global batch on 1, 2 or 4 ranks: the same loss and gradients, dropout and drawn negatives on."""

import dataclasses

import numpy as np
import pytest
import torch

from hstu.config import LossConfig
from hstu.config_ranking import HeadConfig
from hstu.config_similarity import MixtureConfig
from hstu.data.random_rows import rows_of, token_counts
from hstu.data.ranking_batches import gather, take, target_sequences
from hstu.distributed import Engine, World
from hstu.model.retrieval import RetrievalModel
from kernels._backend import set_backend
from tests.model.test_encoders import CONFIGS, NUM_ITEMS, TOY, make_batch
from tests.model.test_ranking import make_model as make_ranking
from tests.ranking import rich_store
from tests.ranks import run_ranks
from tests.shares import assert_same_step, share_of, step, summed_step

LENGTHS = [3, 20, 1, 7, 4]
SPLITS = [[[1], [4, 0, 2, 3]], [[4, 1], [], [3, 0], [2]]]
"""Users of each rank, of 2 and of 4 ranks: in any order, and one rank has nobody."""
MIXTURE = MixtureConfig(
    query_components=3, item_components=2, dim=4, hidden_dim=6, gate_dim=5, user_embeddings=4, user_dropout=0.3,
    item_dropout=0.2, gate_dropout=0.2, softmax_dropout=0.3, balance_weight=0.5, user_norm_weight=0.2, temperature=0.3,
)  # fmt: skip


def make_model(config, **loss):
    torch.manual_seed(0)
    return RetrievalModel(config, NUM_ITEMS, LossConfig(**({"num_negatives": 5, "temperature": 0.5} | loss))).double()


def whole_batch(weighted=False):
    batch = make_batch(LENGTHS)
    weights = torch.rand(len(batch.labels), generator=torch.Generator().manual_seed(1)) + 0.1
    return dataclasses.replace(batch, weights=weights if weighted else None)


def make_triton_model(loss):
    """A toy, whose ops run in Triton's interpreter from here on to the end of the test."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU")
    set_backend("triton")
    torch.manual_seed(0)
    return RetrievalModel(with_dropout(TOY), NUM_ITEMS, LossConfig(name=loss, num_negatives=5, temperature=0.5))


def with_dropout(config):
    return dataclasses.replace(config, dropout=0.3)


@pytest.mark.parametrize("split", SPLITS, ids=["2 ranks", "4 ranks"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_encoders(config, split):
    batch = whole_batch()
    assert_same_step(make_model(with_dropout(config)), batch, [share_of(batch, users) for users in split])


@pytest.mark.parametrize("weighted", [False, True], ids=["mean", "weighted"])
@pytest.mark.parametrize(
    "loss",
    [
        {"name": "sampled_softmax"},
        {"name": "shared_bank"},
        {"name": "shared_bank", "logq_correction": True},
        {"name": "in_batch"},
        {"name": "in_batch", "logq_correction": True},
        {"name": "full_softmax"},
    ],
    ids=lambda loss: "-".join(["corrected"] * loss.get("logq_correction", False) + [loss["name"]]),
)
def test_losses(loss, weighted):
    batch, model = whole_batch(weighted), make_model(with_dropout(CONFIGS["hstu"]), **loss)
    for split in SPLITS:  # weights are summed in float32
        assert_same_step(model, batch, [share_of(batch, users) for users in split], rtol=1e-6 if weighted else 1e-9)


@pytest.mark.parametrize("chunk_mib, users", [(256, 4), (0.005, 4), (256, 0)], ids=["one block", "blocks", "no users"])
def test_mixture_of_logits(chunk_mib, users, monkeypatch):
    """Its auxiliary losses are no sums over positions."""
    mixture = dataclasses.replace(MIXTURE, user_embeddings=users)
    object.__setattr__(mixture, "chunk_mib", chunk_mib)
    config = dataclasses.replace(
        with_dropout(CONFIGS["hstu"]), similarity="mixture_of_logits", mixture=mixture, l2_normalize=False
    )
    model = make_model(config, temperature=1.0)
    for weighted in (False, True):
        batch = whole_batch(weighted)
        for split in SPLITS:
            shares = [share_of(batch, users) for users in split]
            assert_same_step(model, batch, shares, rtol=1e-6 if weighted else 1e-9)


def test_own_rows_give_another_step():
    """What the tests above would see if a rank drew by its own rows."""
    batch, model = whole_batch(), make_model(with_dropout(CONFIGS["hstu"]))
    shares = [dataclasses.replace(share_of(batch, users), random_rows=None) for users in SPLITS[0]]
    assert abs(summed_step(model, shares)[0] - step(model, batch)[0]) > 1e-3
    with pytest.raises(AssertionError):
        assert_same_step(model, batch, shares, rtol=1e-3)


def test_rows_move_the_attention_weights_of_sasrec():
    model = make_model(with_dropout(CONFIGS["sasrec"]))
    batch = whole_batch()
    moved = dataclasses.replace(batch, random_rows=torch.arange(sum(LENGTHS)) + 1)
    assert abs(step(model, batch)[0] - step(model, moved)[0]) > 1e-3


@pytest.mark.parametrize("loss", ["sampled_softmax", "in_batch"])
def test_on_triton(loss):
    model = make_triton_model(loss)
    batch = make_batch([2, 3, 1])
    assert_same_step(model, batch, [share_of(batch, users) for users in ([2, 0], [], [1])], rtol=2e-5)


def gradients_on_rank(split):
    world = World.current()
    model = make_model(with_dropout(CONFIGS["hstu"]), name="in_batch").train()
    engine = Engine(model, world)
    loss = engine.loss(share_of(whole_batch(), split[world.rank]), 5, None)
    (loss * world.size).backward()  # data-parallel ranks average
    return loss.item(), {n: p.grad.numpy() for n, p in model.named_parameters()}


def test_data_parallel_ranks_one_of_them_with_nobody():
    split = [[1, 0, 4, 2, 3], []]
    ranks = run_ranks(2, gradients_on_rank, split)
    loss, gradients = step(make_model(with_dropout(CONFIGS["hstu"]), name="in_batch"), whole_batch())
    assert sum(loss for loss, _ in ranks) == pytest.approx(float(loss), rel=1e-12) and ranks[1][0] == 0.0
    for name, expected in gradients.items():
        for _, found in ranks:
            torch.testing.assert_close(torch.from_numpy(found[name]), expected, rtol=1e-9, atol=1e-12)


# Ranking


def ranking_share(config, data, sequences, mine):
    mine = np.asarray(mine, np.int64)
    lengths, counts = sequences.stop - sequences.first, sequences.stop - sequences.split
    tokens = token_counts(lengths, config.ranking.form == "fused", data.num_prefix)
    batch = gather(data, take(sequences, mine))
    rows = {"random_rows": rows_of(tokens, mine), "random_targets": rows_of(counts, mine)}
    return dataclasses.replace(batch, max_len=int(lengths.max()), max_targets=int(counts.max()),
                               **{n: torch.from_numpy(v) for n, v in rows.items()})  # fmt: skip


HEADS = {
    "trunk": HeadConfig([8, 4], dropout=0.3),
    "experts": HeadConfig([8], shared_experts=2, task_experts=1, dropout=0.3),
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize(
    "form, encoder", [("interleaved", "hstu"), ("fused", "hstu"), ("interleaved", "transformer")], ids=str
)
def test_ranking(form, encoder, head, tmp_path):
    """Tasks with missing labels, prefix tokens, targets; the heads compute their losses in float32."""
    store = rich_store(tmp_path / "s", (5, 1, 9, 0, 4))
    config, data, model = make_ranking(store, form, encoder, head=head)
    sequences = target_sequences(data, config, np.arange(store.num_events))
    whole, number = gather(data, sequences), len(sequences)
    splits = [[[1], [0, *range(2, number)]], [[3, 0], [], [*range(4, number), 2], [1]]]
    for split in splits:
        shares = [ranking_share(config, data, sequences, mine) for mine in split]
        assert_same_step(model, whole, shares, rtol=2e-5)
    own = [dataclasses.replace(s, random_rows=None, random_targets=None) for s in shares]
    with pytest.raises(AssertionError):
        assert_same_step(model, whole, own, rtol=1e-3)
    heads_alone = [dataclasses.replace(s, random_targets=None) for s in shares]
    with pytest.raises(AssertionError):
        assert_same_step(model, whole, heads_alone, rtol=1e-3)
