"""A backbone whose weights are read when it computes: the loaded model's values, and one reading for many rows."""

from __future__ import annotations

import copy
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ml_dtypes import float4_e2m1fn, float8_e4m3fn
from torch import Tensor

from iapt_export.contract.low_bits import Rounding
from tests.families import tiny_family
from tests.tiny import save_tiny_backbone, tiny_llama
from trainers.decoder import rounded
from trainers.decoder import streamed as module
from trainers.decoder.backbone import Backbone, load_backbone
from trainers.decoder.insertion import decoder_layers, hooked
from trainers.decoder.quantise import quantise
from trainers.decoder.rounded import RoundedWeights, on_disk, round_weights
from trainers.decoder.stored import load_mapped, outline_of, stored_weight, weights_sha256
from trainers.decoder.streamed import (
    abreast,
    copies_compared,
    has_room_for,
    is_streamed,
    load_or_stream,
    read_weight,
    streamed,
)

IDS = [torch.tensor([[7, 3, 9]]), torch.tensor([[5, 4, 8, 2]]), torch.tensor([[11], [12]])]
FAMILIES = ["llama", "gemma3_text", "gpt2", "mixtral", "bloom", "gpt_oss", "phi3", "opt", "granite"]


def outline(folder: Path, family: str = "llama") -> Backbone:
    stored = load_mapped(str(save_tiny_backbone(folder, tiny_family(family).to(torch.bfloat16))))
    assert stored is not None
    made = outline_of(stored, "fp32")
    assert made is not None
    return made


def logits_of(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(ids).logits
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_a_streamed_backbone_computes_what_the_loaded_one_does(tmp_path: Path, family: str) -> None:
    made = outline(tmp_path, family)
    model = streamed(made.model)
    loaded = load_backbone(str(tmp_path))
    assert is_streamed(model) and not is_streamed(made.model)
    wanted = [logits_of(loaded.model, ids) for ids in IDS]
    for ids, right in zip(IDS, wanted, strict=True):
        torch.testing.assert_close(logits_of(model, ids), right, rtol=0, atol=0)
    together = abreast(model, [lambda own, ids=ids: logits_of(own, ids) for ids in IDS])
    for right, got in zip(wanted, together, strict=True):
        torch.testing.assert_close(got, right, rtol=0, atol=0)
    assert weights_sha256(model) == weights_sha256(loaded.model)


def test_all_computations_share_one_reading(tmp_path: Path) -> None:
    made = outline(tmp_path)
    reads: Counter[str] = Counter()

    def read(name: str) -> Tensor:
        reads[name] += 1
        return stored_weight(made.model, name)

    def twice(model: Any, ids: Tensor) -> Tensor:
        return torch.cat([logits_of(model, ids), logits_of(model, ids + 1)])

    model = streamed(made.model, read)
    calls = [lambda own, ids=ids: twice(own, ids) for ids in IDS]
    abreast(model, [calls[0]])
    alone = reads.copy()
    assert alone["model.layers.0.mlp.up_proj.weight"] == 2
    abreast(model, calls)
    assert reads - alone == alone


def test_those_that_fall_behind_are_waited_for(tmp_path: Path) -> None:
    """One looks up the embedding once more, as methods do that read the instruction before the backbone does."""
    made = outline(tmp_path)
    reads: Counter[str] = Counter()

    def read(name: str) -> Tensor:
        reads[name] += 1
        return stored_weight(made.model, name)

    def longer(model: Any) -> Tensor:
        model.get_input_embeddings()(IDS[0])
        return logits_of(model, IDS[0])

    both = abreast(streamed(made.model, read), [longer, lambda model: logits_of(model, IDS[0])])
    assert torch.equal(*both)
    assert set(reads.values()) <= {1, 2} and reads["model.layers.1.mlp.down_proj.weight"] == 1


def test_what_one_computation_hooks_reaches_no_other(tmp_path: Path) -> None:
    made = outline(tmp_path)

    def doubled(model: Any) -> Tensor:
        with hooked(decoder_layers(model), lambda layer, hidden: hidden * 2):
            return logits_of(model, IDS[0])

    plain, changed, again = abreast(streamed(made.model), [lambda own: logits_of(own, IDS[0]), doubled, doubled])
    assert torch.equal(plain, logits_of(load_backbone(str(tmp_path)).model, IDS[0]))
    assert torch.equal(changed, again) and not torch.equal(plain, changed)


def test_an_error_ends_all_computations(tmp_path: Path) -> None:
    made = outline(tmp_path)
    before, left = threading.active_count(), []

    def fails(model: Any) -> None:
        logits_of(model, IDS[0])
        raise ValueError("no more")

    def waits(model: Any) -> None:
        try:
            for _ in range(3):
                logits_of(model, IDS[1])
        finally:
            left.append(True)

    with pytest.raises(ValueError, match="no more"):
        abreast(streamed(made.model), [waits, fails, waits])
    assert left == [True, True] and threading.active_count() == before


def test_rounded_weights_are_those_that_rounding_in_place_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounded, "ROWS_AT_ONCE", 20)
    for number, family in enumerate(("llama", "gpt2", "opt")):
        made = outline(tmp_path / str(number), family)
        loaded = load_backbone(str(tmp_path / str(number)))
        for bits in (4, 8):
            right = copy.deepcopy(loaded.model)
            round_weights(right, Rounding(bits))
            plain = streamed(made.model)
            model = streamed(
                plain, RoundedWeights(plain, Rounding(bits), lambda name, made=made: stored_weight(made.model, name))
            )
            for name, wanted in right.named_parameters(remove_duplicate=False):
                for _ in "first time", "from what was kept":
                    assert torch.equal(read_weight(model, name), wanted), name
            assert torch.equal(logits_of(model, IDS[0]), logits_of(right, IDS[0]))
            assert not torch.equal(logits_of(model, IDS[0]), logits_of(loaded.model, IDS[0]))


def test_a_matrix_is_rounded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = load_mapped(str(save_tiny_backbone(tmp_path, tiny_llama().to(torch.bfloat16))))
    assert stored is not None
    made = outline_of(stored, "fp32")
    assert made is not None
    rounded: list[int] = []
    monkeypatch.setattr(
        "trainers.decoder.rounded.quantise", lambda matrix, *how: rounded.append(how[0]) or quantise(matrix, *how)
    )
    model = streamed(made.model, RoundedWeights(made.model, Rounding(4), lambda name: stored_weight(made.model, name)))
    logits_of(model, IDS[0])
    count = len(rounded)
    logits_of(model, IDS[1])
    assert count == len(rounded) == 3 * 7 + 1, "three layers' products, and the table that is the head too"


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.float16, np.float32, float8_e4m3fn, float4_e2m1fn])
def test_what_is_kept_on_disk_keeps_no_file_open(dtype: type) -> None:
    parts = [np.arange(start, start + 24).reshape(4, 6).astype(dtype) for start in (0, 24, 48)]
    opened = len(list(Path("/proc/self/fd").iterdir()))
    kept = [on_disk(parts) for _ in range(20)]
    assert len(list(Path("/proc/self/fd").iterdir())) == opened
    for array in kept:
        assert array.dtype == dtype
        np.testing.assert_array_equal(array, np.concatenate(parts))


def test_a_comparison_holds_a_rounded_copy_and_what_a_runtime_restores() -> None:
    """13 bytes of a weight are 3.25 in fp32, of which `has_room_for` counts one."""
    assert [copies_compared(kinds) for kinds in ([None], [Rounding(8), None], [Rounding(4, "integers")])] == [1, 2, 5]


def test_who_streams_is_decided_by_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(save_tiny_backbone(tmp_path, tiny_llama().to(torch.bfloat16)))
    size = 4 * sum(parameter.numel() for parameter in tiny_llama().parameters())
    for free, copies, streams in ((None, 1, False), (2 * size + 1, 1, False), (2 * size, 1, True), (2 * size, 2, True)):
        monkeypatch.setattr(module, "free_memory", lambda free=free: free)
        assert has_room_for(tiny_llama(), copies) is not streams
        made = load_or_stream(folder, copies=copies)
        assert is_streamed(made.model) is streams
        assert torch.equal(logits_of(made.model, IDS[0]), logits_of(load_backbone(folder).model, IDS[0]))
