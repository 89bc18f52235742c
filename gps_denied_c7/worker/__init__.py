"""A runtime in a process of its own, which may die."""
