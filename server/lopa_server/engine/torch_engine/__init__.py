"""TorchEngine: any Hugging Face causal language model, on CPU or CUDA. Importing a module of this package imports torch."""
