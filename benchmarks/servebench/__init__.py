"""Parts of benchmarks/serving.py: our server's process, the measurements, the picture."""
