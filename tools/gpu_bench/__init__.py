"""Parts of `tools/bench_gpu.py`: denoisers of full size, quantized rows, timing, floors, and the tables made of them."""
