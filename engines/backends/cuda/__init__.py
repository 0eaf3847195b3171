"""The denoising loop on an NVIDIA GPU, whatever made the engines: memory, residency, sampler kernels.

Needs cuda-bindings, and no other GPU library. Importing this package does not import it.
"""
