"""Show the package at work: a synthetic flight, a known network, and a run over real DDS."""
