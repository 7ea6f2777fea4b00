"""Norm, gate, dropout, output projection and residual: the exit of the HSTU layer."""

from kernels.gate_norm_linear.op import gate_norm_linear

__all__ = ["gate_norm_linear"]
