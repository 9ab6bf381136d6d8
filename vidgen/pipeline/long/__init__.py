"""Clips longer than one window of the model."""
