"""Where two sides differ first, and why."""
