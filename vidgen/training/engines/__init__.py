"""What computes the steps of a run: plain torch or DeepSpeed, on one rank or many."""
