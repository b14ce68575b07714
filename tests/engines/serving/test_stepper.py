"""Both kinds of cache compute the same, whoever shares the batch and whoever joins or leaves."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from engines.runner import Arrays
from engines.serving.in_place_stepper import InPlaceStepper
from engines.serving.loading import open_stepper
from engines.serving.stepper import Instruction, Stepper, past_from_present
from iapt_export.contract.errors import IaptError
from iapt_export.contract.manifest import BundleManifest
from tests.bundles import NUM_LAYERS, WIDTH, TinyBuild
from tests.engines.fake_gpu import play_gpu_build

PROMPTS = [("alpha", [5, 6, 7]), ("beta", [9, 8, 7, 6, 5, 4, 3]), ("gamma", [11]), ("alpha", [3, 5])]
CLOSE = 2e-5


def opened(build: TinyBuild, in_place: bool) -> Stepper:
    manifest = BundleManifest.load(build.bundle)
    return open_stepper(build.bundle, manifest, manifest.target(), in_place=in_place)


@pytest.fixture(scope="module", params=[True, False], ids=["in place", "concatenated"])
def loaded(tiny_build: TinyBuild, request: pytest.FixtureRequest) -> Iterator[Stepper]:
    with opened(tiny_build, request.param) as stepper:
        yield stepper


@pytest.fixture
def stepper(loaded: Stepper) -> Iterator[Stepper]:
    yield loaded
    while loaded.num_rows:
        loaded.leave(0)


def instruction(stepper: Stepper, number: int) -> Instruction:
    tenant, tokens = PROMPTS[number]
    return Instruction(stepper.bank.get(tenant), tokens)


def alone(stepper: Stepper, number: int, steps: int) -> tuple[list[np.ndarray], list[tuple[np.ndarray, np.ndarray]]]:
    """Greedy logits of a row by itself, and its cache at the end."""
    logits = [stepper.read([instruction(stepper, number)])[0].copy()]
    for _ in range(steps):
        logits.append(stepper.step([int(logits[-1].argmax())])[0].copy())
    cache = stepper.row_cache(0)
    stepper.leave(0)
    return logits, cache


def test_rows_join_and_leave_without_a_trace(stepper: Stepper) -> None:
    expected = [alone(stepper, number, 6) for number in range(4)]
    made: dict[int, list[np.ndarray]] = {number: [] for number in range(4)}
    rows: list[int] = []

    def read(*numbers: int) -> None:
        logits = stepper.read([instruction(stepper, number) for number in numbers])
        rows.extend(numbers)
        for number, row in zip(numbers, logits, strict=True):
            made[number].append(row.copy())

    def step() -> None:
        logits = stepper.step([int(made[number][-1].argmax()) for number in rows])
        for number, row in zip(rows, logits, strict=True):
            made[number].append(row.copy())

    def leave(number: int) -> None:
        row = rows.index(number)
        stepper.leave(row)
        rows[row] = rows[-1]
        rows.pop()

    read(0, 1)
    step()
    step()
    read(2)
    step()
    leave(0)
    read(3)
    step()
    step()
    leave(2)
    step()
    assert rows == [3, 1] and stepper.num_rows == 2
    assert [tenant.name for tenant in stepper.tenants] == ["alpha", "beta"]
    for number, (logits, _) in enumerate(expected):
        for mine, wanted in zip(made[number], logits, strict=False):
            np.testing.assert_allclose(mine, wanted, atol=CLOSE, rtol=CLOSE)
    assert [len(made[number]) for number in range(4)] == [4, 7, 4, 4]
    for key, wanted in zip(stepper.row_cache(1), expected[1][1], strict=True):
        for mine, one in zip(key, wanted, strict=True):
            np.testing.assert_allclose(mine, one, atol=CLOSE, rtol=CLOSE)


def test_both_kinds_of_cache_agree(tiny_build: TinyBuild) -> None:
    with opened(tiny_build, True) as one, opened(tiny_build, False) as other:
        for number in range(4):
            (mine, my_cache), (wanted, its_cache) = alone(one, number, 5), alone(other, number, 5)
            np.testing.assert_allclose(np.array(mine), np.array(wanted), atol=CLOSE, rtol=CLOSE)
            assert len(my_cache) == len(its_cache) == 2
            for layer in range(2):
                for part in range(2):
                    assert my_cache[layer][part].shape == (2, 4 + len(PROMPTS[number][1]) + 5, 8)
                    np.testing.assert_allclose(my_cache[layer][part], its_cache[layer][part], atol=CLOSE, rtol=CLOSE)


def test_the_cache_is_written_in_place(tiny_build: TinyBuild) -> None:
    with opened(tiny_build, True) as stepper:
        addresses = {name: buffer.ctypes.data for name, buffer in stepper.buffers.items()}  # type: ignore[attr-defined]
        stepper.read([instruction(stepper, 0), instruction(stepper, 1)])
        before = stepper.row_cache(0)
        stepper.step([7, 9])
        after = stepper.row_cache(0)
        assert addresses == {n: b.ctypes.data for n, b in stepper.buffers.items()}  # type: ignore[attr-defined]
        for (key, value), (longer_key, longer_value) in zip(before, after, strict=True):
            assert np.array_equal(longer_key[:, :-1], key) and np.array_equal(longer_value[:, :-1], value)
            assert longer_key.shape[1] == key.shape[1] + 1 and np.abs(longer_key[:, -1]).max() > 0


def test_rows_of_a_cache_in_8_bits_move_and_take_a_quarter(small_cache_build: TinyBuild) -> None:
    with opened(small_cache_build, True) as stepper:
        stepper.read([instruction(stepper, number) for number in range(3)])
        last = stepper.row_cache(2)
        stepper.leave(0)
        for (key, value), (old_key, old_value) in zip(stepper.row_cache(0), last, strict=True):
            assert key.dtype == value.dtype == np.int8
            assert np.array_equal(key, old_key) and np.array_equal(value, old_value)
            assert key.shape[1] == 4 + 1 and key.any() and value.any()
        assert isinstance(stepper, InPlaceStepper)
        entries = stepper.max_rows * stepper.capacity
        assert sum(buffer.nbytes for buffer in stepper.buffers.values()) == entries * NUM_LAYERS * 2 * WIDTH // 2


def test_only_the_cache_is_handed_on() -> None:
    outputs: Arrays = {"logits": np.zeros(1), "present.0.key": np.ones(1), "present.11.value": np.ones(2)}
    assert list(past_from_present(outputs)) == ["past_key_values.0.key", "past_key_values.11.value"]


def test_a_cache_that_the_target_lacks(tiny_build: TinyBuild, monkeypatch: pytest.MonkeyPatch) -> None:
    play_gpu_build(monkeypatch)
    manifest = BundleManifest.load(tiny_build.bundle)
    with pytest.raises(IaptError, match="target onnxruntime has no graph for that cache on device cuda; its graphs: "):
        open_stepper(tiny_build.bundle, manifest, manifest.target(), device="cuda", in_place=True)
