"""In: an ONNX file. Out: a torch network that computes the same, seen to do so in ONNX Runtime."""
