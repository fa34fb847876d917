"""What is done to a model: slicing, recovery, export, quantization."""
