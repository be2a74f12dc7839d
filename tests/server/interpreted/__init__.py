"""Tests for Triton's interpreter, which must be switched on before anything imports Triton: `test_gpu` starts them."""
