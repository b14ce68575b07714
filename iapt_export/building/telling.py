"""What a build says of its inputs beforehand: nothing is wrong with them, and answers may be others than expected."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from iapt_export.building.plan import TargetPlan
from iapt_export.contract.low_bits import in_words
from trainers.adapters.adapter import Adapter
from trainers.decoder.backbone import Backbone

LOGGER = logging.getLogger("iapt_export")
CHANGING_ANSWERS = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "min_length": 0,
    "guidance_scale": 1.0,
    **dict.fromkeys(("min_new_tokens", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias")),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty")),
}
"""Settings of transformers' ``GenerationConfig`` that change greedy answers, with what changes nothing."""


def tell_of_other_weights(targets: Sequence[TargetPlan], adapters: Mapping[str, Adapter], *, merged: bool) -> None:
    """Note which adapters were trained on others than a target serves: each answers best on its own.

    Args:
        targets: what is built.
        adapters: by tenant.
        merged: one is merged into the backbone's weights, which are rounded then.
    """
    for target in targets:
        settings = target.rounding.of_weights if target.rounding else ""
        served = (target.dtype if target.rounding else "fp32", settings)
        flags = f"--weights {served[0]}" + (f" --quantise {settings}" if settings else "")
        way = ""
        if target.rounding and merged:
            way = "rounded after the merge; build without --merge-lora to serve what train --weights trains on"
        elif target.rounding and target.rounding.grid == "integers":
            # training rounds to int8 and int4 as ONNX Runtime's quantiser does; on SmolLM2-135M that is as far from
            # TensorRT's own way as fp32 is
            way = "rounded in TensorRT's way, which train --weights does not know"
        for name, adapter in adapters.items():
            trained = (adapter.config.weights, adapter.config.quantise)
            if way:
                LOGGER.warning(
                    "tenant %s was trained on %s weights, and %s serves %s, %s",
                    *(name, in_words(*trained), target.name, in_words(*served), way),
                )
            elif trained != served:
                LOGGER.warning(
                    "tenant %s was trained on %s weights, and %s serves %s; train %s trains on those",
                    *(name, in_words(*trained), target.name, in_words(*served), flags),
                )


def tell_of_generation_settings(backbone: Backbone) -> None:
    """Note what transformers' ``generate`` would do to greedy answers of this model, and no session does unasked."""
    from transformers import GenerationConfig

    usual = GenerationConfig()
    found = {name: getattr(backbone.model.generation_config, name, None) for name in CHANGING_ANSWERS}
    told = [
        f"{name}={value!r}"
        for name, value in found.items()
        if value not in (None, [], {}, getattr(usual, name, None), CHANGING_ANSWERS[name])
    ]
    if told:
        LOGGER.warning(
            "%s has generation settings that transformers' generate applies to every answer, and a session only where "
            "a request asks for them, if it can: %s",
            *(backbone.name_or_path, ", ".join(told)),
        )
