"""Programs that train, run from a checkout: fine-tuning, and all that made the embedded model."""
