"""Measures of how steady clips are in time."""
