"""Several devices for one clip: processes that share the denoising and decoding."""
