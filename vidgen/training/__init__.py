"""Training: one loop, used by every program in `train/` and by `vidgen train`."""
