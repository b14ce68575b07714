"""One build: what is asked for, what is planned, the stages, and how a bundle is laid out."""
