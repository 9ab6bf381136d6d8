"""Saved state of a running generation, from which a stopped one resumes."""
