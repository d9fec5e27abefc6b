"""Training of a chain's adapters in stages, on the Hugging Face Trainer."""
