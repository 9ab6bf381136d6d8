"""Training: the loop of `vidgen train` and the programs in `train/`."""
