"""Training: the loop behind `vidgen train` and the programs in `train/`."""
