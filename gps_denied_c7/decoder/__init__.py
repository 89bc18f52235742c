"""Image decoding in a process of its own, which may die."""
