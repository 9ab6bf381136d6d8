"""Scores with stated ceilings, floors and intervals."""
