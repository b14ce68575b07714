"""What the search for the first wrong tensor asks of PyTorch's modules; `tests/validation/test_faults.py` runs it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.families import tiny_family
from validation.judging.metrics import worst_vector
from validation.locating.bisect import _own_error
from validation.sides.taps import Tap


@pytest.mark.parametrize(
    ("family", "path", "is_asked"),
    [("llama", "model.layers.0.mlp.act_fn", True), ("gpt_oss", "model.layers.0.mlp.experts", False)],
)
def test_a_module_alone_is_asked_where_its_input_is_all_it_reads(family: str, path: str, is_asked: bool) -> None:
    """Experts take what their router chose, besides: no verdict on these, and no traceback."""
    model = tiny_family(family)
    fed = np.random.default_rng(0).standard_normal((1, 3, 64), np.float32)
    step: Any = SimpleNamespace(mask=np.ones((1, 3)), read_mask=np.ones((1, 3)))
    reference = SimpleNamespace(methods={"": None}, model=model)
    scene: Any = SimpleNamespace(step=step, rows=[SimpleNamespace(tenant="")], reference=reference)
    seen = {f"{path}.input": fed, f"{path}.output": fed}
    found = _own_error(scene, Tap(f"{path}.output", "value", 0), seen, 0)
    if is_asked:
        wanted = torch.nn.functional.silu(torch.from_numpy(fed[0])).numpy()
        assert found == pytest.approx(worst_vector(fed[0], wanted)[0])
    else:
        assert found is None
