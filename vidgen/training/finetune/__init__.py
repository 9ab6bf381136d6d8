"""Fine-tuning on one's own clips: one function behind three doors."""
