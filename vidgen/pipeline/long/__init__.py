"""Clips longer than a window: extended, or rolled out turn by turn."""
