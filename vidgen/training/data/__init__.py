"""Fine-tuning data: files found, looked at, cut into items, encoded, cached, drawn."""
