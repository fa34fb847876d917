"""A model as a float ONNX file, and that file's graph."""
