"""Benchmarks on a GPU: `python -m tools.gpu_bench` of full-size denoisers, `python -m tools.gpu_bench.calibration` of workers."""
