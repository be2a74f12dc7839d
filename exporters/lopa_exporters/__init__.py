"""From torch to the device: LoPA, its training over a population, and bundles of ONNX graphs."""
