"""LayerNorm, projection and SiLU: the entry of the HSTU layer."""

from kernels.norm_linear_silu.op import norm_linear_silu

__all__ = ["norm_linear_silu"]
