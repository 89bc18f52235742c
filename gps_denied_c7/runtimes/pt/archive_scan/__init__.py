"""PyTorch archives, scanned before torch opens them."""
