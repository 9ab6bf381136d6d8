"""Networks, each with a frozen config: VAEs of video and sound, the DiT, encoders, verifiers."""
