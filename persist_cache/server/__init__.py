"""`mlx_lm.server` with a `PromptCache`: restartable, with an admin API and a page."""
