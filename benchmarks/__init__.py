"""Measurements that take hours: not installed, not part of the tests, run from the repository's root."""

import iapt_export  # noqa: F401 (first, because it keeps ONNX Runtime, which some import next, from reporting home)
