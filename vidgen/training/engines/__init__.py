"""Computation of a run's steps by plain torch or DeepSpeed, on one rank or many."""
