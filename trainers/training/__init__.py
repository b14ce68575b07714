"""Data in, adapter directory out: reading, the loop, evaluation, the model card."""
