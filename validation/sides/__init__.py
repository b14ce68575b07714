"""What is compared: the cases, PyTorch's side, and the target's side."""
