"""The project itself: build, layers, commands, benchmarks."""
