"""Pictures, video and sound in and out of files."""
