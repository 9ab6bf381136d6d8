"""Few-step students and rollers, taught by their teacher."""
