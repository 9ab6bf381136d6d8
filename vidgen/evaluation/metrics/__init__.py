"""Measures of single clips: VBench's temporal dimensions, their stand-ins, and weight-free ones."""
