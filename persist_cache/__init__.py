"""A prompt cache for mlx-lm that survives restarts."""
