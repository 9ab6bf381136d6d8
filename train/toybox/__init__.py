"""All that made the embedded model: the world it learned from, its tasks, its distillation."""
