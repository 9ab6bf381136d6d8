"""Kill and resume: the saved state of a running generation."""
