"""TensorRT and TensorRT for RTX: engines built, recorded and run."""
