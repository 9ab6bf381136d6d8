"""Tensor functions without weights: attention, rotary positions, norms, causal convolution."""
