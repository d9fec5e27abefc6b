"""The layer that owns a base and its chain, how it runs, and what the model remembers of it."""
