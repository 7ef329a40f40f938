"""What makes a KV cache reusable: the identity of a model, and of what was loaded."""
