"""Fine-tuning of a model on own clips."""
