"""Public attention op: validation, the custom ops of both backends, their fakes and gradients."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from kernels._backend import choose
from kernels._common import deterministic_or
from kernels.attention.cpu import attention_bwd_cpu, attention_fwd_cpu
from kernels.attention.cpu_delta import attention_delta_bwd_cpu, attention_delta_fwd_cpu
from kernels.attention.layout_delta import DeltaLayout
from kernels.attention.plan import AttentionPlan
from kernels.attention.reference import Mask, attention_reference
from kernels.attention.times import PowerLaw, TimeBuckets


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    position_weight: Tensor | None = None,
    time_weight: Tensor | None = None,
    *,
    divisor: float | Literal["max_len", "row_count"],
    scale: float = 1.0,
    deterministic: bool | None = None,
) -> Tensor:
    """Pointwise aggregated attention with relative position and time bias over a jagged batch.

    ``out_i = sum_j SiLU(scale q_i.k_j + w_pos[N-1+j-i] + time(tq_i - tk_j)) / divisor  v_j`` over the rows j that row
    i sees by the plan's mask; ``time(gap)`` is ``w_time[bucket(gap)]``, or ``-a ln(1+gap) + b`` for a
    :class:`kernels.attention.PowerLaw`. For the position bias a target stands right after the history.

    Args:
        q: [L, H, A] float32, float64, bfloat16 or float16; strided views are fine.
        k: same shape and dtype; in the delta form [K, H, A], rows as the plan's key_starts and key_lengths say.
        v: [L or K, H, V], same dtype.
        plan: layout, mask and times of the batch (:func:`kernels.attention.make_plan`).
        position_weight: [H or 1, 2N-1] with N >= plan.num_positions, or None.
        time_weight: [H or 1, buckets] (power law: [H or 1, 2]), or None; the plan must then hold times.
        divisor: > 0, a constant for the batch (published: the padded width N); "max_len": the batch's longest user;
            "row_count": how many rows each row sees (the plan made with count_rows).
        scale: factor on q.k (published: 1).
        deterministic: two backward runs are bit-equal. None: as torch.use_deterministic_algorithms says. The CPU
            path always is.

    Returns:
        [L, H, V] in v's dtype, accumulated in float32 (float64 for float64). Under autocast too: it is computed in the
        dtype that q, k and v come in.

    Raises:
        ValueError: shapes, dtypes or the plan do not fit together.

    Source: Zhai et al. 2024 (arXiv 2402.17152), section 3.1, bias as in the reference code; targets and the delta
    form: its section 3.4 (M-FALCON).
    """
    number, row_divisor = _divisor(divisor, plan)
    _validate(q, k, v, plan, position_weight, time_weight, number)
    if choose("attention", q.device, q.dtype).backend == "triton":
        _validate_for_kernel(q, v, plan)
        kind, width = _time_kind(plan, time_weight)
        mask = plan.mask
        return torch.ops.hstu.attention_triton(
            q, k, v, plan.offsets, plan.order, plan.key_starts, plan.key_lengths, plan.num_targets, plan.query_age,
            plan.key_age, plan.thresholds, row_divisor, position_weight, time_weight, plan.max_len, plan.max_query_len,
            [int(mask.causal), mask.contextual, mask.window, mask.full_rows], kind, width, number, scale,
            deterministic_or(deterministic),
        )  # fmt: skip
    if q.device.type != "cpu":
        return attention_reference(q, k, v, plan, position_weight, time_weight, number, scale, row_divisor)
    if plan.delta is not None:
        delta, mask = plan.delta, plan.mask
        return torch.ops.hstu.attention_delta(
            q, k, v, delta.schedule, delta.units, delta.query_rows, delta.key_rows, delta.targets, delta.buckets,
            plan.query_time, plan.key_time, row_divisor, position_weight, time_weight, _bucket_kind(plan),
            [int(mask.causal), mask.contextual, mask.window, mask.full_rows], number, scale,
        )  # fmt: skip
    assert plan.schedule is not None and plan.rows is not None and plan.slots is not None  # made on the CPU
    buckets = plan.buckets if time_weight is not None else None
    return torch.ops.hstu.attention(
        q, k, v, plan.schedule, plan.rows, plan.slots, buckets, plan.hidden, plan.pair_positions, row_divisor,
        position_weight, time_weight, number, scale, plan.mask.reaches_forward,
    )  # fmt: skip


def _divisor(divisor: float | str, plan: AttentionPlan) -> tuple[float, Tensor | None]:
    """The constant divisor and, for the row's own count, the tensor [L] that replaces it."""
    if divisor == "max_len":
        return float(max(plan.max_len, 1)), None
    if divisor == "row_count":
        if plan.row_counts is None:
            raise ValueError("divisor='row_count': the plan holds no counts; make_plan(..., count_rows=True)")
        return 1.0, plan.row_counts
    if isinstance(divisor, str) or not divisor > 0:
        raise ValueError(f"divisor={divisor!r}: expected > 0, 'max_len' or 'row_count'")
    return float(divisor), None


def _time_kind(plan: AttentionPlan, time_weight: Tensor | None) -> tuple[int, float]:
    """0 no time bias, 1 buckets, 2 power law; and the buckets' width in ln(s)."""
    if time_weight is None:
        return 0, 1.0
    return (1, plan.time_buckets.width) if isinstance(plan.time_buckets, TimeBuckets) else (2, 1.0)


def _bucket_kind(plan: AttentionPlan) -> list[float]:
    """Count and width of the plan's time buckets; empty: a power law, or no times."""
    kind = plan.time_buckets
    return [float(kind.count), kind.width] if isinstance(kind, TimeBuckets) else []


def _validate(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, position_weight: Tensor | None,
              time_weight: Tensor | None, divisor: float) -> None:  # fmt: skip
    if plan.is_delta:
        if q.dim() != 3 or k.dim() != 3 or k.shape[1:] != q.shape[1:]:
            raise ValueError(f"q and k: expected [L, H, A] and [K, H, A], got {list(q.shape)} and {list(k.shape)}")
    elif q.dim() != 3 or k.shape != q.shape:
        raise ValueError(f"q and k: expected the same [L, H, A], got {list(q.shape)} and {list(k.shape)}")
    if v.dim() != 3 or v.shape[:2] != k.shape[:2]:
        raise ValueError(f"v: expected [{k.shape[0]}, {k.shape[1]}, V], got {list(v.shape)}")
    if not (q.dtype == k.dtype == v.dtype) or not q.is_floating_point():
        raise ValueError(f"q, k, v: expected one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not (q.device == k.device == v.device == plan.offsets.device):
        devices = ", ".join(str(t.device) for t in (q, k, v, plan.offsets))
        raise ValueError(f"q, k, v, plan: expected one device, got {devices}")
    if position_weight is not None:
        heads, size = position_weight.shape if position_weight.dim() == 2 else (0, 0)
        if heads not in (1, q.shape[1]) or size % 2 == 0 or size < 2 * plan.num_positions - 1:
            raise ValueError(
                f"position_weight: expected [1 or {q.shape[1]}, 2N-1] with N >= {plan.num_positions}, "
                f"got {list(position_weight.shape)}"
            )
    if time_weight is not None:
        if plan.query_time is None or plan.key_time is None or plan.time_buckets is None:
            raise ValueError(
                "time_weight: the plan holds no times; give query_time, key_time, time_buckets to make_plan"
            )
        expected = plan.time_buckets.num_weights
        if time_weight.dim() != 2 or time_weight.shape[0] not in (1, q.shape[1]) or time_weight.shape[1] != expected:
            raise ValueError(f"time_weight: expected [1 or {q.shape[1]}, {expected}], got {list(time_weight.shape)}")
        if plan.query_time.shape[0] != q.shape[0] or plan.key_time.shape[0] != k.shape[0]:
            raise ValueError(
                f"plan times: expected {q.shape[0]} query and {k.shape[0]} key times, "
                f"got {plan.query_time.shape[0]} and {plan.key_time.shape[0]}"
            )


def _validate_for_kernel(q: Tensor, v: Tensor, plan: AttentionPlan) -> None:
    if plan.order is None:
        raise ValueError("plan: made while kernels.backend was torch; make it under the backend it is used with")
    if not (1 <= q.shape[2] <= MAX_WIDTH and 1 <= v.shape[2] <= MAX_WIDTH):
        raise ValueError(
            f"q and v have widths {q.shape[2]} and {v.shape[2]}: the Triton kernel takes 1 to {MAX_WIDTH} a head; "
            "use more heads or kernels.backend=torch"
        )


MAX_WIDTH = 256
"""Query/key and value width per head that the Triton kernel takes."""


# CPU path


@torch.library.custom_op("hstu::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, schedule: Tensor, rows: Tensor, slots: Tensor,
               buckets: Tensor | None, hidden: Tensor | None, pair_positions: Tensor | None,
               row_divisor: Tensor | None, position_weight: Tensor | None, time_weight: Tensor | None,
               divisor: float, scale: float, all_keys: bool) -> Tensor:  # fmt: skip
    return attention_fwd_cpu(
        q, k, v, schedule, rows, slots, buckets, hidden, pair_positions, row_divisor, position_weight, time_weight,
        divisor, scale, all_keys,
    )  # fmt: skip


@_attention.register_fake
def _(q, k, v, *_):  # type: ignore[no-untyped-def]
    return v.new_empty(v.shape)


def _grad_fakes(q: Tensor, k: Tensor, v: Tensor, *tables: Tensor | None) -> tuple[Tensor, ...]:
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    grads = [q.new_empty((0, 0) if w is None else w.shape, dtype=work) for w in tables]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), *grads


@torch.library.custom_op("hstu::attention_backward", mutates_args=())
def _attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, schedule: Tensor, rows: Tensor, slots: Tensor,
                        buckets: Tensor | None, hidden: Tensor | None, pair_positions: Tensor | None,
                        row_divisor: Tensor | None, position_weight: Tensor | None, time_weight: Tensor | None,
                        divisor: float, scale: float, all_keys: bool
                        ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return attention_bwd_cpu(
        grad, q, k, v, schedule, rows, slots, buckets, hidden, pair_positions, row_divisor, position_weight,
        time_weight, divisor, scale, all_keys,
    )  # fmt: skip


@_attention_backward.register_fake
def _(grad, q, k, v, s, r, t, b, h, p, d, position_weight, time_weight, divisor, scale, all_keys):  # type: ignore[no-untyped-def]
    return _grad_fakes(q, k, v, position_weight, time_weight)


NUM_TENSORS = {"cpu": 12, "delta": 14, "triton": 14}
"""Leading tensor arguments of each custom op; the last two are the tables."""


def _setup_context(ctx: Any, inputs: tuple[Any, ...], backend: str) -> None:
    count = NUM_TENSORS[backend]
    ctx.settings = inputs[count:]
    ctx.save_for_backward(*inputs[:count])


def _gradients(ctx: Any, grad: Tensor, backward: Any) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    d_q, d_k, d_v, *d_tables = backward(grad, *tensors, *ctx.settings)
    d_position, d_time = (
        None if w is None else d.to(w.dtype) for w, d in zip(tensors[-2:], d_tables, strict=True)
    )  # fmt: skip
    between = [None] * (len(tensors) - 5)
    return d_q, d_k, d_v, *between, d_position, d_time, *[None] * len(ctx.settings)


_attention.register_autograd(
    lambda ctx, grad: _gradients(ctx, grad, torch.ops.hstu.attention_backward),
    setup_context=lambda ctx, inputs, output: _setup_context(ctx, inputs, "cpu"),
)


# CPU path of the delta form


@torch.library.custom_op("hstu::attention_delta", mutates_args=())
def _attention_delta(q: Tensor, k: Tensor, v: Tensor, schedule: Tensor, units: Tensor, query_rows: Tensor,
                     key_rows: Tensor, targets: Tensor, buckets: Tensor | None, query_time: Tensor | None,
                     key_time: Tensor | None, row_divisor: Tensor | None, position_weight: Tensor | None,
                     time_weight: Tensor | None, bucket_kind: list[float], mask: list[int], divisor: float,
                     scale: float) -> Tensor:  # fmt: skip
    return attention_delta_fwd_cpu(
        q, k, v, DeltaLayout(schedule, units, query_rows, key_rows, targets, buckets), (query_time, key_time),
        _kind_of(bucket_kind), Mask(bool(mask[0]), *mask[1:]), row_divisor, position_weight, time_weight, divisor,
        scale,
    )  # fmt: skip


@_attention_delta.register_fake
def _(q, k, v, *_):  # type: ignore[no-untyped-def]
    return v.new_empty(q.shape[0], *v.shape[1:])


@torch.library.custom_op("hstu::attention_delta_backward", mutates_args=())
def _attention_delta_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, schedule: Tensor, units: Tensor, query_rows: Tensor,
    key_rows: Tensor, targets: Tensor, buckets: Tensor | None, query_time: Tensor | None, key_time: Tensor | None,
    row_divisor: Tensor | None, position_weight: Tensor | None, time_weight: Tensor | None, bucket_kind: list[float],
    mask: list[int], divisor: float, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return attention_delta_bwd_cpu(
        grad, q, k, v, DeltaLayout(schedule, units, query_rows, key_rows, targets, buckets), (query_time, key_time),
        _kind_of(bucket_kind), Mask(bool(mask[0]), *mask[1:]), row_divisor, position_weight, time_weight, divisor,
        scale,
    )  # fmt: skip


@_attention_delta_backward.register_fake
def _(grad, q, k, v, s, u, r, o, t, b, a, c, d, position_weight, time_weight, *_):  # type: ignore[no-untyped-def]
    return _grad_fakes(q, k, v, position_weight, time_weight)


def _kind_of(bucket_kind: list[float]) -> TimeBuckets | PowerLaw:
    return TimeBuckets(int(bucket_kind[0]), bucket_kind[1]) if bucket_kind else PowerLaw()


_attention_delta.register_autograd(
    lambda ctx, grad: _gradients(ctx, grad, torch.ops.hstu.attention_delta_backward),
    setup_context=lambda ctx, inputs, output: _setup_context(ctx, inputs, "delta"),
)


# Triton path


@torch.library.custom_op("hstu::attention_triton", mutates_args=())
def _attention_triton(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, order: Tensor, key_starts: Tensor | None,
                      key_lengths: Tensor | None, num_targets: Tensor | None, query_age: Tensor | None,
                      key_age: Tensor | None, thresholds: Tensor | None, row_divisor: Tensor | None,
                      position_weight: Tensor | None, time_weight: Tensor | None, max_len: int, max_query_len: int,
                      mask: list[int], time_kind: int, bucket_width: float, divisor: float, scale: float,
                      deterministic: bool) -> Tensor:  # fmt: skip
    from kernels.attention.kernel import Problem, attention_fwd

    return attention_fwd(Problem(
        q, k, v, offsets, order, key_starts, key_lengths, num_targets, query_age, key_age, thresholds, row_divisor,
        position_weight, time_weight, max_len, max_query_len, tuple(mask), time_kind, bucket_width, divisor, scale,
    ))  # fmt: skip


@_attention_triton.register_fake
def _(q, k, v, *_):  # type: ignore[no-untyped-def]
    return v.new_empty(q.shape[0], *v.shape[1:])


@torch.library.custom_op("hstu::attention_triton_backward", mutates_args=())
def _attention_triton_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, order: Tensor, key_starts: Tensor | None,
    key_lengths: Tensor | None, num_targets: Tensor | None, query_age: Tensor | None, key_age: Tensor | None,
    thresholds: Tensor | None, row_divisor: Tensor | None, position_weight: Tensor | None,
    time_weight: Tensor | None, max_len: int, max_query_len: int, mask: list[int], time_kind: int,
    bucket_width: float, divisor: float, scale: float, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from kernels.attention.kernel import Problem, attention_bwd

    problem = Problem(
        q, k, v, offsets, order, key_starts, key_lengths, num_targets, query_age, key_age, thresholds, row_divisor,
        position_weight, time_weight, max_len, max_query_len, tuple(mask), time_kind, bucket_width, divisor, scale,
    )  # fmt: skip
    return attention_bwd(grad, problem, deterministic)


@_attention_triton_backward.register_fake
def _(grad, q, k, v, o, r, s, n, t, a, b, c, d, position_weight, time_weight, *_):  # type: ignore[no-untyped-def]
    return _grad_fakes(q, k, v, position_weight, time_weight)


_attention_triton.register_autograd(
    lambda ctx, grad: _gradients(ctx, grad, torch.ops.hstu.attention_triton_backward),
    setup_context=lambda ctx, inputs, output: _setup_context(ctx, inputs, "triton"),
)
