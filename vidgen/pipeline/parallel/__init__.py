"""Several devices for one clip: a crew of processes that denoise and decode together."""
