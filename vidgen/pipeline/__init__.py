"""THE pipeline: encode prompt, prepare, sample, decode, write."""
