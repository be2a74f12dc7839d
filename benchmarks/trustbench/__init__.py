"""The parts of `benchmarks/trust.py`: one file for each thing that an operator has to be able to trust."""
