"""Model folders: open, check, rename and convert weights."""
