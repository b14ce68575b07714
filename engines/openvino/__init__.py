"""OpenVINO behind the runner contract, for portable graphs."""
