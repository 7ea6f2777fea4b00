"""Exact ranks and the best k items over the whole catalogue."""

from kernels.rank_and_topk.op import rank, topk

__all__ = ["rank", "topk"]
