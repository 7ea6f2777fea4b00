"""Jagged causal pointwise attention of HSTU with relative position and time bias."""

from kernels.attention.op import attention
from kernels.attention.plan import AttentionPlan, TimeBuckets, make_plan

__all__ = ["AttentionPlan", "TimeBuckets", "attention", "make_plan"]
