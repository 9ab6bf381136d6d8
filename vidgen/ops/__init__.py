"""Tensor operations: attention, rotary positions, norms, causal convolutions, native kernels."""
