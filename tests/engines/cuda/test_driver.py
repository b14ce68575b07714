"""What the NVIDIA driver says of this machine, asked through a stand-in for libcuda."""

from __future__ import annotations

import ctypes

import pytest

from engines.cuda import driver as cuda_driver
from engines.cuda.driver import Driver, Gpu, find_driver

ADA = Gpu("NVIDIA RTX 4090", "8.9", 24 << 30)


class _FakeDriverLibrary:
    """libcuda with two GPUs."""

    def __init__(self, status: int = 0, count: int = 2) -> None:
        self.status, self.count = status, count

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.status

    def cuDriverGetVersion(self, result: object) -> None:  # noqa: N802
        _pointed(result).value = 13010

    def cuDeviceGetCount(self, result: object) -> None:  # noqa: N802
        _pointed(result).value = self.count

    def cuDeviceGet(self, result: object, index: int) -> None:  # noqa: N802
        _pointed(result).value = index

    def cuDeviceGetName(self, name: ctypes.Array[ctypes.c_char], length: int, device: object) -> None:  # noqa: N802
        name.value = b"NVIDIA RTX 4090"

    def cuDeviceTotalMem_v2(self, result: object, device: object) -> None:  # noqa: N802
        _pointed(result).value = 24 << 30

    def cuDeviceGetAttribute(self, result: object, attribute: int, device: object) -> None:  # noqa: N802
        _pointed(result).value = {75: 8, 76: 9}[attribute]


def _pointed(reference: object) -> ctypes.c_int:
    return reference._obj  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("library", "expected"),
    [
        (_FakeDriverLibrary(), Driver(gpus=(ADA, ADA), cuda_version="13.1")),
        (
            _FakeDriverLibrary(count=0),
            Driver(
                cuda_version="13.1",
                problem="the NVIDIA driver sees no GPU; check CUDA_VISIBLE_DEVICES and nvidia-smi",
            ),
        ),
        (
            _FakeDriverLibrary(status=999),
            Driver(problem="the NVIDIA driver does not start: cuInit gives error 999; see nvidia-smi"),
        ),
        (None, Driver(problem=f"no NVIDIA driver found: {cuda_driver.LIBRARY} is missing")),
    ],
)
def test_the_driver_is_asked(
    monkeypatch: pytest.MonkeyPatch, library: _FakeDriverLibrary | None, expected: Driver
) -> None:
    def load(name: str) -> _FakeDriverLibrary:
        if library is None:
            raise OSError(name)
        return library

    monkeypatch.setattr(cuda_driver.ctypes, "CDLL", load)
    assert find_driver() == expected
