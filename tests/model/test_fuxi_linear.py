"""FuXi-Linear: against a loop over users and events in float64, by hand, chunks, times, sizes, training."""

import dataclasses
import math

import pytest
import torch
from torch.nn.functional import layer_norm, linear, rms_norm, silu, softplus

from hstu.config import FuXiLinearConfig
from hstu.errors import UserError
from hstu.model.encoder import make_encoder
from hstu.model.fuxi_linear import positional_weights, temporal_weights
from hstu.model.retrieval import RetrievalModel
from tests.model.test_encoders import CONFIGS, make_batch, make_model

CONFIG = CONFIGS["fuxi_linear"]
LENGTHS = [3, 14, 1, 7]
"""With chunks of 6: less than one, two and a part, one event, one and a part."""


def loop_block(block, x, asked, happened, periods_s):
    """One block on one user: every weight formed by itself, as the equations read. x: [n, D] float64."""
    dim, num_events, num_heads = x.shape[1], len(x), block.num_heads
    projected = layer_norm(x, (dim,), eps=1e-6) @ block.projection
    qk = (block.projection.shape[1] - 6 * dim) // 2
    u, q, k, v = silu(projected[:, : -2 * dim]).split([3 * dim, qk, qk, dim], dim=1)
    by_time, by_place = projected[:, -2 * dim :].split(dim, dim=1)
    rates = torch.exp(-torch.cumsum(softplus(block.decay), 0))
    periods = periods_s.repeat(2).to(x.dtype)  # of the sines, then of the cosines
    is_sine = torch.arange(len(periods)) < len(periods_s)
    rows = []
    for i in range(num_events):
        seen = slice(i + 1)
        steps = torch.arange(i + 1, 0, -1)[:, None]  # i - j + 1
        products = (q[i] * k[seen]).unflatten(1, (num_heads, -1)).sum(2) * torch.exp(-rates * steps)  # [j, H]
        semantic = (products.repeat_interleave(dim // num_heads, 1) * v[seen]).sum(0)
        angle = 2 * math.pi * (asked[i] - happened[seen]).to(x.dtype)[:, None] / periods  # [j, 2T]
        waves = torch.where(is_sine, angle.sin(), angle.cos()) * 0.5**angle
        temporal = (waves.repeat_interleave(dim // len(periods), 1) * by_time[seen]).sum(0)
        places = block.position[seen] @ block.position[i] / (block.position.shape[1] / 2)
        positional = (places[:, None] * by_place[seen]).sum(0)
        positional = block.position_scale * positional + block.position_skip * by_place[i]
        rows.append(torch.cat([layer_norm(m, (dim,), eps=1e-6) for m in (semantic, temporal, positional)]))
    x = x + linear(u * torch.stack(rows), block.mix.weight)
    gate, up = linear(rms_norm(x, (dim,), eps=1e-6), block.gate_up.weight).chunk(2, dim=1)
    return x + linear(silu(gate) * up, block.down.weight)


def loop_encoder(encoder, events, batch):
    """The encoder, user by user. events: [L, D] float64."""
    outputs = []
    for start, stop in zip(batch.offsets[:-1].tolist(), batch.offsets[1:].tolist(), strict=True):
        x = math.sqrt(events.shape[1]) * events[start:stop] + encoder.input.position[: stop - start]
        for block in encoder.layers:
            times = batch.request_times[start:stop], batch.timestamps[start:stop]
            x = loop_block(block, x, *times, encoder.periods_s)
        outputs.append(x)
    return torch.cat(outputs)


def wide_awake(config, seed=0):
    """An encoder in float64 whose mixers matter: initial values make all but the residual small."""
    torch.manual_seed(seed)
    encoder = make_encoder(config).double()
    with torch.no_grad():
        for block in encoder.layers:
            for weight in (block.projection, block.mix.weight, block.gate_up.weight, block.down.weight):
                weight.mul_(10)
            block.decay.normal_()
            block.position_scale.fill_(0.7)
    return encoder


def near_times(batch):
    """The batch with its times a hundred thousand times closer, so that no mixer's weights are all 0."""
    first = batch.timestamps.min()
    return dataclasses.replace(
        batch, timestamps=(batch.timestamps - first) // 10**5, request_times=(batch.request_times - first) // 10**5
    )


def test_outputs_and_gradients_equal_a_loop_over_users_and_events():
    encoder, batch = wide_awake(dataclasses.replace(CONFIG, num_periods=2)), near_times(make_batch(LENGTHS))
    events = torch.randn(25, CONFIG.dim, dtype=torch.float64, requires_grad=True)
    got, expected = encoder(events, encoder.plan(batch), None), loop_encoder(encoder, events, batch)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    far = encoder(events, encoder.plan(make_batch(LENGTHS)), None)
    assert (got - far).abs().max() > 0.1  # the times matter
    inputs, upstream = [events, *encoder.parameters()], torch.randn_like(got)
    gradients = torch.autograd.grad(got, inputs, upstream)
    for a, b in zip(gradients, torch.autograd.grad(expected, inputs, upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("chunk_size", [1, 5, 20, 64])
def test_the_size_of_a_chunk_changes_nothing(chunk_size):
    batch, events = near_times(make_batch(LENGTHS)), torch.randn(25, CONFIG.dim, dtype=torch.float64)
    encoder, other = wide_awake(CONFIG), wide_awake(dataclasses.replace(CONFIG, chunk_size=chunk_size))
    expected = encoder(events, encoder.plan(batch), None)
    torch.testing.assert_close(other(events, other.plan(batch), None), expected, rtol=1e-11, atol=1e-11)


def test_temporal_weights_by_hand():
    # One period of 16 s; events at 100 s and 104 s, the second one predicted for 108 s.
    key_time, query_time = torch.tensor([[[100, 104]]]), torch.tensor([[[104, 108]]])
    inside = temporal_weights(query_time, key_time, torch.tensor([16]), torch.float64).inside[0, 0]
    quarter, half = 0.5 ** (math.pi / 2), 0.5**math.pi  # kept after a quarter and half of the period
    sines = torch.tensor([[quarter, 0.0], [0.0, quarter]], dtype=torch.float64)
    cosines = torch.tensor([[0.0, 0.0], [-half, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(inside, torch.stack([sines, cosines]), rtol=0, atol=1e-12)


def test_positional_weights_by_hand():
    table = torch.tensor([[0.0, 1.0], [1.0, 1.0], [2.0, 0.0]])
    inside = positional_weights(table, num_chunks=2, size=2).inside[0, :, 0]
    assert inside.tolist() == [[[1.0, 0.0], [1.0, 2.0]], [[4.0, 0.0], [0.0, 0.0]]]  # the fourth place has no vector


def test_phases_of_todays_seconds_are_exact_in_float32():
    # 1.7e9 s has no exact float32 neighbour within a minute: gaps and phases must be formed in integers.
    query_time, key_time = torch.tensor([[[1_700_000_004]]]), torch.tensor([[[1_700_000_001]]])
    inside = temporal_weights(query_time, key_time, torch.tensor([16]), torch.float32).inside.flatten()
    angle = 2 * math.pi * 3 / 16
    expected = torch.tensor([math.sin(angle), math.cos(angle)]) * 0.5**angle
    torch.testing.assert_close(inside, expected, rtol=1e-5, atol=0)


def test_only_gaps_matter():
    encoder, batch = wide_awake(CONFIG), near_times(make_batch(LENGTHS))
    shifted = dataclasses.replace(
        batch, timestamps=batch.timestamps + 10**9 + 7, request_times=batch.request_times + 10**9 + 7
    )
    events = torch.randn(25, CONFIG.dim, dtype=torch.float64)
    outputs = [encoder(events, encoder.plan(b), None) for b in (batch, shifted)]
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)  # phases of long periods carry the rounding of 2 pi


def test_request_time_changes_only_what_it_should():
    batch = near_times(make_batch([9]))
    later = dataclasses.replace(batch, request_times=batch.request_times + torch.tensor([0] * 8 + [3]))
    known, blind = make_model(CONFIG), make_model(dataclasses.replace(CONFIG, request_time=False))
    assert torch.equal(known.encode(batch)[:8], known.encode(later)[:8])
    assert not torch.equal(known.encode(batch)[8], known.encode(later)[8])
    assert torch.equal(blind.encode(batch), blind.encode(later))


def test_no_output_depends_on_the_time_of_a_later_event():
    batch = near_times(make_batch([14]))
    later = dataclasses.replace(
        batch,
        timestamps=batch.timestamps + torch.tensor([0] * 8 + [5] * 6),
        request_times=batch.request_times + torch.tensor([0] * 8 + [5] * 6),
    )
    model = make_model(CONFIG)
    before, after = model.encode(batch), model.encode(later)
    assert torch.equal(before[:8], after[:8])
    assert (before[8:] != after[8:]).any(dim=1).all()


def test_a_batch_without_events():
    model = make_model(CONFIG)
    empty = dataclasses.replace(
        make_batch([1]), offsets=torch.tensor([0, 0]), max_len=0,
        **{n: torch.zeros(0, dtype=torch.int64) for n in ("item_ids", "timestamps", "request_times", "labels")},
    )  # fmt: skip
    assert model.encode(empty).shape == (0, CONFIG.dim)


def test_parameters_and_initial_values_of_the_published_size():
    config = FuXiLinearConfig(dim=256, num_blocks=8, num_heads=8, qk_dim=32, ffn_dim=256)
    torch.manual_seed(0)
    model = RetrievalModel(config, 10)
    # Block: 256 x (3 x 256 + 256 + 256 + 256 gated, 2 x 256 linear) + 8 decays + 211 x 32 + 2, then 768 x 256 +
    # 2 x 256 x 256 + 256 x 256 = 924,266; and 211 x 256 positions.
    assert model.num_parameters()["without_embeddings"] == 8 * 924_266 + 211 * 256
    block = model.encoder.layers[0]
    gated, values = block.projection.split([1536, 512], dim=1)
    assert gated.std().item() == pytest.approx(0.02, rel=0.02)
    assert values.abs().max().item() <= 1 / 16 and values.std().item() == pytest.approx(1 / 16 / 3**0.5, rel=0.02)
    torch.testing.assert_close(block.position[:, :16] ** 2 + block.position[:, 16:] ** 2, torch.ones(211, 16))
    rate = torch.exp(-softplus(block.decay).cumsum(0))
    torch.testing.assert_close(rate, 0.5 ** torch.arange(1.0, 9.0), rtol=0.2, atol=0)
    assert model.encoder.periods_s.tolist() == [16**i for i in range(8)]


def test_training_learns_to_count():
    # The next item is the last one plus one, modulo 9: the loss falls far below ln 6, that of guessing.
    model = make_model(dataclasses.replace(CONFIG, num_blocks=1, dropout=0.0))
    batch = make_batch([12] * 8)
    item_ids = (torch.arange(96) + torch.arange(8).repeat_interleave(12)) % 9 + 1
    batch = dataclasses.replace(batch, item_ids=item_ids, labels=item_ids % 9 + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    losses = []
    for step in range(40):
        optimizer.zero_grad()
        loss = model.loss(batch, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.0 and sum(losses[-5:]) / 5 < 0.2


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("num_heads", 3, "model.num_heads=3: expected a divisor of dim=64"),
     ("num_periods", 5, "model.num_periods=5: expected half of a divisor of dim=64"),
     ("position_dim", 7, r"model.position_dim=7: expected an even number >= 2 \(sines and cosines\)"),
     ("chunk_size", 0, "model.chunk_size=0: expected >= 1"),
     ("period_ratio", 1000, r"model.period_ratio=1000: expected a longest period below 2\^62 s")],
    ids=["heads", "periods", "position width", "chunk", "longest period"],
)  # fmt: skip
def test_options_out_of_range(field, value, message):
    with pytest.raises(UserError, match=message):
        FuXiLinearConfig(**{field: value})


@pytest.mark.gpu
def test_cuda_equals_cpu():
    encoder, batch = wide_awake(CONFIG), near_times(make_batch(LENGTHS))
    events = torch.randn(25, CONFIG.dim, dtype=torch.float64)
    expected = encoder(events, encoder.plan(batch), None)
    device = torch.device("cuda")
    moved = batch.to(device)
    got = encoder.to(device).float()(events.to(device).float(), encoder.plan(moved), None)
    torch.testing.assert_close(got.cpu(), expected.float(), rtol=1e-3, atol=1e-3)
