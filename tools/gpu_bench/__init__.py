"""Parts of `tools/gpu_bench/__main__.py`: denoisers of full size, quantized rows, timing, floors, and the tables made of them."""
