"""Which tenants share a stack of weights, what cannot share a bundle, and which weights each row gets."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from iapt_export.building.layout import method_spec
from iapt_export.contract.errors import IaptError
from iapt_export.graphs.installed import (
    Installed,
    deploy,
    in_decode,
    install,
    installed_from_manifest,
    rational_forms,
    rows_from_inputs,
)
from tests.bundles import METHOD, NUM_LAYERS, random_method, tiny_adapter
from tests.graphs import stacked_feeds
from tests.tiny import tiny_llama
from trainers.decoder.insertion import sizes_of
from trainers.methods.configs import (
    ADePTConfig,
    DePTConfig,
    LAMPConfig,
    LoPAConfig,
    LoRAConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
)
from trainers.methods.iapt import IAPT
from trainers.methods.lopa import LoPA, SentPrompt
from trainers.methods.lora import LoRA
from trainers.methods.rational import rational

PROMPT = PromptTuningConfig(prompt_length=4)
LAMP = LAMPConfig(init_length=20, rank=3, window=5)
LOPA = LoPAConfig(prompt_length=6, rank=2)
ADEPT = ADePTConfig(prompt_length=5, bottleneck=4)
PREFIX = PrefixTuningConfig(prompt_length=7)
LORA = LoRAConfig(rank=2)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama(num_hidden_layers=NUM_LAYERS)


def installed(model: Any, *configs: Any, fold: bool = False) -> tuple[list[Installed], list[str]]:
    """The methods of a bundle with a tenant for each configuration, and each tenant's method."""
    tenants = {f"t{number}": tiny_adapter(number, config) for number, config in enumerate(configs)}
    deployed = {name: deploy(adapter, model, fold_embeddings=fold) for name, adapter in tenants.items()}
    methods, owner = install(tenants, deployed)
    assert list(owner) == list(tenants)
    return methods, list(owner.values())


SHARED = {
    "the same": ([METHOD, METHOD], "iapt"),
    "initial activation, learning": (
        [METHOD, dataclasses.replace(METHOD, init_function="tanh", coefficients="bilevel")],
        "iapt",
    ),
    "initial text": ([PROMPT, dataclasses.replace(PROMPT, init="random", init_text="other")], "prompt_tuning"),
    "LAMP ends as a prompt": ([PROMPT, LAMP], "prompt_tuning"),
    "a prompt may join LAMP": ([LAMP, PROMPT], "prompt_tuning"),
    "LAMP of other ranks": ([LAMP, LAMPConfig(init_length=8, rank=2, window=2)], "prompt_tuning"),
    "a prefix's network": (
        [PREFIX, PrefixTuningConfig(prompt_length=7, projection=True, projection_width=8)],
        "prefix_tuning",
    ),
    "DePT of other ranks": (
        [DePTConfig(prompt_length=3, rank=2, max_length=9), DePTConfig(prompt_length=3, rank=4, max_length=9, alpha=2)],
        "position_table",
    ),
    "LoPA": ([LOPA, dataclasses.replace(LOPA, init="random")], "lopa"),
    "LoRA": ([LORA, LORA], "lora"),
}


@pytest.mark.parametrize("case", SHARED)
def test_tenants_that_share_a_stack(model: Any, case: str) -> None:
    configs, name = SHARED[case]
    methods, owner = installed(model, *configs)
    assert ([item.name for item in methods], owner) == ([name], [name] * 2)


APART = {
    "bottleneck": ([METHOD, dataclasses.replace(METHOD, bottleneck=4)], ["iapt", "iapt_2"]),
    "nothing that shapes tell": ([METHOD, dataclasses.replace(METHOD, scale=True)], ["iapt", "iapt_2"]),
    "raw input": ([METHOD, dataclasses.replace(METHOD, normalize=False)], ["iapt", "iapt_2"]),
    "three": (
        [METHOD, dataclasses.replace(METHOD, bottleneck=4), dataclasses.replace(METHOD, prompt_length=2)],
        ["iapt", "iapt_2", "iapt_3"],
    ),
    "and back": ([METHOD, dataclasses.replace(METHOD, bottleneck=4), METHOD], ["iapt", "iapt_2", "iapt"]),
    "prompt length": ([PROMPT, PromptTuningConfig(prompt_length=5)], ["prompt_tuning", "prompt_tuning_2"]),
    "LAMP of another length": (
        [PROMPT, LAMPConfig(init_length=20, rank=3, window=4)],
        ["prompt_tuning", "prompt_tuning_2"],
    ),
    "decode offset": ([ADEPT, dataclasses.replace(ADEPT, decode_offset=True)], ["adept", "adept_2"]),
    "scaling": ([LORA, LoRAConfig(rank=2, rslora=True)], ["lora", "lora_2"]),
    "methods": (
        [LORA, LOPA, DePTConfig(prompt_length=3), ADEPT, METHOD, PROMPT, PREFIX],
        ["lora", "lopa", "position_table", "adept", "iapt", "prompt_tuning", "prefix_tuning"],
    ),
}


@pytest.mark.parametrize("case", APART)
def test_tenants_of_different_methods(model: Any, case: str) -> None:
    configs, names = APART[case]
    methods, owner = installed(model, *configs)
    assert owner == names
    assert [item.name for item in methods] == list(dict.fromkeys(names))


def test_loras_of_one_effect_share_a_stack_however_they_are_spelt(model: Any) -> None:
    spelt = [LoRAConfig(rank=4, alpha=8), LoRAConfig(rank=4, alpha=4, rslora=True)]
    config: Any = LoRA.stack_config(spelt, sizes_of(model))
    methods = [LoRA(each, sizes_of(model)).in_stack(config, sizes_of(model)) for each in spelt]
    assert [each.config for each in methods] == [config, config]
    assert config.scaling == 1 and LoRA.stack_config(spelt[:1] * 2, sizes_of(model)) is None


def test_folded_offsets_are_a_table(model: Any) -> None:
    methods, owner = installed(model, ADEPT, PROMPT, fold=True)
    assert owner == ["token_table", "prompt_tuning"]
    assert dict(methods[0].method.named_parameters())["table"].shape == (320, 32)


def test_lopa_is_an_encoder_and_a_place_for_its_prompts(model: Any) -> None:
    ((item,), _) = installed(model, LOPA)
    assert isinstance(item.encoder, LoPA) and item.stacked is item.encoder
    assert isinstance(item.method, SentPrompt) and item.method.num_slots == 6


def test_what_acts_on_generated_tokens(model: Any) -> None:
    configs = [METHOD, PROMPT, PREFIX, LOPA, ADEPT, DePTConfig(prompt_length=3)]
    assert in_decode(installed(model, *configs)[0]) == []
    methods, _ = installed(model, *configs, LORA, dataclasses.replace(ADEPT, decode_offset=True))
    assert [item.name for item in in_decode(methods)] == ["lora", "adept_2"]


OTHER_DEGREES = dataclasses.replace(METHOD, numerator_degree=4, denominator_degree=3)
RATIONALS = (
    "the rational activations differ (degrees (4, 3) form B and degrees (5, 4) form B), "
    "and a graph holds one body of the operator"
)
ENCODERS = "LoPA adapters of different configurations need an encoder graph each, and a bundle has one"
REFUSED = {
    "degrees": ([METHOD, OTHER_DEGREES], f"{RATIONALS}; build one bundle for each"),
    "forms": (
        [METHOD, dataclasses.replace(METHOD, rational_form="A")],
        "the rational activations differ (degrees (5, 4) form A and degrees (5, 4) form B), "
        "and a graph holds one body of the operator; build one bundle for each",
    ),
    "encoders": ([LOPA, LoPAConfig(prompt_length=6, rank=3)], f"{ENCODERS}; build one bundle for each"),
    "both": (
        [METHOD, LOPA, OTHER_DEGREES, LoPAConfig(prompt_length=5)],
        f"{RATIONALS}; {ENCODERS}; build one bundle for each",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_one_set_of_graphs_cannot_serve(model: Any, case: str) -> None:
    configs, text = REFUSED[case]
    with pytest.raises(IaptError) as caught:
        installed(model, *configs)
    assert str(caught.value) == text


def test_a_fixed_activation_has_no_body_to_disagree_on(model: Any) -> None:
    methods, owner = installed(model, METHOD, dataclasses.replace(OTHER_DEGREES, activation="gelu"))
    assert owner == ["iapt", "iapt_2"]
    assert rational_forms(methods) == {(6, 4, "B")}
    assert rational_forms(methods[1:]) == set()


def test_an_installed_activation_is_the_traceable_one_and_the_trainers_stays(model: Any) -> None:
    ((item,), _) = installed(model, METHOD)
    assert isinstance(item.method, IAPT)
    assert item.method.rational is torch.ops.iapt.rational
    assert IAPT.rational is rational and random_method(0).rational is rational


def test_a_manifest_tells_all_of_it(model: Any) -> None:
    """What reads a bundle installs what the exporter did, but for the weights."""
    configs = [METHOD, dataclasses.replace(METHOD, scale=True), LAMP, PREFIX, LOPA, ADEPT, DePTConfig(), LORA]
    methods, _ = installed(model, *configs)
    manifest: Any = SimpleNamespace(methods=[method_spec(item) for item in methods])
    again = installed_from_manifest(manifest, model)
    assert [method_spec(item) for item in again] == manifest.methods
    assert [type(item.method) for item in again] == [type(item.method) for item in methods]


def feeds(methods: list[Installed], **index: list[int]) -> dict[str, torch.Tensor]:
    """Two tenants' weights of every method, and whose each row is."""
    found: dict[str, torch.Tensor] = {}
    for item in methods:
        tenants = [random_method(seed, item.stacked.config) for seed in range(2)]
        found |= {name: torch.from_numpy(array) for name, array in stacked_feeds(tenants, item.name).items()}
        found[f"{item.name}.tenant_index"] = torch.tensor(index[item.name])
    return found


def test_rows_of_one_method_each_have_their_own_weights(model: Any) -> None:
    methods, _ = installed(model, PROMPT)
    inputs = feeds(methods, prompt_tuning=[1, 0, 1])
    rows = rows_from_inputs(methods, inputs)
    (part,) = rows.parts
    assert part.active is not None and part.active.tolist() == [True] * 3
    stack = inputs["prompt_tuning.prompt"]
    assert torch.equal(part.weights["prompt"], stack[[1, 0, 1]])
    assert rows.slot_mask(torch.ones(3, 2, dtype=torch.long)).tolist() == [[1] * 4] * 3


def test_a_row_of_no_method_is_the_backbones(model: Any) -> None:
    methods, _ = installed(model, PROMPT)
    rows = rows_from_inputs(methods, feeds(methods, prompt_tuning=[1, -1]))
    assert rows.slot_mask(torch.ones(2, 3, dtype=torch.long)).tolist() == [[1] * 4, [0] * 4]


def test_rows_of_several_methods_take_turns(model: Any) -> None:
    methods, _ = installed(model, PROMPT, PREFIX, LORA)
    inputs = feeds(methods, prompt_tuning=[-1, 1, -1, -1], prefix_tuning=[0, -1, -1, -1], lora=[-1, -1, 1, -1])
    rows = rows_from_inputs(methods, inputs)
    assert rows.mixed and rows.num_slots == 7
    actives = [part.active.tolist() for part in rows.parts if part.active is not None]
    assert actives == [[False, True, False, False], [True, False, False, False], [False, False, True, False]]
    assert torch.equal(rows.parts[0].weights["prompt"][1], inputs["prompt_tuning.prompt"][1])
    assert [len(part.weights[next(iter(part.weights))]) for part in rows.parts] == [4, 4, 4]
    slots = rows.slot_mask(torch.ones(4, 2, dtype=torch.long)).tolist()
    assert slots == [[1] * 7, [0] * 3 + [1] * 4, [0] * 7, [0] * 7]


def test_the_decode_step_takes_part_of_them(model: Any) -> None:
    """A method that stands alone in a graph still shares the bundle, so its rows are told apart there too."""
    methods, _ = installed(model, PROMPT, LORA)
    inputs = feeds(methods, prompt_tuning=[0, -1], lora=[-1, 0])
    inputs = {name: tensor for name, tensor in inputs.items() if name.startswith("lora.")}
    (part,) = rows_from_inputs(methods, inputs, only=in_decode(methods)).parts
    assert part.active is not None and part.active.tolist() == [False, True]


def test_sent_prompts_are_taken_as_they_come(model: Any) -> None:
    prompts = torch.randn(2, 6, 32)
    alone, _ = installed(model, LOPA)
    (part,) = rows_from_inputs(alone, {"lopa.prompts": prompts}).parts
    assert part.active is None and part.weights["prompts"] is prompts
    beside, _ = installed(model, LOPA, LORA)
    inputs = feeds(beside[1:], lora=[0, -1]) | {"lopa.prompts": prompts, "lopa.tenant_index": torch.tensor([-1, 0])}
    assert rows_from_inputs(beside, inputs).parts[0].active.tolist() == [False, True]  # type: ignore[union-attr]


def test_a_table_of_the_vocabulary_is_not_copied_for_each_row(model: Any) -> None:
    methods, _ = installed(model, ADEPT, fold=True)
    inputs = {"token_table.prompt": torch.randn(2, 5, 32), "token_table.table": torch.randn(2, 320, 32)}
    (part,) = rows_from_inputs(methods, inputs | {"token_table.tenant_index": torch.tensor([1, 0, 1])}).parts
    assert part.weights["table"] is inputs["token_table.table"]
    assert part.weights["table_row"].tolist() == [1, 0, 1]
    assert torch.equal(part.weights["prompt"], inputs["token_table.prompt"][[1, 0, 1]])
