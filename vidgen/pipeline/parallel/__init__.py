"""Several devices for one clip: processes that denoise and decode together."""
