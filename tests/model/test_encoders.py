"""Encoders: causality, jagged equals alone, initial values, parameter counts, the baselines' attention."""

import dataclasses

import pytest
import torch

from hstu.config import BiasConfig, FuXiLinearConfig, HSTUConfig, LossConfig, SASRecConfig, TransformerConfig
from hstu.data.batches import Batch
from hstu.model.retrieval import RetrievalModel
from hstu.model.softmax_attention import _padded, causal_softmax_attention
from hstu.model.transformer import rotary
from kernels.attention import make_plan

NUM_ITEMS = 40
CONFIGS = {
    "hstu": HSTUConfig(dim=8, num_heads=2, qk_dim=4, v_dim=5, max_len=20),
    "hstu-per-head": HSTUConfig(dim=8, num_heads=2, qk_dim=4, v_dim=4, max_len=20, bias=BiasConfig(per_head=True)),
    "hstu-no-bias": HSTUConfig(dim=8, qk_dim=4, v_dim=4, max_len=20, bias=BiasConfig(position=False, time=False)),
    "hstu-window": HSTUConfig(dim=8, qk_dim=4, v_dim=4, max_len=20, window=3, full_rows=1, divisor="row_count"),
    "hstu-power-law": HSTUConfig(dim=8, qk_dim=4, v_dim=4, max_len=20, bias=BiasConfig(time_kind="power_law")),
    "sasrec": SASRecConfig(dim=8, num_heads=2, ffn_dim=12, max_len=20),
    "transformer": TransformerConfig(dim=8, num_heads=2, ffn_dim=12, max_len=20),
    "fuxi_linear": FuXiLinearConfig(
        dim=16, num_heads=2, qk_dim=4, ffn_dim=12, position_dim=4, chunk_size=6, max_len=20
    ),
}


TOY = HSTUConfig(
    dim=8, num_blocks=1, num_heads=2, qk_dim=4, v_dim=5, max_len=20, dropout=0.0,
    bias=BiasConfig(num_buckets=16, bucket_width=1.3),
)  # fmt: skip
"""Draws nothing and has few time buckets: for Triton's interpreter, which is slow."""


def make_batch(lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    total = int(offsets[-1])
    times = torch.cat([torch.randint(0, 10**7, (n + 1,), generator=g).sort().values for n in lengths])
    keep = torch.ones(total + len(lengths), dtype=torch.bool)
    keep[offsets[1:] + torch.arange(len(lengths))] = False
    return Batch(
        offsets=offsets,
        item_ids=torch.randint(1, NUM_ITEMS + 1, (total,), generator=g),
        timestamps=times[keep],
        request_times=times[1:][keep[:-1]],
        labels=torch.randint(1, NUM_ITEMS + 1, (total,), generator=g),
        users=torch.arange(len(lengths)),
        max_len=max(lengths),
    )


def make_model(config, seed=0):
    torch.manual_seed(seed)
    return RetrievalModel(config, NUM_ITEMS, LossConfig(num_negatives=5))


def one_user(batch, user):
    rows = slice(*batch.offsets[user : user + 2].tolist())
    parts = {n: getattr(batch, n)[rows] for n in ("item_ids", "timestamps", "request_times", "labels")}
    length = rows.stop - rows.start
    return rows, Batch(offsets=torch.tensor([0, length]), users=torch.zeros(1), max_len=length, **parts)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_user_in_a_batch_equals_the_user_alone(config):
    model, batch = make_model(config), make_batch([3, 20, 1, 7])
    together = model.encode(batch)
    for user in range(4):
        rows, alone = one_user(batch, user)
        torch.testing.assert_close(together[rows], model.encode(alone), rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(model.last(batch), together[batch.offsets[1:] - 1])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_no_output_depends_on_a_later_event(config):
    model, batch = make_model(config), make_batch([12])
    changed = dataclasses.replace(batch, item_ids=batch.item_ids.clone())
    changed.item_ids[8:] = batch.item_ids[8:] % NUM_ITEMS + 1
    before, after = model.encode(batch), model.encode(changed)
    assert torch.equal(before[:8], after[:8])
    assert (before[8:] != after[8:]).any(dim=1).all()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_loss_is_a_function_of_the_seed_and_reaches_every_parameter(config):
    model, batch = make_model(config), make_batch([3, 20, 1, 7])
    assert torch.equal(model.loss(batch, 5), model.loss(batch, 5))
    assert not torch.equal(model.loss(batch, 5), model.loss(batch, 6))
    model.loss(batch, 5).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_outputs_have_unit_length(config):
    norms = make_model(config).encode(make_batch([5, 2])).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(7), rtol=1e-5, atol=0)


def test_request_time_changes_only_what_it_should():
    config = CONFIGS["hstu"]
    off = dataclasses.replace(config, bias=BiasConfig(request_time=False))
    batch = make_batch([9])
    later = dataclasses.replace(batch, request_times=batch.request_times + torch.tensor([0] * 8 + [10**6]))
    known, blind = make_model(config), make_model(off)
    assert torch.equal(known.encode(batch)[:8], known.encode(later)[:8])
    assert not torch.equal(known.encode(batch)[8], known.encode(later)[8])
    assert torch.equal(blind.encode(batch), blind.encode(later))


def test_parameters_of_the_published_ml_1m_sizes():
    # HSTU layer: 50 x 200 + (2 x 211 - 1) + 129 + 50 x 50 + 50 = 13,100; twice, and 211 x 50 positions.
    model = RetrievalModel(HSTUConfig(), 3883)
    assert model.num_parameters() == {"total": 2 * 13_100 + 10_550 + 3884 * 50, "without_embeddings": 36_750}
    # SASRec block: 150 x 50 + 150 + 3 x (50 x 50 + 50) = 15,300.
    assert RetrievalModel(SASRecConfig(), 3883).num_parameters()["without_embeddings"] == 2 * 15_300 + 10_550


def test_initial_values_are_the_published_ones():
    torch.manual_seed(0)
    layer = RetrievalModel(HSTUConfig(), 3883).encoder.layers[0]
    assert layer.uvqk.std().item() == pytest.approx(0.02, rel=0.05)
    assert layer.bias.position.std().item() == pytest.approx(0.02, rel=0.15)
    assert layer.out_weight.abs().max().item() <= (6 / 100) ** 0.5
    assert layer.out_weight.std().item() == pytest.approx((6 / 100 / 3) ** 0.5, rel=0.05)


def attention_inputs(lengths, heads=2, width=8):
    g = torch.Generator().manual_seed(0)
    total = sum(lengths)
    plan = make_plan(torch.tensor([0, *lengths]).cumsum(0), max(lengths))
    tensors = [torch.randn(total, heads, width, generator=g, dtype=torch.float64).requires_grad_() for _ in range(3)]
    return tensors, plan


def test_softmax_attention_equals_torch_on_the_padded_batch():
    tensors, plan = attention_inputs([3, 0, 70, 1, 130])
    got, expected = causal_softmax_attention(*tensors, plan), _padded(*tensors, plan, 0.0, 0, None)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    upstream = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad(got, tensors, upstream), torch.autograd.grad(expected, tensors, upstream), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_softmax_attention_gradient_with_dropout():
    tensors, plan = attention_inputs([3, 2, 5], width=4)
    assert torch.autograd.gradcheck(lambda q, k, v: causal_softmax_attention(q, k, v, plan, 0.3, 5), tensors)
    with_dropout = causal_softmax_attention(*tensors, plan, 0.3, 5)
    assert not torch.equal(with_dropout, causal_softmax_attention(*tensors, plan, 0.3, None))


def test_rotary_keeps_lengths_and_depends_on_distance_only():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 1, 8, generator=g), torch.randn(1, 1, 8, generator=g)
    position = torch.arange(50)
    q_at, k_at = (rotary(x.expand(50, 1, 8), position, 10_000.0) for x in (q, k))
    torch.testing.assert_close(q_at.norm(dim=-1), q.norm(dim=-1).expand(50, 1))
    dots = torch.einsum("iha,jha->ij", q_at, k_at)
    torch.testing.assert_close(dots[5, 2], dots[43, 40], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dots[0, 0], (q * k).sum(), rtol=1e-5, atol=1e-6)
