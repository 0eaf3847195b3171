"""Triton kernels for an NVIDIA GPU; importing one needs Triton, which CUDA builds of torch bring."""
