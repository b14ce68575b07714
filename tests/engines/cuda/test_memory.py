"""Arrays in a GPU's memory: their parts and copies are NumPy's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from engines.cuda import memory as cuda_memory
from engines.cuda.memory import CudaStream, DeviceArray
from tests.engines.fake_gpu import FakeCuda

SHAPE = (4, 3, 6, 2)


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaStream]:
    fake = FakeCuda()
    monkeypatch.setattr(cuda_memory, "load_cuda", lambda: fake)
    made = CudaStream()
    made.open()
    yield made
    made.close()
    assert not fake.live and not fake.streams


def both(stream: CudaStream, seed: int = 0) -> tuple[np.ndarray, DeviceArray]:
    """The same array here and there."""
    host = np.random.default_rng(seed).integers(1, 1000, SHAPE).astype(np.float32)
    return host, DeviceArray(stream, stream.upload(f"array {seed}", host), host.shape, host.dtype)


@pytest.mark.parametrize(
    "key",
    [0, -1, slice(1, 3), slice(2, 9), slice(0, 0), (1, slice(None), slice(0, 5)), (3, 2), (0, slice(1, 3), slice(4))],
)
def test_parts_are_numpys(stream: CudaStream, key: Any) -> None:
    host, there = both(stream)
    assert there[key].shape == host[key].shape
    np.testing.assert_array_equal(np.array(there[key]), host[key])
    other_host, other = both(stream, 1)
    other_host[key], other[key] = host[key], there[key]
    np.testing.assert_array_equal(np.array(other), other_host)
    host[key] = there[key] = 0
    np.testing.assert_array_equal(np.array(there), host)


def test_a_row_moves_and_no_more_than_its_entries(stream: CudaStream) -> None:
    host, there = both(stream)
    host[1, :, :4] = host[3, :, :4]
    there[1, :, :4] = there[3, :, :4]
    np.testing.assert_array_equal(np.array(there), host)
    there[0, :, :1] = DeviceArray(stream, there.address, (3, 1, 2), there.dtype)  # one without gaps into one with
    np.testing.assert_array_equal(np.array(there)[0, :, 0], host[0].ravel()[:6].reshape(3, 2))


def test_what_is_no_part(stream: CudaStream) -> None:
    _, there = both(stream)
    for key, text in ((4, "out of range"), ((0, 0, 0, 0, 0), "5 indices"), (slice(0, 4, 2), "step 2")):
        with pytest.raises(IndexError, match=text):
            there[key]
    with pytest.raises(ValueError, match="does not fit"):
        there[0] = there[:2]
    with pytest.raises(ValueError, match="to another one or to 0, not to 7"):
        there[0] = 7
    with pytest.raises(ValueError, match="along its first axis only"):
        there[:2, :2, :2] = 0
