"""Programs beside the build: the simulated GPU, counters, resources of kernels, releases of transformers, the support table."""
