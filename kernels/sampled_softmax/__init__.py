"""Sampled softmax: each position against its own negatives, or against one shared bank."""

from kernels.sampled_softmax.op import bank_softmax, sampled_softmax

__all__ = ["bank_softmax", "sampled_softmax"]
