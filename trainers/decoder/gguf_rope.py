"""Rotary position embeddings as a GGUF file describes them, as transformers' ``rope_parameters``.

llama.cpp divides the angle of pair i by a factor: one number for all (linear), a ramp between two wavelengths
(yarn, arXiv 2309.00071), one set of numbers for short and one for long texts (longrope, arXiv 2402.13753), or the
tensor ``rope_freqs.weight``, in which converters write the ramp of Llama 3.1.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from iapt_export.contract.errors import IaptError
from trainers.decoder.gguf_file import Fields

FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
FACTOR_TENSORS = {"llama": (FREQS, LONG, SHORT), "phi3": (LONG, SHORT)}
"""Architecture to the tensors of factors that llama.cpp reads with it."""
PARTIAL = ("phi3", "stablelm")
"""Architectures in which transformers can rotate a part of each head only (``partial_rotary_factor``)."""
LLAMA3_LOW, LLAMA3_HIGH = 1.0, 4.0
"""Of every Llama 3.1, 3.2 and 3.3: in ``rope_freqs`` they cannot be told apart from the original context's length."""


def head_width(fields: Fields, hidden: int, heads: int) -> tuple[int, int]:
    """The width of a head, and how many of its numbers are rotated.

    Raises:
        IaptError: keys and values differ in width, or the family rotates whole heads only.
    """
    architecture = fields.file.architecture
    width = fields.take("attention.key_length", hidden // heads)
    value_width = fields.take("attention.value_length", width)
    rotated = fields.take("rope.dimension_count", width)
    if value_width != width:
        raise fields.refusal("attention.value_length", f"is {value_width}, unlike the keys' {width}")
    if rotated != width and architecture not in PARTIAL:
        raise fields.refusal("rope.dimension_count", f"is {rotated} of {width}, and {architecture} rotates whole heads")
    if width != hidden // heads and architecture in PARTIAL:
        raise fields.refusal("attention.key_length", f"is {width}, and {architecture} has heads of D / H")
    return width, rotated


def rope_parameters(fields: Fields, context: int, width: int, rotated: int) -> dict[str, Any]:
    """Transformers' ``rope_parameters`` (for gemma3, those of the layers without a window).

    Args:
        fields: of the file; those of the rotary embedding are taken.
        context: the longest text the file claims.
        width: of a head.
        rotated: how many of its numbers are rotated.

    Raises:
        IaptError: a scaling that this family's configuration cannot hold.
    """
    file = fields.file
    base = float(fields.take("rope.freq_base", 10000.0))
    parameters: dict[str, Any] = {"rope_theta": base}
    if file.architecture in PARTIAL:
        parameters["partial_rotary_factor"] = _fraction(rotated, width)
    kind = fields.take("rope.scaling.type", "linear")
    factor = float(fields.take("rope.scaling.factor", 0.0) or 1.0)
    attention = float(fields.take("rope.scaling.attn_factor", 1.0))
    original = fields.take("rope.scaling.original_context_length", context)
    if LONG in file.tensors or kind == "longrope":
        parameters |= _longrope(fields, factor, attention, original)
    elif kind == "yarn":
        parameters |= _yarn(fields, factor, attention, original)
    elif kind not in ("linear", "none"):
        raise fields.refusal("rope.scaling.type", f"is {kind!r}; known are none, linear, yarn and longrope")
    elif attention != 1:
        raise fields.refusal("rope.scaling.attn_factor", f"is {attention} beside {kind} scaling")
    elif factor != 1 and kind == "linear":
        parameters |= {"rope_type": "linear", "factor": factor}
    if FREQS in file.tensors and file.architecture == "llama":
        if "rope_type" in parameters:
            raise fields.refusal("rope.scaling.type", f"is {kind!r} beside the tensor {FREQS}")
        parameters |= llama3_parameters(file.tensor(FREQS), base, context)
    if file.architecture == "phi3" and parameters.get("rope_type", "longrope") != "longrope":
        raise fields.refusal("rope.scaling.type", f"is {kind!r}, and transformers scales phi3 by longrope only")
    return {"rope_type": "default", **parameters}


def llama3_parameters(factors: np.ndarray, base: float, context: int) -> dict[str, Any]:
    """Llama 3.1's scaling that gives these factors.

    Args:
        factors: ``[R / 2]``, what each pair's frequency is divided by.
        base: of the frequencies.
        context: the longest text the file claims; the original context is a power of two up to it.

    Returns:
        rope parameters of type ``llama3``, or none where all factors are 1.

    Raises:
        IaptError: no such scaling gives them.
    """
    if np.all(factors == 1):
        return {}
    factor = float(factors.max())
    wavelengths = 2 * math.pi * base ** (np.arange(len(factors)) / len(factors))
    for exponent in range(5, 24):
        original = 2**exponent
        smooth = np.clip((original / wavelengths - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW), 0, 1)
        if np.allclose(1 / factors, (1 - smooth) / factor + smooth, rtol=1e-4, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": LLAMA3_LOW,
                "high_freq_factor": LLAMA3_HIGH,
                "original_max_position_embeddings": original,
            }
    raise IaptError(
        f"the GGUF tensor {FREQS} holds factors ({', '.join(f'{f:g}' for f in factors[:8])} …) that Llama 3.1's "
        "scaling of rotary frequencies does not give; give the model's Hugging Face folder instead of the GGUF file"
    )


def _yarn(fields: Fields, factor: float, attention: float, original: int) -> dict[str, Any]:
    for name in ("yarn_ext_factor", "yarn_attn_factor"):
        if (value := fields.take(f"rope.scaling.{name}", 1.0)) != 1:
            raise fields.refusal(f"rope.scaling.{name}", f"is {value}; known is 1")
    parameters: dict[str, Any] = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    for name in ("beta_fast", "beta_slow"):
        if (value := fields.take(f"rope.scaling.yarn_{name}")) is not None:
            parameters[name] = float(value)
    if attention != 1:
        parameters["attention_factor"] = attention * (0.1 * math.log(factor) + 1)
    return parameters


def _longrope(fields: Fields, factor: float, attention: float, original: int) -> dict[str, Any]:
    file = fields.file
    if missing := [name for name in (LONG, SHORT) if name not in file.tensors]:
        raise IaptError(f"{file.path} scales by longrope and lacks {', '.join(missing)}; convert it again")
    if factor != 1:
        raise fields.refusal("rope.scaling.factor", f"is {factor} beside longrope's tensors of factors")
    return {
        "rope_type": "longrope",
        "long_factor": file.tensor(LONG).tolist(),
        "short_factor": file.tensor(SHORT).tolist(),
        "attention_factor": attention,
        "original_max_position_embeddings": original,
    }


def _fraction(rotated: int, width: int) -> float:
    """A fraction of the width which, cut to an integer as transformers does, is ``rotated`` again."""
    fraction = rotated / width
    return fraction if int(width * fraction) == rotated else math.nextafter(fraction, 2)
