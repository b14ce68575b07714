"""Which errors are the user's to fix, and what they are told."""

from __future__ import annotations

import errno

import pytest

from iapt_export.contract.errors import BundleError, explain


def test_our_errors_explain_themselves() -> None:
    assert explain(BundleError("prefill.onnx is missing")) == "prefill.onnx is missing"


@pytest.mark.parametrize(("module", "extra"), [("torch", "train"), ("onnx.helper", "export"), ("cryptography", "sign")])
def test_a_missing_package_names_its_extra(module: str, extra: str) -> None:
    text = explain(ModuleNotFoundError(f"No module named {module!r}", name=module))
    assert text is not None
    assert f"pip install -e '.[{extra}]'" in text
    assert module in text


def test_a_full_disk_is_explained_and_other_defects_are_not() -> None:
    text = explain(OSError(errno.ENOSPC, "No space left on device", "weights.data"))
    assert text is not None
    assert text == "No space left on device: weights.data; free space, then run the command again"
    assert explain(OSError(errno.EINVAL, "Invalid argument")) is None
    assert explain(ModuleNotFoundError("No module named 'colour'", name="colour")) is None
    assert explain(ValueError("a defect")) is None
