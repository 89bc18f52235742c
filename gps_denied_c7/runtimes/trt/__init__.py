"""TensorRT: engines built and run by its own API."""
