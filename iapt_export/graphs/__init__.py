"""Backbone and methods in, ONNX graphs out: interfaces, twins, tracing, passes, storage."""
