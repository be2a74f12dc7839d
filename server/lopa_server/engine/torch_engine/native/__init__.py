"""Kernels for CPUs, in C: compiled on the machine that runs them, called beside torch and on torch's own threads."""
