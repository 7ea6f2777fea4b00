"""Cross-entropy over the whole catalogue, chunked."""

from kernels.linear_cross_entropy.op import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
