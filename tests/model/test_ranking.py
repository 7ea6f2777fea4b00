"""The ranking model: nothing of the future is seen, every parameter learns, torchrec and plain tables agree, heads."""

from __future__ import annotations

import builtins
import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from hstu.config import FuXiLinearConfig, HSTUConfig, SASRecConfig, TransformerConfig
from hstu.config_ranking import HeadConfig, TaskConfig
from hstu.data.ranking import RankingData
from hstu.data.ranking_batches import gather, make_features, target_sequences
from hstu.errors import UserError
from hstu.feature_tables import FeatureTables, has_torchrec
from hstu.model.heads import RankingHeads
from hstu.model.ranking import NumberTokens, RankingModel
from tests.ranking import config_of, ranking_config, rich_store, with_columns

NAN = float("nan")
LENGTHS = (5, 1, 9, 0, 4)
TASK_NAMES = ("click", "rating", "watch")
FORMS = ("interleaved", "fused")
ENCODERS = {
    "hstu": HSTUConfig(dim=8, num_blocks=2, num_heads=2, qk_dim=4, v_dim=4, max_len=12, dropout=0.1),
    "transformer": TransformerConfig(dim=8, num_blocks=2, num_heads=2, ffn_dim=8, max_len=12, dropout=0.1),
    "sasrec": SASRecConfig(dim=8, num_blocks=2, num_heads=2, ffn_dim=8, max_len=12, dropout=0.1),
    "fuxi_linear": FuXiLinearConfig(
        dim=8, num_blocks=2, num_heads=2, qk_dim=4, ffn_dim=8, num_periods=4, max_len=12, dropout=0.1
    ),
}


def make_model(store, form="interleaved", encoder="hstu", **changes):
    """A model whose weights are large enough for every input to matter."""
    config = config_of(ranking_config(form, **changes), model=ENCODERS[encoder])
    data = RankingData(store, config.ranking)
    torch.manual_seed(0)
    model = RankingModel(config.model, config.ranking, data).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return config, data, model


def batch_of(config, data, rows=None):
    """All events predicted, or those of ``rows``."""
    rows = np.arange(data.store.num_events) if rows is None else np.asarray(rows)
    return gather(data, target_sequences(data, config, rows))


def predictions(model, batch):
    """By task and event row."""
    with torch.inference_mode():
        found = model.predict(batch)
    return {n: {int(r): v for r, v in zip(batch.rows, found[n], strict=True)} for n in TASK_NAMES}


def changed(before, after):
    """Rows whose predictions differ in any task."""
    assert before["click"].keys() == after["click"].keys()
    return {r for n in TASK_NAMES for r in before[n] if not torch.equal(before[n][r], after[n][r])}


@pytest.fixture
def store(tmp_path):
    return rich_store(tmp_path / "store", LENGTHS)


def flipped(store, path, rows):
    """The store with other actions and labels at ``rows``."""
    columns = {n: np.array(store.columns[n]) for n in ("click", "rating", "watch_s")}
    columns["click"][rows] = 1 - columns["click"][rows]
    columns["rating"][rows] = np.where(columns["rating"][rows] == 3, 1, 3)
    columns["watch_s"][rows] = 59 - columns["watch_s"][rows]
    return with_columns(store, path, **columns)


# No leak


@pytest.mark.parametrize("encoder", ["hstu", "transformer", "sasrec", "fuxi_linear"])
def test_interleaved_an_action_changes_later_predictions_only(store, tmp_path, encoder):
    config, data, model = make_model(store, encoder=encoder)
    before = predictions(model, batch_of(config, data))
    for row in (0, 9, 13, 14):  # first of user 0; in the middle and at the end of user 2 (rows 6..14)
        other = RankingData(flipped(store, tmp_path / str(row), [row]), config.ranking)
        after = predictions(model, batch_of(config, other))
        end = int(store.offsets[np.searchsorted(store.offsets, row, side="right")])
        assert changed(before, after) == set(range(row + 1, end))


def test_fused_an_action_is_unseen_by_its_group_and_seen_by_the_next(store, tmp_path):
    config, data, model = make_model(store, "fused")  # groups of three targets
    before = predictions(model, batch_of(config, data))
    for row, later in ((7, {9, 10, 11, 12, 13, 14}), (8, {9, 10, 11, 12, 13, 14}), (11, {12, 13, 14}), (14, set())):
        other = RankingData(flipped(store, tmp_path / str(row), [row]), config.ranking)
        assert changed(before, predictions(model, batch_of(config, other))) == later


def test_fused_targets_do_not_see_each_other(store):
    """Another item as target changes its own prediction only, also through the prefix, which sees the history."""
    config, data, model = make_model(store, "fused")
    rows = [12, 13, 14]
    before = predictions(model, batch_of(config, data, rows))
    batch = batch_of(config, data, rows)
    items = batch.item_ids.clone()
    items[batch.targets[1]] = items[batch.targets[1]] % 20 + 1
    assert changed(before, predictions(model, dataclasses.replace(batch, item_ids=items))) == {13}


@pytest.mark.parametrize("form", FORMS)
def test_labels_reach_no_prediction(store, form):
    config, data, model = make_model(store, form, actions={})  # labels are no actions here
    batch = batch_of(config, data)
    before = predictions(model, batch)
    labels = {n: torch.zeros_like(v) for n, v in batch.labels.items()}
    assert changed(before, predictions(model, dataclasses.replace(batch, labels=labels))) == set()


@pytest.mark.parametrize("form", FORMS)
def test_predicted_events_may_have_any_action(store, tmp_path, form):
    """What is done in the predicted events themselves is unknown when they are asked: interleaved the last of each
    user, fused all."""
    config, data, model = make_model(store, form)
    rows = [4, 14, 18] if form == "interleaved" else [3, 4, 13, 14, 18]
    before = predictions(model, batch_of(config, data, rows))
    other = RankingData(flipped(store, tmp_path / "o", rows), config.ranking)
    assert changed(before, predictions(model, batch_of(config, other, rows))) == set()


@pytest.mark.parametrize("form", FORMS)
def test_other_users_features_change_nothing(store, form):
    config, data, model = make_model(store, form)
    before = predictions(model, batch_of(config, data))
    batch = batch_of(config, data)
    user = batch.user_features
    values, numbers = user.values.clone(), user.numbers.clone()
    of_user = batch.users == 2
    values[of_user] = (values[of_user] + 1) % data.user_feature_sizes["gender"]  # one value each
    numbers[of_user] += 1.0
    after = predictions(
        model, dataclasses.replace(batch, user_features=dataclasses.replace(user, values=values, numbers=numbers))
    )
    assert changed(before, after) == set(range(6, 15))


@pytest.mark.parametrize("encoder", ["hstu", "transformer", "sasrec", "fuxi_linear"])
def test_interleaved_predictions_do_not_depend_on_later_events(store, encoder):
    config, data, model = make_model(store, encoder=encoder)
    whole = predictions(model, batch_of(config, data))
    for row in (0, 3, 6, 10, 14):
        alone = predictions(model, batch_of(config, data, [row]))
        for name in TASK_NAMES:
            assert_close(alone[name][row], whole[name][row], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_batching_changes_nothing(store, form):
    config, data, model = make_model(store, form)
    together = predictions(model, batch_of(config, data))
    for user in (0, 1, 2, 4):
        rows = np.arange(store.offsets[user], store.offsets[user + 1])
        alone = predictions(model, batch_of(config, data, rows))
        for name in TASK_NAMES:
            for row in rows.tolist():
                assert_close(alone[name][row], together[name][row], rtol=1e-5, atol=1e-6)


# Edges


@pytest.mark.parametrize("form", FORMS)
def test_cold_users_single_events_and_long_users(tmp_path, form):
    store = rich_store(tmp_path / "s", (1, 40, 0, 2))
    config, data, model = make_model(store, form)
    found = predictions(model, batch_of(config, data))
    assert found["click"].keys() == set(range(43))  # more than the 12 events that fit, each once
    for row in range(43):
        assert 0 < found["click"][row] < 1 and torch.isfinite(found["watch"][row])
        assert_close(found["rating"][row].sum(), torch.tensor(1.0))
    first = predictions(model, batch_of(config, data, [0, 1, 41]))  # no history at all
    for row in (0, 1, 41):
        assert_close(first["click"][row], found["click"][row], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_no_features_and_no_actions(store, form):
    nothing = dict.fromkeys(("user_features", "item_features", "event_features", "actions"), {})
    config, data, model = make_model(store, form, **nothing)
    assert model.num_prefix == 0 and len(predictions(model, batch_of(config, data))["click"]) == sum(LENGTHS)


def test_fused_needs_an_encoder_that_knows_targets(store):
    with pytest.raises(UserError, match="form=fused with model.name=transformer: only hstu knows targets; use interl"):
        make_model(store, "fused", "transformer")


def test_user_minus_1_has_every_feature_missing(store):
    config, data, model = make_model(store)
    batch = batch_of(config, data, [6, 7])
    known = predictions(model, batch)
    nobody = dataclasses.replace(batch, user_features=make_features(*data.prefix_features(np.array([-1]))))
    assert changed(known, predictions(model, nobody)) == {6, 7}


# Training


@pytest.mark.parametrize("heads", [HeadConfig([8, 4]), HeadConfig([8], shared_experts=2, task_experts=1)],
                         ids=["trunk", "experts"])  # fmt: skip
@pytest.mark.parametrize("form", FORMS)
def test_gradients_reach_every_parameter(store, form, heads):
    config, data, model = make_model(store, form, head=heads)
    batch = batch_of(config, data)
    model.loss(batch, 5).backward()
    without = {n for n, p in model.named_parameters() if p.numel() and (p.grad is None or not p.grad.any())}
    # Nobody lacks an age or a length; the item number has no numeric feature; positions beyond the longest are unused.
    assert without <= {"user_numbers.missing", "item_numbers.missing"}
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_dropout_follows_the_seed(store):
    config, data, model = make_model(store)
    batch = batch_of(config, data)
    one, two, other = (model.loss(batch, seed).item() for seed in (1, 1, 2))
    assert one == two != other


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_autocast_is_close(store, form):
    config, data, model = make_model(store, form)
    batch = batch_of(config, data)
    plain = model.loss(batch, 0).item()
    with torch.autocast("cpu", torch.bfloat16):
        low = model.loss(batch, 0)
    assert low.dtype == torch.float32 and low.item() == pytest.approx(plain, rel=0.05)


# Tables


SIZES = {"item.genres": 4, "event.type": 3, "pop": 5}
"""``pop`` is a name that torch's ModuleDict has for itself."""


def table_features():
    genres = (np.array([1, 2, 3, 0]), np.array([2, 1, 1]))  # rows: {1, 2}, {3}, {0}
    return make_features(
        {"item.genres": genres, "event.type": (np.array([2, 0, 2]), np.ones(3, np.int64)),
         "pop": (np.array([4, 4, 1]), np.ones(3, np.int64))}, np.zeros((3, 0)),
    )  # fmt: skip


def test_plain_tables_by_hand():
    tables = FeatureTables(SIZES, 2, use_torchrec=False)
    weight = tables.collection.embeddings["item_genres"].weight
    genres, kind, _ = tables(table_features())
    assert_close(genres, torch.stack([weight[1] + weight[2], weight[3], weight[0]]))
    assert_close(kind, tables.collection.embeddings["event_type"].weight[torch.tensor([2, 0, 2])])
    assert 0.005 < float(weight.std()) < 0.05


@pytest.mark.skipif(not has_torchrec(), reason="torchrec is not installed")
def test_torchrec_and_plain_tables_are_the_same():
    torch.manual_seed(3)
    sharded = FeatureTables(SIZES, 4, use_torchrec=True)
    after = torch.rand(1)
    torch.manual_seed(3)
    plain = FeatureTables(SIZES, 4, use_torchrec=False)
    assert torch.equal(after, torch.rand(1))  # a model's other weights do not depend on torchrec
    assert sharded.uses_torchrec and not plain.uses_torchrec
    for name, value in sharded.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name])
    with torch.no_grad():
        for parameter in sharded.parameters():
            parameter.normal_()
    plain.load_state_dict(sharded.state_dict())
    upstream = [torch.randn(3, 4) for _ in SIZES]
    for tables in (plain, sharded):
        out = tables(table_features())
        sum((a * b).sum() for a, b in zip(out, upstream, strict=True)).backward()
    for a, b in zip(plain(table_features()), sharded(table_features()), strict=True):
        assert torch.equal(a, b)
    for (name, p), (other, q) in zip(plain.named_parameters(), sharded.named_parameters(), strict=True):
        assert name == other and torch.equal(p.grad, q.grad)
    sharded.load_state_dict(plain.state_dict())


def test_wrong_features_and_names_are_refused():
    with pytest.raises(ValueError, match=r"features are \['a'\], the tables \['b'\]"):
        FeatureTables({"b": 2}, 2, False)(make_features({"a": (np.array([0]), np.array([1]))}, np.zeros((1, 0))))
    with pytest.raises(ValueError, match="same table name"):
        FeatureTables({"a.b": 2, "a_b": 2}, 2, False)
    assert FeatureTables({}, 2)(make_features({}, np.zeros((3, 0)))) == []


def test_a_model_where_torchrec_cannot_be_imported(tmp_path):
    code = f"""
import sys
for name in ("torchrec", "fbgemm_gpu"):
    sys.modules[name] = None
from pathlib import Path
from tests.model.test_ranking import batch_of, make_model
from tests.ranking import rich_store
config, data, model = make_model(rich_store(Path({str(tmp_path)!r}) / "s"), "fused")
assert not model.item_tables.uses_torchrec
model.loss(batch_of(config, data), 0).backward()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def test_torchrec_is_imported_off_the_meta_device(monkeypatch):
    """Where a model is made without memory, as hstu-export does: torchrec computes as it is imported."""
    devices, plain = [], builtins.__import__

    def spy(name, *args, **kwargs):
        if name == "torchrec":
            devices.append(torch.empty(0).device.type)
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", spy)
    with torch.device("meta"):
        assert has_torchrec.__wrapped__() == has_torchrec()
    assert devices == ["cpu"] * has_torchrec()


def test_number_tokens_by_hand():
    tokens = NumberTokens(2, 3)
    out = tokens(torch.tensor([[2.0, NAN], [NAN, -1.0]]))
    assert_close(out[0, 0], 2 * tokens.slope[0] + tokens.level[0])
    assert_close(out[0, 1], tokens.missing[1])
    assert_close(out[1, 0], tokens.missing[0])
    assert_close(out[1, 1], tokens.level[1] - tokens.slope[1])


# Heads


HEAD_TASKS = {
    "b": TaskConfig("x", weight=2.0),
    "m": TaskConfig("x", kind="multiclass", levels=[1, 2, 3]),
    "o": TaskConfig("x", kind="ordinal", levels=[1, 2, 3, 4]),
    "r": TaskConfig("x", kind="regression", transform="log1p"),
}
PRIORS = {"b": [0.2], "m": [0.1, 0.6, 0.3], "o": [0.1, 0.2, 0.3, 0.4], "r": [2.0, 0.5]}


def make_heads(config=None, zero=False, priors=PRIORS):
    torch.manual_seed(1)
    heads = RankingHeads(4, HEAD_TASKS, config or HeadConfig([6]), priors)
    if zero:
        with torch.no_grad():
            for output in heads.outputs.values():
                output.weight.zero_()
    return heads


def labels(**values):
    return {n: torch.tensor(v) for n, v in values.items()}


def test_priors_give_the_base_rates():
    heads = make_heads(zero=True)
    found = heads.predict(heads(torch.randn(2, 4)))
    for name in "bmo":
        assert_close(found[name][0].flatten(), torch.tensor(PRIORS[name]), rtol=1e-5, atol=1e-6)
    assert_close(found["r"], torch.expm1(torch.tensor([2.0, 2.0])))


def test_priors_of_levels_that_never_occur():
    heads = make_heads(zero=True, priors=PRIORS | {"o": [0.5, 0.0, 0.5, 0.0], "m": [1.0, 0.0, 0.0], "b": [0.0]})
    found = heads.predict(heads(torch.randn(1, 4)))
    assert_close(found["o"][0], torch.tensor([0.5, 0.0, 0.5, 0.0]), rtol=0, atol=1e-3)
    assert_close(found["m"][0], torch.tensor([1.0, 0.0, 0.0]), rtol=0, atol=1e-3)
    assert 0 < found["b"][0] < 1e-3


@pytest.mark.parametrize("name", ["m", "o"])
def test_level_probabilities_sum_to_1(name):
    heads = make_heads()
    outputs = {n: 30 * torch.randn(50, 3 if n == "m" else 1) for n in HEAD_TASKS}
    found = heads.predict(outputs)[name]
    assert_close(found.sum(1), torch.ones(50)) and (found >= 0).all()


def test_ordinal_by_hand():
    """P(level > k) = sigmoid(score - cut_k), ascending cuts."""
    heads = make_heads()
    with torch.no_grad():
        heads.get_parameter("cuts_o").copy_(torch.tensor([-1.0, 0.5, -2.0]))
    steps = torch.tensor([0.5, -2.0]).exp().log1p()  # softplus
    cuts = torch.tensor([-1.0, float(-1 + steps[0]), float(-1 + steps[0] + steps[1])])
    score = torch.tensor([[-3.0], [0.2], [4.0]])
    above = torch.cat([torch.ones(3, 1), torch.sigmoid(score - cuts), torch.zeros(3, 1)], dim=1)
    outputs = {n: torch.zeros(3, 1) for n in HEAD_TASKS} | {"m": torch.zeros(3, 3), "o": score}
    assert_close(heads.predict(outputs)["o"], above[:, :-1] - above[:, 1:])


def test_ordinal_loss_far_from_the_cuts_still_has_a_gradient():
    # At a score of 60 both sides of a middle level are 1 in float32: their difference would be 0 and say nothing.
    heads = make_heads()
    score = torch.full((1, 1), 60.0, requires_grad=True)
    heads._task_loss("o", score, torch.tensor([1.0]), torch.tensor(1)).backward()
    assert_close(score.grad, torch.ones(1, 1))


def test_losses_by_hand():
    heads = make_heads(zero=True)
    outputs = {"b": torch.tensor([[0.0], [2.0]]), "m": torch.log(torch.tensor([[0.5, 0.25, 0.25]] * 2)),
               "o": torch.zeros(2, 1), "r": torch.tensor([[0.0], [1.0]])}  # fmt: skip
    total, each = heads.loss(outputs, labels(b=[1.0, NAN], m=[0.0, 2.0], o=[NAN, NAN], r=[np.expm1(3.0), NAN]))
    assert float(each["b"]) == pytest.approx(np.log(2))
    assert float(each["m"]) == pytest.approx((np.log(2) + np.log(4)) / 2)
    assert float(each["o"]) == 0
    assert float(each["r"]) == pytest.approx((3.0 - 2.0) ** 2 / 0.5**2)
    assert float(total) == pytest.approx(2 * np.log(2) + (np.log(2) + np.log(4)) / 2 + 4)


def test_regression_goes_there_and_back():
    heads = make_heads()
    label = torch.tensor([0.0, 3.0, 1e4])
    found = heads.predict({n: torch.zeros(3, 3) for n in HEAD_TASKS} | {"r": heads._standardise("r", label)[:, None]})
    assert_close(found["r"], label, rtol=1e-4, atol=1e-5)


def test_a_batch_without_labels_has_loss_0_and_finite_gradients():
    heads = make_heads()
    x = torch.randn(3, 4, requires_grad=True)
    total, _ = heads.loss(heads(x), {n: torch.full((3,), NAN) for n in HEAD_TASKS})
    total.backward()
    assert float(total) == 0 and torch.equal(x.grad, torch.zeros(3, 4))
    assert all(not p.grad.any() for p in heads.parameters() if p.grad is not None)


@pytest.mark.parametrize("shared, own", [(2, 0), (0, 2), (2, 1)])
def test_experts_and_gates(shared, own):
    heads = make_heads(HeadConfig([6, 5], shared_experts=shared, task_experts=own))
    x = torch.randn(7, 4)
    outputs = heads(x)
    assert {n: tuple(v.shape) for n, v in outputs.items()} == {"b": (7, 1), "m": (7, 3), "o": (7, 1), "r": (7, 1)}
    assert len(heads.shared) == shared and all(len(v) == own for v in heads.own.values())
    experts = [*heads.shared, *heads.own["b"]]
    gate = torch.softmax(heads.gates["b"](x), dim=1)
    assert_close(gate.sum(1), torch.ones(7))
    by_hand = torch.zeros(7, 5)
    for place, mlp in enumerate(experts):
        hidden = x
        for linear in mlp:
            hidden = torch.nn.functional.silu(linear(hidden))
        by_hand += gate[:, place, None] * hidden
    assert_close(outputs["b"], heads.outputs["b"](by_hand))


def test_head_dropout_follows_the_seed():
    heads = make_heads(HeadConfig([6], dropout=0.5))
    x = torch.randn(5, 4)
    assert torch.equal(heads(x, 1)["b"], heads(x, 1)["b"]) and not torch.equal(heads(x, 1)["b"], heads(x, 2)["b"])
    assert torch.equal(heads(x)["b"], make_heads()(x)["b"])
