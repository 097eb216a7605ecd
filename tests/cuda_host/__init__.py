"""The CUDA kernels' code that needs no GPU: compiled for the host, or read from a build."""
