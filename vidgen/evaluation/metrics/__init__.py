"""Measures of single clips: VBench's temporal dimensions, stand-ins for them, and others."""
