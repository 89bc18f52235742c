"""What a model is, and what its answers must be."""
