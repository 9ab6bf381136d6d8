"""Few-step students, taught by their teacher."""
