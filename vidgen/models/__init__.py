"""Networks, each with its frozen config: the video VAE, the spacetime DiT, the text encoder."""
