"""Torch: AOTInductor packages, compiled ahead of time, with their weights beside them.

Running a package needs torch and safetensors, on a GPU cuda-bindings as well; neither diffusers nor a compiler.
Importing this package imports none of them.
"""
