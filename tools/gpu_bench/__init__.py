"""Benchmarks on GPUs: `python -m tools.gpu_bench` of full-size denoisers, `tools.gpu_bench.calibration` of workers."""
