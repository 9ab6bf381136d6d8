"""The one scheduler, and workers of this machine or of a Ray cluster."""
