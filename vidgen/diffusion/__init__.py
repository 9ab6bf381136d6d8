"""Flow matching: the convention, schedules, samplers, guidance and conditions. Knows no model."""
