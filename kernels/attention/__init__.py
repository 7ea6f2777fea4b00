"""Pointwise aggregated attention of HSTU over jagged batches."""

from kernels.attention.op import attention
from kernels.attention.plan import AttentionPlan, make_plan, sequence_positions
from kernels.attention.reference import Mask
from kernels.attention.times import PowerLaw, TimeBuckets

__all__ = ["AttentionPlan", "Mask", "PowerLaw", "TimeBuckets", "attention", "make_plan", "sequence_positions"]
