"""Model folders: reading, checking, naming and converting weights."""
