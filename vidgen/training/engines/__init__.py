"""Engines that compute training steps: plain torch or DeepSpeed, on one rank or many."""
