"""TorchEngine: any Hugging Face causal language model, on CPU or CUDA. All of it but `config` imports torch."""
