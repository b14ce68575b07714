"""What needs an NVIDIA GPU, ready to be run once one is at hand: `first_light`, its parts, and what travels there."""
