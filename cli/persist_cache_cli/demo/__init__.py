"""The demonstration: a real model, real processes, one table."""
