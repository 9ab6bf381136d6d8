"""Judges, metrics and suites that measure the embedded model; `python -m eval.toybox`."""
