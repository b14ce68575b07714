"""A loaded backbone is held against transformers' ``generate``, with what a family's code could get wrong planted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from iapt_export.contract.errors import IaptError
from tests.families import FAMILIES, REFUSED, tiny_family
from tests.tiny import save_tiny_backbone, tiny_gpt2, tiny_llama
from trainers.decoder import backbone as loading
from trainers.decoder.attention import use_own_attention
from trainers.decoder.backbone import load_backbone
from trainers.decoder.own_answer import LIMIT_IN_16_BITS, check_own_answer, plain_generation
from trainers.decoder.stored import load_mapped

SUPPORTED = [name for name, (expected, *_) in FAMILIES.items() if expected != REFUSED]


class CountsPadding(GPT2LMHeadModel):
    """Its tokens' places are their positions."""

    def forward(self, *args: Any, position_ids: Any = None, **fields: Any) -> Any:
        return super().forward(*args, **fields)


class ScalesTokens(LlamaForCausalLM):
    """It treats tokens in another way than their embeddings."""

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, **fields: Any) -> Any:
        if input_ids is not None:
            inputs_embeds = self.get_input_embeddings()(input_ids).flip(-1)
        return super().forward(inputs_embeds=inputs_embeds, **fields)


class Breaks(LlamaForCausalLM):
    """It has no ``generate``."""

    def generate(self, *args: Any, **fields: Any) -> Any:
        raise AttributeError("no generate here\nand more")


def of_kind(kind: Any) -> Any:
    model = tiny_gpt2() if issubclass(kind, GPT2LMHeadModel) else tiny_llama()
    model.__class__ = kind
    use_own_attention(model)
    return model


@pytest.mark.parametrize("name", SUPPORTED)
def test_families_that_are_supported_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainers.decoder.own_answer.LIMIT", 1e-5)
    model = tiny_family(name)
    use_own_attention(model)
    check_own_answer(model, name)


def test_16_bits_agree_within_their_limit() -> None:
    model = tiny_llama().bfloat16()
    use_own_attention(model)
    check_own_answer(model, "tiny")
    assert LIMIT_IN_16_BITS < 0.5


def test_weights_that_are_no_numbers_are_no_fault_of_the_family() -> None:
    model = tiny_llama()
    use_own_attention(model)
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight[5, 7] = float("nan")
    with pytest.raises(IaptError, match="tiny answers NaN or infinity to a prompt alone, at step 0: its weights hold"):
        check_own_answer(model, "tiny")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (CountsPadding, "the logits of a prompt beside a longer row, at step 0, are .* of the largest from those of"),
        (ScalesTokens, "tiny is not supported: the logits of a prompt alone, at step 0, are"),
        (Breaks, "tiny is not supported: transformers' own generate cannot run it: no generate here$"),
    ],
)
def test_a_model_that_answers_otherwise_is_refused(kind: Any, words: str) -> None:
    with pytest.raises(IaptError, match=words):
        check_own_answer(of_kind(kind), "tiny")


def test_it_is_checked_when_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(loading, "check_own_answer", lambda model, name: asked.append((type(model), name)))
    load_backbone(str(save_tiny_backbone(tmp_path)))
    assert asked == [(LlamaForCausalLM, str(tmp_path))]
    assert load_mapped(str(tmp_path)) is not None and len(asked) == 1  # may be more than memory holds


def test_settings_of_a_checkpoint_do_not_choose_the_tokens() -> None:
    """Penalties and beams in ``generation_config.json`` are no part of the model."""
    ids = torch.arange(2, 300, 2)[None]

    def tokens(model: Any) -> list[int]:
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        return [int(token) for token in made[0, ids.shape[1] :]]

    plain, penalised = tiny_llama(), tiny_llama()
    penalised.generation_config.repetition_penalty = 5.0
    wanted = tokens(plain)
    assert tokens(penalised) != wanted
    with plain_generation(penalised):
        assert tokens(penalised) == wanted
    assert penalised.generation_config.repetition_penalty == 5.0
