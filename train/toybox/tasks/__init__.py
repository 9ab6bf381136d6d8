"""What the programs in `train/` teach the embedded model from: the Toybox world, cached."""
