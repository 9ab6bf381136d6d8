"""Other families through diffusers' pipelines, behind our own request and clip."""
