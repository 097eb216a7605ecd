"""Everything CUDA on the GPU of this machine: `python -m benchmarks.gpu.run`."""
