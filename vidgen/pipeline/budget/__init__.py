"""What a generation will take, stage by stage, and which setup fits."""
