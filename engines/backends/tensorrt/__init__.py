"""TensorRT: strongly typed plans built from the exported ONNX files, and how they are loaded and run.

`builder` and its neighbours need the full `tensorrt` package and polygraphy; everything that runs a
plan needs `tensorrt` or `tensorrt_lean`, and cuda-bindings. Importing this package imports neither.
"""
