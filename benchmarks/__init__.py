"""Measurements that take hours: not installed, not part of the tests, run from the repository's root."""
