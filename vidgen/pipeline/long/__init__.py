"""Clips longer than a window."""
