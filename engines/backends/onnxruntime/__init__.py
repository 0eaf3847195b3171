"""ONNX Runtime: graphs lowered for the CPU (`cpu`), and exported graphs as they are on a GPU.

There the provider is CUDA's (`provider`, `plan` and `host`, which need onnxruntime-gpu and cuda-bindings) or TensorRT
for RTX (`tensorrt_rtx`, a plugin). Importing this package imports none of them.
"""
