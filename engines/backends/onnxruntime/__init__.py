"""ONNX Runtime's CUDA execution provider: the exported ONNX graphs, as they are, on an NVIDIA GPU.

Needs onnxruntime-gpu and cuda-bindings, not torch. Importing this package imports neither.
"""
