"""The procedural world with ground truth that trains, tests and scores the embedded model."""
