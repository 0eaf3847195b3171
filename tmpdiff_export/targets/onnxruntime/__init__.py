"""Engines for ONNX Runtime: the CPU, CUDA, TensorRT for RTX."""
