"""ONNX Runtime behind the runner contract."""
