"""PyTorch: artefacts scanned before torch sees them, then run in FP16."""
