"""Other families through diffusers' pipelines, with our own request and clip."""
