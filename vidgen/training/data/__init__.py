"""Fine-tuning data: find and check files, cut them into items, encode, cache and draw them."""
