"""Scores of clips with confidence intervals."""
