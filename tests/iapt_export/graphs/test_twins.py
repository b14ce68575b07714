"""Export twins compute what the trained modules compute: in eager PyTorch for five architectures, and as ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from iapt_export.graphs.export import export_graphs
from iapt_export.graphs.trace import exportable
from iapt_export.graphs.twins import DecodeTwin, GeneratorTwin, PrefillTwin
from tests.bundles import METHOD, random_method
from tests.graphs import (
    flat,
    iapt_feeds,
    installed,
    past_feeds,
    rest,
    run_onnx,
    specs_for,
    trained_prefill,
    trained_prompt,
    worst,
)
from tests.tiny import ARCHITECTURES, padded
from trainers.decoder.generate import decode, prefill
from trainers.decoder.insertion import sizes_of
from trainers.decoder.method import Method, Rows, rows_of

WIDTH = 32
INDEX = [2, 0, 1, 2]
LENGTHS = [7, 3, 1, 5]
LIMIT = 2e-5
EXPORTED = [
    "gpt2",
    pytest.param("qwen3", marks=pytest.mark.slow),
    pytest.param("qwen2", marks=pytest.mark.slow),
    pytest.param("mistral", marks=pytest.mark.slow),
]
"""Beside Llama, which the shared tiny bundle exports; test_serve_passes.py exports three of them to be served from."""


def trained(model: Any) -> list[Method]:
    return [random_method(seed, METHOD, sizes_of(model)) for seed in range(3)]


def twin_of(twin: type[Any], name: str, model: Any) -> tuple[Any, Any]:
    """A twin over IAPT alone, and how it takes its tuple."""
    methods = installed(METHOD, sizes_of(model))
    spec = specs_for(model, methods)[name]
    return twin(model, methods, spec), lambda feeds: rest(spec, feeds)


def real_rows(mask: Tensor) -> np.ndarray:
    """``[B, P+T]``: prompts and real tokens."""
    return torch.cat([mask.new_ones(len(mask), METHOD.prompt_length), mask], dim=1).bool().numpy()


def assert_caches_agree(made: list[Any], wanted: list[Tensor], mask: Tensor) -> None:
    assert len(made) == len(wanted)
    for mine, theirs in zip(made, wanted, strict=True):
        for row, real in enumerate(real_rows(mask)):
            assert worst(np.asarray(mine)[row][:, real], theirs[row].numpy()[:, real]) < LIMIT


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prefill_of_mixed_rows_is_each_tenants_own(architecture: str, side: str) -> None:
    model = ARCHITECTURES[architecture]()
    tenants = trained(model)
    ids, mask = padded(LENGTHS, side)
    twin, taken = twin_of(PrefillTwin, "prefill", model)
    with exportable(model), torch.no_grad():
        logits, *cache = twin(ids, mask, taken(iapt_feeds(tenants, INDEX)))
    wanted, layers = trained_prefill(model, tenants, INDEX, ids, mask)
    assert logits.shape == (4, 1, 320)
    assert worst(logits[:, 0], wanted) < LIMIT
    assert_caches_agree(cache, layers, mask)
    swapped, _ = trained_prefill(model, tenants, [0, 1, 2, 0], ids, mask)
    assert worst(logits[:, 0], swapped) > 1e-2, "the tenants must tell"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decode_is_the_backbones_step(architecture: str) -> None:
    model = ARCHITECTURES[architecture]()
    ids, mask = padded(LENGTHS, "left")
    _, cache = prefill(model, rows_of(trained(model)[0]), ids, mask)
    twin, taken = twin_of(DecodeTwin, "decode", model)
    past = tuple(tensor.clone() for tensor in taken(past_feeds(cache)))
    total = torch.cat([mask.new_ones(4, METHOD.prompt_length), mask, mask.new_ones(4, 1)], dim=1)
    token = torch.tensor([5, 6, 7, 8])
    wanted = decode(model, Rows(), token, total, cache)
    with exportable(model), torch.no_grad():
        logits, *present = twin(token[:, None], total, total.sum(1, keepdim=True) - 1, past)
    assert worst(logits[:, 0], wanted) < LIMIT
    assert [tensor.shape for tensor in present] == [tensor.shape for tensor in flat(cache)]
    assert_caches_agree(present, flat(cache), torch.cat([mask, mask.new_ones(4, 1)], dim=1))


@pytest.mark.parametrize("side", ["left", "right"])
def test_generators_are_the_trained_modules(side: str) -> None:
    model = ARCHITECTURES["llama"]()
    tenants = trained(model)
    hidden = torch.randn(4, 3, 7, WIDTH)
    _, mask = padded(LENGTHS, side)
    twin, taken = twin_of(GeneratorTwin, "generator", model)
    (made,) = twin(hidden, mask, taken(iapt_feeds(tenants, INDEX)))
    assert made.shape == (4, 3, METHOD.prompt_length, WIDTH)
    for row, tenant in enumerate(INDEX):
        for layer in range(3):
            wanted = trained_prompt(tenants[tenant], layer, hidden[row : row + 1, layer], mask[row : row + 1])
            assert worst(made[row, layer], wanted[0]) < LIMIT


def test_padding_holds_anything() -> None:
    """What stands at padded places, NaN excepted, changes nothing."""
    model = ARCHITECTURES["llama"]()
    hidden = torch.randn(4, 3, 7, WIDTH)
    _, mask = padded(LENGTHS, "left")
    twin, taken = twin_of(GeneratorTwin, "generator", model)
    weights = taken(iapt_feeds(trained(model), INDEX))
    noisy = torch.where(mask[:, None, :, None].bool(), hidden, torch.full_like(hidden, 1e3))
    assert torch.equal(twin(hidden, mask, weights)[0], twin(noisy, mask, weights)[0])


def test_the_export_attention_is_taken_back() -> None:
    model = ARCHITECTURES["llama"]()
    before = model.config._attn_implementation

    def fail() -> None:
        with exportable(model):
            assert model.config._attn_implementation == "iapt_export" != before
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert model.config._attn_implementation == before


@pytest.fixture(scope="module", params=EXPORTED)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A one-layer model of the architecture, and the folder with its prefill and decode graphs."""
    layers = {"n_layer": 1} if request.param == "gpt2" else {"num_hidden_layers": 1}
    model = ARCHITECTURES[request.param](**layers)
    folder = tmp_path_factory.mktemp(request.param)
    export_graphs(
        model, installed(METHOD, sizes_of(model)), folder, dtype="fp32", opset=23, names=("prefill", "decode")
    )
    return model, folder


def test_other_architectures_as_onnx(exported: tuple[Any, Path]) -> None:
    model, folder = exported
    tenants = trained(model)
    ids, mask = padded(LENGTHS, "left")
    feeds = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), **iapt_feeds(tenants, INDEX)}
    made = run_onnx(folder / "prefill.onnx", feeds)
    logits, layers = trained_prefill(model, tenants, INDEX, ids, mask)
    assert worst(made["logits"][:, 0], logits) < LIMIT
    assert_caches_agree(list(made.values())[1:], layers, mask)

    total = torch.cat([mask.new_ones(4, METHOD.prompt_length), mask, mask.new_ones(4, 1)], dim=1)
    token = torch.tensor([5, 6, 7, 8])
    step = run_onnx(
        folder / "decode.onnx",
        {
            "input_ids": token[:, None].numpy(),
            "attention_mask": total.numpy(),
            "position_ids": (total.sum(dim=1, keepdim=True) - 1).numpy(),
            **{name.replace("present", "past_key_values"): made[name] for name in list(made)[1:]},
        },
    )
    for row, tenant in enumerate(INDEX):
        own = ids[row : row + 1, -LENGTHS[row] :]
        ones = torch.ones(1, METHOD.prompt_length + LENGTHS[row] + 1, dtype=torch.long)
        _, cache = prefill(model, rows_of(tenants[tenant]), own, torch.ones_like(own))
        wanted = decode(model, Rows(), token[row : row + 1], ones, cache)
        assert worst(step["logits"][row], wanted) < LIMIT
