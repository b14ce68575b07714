"""A frozen decoder and what may be done to it: the contract of the methods, the backbone, and generation with both."""
