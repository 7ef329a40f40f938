"""Running a model over a prompt: loading it, computing its KV, and what that costs."""
