"""Public attention op: validation, one custom op, its fake and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels._backend import choose
from kernels.attention.cpu import attention_bwd_cpu, attention_fwd_cpu
from kernels.attention.plan import AttentionPlan
from kernels.attention.reference import attention_reference


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    position_weight: Tensor | None = None,
    time_weight: Tensor | None = None,
    *,
    divisor: float,
    scale: float = 1.0,
) -> Tensor:
    """Causal pointwise aggregated attention with relative position and time bias over a jagged batch.

    ``out_i = sum_{j <= i} SiLU(scale q_i.k_j + w_pos[N-1+j-i] + w_time[bucket(tq_i - tk_j)]) / divisor  v_j``

    Args:
        q, k: [L, H, A] float32, float64, bfloat16 or float16; strided views are fine.
        v: [L, H, V], same dtype.
        plan: layout, times and buckets of the batch (:func:`kernels.attention.make_plan`).
        position_weight: [H or 1, 2N-1] with N >= plan.max_len, or None.
        time_weight: [H or 1, buckets], or None; the plan must then hold times.
        divisor: > 0. A constant for the batch (published: the padded width N).
        scale: factor on q.k (published: 1).

    Returns:
        [L, H, V] in v's dtype, accumulated in float32 (float64 for float64).

    Raises:
        ValueError: shapes, dtypes or the plan do not fit together.

    Source: Zhai et al. 2024 (arXiv 2402.17152), section 3.1, bias as in the reference code.
    """
    _validate(q, k, v, plan, position_weight, time_weight, divisor)
    choose("attention", q.device)  # an explicit backend that cannot be met raises
    if q.device.type != "cpu":
        # Until the Triton kernel is there, other devices run the specification itself.
        return attention_reference(q, k, v, plan, position_weight, time_weight, divisor, scale)
    assert plan.schedule is not None and plan.rows is not None and plan.slots is not None
    buckets = plan.buckets if time_weight is not None else None
    return torch.ops.hstu.attention(
        q, k, v, plan.schedule, plan.rows, plan.slots, buckets, position_weight, time_weight, divisor, scale
    )


def _validate(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, position_weight: Tensor | None,
              time_weight: Tensor | None, divisor: float) -> None:  # fmt: skip
    if q.dim() != 3 or k.shape != q.shape:
        raise ValueError(f"q and k: expected the same [L, H, A], got {list(q.shape)} and {list(k.shape)}")
    if v.dim() != 3 or v.shape[:2] != q.shape[:2]:
        raise ValueError(f"v: expected [{q.shape[0]}, {q.shape[1]}, V], got {list(v.shape)}")
    if not (q.dtype == k.dtype == v.dtype) or not q.is_floating_point():
        raise ValueError(f"q, k, v: expected one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not (q.device == k.device == v.device == plan.offsets.device):
        devices = ", ".join(str(t.device) for t in (q, k, v, plan.offsets))
        raise ValueError(f"q, k, v, plan: expected one device, got {devices}")
    if not divisor > 0:
        raise ValueError(f"divisor={divisor}: expected > 0")
    if position_weight is not None:
        heads, size = position_weight.shape if position_weight.dim() == 2 else (0, 0)
        if heads not in (1, q.shape[1]) or size % 2 == 0 or size < 2 * plan.max_len - 1:
            raise ValueError(
                f"position_weight: expected [1 or {q.shape[1]}, 2N-1] with N >= {plan.max_len}, "
                f"got {list(position_weight.shape)}"
            )
    if time_weight is not None:
        if plan.query_time is None or plan.time_buckets is None:
            raise ValueError(
                "time_weight: the plan holds no times; give query_time, key_time, time_buckets to make_plan"
            )
        expected = plan.time_buckets.count
        if time_weight.dim() != 2 or time_weight.shape[0] not in (1, q.shape[1]) or time_weight.shape[1] != expected:
            raise ValueError(f"time_weight: expected [1 or {q.shape[1]}, {expected}], got {list(time_weight.shape)}")


@torch.library.custom_op("hstu::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, schedule: Tensor, rows: Tensor, slots: Tensor,
               buckets: Tensor | None, position_weight: Tensor | None, time_weight: Tensor | None,
               divisor: float, scale: float) -> Tensor:  # fmt: skip
    return attention_fwd_cpu(q, k, v, schedule, rows, slots, buckets, position_weight, time_weight, divisor, scale)


@_attention.register_fake
def _(q, k, v, schedule, rows, slots, buckets, position_weight, time_weight, divisor, scale):  # type: ignore[no-untyped-def]
    return v.new_empty(v.shape)


@torch.library.custom_op("hstu::attention_backward", mutates_args=())
def _attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, schedule: Tensor, rows: Tensor, slots: Tensor,
                        buckets: Tensor | None, position_weight: Tensor | None, time_weight: Tensor | None,
                        divisor: float, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return attention_bwd_cpu(
        grad, q, k, v, schedule, rows, slots, buckets, position_weight, time_weight, divisor, scale
    )


@_attention_backward.register_fake
def _(grad, q, k, v, schedule, rows, slots, buckets, position_weight, time_weight, divisor, scale):  # type: ignore[no-untyped-def]
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    tables = [q.new_empty((0, 0) if w is None else w.shape, dtype=work) for w in (position_weight, time_weight)]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), *tables


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.divisor, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    position_weight, time_weight = tensors[7], tensors[8]
    d_q, d_k, d_v, d_position, d_time = torch.ops.hstu.attention_backward(grad, *tensors, ctx.divisor, ctx.scale)
    d_position = None if position_weight is None else d_position.to(position_weight.dtype)
    d_time = None if time_weight is None else d_time.to(time_weight.dtype)
    return d_q, d_k, d_v, None, None, None, None, d_position, d_time, None, None


_attention.register_autograd(_backward, setup_context=_setup_context)
