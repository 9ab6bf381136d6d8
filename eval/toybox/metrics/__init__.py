"""Measures of Toybox clips that need no judge's opinion: paths, bounces, shapes, sync."""
