"""The tuning methods, one file each, with their settings (`configs`) and their names (`forms`)."""
