"""What can be done with a decoder: supported, supported with a restriction, or refused, each with its reason.

A configuration says too little: two fields of one name mean different things in two families. So the model's own code
is run once on tensors without data ("meta"), which takes a second at most, whatever the model's size. What it asks of
its attention and leaves in its cache is read off: how many heads it caches, of which width, which windows it masks,
whether its code attends by itself. Nothing is loaded and nothing computed.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, DynamicCache
from transformers.dynamic_module_utils import TRANSFORMERS_DYNAMIC_MODULE_NAME
from transformers.masking_utils import AttentionMaskInterface

from iapt_export.contract.disk import file_sha256
from iapt_export.contract.errors import IaptError
from trainers.decoder.attention import Options, read_options, real_rotations, traceable_experts, use_own_attention

TRIAL = "iapt_trial"
NUM_TOKENS, NUM_PLACES = 6, 2**20
"""Tokens of the trial, and places at which a mask's rule is asked."""
OTHER_RULE, BOTH_WAYS = 0, -2
"""Stand for a mask that is neither causal nor a window, and for one that sees later tokens."""
PROVEN = {"bloom", "codegen", "diffllama", "falcon", "gptj"}
"""Families whose code attends by itself, and whose rows are tested not to depend on padding; CodeGen's and GPT-J's does
until transformers 5.24."""
UNTRACEABLE = {"doge"}
"""Families whose code torch.export specialises to rows of one length, which a trial without data does not tell."""
PLAIN_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
"""Kinds of layers whose cache is keys and values alone."""
ENCODER_AND_DECODER = "it is an encoder and a decoder; only decoders are"
NOT_ARCHITECTURE = ("dtype", "_name_or_path")
"""Fields of a configuration on which no verdict depends."""


@dataclass(frozen=True)
class Family:
    """What a trial of a decoder's code has shown."""

    refusal: str = ""
    """Why it cannot be used at all, a sentence; empty where it can."""
    restrictions: tuple[str, ...] = ()
    """What works in another way than usual, a sentence each."""
    in_place: bool = True
    """Whether graphs over a cache that is written in place are possible; else the portable graphs serve alone."""
    num_kv_heads: int = 0
    """H, heads of the cache."""
    head_dim: int = 0
    """K, width of a cached key, and of a value where nothing else is said."""
    value_dim: int = 0
    """Width of a cached value where it is another; else 0."""
    max_positions: int | None = None
    """Most positions where fewer than the configuration says; None leaves its number."""


@dataclass
class _Trial:
    """What is noted while a model runs without data."""

    calls: list[tuple[int, Options, int]] = field(default_factory=list)
    """Layer, what its attention is asked for, and the window of the mask that it gets."""
    strange: str = ""
    """The first argument of an attention call that is not known."""
    uses_positions: bool = False
    """Whether anything is computed of the tokens' positions."""

    def attend(
        self, module: nn.Module, query: Tensor, _key: Tensor, value: Tensor, attention_mask: Any, **arguments: Any
    ) -> Any:
        arguments.pop("scaling", None)
        try:
            options = read_options(module, arguments)
        except IaptError as error:
            self.strange, options = str(error), Options()
        self.calls.append((int(getattr(module, "layer_idx", -1)), options, getattr(attention_mask, "iapt_window", -1)))
        batch, heads, length, _ = query.shape
        return query.new_empty(batch, length, heads, value.shape[-1]), None

    @staticmethod
    def mask(*, mask_function: Any, batch_size: int, q_length: int, kv_length: int, **_: Any) -> Tensor:
        tagged = torch.empty(batch_size, 1, q_length, kv_length, dtype=torch.bool, device="meta")
        tagged.iapt_window = _window_of(mask_function)  # type: ignore[attr-defined]
        return tagged


class _Computation(TorchDispatchMode):
    """Notes what is computed while the context is open."""

    def __init__(self, positions: Tensor) -> None:
        super().__init__()
        self._positions = positions
        self.is_complex = self.uses_positions = False
        """Whether a complex number is made, and whether anything reads the positions of the tokens."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = operator(*args, **(kwargs or {}))
        self.is_complex |= isinstance(made, Tensor) and made.is_complex()
        # also inside of lists: indexing hands its indices on as one
        self.uses_positions |= any(value is self._positions for value in tree_leaves((args, kwargs)))
        return made


_known: dict[str, Family] = {}


def family_of(model: Any) -> Family:
    """What can be done with a decoder, whose weights may be on the meta device.

    Args:
        model: a causal LM of transformers; it is not changed.
    """
    fields = {name: value for name, value in model.config.to_dict().items() if name not in NOT_ARCHITECTURE}
    code = remote_code_sha256(model)
    key = f"{type(model).__module__}.{type(model).__qualname__} {code} {json.dumps(fields, default=str)}"
    if key not in _known:
        with torch.device("meta"):
            trial_model = type(model)(copy.deepcopy(model.config)).eval()
        _known[key] = _examined(trial_model)
    return _known[key]


def check_family(model: Any, name: str = "") -> Family:
    """`family_of`, refusing what cannot be used.

    Raises:
        IaptError: with the reason.
    """
    family = family_of(model)
    if family.refusal:
        raise IaptError(f"{name or model.config.model_type} is not supported: {family.refusal}")
    return family


def remote_code_sha256(model: Any) -> str:
    """SHA-256 over the files of a model whose code came with it; empty for transformers' own."""
    kinds = (type(model), type(model.config))
    own = [kind for kind in kinds if kind.__module__.partition(".")[0] == TRANSFORMERS_DYNAMIC_MODULE_NAME]
    folders = {Path(inspect.getfile(kind)).parent for kind in own}
    files = sorted(path for folder in folders for path in folder.glob("*.py"))
    return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest() if files else ""


def cache_argument(module: Any, cache: Any) -> dict[str, Any]:
    """The argument by which a model's code takes a cache, ``past_key_values`` until transformers renamed it ``cache``
    in 5.24; code that came with a checkpoint may have either name under any version.
    """
    return {"cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values": cache}


def max_positions(model: Any) -> int:
    """The most entries that a row of a backbone can have, prompts included; reads no weights."""
    config = model.config.get_text_config()
    return check_family(model).max_positions or getattr(config, "max_position_embeddings", None) or 2**31


def _examined(model: Any) -> Family:
    if reason := _told_by_configuration(model):
        return Family(refusal=reason)
    try:
        width, hidden = model.get_input_embeddings().weight.shape[1], model.config.get_text_config().hidden_size
    except (AttributeError, NotImplementedError) as error:
        return Family(refusal=f"it has no table of embeddings for its tokens: {_first_line(error)}")
    if width != hidden:
        return Family(
            refusal=f"its embeddings are {width} wide and its layers {hidden}; soft prompts need one width for both"
        )
    use_own_attention(model)
    _compute_equal_parts_once(model)
    trial = _Trial()
    cache = DynamicCache()
    AttentionInterface.register(TRIAL, trial.attend)
    AttentionMaskInterface.register(TRIAL, trial.mask)
    positions = torch.arange(NUM_TOKENS, device="meta")[None]
    computation = _Computation(positions)
    try:
        model.set_attn_implementation(TRIAL)
        with torch.no_grad(), traceable_experts(model), real_rotations(model), computation:
            model(
                inputs_embeds=torch.empty(1, NUM_TOKENS, width, device="meta"),
                attention_mask=torch.ones(1, NUM_TOKENS, dtype=torch.int64, device="meta"),
                position_ids=positions,
                use_cache=True,
                **cache_argument(model, cache),
            )
    except Exception as error:  # whatever a model's own code raises
        return Family(refusal=f"its code cannot be followed without data, which export needs: {_first_line(error)}")
    if trial.strange:
        return Family(refusal=trial.strange)
    if computation.is_complex:
        return Family(refusal="it computes with complex numbers (of rotary positions), which ONNX's operators lack")
    trial.uses_positions = computation.uses_positions
    return _judged(model, trial, cache)


def _compute_equal_parts_once(model: Any) -> None:
    """Let norms, MLPs and projections give again what one of their kind gave for such an input: layers have equal ones.

    They are what takes a single tensor and has no layer's number, so that nothing that is looked for is in them. Half
    of a trial's time goes this way.
    """
    results: dict[Any, Tensor] = {}

    def once(forward: Any, kind: Any) -> Any:
        def forward_once(*arguments: Any, **named: Any) -> Any:
            if named or len(arguments) != 1 or not isinstance(arguments[0], Tensor):
                return forward(*arguments, **named)
            place = (kind, arguments[0].shape, arguments[0].dtype)
            result = results.get(place)
            if result is None:
                result = forward(*arguments)
                if isinstance(result, Tensor):
                    results[place] = result
            return result

        return forward_once

    for module in model.modules():
        if not any(hasattr(part, "layer_idx") for part in module.modules()):
            shapes = tuple(parameter.shape for parameter in module.parameters())
            module.forward = once(module.forward, (type(module), shapes))


def _told_by_configuration(model: Any) -> str:
    """Why a decoder is refused, where its configuration or class says so."""
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder:
        return ENCODER_AND_DECODER
    if config.model_type in UNTRACEABLE:
        return "torch.export takes its code for rows of one length alone, and graphs are for all"
    kinds = set(getattr(config, "layer_types", None) or ()) - PLAIN_LAYERS
    if getattr(model, "_is_stateful", False) or kinds:
        what = ", ".join(sorted(kinds)) or "a recurrent state"
        return f"its layers keep other state than keys and values ({what}), which no cache here holds"
    ropes = getattr(config, "rope_parameters", None) or {}
    ropes = [ropes] if "rope_type" in ropes else [rope for rope in ropes.values() if isinstance(rope, dict)]
    if any("dynamic" in str(rope.get("rope_type")) for rope in ropes):
        return "its rotary factors change with the longest row (dynamic NTK); a rope_type of linear or yarn does not"
    if len(ropes) > 1 and any(rope.get("rope_type") == "longrope" for rope in ropes):
        return "its rotary factors change with the longest row (longrope) in some kinds of layers, and not in others"
    return ""


def _judged(model: Any, trial: _Trial, cache: DynamicCache) -> Family:
    """The verdict on what a trial noted."""
    config = model.config.get_text_config()
    num_layers = config.num_hidden_layers
    if num_layers < 1:
        return Family(refusal="its configuration says that it has no layers")
    entries = [layer for layer in cache.layers if isinstance(getattr(layer, "keys", None), Tensor)]
    if len(entries) != num_layers:
        return Family(refusal=f"{num_layers} layers share {len(entries)} caches; each layer must have its own")
    shapes = {(*layer.keys.shape[1:], *layer.values.shape[1:]) for layer in entries}
    if len(shapes) > 1 or any(len(shape) != 6 or shape[0] != shape[3] or shape[1] != NUM_TOKENS for shape in shapes):
        return Family(refusal="its layers cache keys and values of several shapes; all layers must have one")
    ((heads, _, key_width, _, _, value_width),) = shapes
    if any(window == BOTH_WAYS for *_, window in trial.calls):
        return Family(refusal="it attends in both directions (is_decoder is off?); only causal decoders are supported")
    limit = _original_length(config)
    reasons = []
    if [layer for layer, *_ in trial.calls] != list(range(num_layers)):
        if config.model_type not in PROVEN:
            return Family(
                refusal="its code attends by itself instead of through transformers' attention interface, so nothing "
                "says what a row sees beside padding"
            )
        reasons.append("its code attends by itself, in a way that a cache written in place cannot follow")
    elif not trial.uses_positions:
        return Family(refusal="its code takes no positions, so it would count the padding beside a row as tokens")
    elif any(window != options.window for _, options, window in trial.calls):
        reasons.append("its masks are more than what its attention is told, which a cache in place needs")
    if is_latent := key_width != value_width:
        reasons.append(f"it caches latents of {key_width} and {value_width} numbers, of which each step makes all keys")
    elif key_width % 8:
        reasons.append(f"its heads are {key_width} wide, and attention over a cache in place takes multiples of 8")
    restrictions = [f"{reason}: portable graphs only" for reason in reasons]
    if limit is not None:
        restrictions.append(f"rotary factors are those of up to {limit} positions (longrope): a row may have no more")
    value_dim = value_width if is_latent else 0
    return Family("", tuple(restrictions), not reasons, heads, key_width, value_dim, limit)


def _original_length(config: Any) -> int | None:
    """Positions up to which longrope's first set of factors holds; None for other rotary embeddings."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    return int(rope["original_max_position_embeddings"])


def _window_of(mask_function: Any) -> int:
    """Entries that a token sees by a mask's rule: -1 for all before it, `OTHER_RULE` where that is no window."""
    place = torch.arange(2 * NUM_PLACES)
    query = torch.tensor(NUM_PLACES)
    try:
        seen = mask_function(torch.tensor(0), torch.tensor(0), query, place).expand(place.shape)
    except RuntimeError:  # a rule that reads tensors of the batch
        return OTHER_RULE
    if seen[NUM_PLACES + 1 :].any():
        return BOTH_WAYS
    count = int(seen.sum())
    if not torch.equal(seen, (place <= query) & (place > query - count)):
        return OTHER_RULE
    return -1 if count > NUM_PLACES else count


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
