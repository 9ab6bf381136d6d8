"""Temporal measures of clips, and comparisons of folders."""
