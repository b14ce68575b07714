"""NVIDIA's driver and memory, without torch."""
