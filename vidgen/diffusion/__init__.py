"""Flow matching, independent of the model: schedules, samplers, guidance and conditions."""
