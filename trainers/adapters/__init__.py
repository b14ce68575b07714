"""The adapter directory: what a trainer writes, stock PEFT's included."""
