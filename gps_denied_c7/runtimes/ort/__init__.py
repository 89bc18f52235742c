"""ONNX Runtime on its TensorRT, CUDA and CPU execution providers."""
