"""Kernels of our own: what they compute, on a CPU in torch and on a GPU in Triton."""
