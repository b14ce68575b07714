"""What PyTorch answers to the prompts of a comparison, computed once by each process of a run.

Many tests damage one tiny bundle's graphs and compare it with the same answers. A test of the answers themselves calls
`validation.sides.truth.record_truth`, which stays as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest

import validation.judging.compare
from tests.traces import is_plain, tensors_sha256
from trainers.decoder.method import Method
from trainers.decoder.streamed import is_streamed
from validation.sides.reference import Reference
from validation.sides.truth import Truth, record_truth


class SharedTruths:
    """Stands for `record_truth`: computes what no test of this process has asked for yet, and remembers any other."""

    def __init__(self) -> None:
        self.known: dict[str, list[Truth]] = {}

    def __call__(
        self,
        reference: Reference,
        prompts: Sequence[Any],
        *,
        given: Sequence[Any] = (),
        on_given: Callable[[int], None] = lambda _: None,
        on_step: Callable[[], None] = lambda: None,
        **asked: Any,
    ) -> list[Truth]:
        if is_streamed(reference.model) or not is_plain(reference.model):
            return record_truth(reference, prompts, given=given, on_given=on_given, on_step=on_step, **asked)
        tenants = {name: described(method) for name, method in reference.methods.items()}
        backbone = [repr(reference.model.config), tensors_sha256(reference.model), repr(reference.manifest.backbone)]
        key = repr((backbone, tenants, list(prompts), list(given), sorted(asked.items())))
        if key not in self.known:
            self.known[key] = record_truth(reference, prompts, given=given, on_given=on_given, on_step=on_step, **asked)
        else:
            for number in range(len(given)):
                on_given(number)
        return copy.deepcopy(self.known[key])  # some tests change what they get


def described(method: Method) -> list[str]:
    """A method's class, configuration and weights."""
    return [type(method).__qualname__, repr(method.config), repr(method.sizes), tensors_sha256(method)]


@pytest.fixture(scope="session", autouse=True)
def shared_truths() -> Any:
    """Comparisons of this process with equal prompts, weights and adapters compute PyTorch's side once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation.judging.compare, "record_truth", SharedTruths())
        yield
