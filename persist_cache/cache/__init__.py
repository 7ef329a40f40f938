"""`PromptCache`: live caches in memory over a store on disk; in the place of mlx-lm's own."""
