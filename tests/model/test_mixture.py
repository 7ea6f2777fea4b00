"""Mixture of logits against sums written out: scores, loss, ranks, and a run from training to recommending.

Legend: L total events, B users, D model width, R negatives, V items, P and K components, C their width, E = P K.
"""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch.func import functional_call

from hstu.cli import conf_dir
from hstu.config import (
    Config,
    DataConfig,
    EvalConfig,
    HSTUConfig,
    LossConfig,
    MixtureConfig,
    OptimConfig,
    RunConfig,
    from_dict,
    published_row,
    to_dict,
)
from hstu.errors import UserError
from hstu.model.losses import make_loss
from hstu.model.mixture import MixtureOfLogits, MixtureTable
from hstu.model.retrieval import RetrievalModel
from hstu.recommend import load
from hstu.train import train
from kernels.sampled_softmax.cpu import draw_negatives
from tests.serving import brute_rank

L, V, D, R = 9, 13, 6, 5
SMALL = MixtureConfig(query_components=3, item_components=2, dim=4, hidden_dim=7, gate_dim=5, user_embeddings=4)
NO_DROPOUT = dict(user_dropout=0.0, item_dropout=0.0, gate_dropout=0.0, softmax_dropout=0.0)


def make_table(config=SMALL, seed=0, **changes) -> MixtureTable:
    """In float64 and evaluation mode, with values large enough to matter, biases included."""
    torch.manual_seed(seed)
    table = MixtureTable(V, D, dataclasses.replace(config, **changes)).double().eval()
    with torch.no_grad():
        for parameter in table.parameters():
            parameter.normal_(std=0.7)
        table.items.weight[0] = 0
        if table.mixture.users is not None:
            table.mixture.users.weight[0] = 0
    return table


def make_queries(table, num=L, strangers=True):
    """Of users 0 to 3, after a stranger, whose vector of zeros has no derivative once it is normalised."""
    outputs = torch.randn(num, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    users = torch.arange(num) % 5 - 1 if strangers else torch.arange(num) % 4
    return table.mixture.queries(outputs, users).detach()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def pair_by_hand(table, query, item):
    """Score and weights [E] of one query vector and one item id, without dropout, in numpy."""
    values = {name: p.detach().numpy() for name, p in table.named_parameters()}
    config, x, e = table.mixture.config, query.numpy(), values["items.weight"][item]

    def linear(name, v):
        return values[f"mixture.{name}.weight"] @ v + values.get(f"mixture.{name}.bias", 0.0)

    def gate(name, v):
        hidden = linear(f"{name}.0", v)
        return linear(f"{name}.2", hidden * sigmoid(hidden))

    h = linear("query_hidden", x[:D])
    left, right = h[: config.hidden_dim], h[config.hidden_dim :]
    bend = left * sigmoid(left)
    if config.activation == "gelu":
        bend = left * 0.5 * (1 + np.array([math.erf(v / math.sqrt(2)) for v in left]))
    own = linear("query_components", bend * right).reshape(-1, config.dim)
    queries = [*own, *([x[D:]] if config.user_embeddings else [])]
    items = linear("item_components", e).reshape(-1, config.dim)
    logits = [
        float(q @ i) / max(np.linalg.norm(q), 1e-6) / max(np.linalg.norm(i), 1e-6) / config.temperature
        for q in queries
        for i in items
    ]
    g = gate("query_gate", x[:D]) * gate("item_gate", e) + gate("pair_gate", np.array(logits))
    g = g * sigmoid(g)
    weights = np.exp(g - g.max()) / np.exp(g - g.max()).sum()
    return float(weights @ logits), weights


# Scores


def test_mixture_by_hand():
    """Query (3, 4)/5 and items (1, 0), (0, 1): cosines 0.6 and 0.8, over 0.2 logits 3 and 4. Gates (2, -1) * (1.5, 3)
    = (3, -3), nothing from the pair: weights softmax(3 s, -3 (1 - s)), s = 1 / (1 + e^-3)."""
    mixture = MixtureOfLogits(MixtureConfig(query_components=1, item_components=2, dim=2, temperature=0.2), 2)
    torch.nn.init.zeros_(mixture.pair_gate[2].weight)
    logits = mixture.pair_logits(torch.tensor([[[0.6, 0.8]]]), torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]]))
    assert logits.tolist() == [[[pytest.approx(3), pytest.approx(4)]]]
    score, weights = mixture.mix(logits, torch.tensor([[2.0, -1.0]]), torch.tensor([[[1.5, 3.0]]]), None)
    s = 1 / (1 + math.exp(-3))
    first = 1 / (1 + math.exp(-3 * (1 - s) - 3 * s))
    assert weights[0, 0].tolist() == [pytest.approx(first), pytest.approx(1 - first)]
    assert score.item() == pytest.approx(3 * first + 4 * (1 - first))


def test_queries_are_layer_normalised_outputs_and_user_vectors():
    table = make_table()
    users = torch.tensor([0, 3, 4, -1])  # 4 shares the vector of 0; -1 has none
    queries = table.mixture.queries(torch.randn(4, D, dtype=torch.float64), users)
    rows = table.mixture.users.weight
    assert queries.shape == (4, D + 4)
    assert queries[:, :D].mean(dim=1).abs().max() < 1e-12
    assert queries[:, :D].var(dim=1, correction=0).tolist() == [pytest.approx(1, rel=1e-4)] * 4
    assert torch.equal(queries[:, D:], torch.stack([rows[1], rows[4], rows[1], torch.zeros(4, dtype=torch.float64)]))
    assert make_table(user_embeddings=0).mixture.queries(torch.randn(4, D).double(), users).shape == (4, D)


@pytest.mark.parametrize("changes", [{}, {"user_embeddings": 0}, {"activation": "gelu"}], ids=["users", "none", "gelu"])
def test_scores_equal_those_written_out(changes):
    table = make_table(**changes)
    queries = make_queries(table)
    scores, ids = table.topk(queries, V)
    expected = np.array([[pair_by_hand(table, q, int(i))[0] for i in row] for q, row in zip(queries, ids, strict=True)])
    assert scores.numpy() == pytest.approx(expected, rel=1e-10)


# Loss


@pytest.mark.parametrize("weighted", [False, True], ids=["mean", "weighted"])
def test_loss_by_hand(weighted):
    """Sampled softmax over the label and the negatives that differ from it, minus 0.3 times the mutual information of
    positions and logits, plus 0.2 times the mean squared norm of the user vectors."""
    table = make_table(balance_weight=0.3, user_norm_weight=0.2)
    negatives = draw_negatives(L, R, V, 7, torch.device("cpu")).tolist()
    queries, labels = make_queries(table), torch.arange(L) % 4 + 1
    labels[2] = negatives[2][1]  # a negative that does not count
    position_weights = torch.arange(1, L + 1).double() if weighted else None
    loss = make_loss(LossConfig(num_negatives=R, temperature=1.0))(queries, labels, position_weights, table, 7)
    losses, gates = [], []
    for query, label, others in zip(queries, labels.tolist(), negatives, strict=True):
        own, weights = pair_by_hand(table, query, label)
        rest = sum(math.exp(pair_by_hand(table, query, i)[0]) for i in others if i != label)
        losses.append(math.log(math.exp(own) + rest) - own)
        gates.append(weights)
    entropy = lambda p: -(p * np.log(p + 1e-6)).sum(axis=-1)  # noqa: E731
    information = entropy(np.mean(gates, axis=0)) - entropy(np.array(gates)).mean()
    squares = queries[:, D:].square().sum(dim=1).mean().item()
    mean = np.average(losses, weights=None if position_weights is None else position_weights.numpy())
    assert information > 0.01 and squares > 0.1
    assert loss.item() == pytest.approx(mean - 0.3 * information + 0.2 * squares, rel=1e-6)


def blockwise(monkeypatch, rows):
    """Blocks of ``rows`` positions in the loss, whatever chunk_mib is."""
    monkeypatch.setattr(MixtureTable, "_pair_floats", lambda self: self.mixture.config.chunk_mib * 2**18 // rows // 6)


def test_blocks_of_positions_change_neither_loss_nor_gradients(monkeypatch):
    table = make_table(**NO_DROPOUT).train()
    labels, found = torch.arange(L) % 4 + 1, []
    for rows in (None, 4, 1):
        if rows is not None:
            blockwise(monkeypatch, rows)
        queries = make_queries(table).requires_grad_()
        loss = table.sampled_softmax(queries, labels, num_negatives=R, seed=3, temperature=1.0)
        inputs = [queries, *(p for n, p in table.named_parameters() if n != "mixture.users.weight")]
        found.append([loss, *torch.autograd.grad(loss.square().sum(), inputs)])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-10, atol=1e-12)


def test_blocks_are_scored_again_with_the_same_masks(monkeypatch):
    """The gradient along a direction equals the difference quotient, dropout on and three blocks."""
    blockwise(monkeypatch, 4)
    table = make_table(gate_dropout=0.2).train()
    labels, queries = torch.arange(L) % 4 + 1, make_queries(table, strangers=False)
    direction = torch.randn(queries.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    loss = lambda x: table.sampled_softmax(x, labels, num_negatives=R, seed=3, temperature=1.0).sum()  # noqa: E731
    leaf = queries.clone().requires_grad_()
    slope = (torch.autograd.grad(loss(leaf), leaf)[0] * direction).sum().item()
    step = 1e-6
    quotient = (loss(queries + step * direction) - loss(queries - step * direction)).item() / (2 * step)
    assert slope == pytest.approx(quotient, rel=1e-6)


@pytest.mark.parametrize("training", [False, True], ids=["no dropout", "dropout"])
def test_gradcheck(training):
    table = make_table(gate_dropout=0.2).train(training)
    names = [name for name, _ in table.named_parameters() if name != "mixture.users.weight"]
    labels, negatives = torch.tensor([1, 2, 3]), torch.tensor([[2, 1], [4, 5], [3, 6]])

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = table

        def forward(self, queries):
            return self.table.sampled_softmax(queries, labels, negatives, seed=1, temperature=1.0)

    module = Loss()

    def loss(queries, *values):
        return functional_call(module, {f"table.{n}": v for n, v in zip(names, values, strict=True)}, (queries,))

    values = [dict(table.named_parameters())[name].detach().clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(loss, (make_queries(table, 3, strangers=False).requires_grad_(), *values))


def test_dropout_is_a_function_of_the_seed_and_absent_in_evaluation():
    table, labels = make_table(), torch.arange(L) % 4 + 1
    queries, negatives = make_queries(table), torch.arange(L * R).view(L, R) % V + 1
    loss = lambda seed: table.sampled_softmax(queries, labels, negatives, seed=seed, temperature=1.0)  # noqa: E731
    still = loss(1)
    assert torch.equal(loss(2), still)
    table.train()
    first = loss(1)
    torch.manual_seed(99)
    assert torch.equal(loss(1), first) and not torch.equal(loss(2), first) and not torch.equal(first, still)


def test_the_weights_that_dropout_leaves_sum_to_one():
    table = make_table(softmax_dropout=0.5)
    logits = torch.randn(40, 3, 6, dtype=torch.float64)
    _, weights = table.mixture.mix(logits, torch.randn(40, 6).double(), torch.randn(3, 6).double(), 1)
    dropped = (weights == 0).all(dim=2)
    assert (weights == 0).double().mean().item() == pytest.approx(0.5, abs=0.07)
    torch.testing.assert_close(weights.sum(dim=2), (~dropped).double())


@pytest.mark.parametrize("name", ["shared_bank", "in_batch", "full_softmax"])
def test_other_losses_are_refused(name):
    table = make_table()
    with pytest.raises(ValueError, match="a mixture of logits has no loss .* expected sampled_softmax"):
        make_loss(LossConfig(name=name, temperature=1.0))(
            make_queries(table), torch.ones(L, dtype=torch.int64), None, table, 0
        )


# Ranks


@pytest.mark.parametrize("chunk_mib", [64, 0.002], ids=["one block", "many blocks"])
def test_rank_and_topk_against_all_pairs(chunk_mib):
    table = make_table()
    with torch.no_grad():
        table.items.weight[5] = table.items.weight[2]  # a tie
    queries, targets = make_queries(table), torch.tensor([2, 5, 1, 3, 2, 13, 7, 5, 2])
    seen = [[], [2], [4, 4, 0], [3], [5, 6], [1, 2], [], list(range(1, V + 1)), [5]]
    seen_ids = torch.tensor([i for row in seen for i in row])
    seen_offsets = torch.tensor([0, *np.cumsum([len(row) for row in seen])])
    scores = [{i: pair_by_hand(table, q, i)[0] for i in range(1, V + 1)} for q in queries]
    ranks = table.rank(queries, targets, seen_ids, seen_offsets, chunk_mib)
    assert ranks.tolist() == [brute_rank(*row) for row in zip(scores, targets.tolist(), seen, strict=True)]
    assert ranks.tolist() != table.rank(queries, targets).tolist()
    best, ids = table.topk(queries, 4, seen_ids, seen_offsets, chunk_mib)
    for row, hidden in enumerate(seen):
        expected = sorted((s for i, s in scores[row].items() if i not in hidden), reverse=True)[:4]
        found = [i for i in ids[row].tolist() if i > 0]
        assert len(found) == len(expected) and not set(found) & set(hidden)
        assert [scores[row][i] for i in found] == pytest.approx(expected)
        assert best[row, : len(found)].tolist() == pytest.approx(expected)
    assert ids[7].tolist() == [0] * 4 and best[7].tolist() == [-math.inf] * 4


def test_pairs_are_scored_within_the_bound(monkeypatch):
    table, sizes, mix = MixtureTable(400, D, SMALL).eval(), [], MixtureOfLogits.mix

    def recorded(self, logits, *rest):
        sizes.append(logits.numel() // logits.shape[-1])
        return mix(self, logits, *rest)

    monkeypatch.setattr(MixtureOfLogits, "mix", recorded)
    queries = table.mixture.queries(torch.randn(20, D), torch.arange(20))
    table.rank(queries, torch.ones(20, dtype=torch.int64), chunk_mib=0.1)
    pair_bytes = 4 * (2 * SMALL.gate_dim + 8 * 6)
    assert sum(sizes) == 20 * 401 and max(sizes) * pair_bytes <= 0.05 * 2**20 < 2 * max(sizes) * pair_bytes


# The model and its runs


def mixture_model(**changes) -> HSTUConfig:
    values = dict(dim=8, num_blocks=1, qk_dim=8, v_dim=8, max_len=20, dropout=0.1, l2_normalize=False)
    mixture = MixtureConfig(query_components=3, item_components=2, dim=8, hidden_dim=16, gate_dim=8, user_embeddings=50)
    return HSTUConfig(**values, similarity="mixture_of_logits", mixture=dataclasses.replace(mixture, **changes))


def test_tables_of_ids_and_parameters():
    model = RetrievalModel(mixture_model(), 30)
    assert [sum(p.numel() for p in table.parameters()) for table in model.tables()] == [31 * 8, 51 * 8]
    numbers = model.num_parameters()
    assert numbers["total"] - numbers["without_embeddings"] == (31 + 51) * 8
    weight = model.table.mixture.item_components.weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (8 + 16)), rel=0.2)
    assert model.table.mixture.query_hidden.bias.abs().max() == 0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Config and folder of a short run on 150 synthetic users."""
    root = tmp_path_factory.mktemp("mixture")
    config = Config(
        experiment="tiny",
        data=DataConfig(root=str(root / "data"), num_users=150, num_items=60),
        model=mixture_model(),
        loss=LossConfig(num_negatives=16, temperature=1.0),
        optim=OptimConfig(lr=3e-3),
        eval=EvalConfig(ks=[10], bootstrap=0, filter_history="none"),
        run=RunConfig(dir=str(root / "run"), epochs=3, batch_users=16, loggers=[], progress=False,
                      save_every_minutes=None, log_every_steps=1),
    )  # fmt: skip
    return config, train(config)


def test_training_loss_falls(run):
    _, folder = run
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["epoch_loss"] for line in lines if "epoch_loss" in line]
    assert len(losses) == 3 and losses[2] < losses[1] < losses[0]


def test_checkpoint_to_recommendations(run):
    config, folder = run
    cached, plain = load(folder, device="cpu"), load(folder, device="cpu", cache_mib=0)
    assert cached.config == config and isinstance(cached.model.table, MixtureTable)
    assert cached.queries is not None and plain.queries is None
    user = int(cached.store.user_raw_ids[3])
    first = plain.recommend(user=user, k=5, filter_history="none")
    for _ in range(2):  # the second time from the cache
        again = cached.recommend(user=user, k=5, filter_history="none")
        assert [i.item for i in again.items] == [i.item for i in first.items]
        assert [i.score for i in again.items] == pytest.approx([i.score for i in first.items], rel=1e-4)
    (_, scores, ids), *_ = plain.recommend_many(np.array([3]), k=5, filter_history="none")
    assert cached.store.item_raw_ids[ids[0] - 1].tolist() == [i.item for i in first.items]
    assert scores[0] == pytest.approx([i.score for i in first.items], rel=1e-5)


def test_the_user_vector_tells_a_user_from_a_stranger_with_the_same_history(run):
    recommender = load(run[1], device="cpu")
    user = recommender.store.user_raw_ids[3].item()
    with torch.no_grad():
        recommender.model.table.mixture.users.weight[4] += 3.0
    known = recommender.recommend(user=user, k=5, filter_history="none")
    stranger = recommender.recommend(
        history=[e.item for e in known.history], history_times=[e.time for e in known.history],
        request_time=known.history[-1].time + 60, k=5, filter_history="none",
    )  # fmt: skip
    assert [i.score for i in known.items] != pytest.approx([i.score for i in stranger.items], rel=1e-3)


# Config


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss": {"name": "full_softmax", "temperature": 1.0}}, "loss.name='full_softmax': expected sampled_softmax"),
        ({"loss": {}}, "loss.temperature=0.05: expected 1 with"),
        ({"model": {"l2_normalize": True}}, "model.l2_normalize=True: expected false"),
        ({"model": {"similarity": "cosine"}}, "model.similarity='cosine': expected one of dot, mixture_of_logits"),
        ({"model": {"mixture": {"softmax_dropout": 1.0}}}, r"model.mixture.softmax_dropout=1.0: expected in \[0, 1\)"),
        ({"model": {"mixture": {"user_embeddings": 5, "query_components": 1}}}, "query_components=1: expected >= 2"),
        ({"model": {"mixture": {"dims": 5}}}, "dims"),
        ({"ranking": {"tasks": {"like": {"threshold": 4}}}}, "ranking='a ranking model': expected none"),
    ],
    ids=["loss", "temperature", "l2", "similarity", "dropout", "components", "unknown", "ranking"],
)
def test_config_errors(changes, said):
    values = {"model": {"similarity": "mixture_of_logits", "l2_normalize": False}, "loss": {"temperature": 1.0}}
    values["model"] |= changes.get("model", {})
    with pytest.raises(UserError, match=said):
        from_dict(values | {k: v for k, v in changes.items() if k != "model"})


@pytest.mark.parametrize("dataset", ["ml-1m", "ml-20m", "amazon-books"])
def test_experiments_and_their_published_rows(dataset):
    from hydra import compose, initialize_config_dir

    from hstu.cli import register_schemas
    from hstu.config import from_dictconfig

    register_schemas()
    with initialize_config_dir(str(conf_dir()), version_base=None):
        large, config = (
            from_dictconfig(compose("config", [f"experiment={dataset}/{name}"]))
            for name in ("hstu-large", "hstu-large-mol")
        )
    assert config.model.mixture.query_components == 8 and from_dict(to_dict(config)) == config
    row = published_row(config)
    assert row is not None and row.metrics["hr@10"] > published_row(large).metrics["hr@10"]
    dot = dataclasses.replace(config.model, similarity="dot")
    assert published_row(dataclasses.replace(config, model=dot)) is None
    assert published_row(dataclasses.replace(large, published=row)) is None
    same = dataclasses.replace(config.model, l2_normalize=True, similarity="dot", mixture=MixtureConfig())
    assert same == large.model
