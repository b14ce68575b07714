"""A session behind NVIDIA Triton: the model repository, and the model that Triton's python backend runs."""
