"""Scheduler of jobs, and workers on this machine or a Ray cluster."""
