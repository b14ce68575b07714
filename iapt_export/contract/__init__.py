"""What a deployment machine reads of a bundle, and the errors of all packages. Standard library only."""
