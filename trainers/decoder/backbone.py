"""Load a frozen backbone and its tokenizer from a hub id, a folder, or GGUF weights."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iapt_export.contract.errors import IaptError
from iapt_export.contract.kinds import found_at
from iapt_export.contract.manifest import MANIFEST_FILE, BackboneSpec
from iapt_export.contract.sizes import MOST_LAYERS
from iapt_export.contract.types import FLOATS, TENSOR_TYPES
from trainers.decoder.checkpoint import check_generation, check_loading, read_checkpoint, read_warnings
from trainers.decoder.family import ENCODER_AND_DECODER, check_family
from trainers.decoder.fp8 import Blocks, Weight, blocks_of, check_scales, weights_of
from trainers.decoder.gguf_config import gguf_config
from trainers.decoder.gguf_file import GgufFile
from trainers.decoder.gguf_tokenizer import gguf_tokenizer
from trainers.decoder.gguf_weights import gguf_state_dict
from trainers.decoder.instruction import with_one_template
from trainers.decoder.own_answer import check_own_answer

CHECKPOINT = ["*.safetensors", "*.safetensors.index.json"]
"""Files of a model on the hub that hold its weights."""

FINGERPRINT_FIELDS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "rope_parameters",
    "tie_word_embeddings",
)
"""What makes two backbones interchangeable for an adapter, apart from the weights' values."""


@dataclass
class Backbone:
    """A loaded causal LM, frozen and in evaluation mode, with its tokenizer."""

    model: Any
    """``transformers.PreTrainedModel``."""
    tokenizer: Any
    """``transformers.PreTrainedTokenizerBase``, or None when the source has none."""
    name_or_path: str
    """What the user asked for."""
    revision: str | None = None
    """The hub commit asked for, if any."""

    def __post_init__(self) -> None:
        from trainers.decoder.attention import use_own_attention

        use_own_attention(self.model)

    @property
    def fingerprint(self) -> str:
        """See `config_fingerprint`."""
        return config_fingerprint(self.model.config)


def config_fingerprint(config: Any) -> str:
    """Sixteen hex digits over the architecture fields of a transformers config."""
    config = config.get_text_config()
    fields = {name: getattr(config, name, None) for name in FINGERPRINT_FIELDS}
    text = json.dumps(fields, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_backbone(
    name_or_path: str,
    *,
    dtype: str = "fp32",
    revision: str | None = None,
    trust_remote_code: bool = False,
    asks_generate: bool = True,
) -> Backbone:
    """Load a causal LM and its tokenizer, frozen, in evaluation mode, on the CPU.

    Args:
        name_or_path: Hugging Face id, local folder, GGUF file, or folder that holds one GGUF file.
        dtype: ``fp32``, ``fp16`` or ``bf16``.
        revision: hub commit or branch.
        trust_remote_code: run code from the model's repository; off unless the user asks.
        asks_generate: see `check_own_answer`; it reads all weights several times.

    Raises:
        IaptError: nothing usable stands there; it is of a family that is refused, which is found before its weights
            are read; its weights are missing, left over or of another shape; a GGUF
            field or tensor has no place in transformers' model; or what is computed here is not what transformers'
            ``generate`` gives.
    """
    import torch

    if dtype not in FLOATS:
        raise IaptError(f"dtype {dtype!r} is not known; use one of {', '.join(FLOATS)}")
    kind = getattr(torch, TENSOR_TYPES[dtype])
    source, gguf_file = _locate(name_or_path)
    options = {"revision": revision} if revision else {}
    with _explained(name_or_path):
        outline, blocks = _outline(source, gguf_file, name_or_path, trust_remote_code, options)
        check_family(outline, name_or_path)
        if gguf_file:
            model, tokenizer = _load_gguf(Path(source) / gguf_file, kind)
        elif blocks:
            weights = _weights_in_fp8(source, blocks, name_or_path, options)
            model = _named_after(source, _filled(outline, weights, kind, source), options)
            tokenizer = _load_tokenizer(source, trust_remote_code=trust_remote_code, **options)
        else:
            model, tokenizer = _load_folder(source, kind, trust_remote_code, options)
    model.requires_grad_(False)
    backbone = Backbone(model.eval(), tokenizer, name_or_path, revision)
    if asks_generate:
        check_own_answer(backbone.model, name_or_path)
    return backbone


def load_backbone_of(
    bundle: Path,
    spec: BackboneSpec,
    *,
    model: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    load: Callable[..., Backbone] = load_backbone,
) -> Backbone:
    """`load_backbone` for a bundle that exists.

    Args:
        bundle: for the error's text.
        spec: of its manifest.
        model: what to load; None takes what the manifest names.
        revision: likewise.
        trust_remote_code: as in `load_backbone`.
        load: what to load it with.

    Raises:
        IaptError: it cannot be loaded. A folder's name in a manifest is meant from where the bundle was built.
    """
    name = model or spec.name_or_path
    try:
        return load(name, revision=revision or spec.revision, trust_remote_code=trust_remote_code)
    except IaptError as error:
        if model or Path(name).exists():
            raise
        raise IaptError(
            f"{bundle} was built from the backbone {name!r}, which is no folder as seen from {Path.cwd()}, and no "
            "Hugging Face model that can be had here; give its folder or id with --model"
        ) from error


def load_outline(name_or_path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """A backbone's model on the meta device: from its configuration alone, its weights need not be there.

    Args:
        name_or_path: as `load_backbone` takes it.
        revision: hub commit or branch.
        trust_remote_code: run code from the model's repository.

    Returns:
        A causal LM of transformers in evaluation mode, for `trainers.decoder.family.family_of` and sizes.

    Raises:
        IaptError: nothing usable stands there, or its configuration is of no causal LM.
    """
    source, gguf_file = _locate(name_or_path)
    with _explained(name_or_path):
        options = {"revision": revision} if revision else {}
        return _outline(source, gguf_file, name_or_path, trust_remote_code, options)[0]


def load_tokenizer(name_or_path: str) -> Any:
    """The tokenizer of a backbone, whose weights need not be there.

    Args:
        name_or_path: as `load_backbone` takes it.

    Raises:
        IaptError: there is none, or it cannot be read.
    """
    source, gguf_file = _locate(name_or_path)
    with _explained(name_or_path):
        return gguf_tokenizer(GgufFile(Path(source) / gguf_file)) if gguf_file else _load_tokenizer(source)


def load_unread(
    folder: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[Backbone, dict[str, Weight]] | None:
    """A backbone in FP8 on the meta device, and what its weights are read from, by their names in the checkpoint.

    Args:
        folder: a local one.
        revision: for the backbone that is returned.
        trust_remote_code: run code from the model's folder.

    Returns:
        None where its weights are not in FP8.

    Raises:
        IaptError: as `load_backbone`, but for weights that are missing or left over.
    """
    with _explained(folder):
        outline, blocks = _outline(folder, None, folder, trust_remote_code, {})
        if blocks is None:
            return None
        check_family(outline, folder)
        weights = _weights_in_fp8(folder, blocks, folder, {})
        model = _named_after(folder, outline, {})
        tokenizer = _load_tokenizer(folder, trust_remote_code=trust_remote_code)
    return Backbone(model, tokenizer, folder, revision), weights


def _outline(
    source: str, gguf_file: str | None, name: str, trust_remote_code: bool, options: dict[str, str]
) -> tuple[Any, Blocks | None]:
    """`load_outline` of what `_locate` found, and how its weights are scaled where they are in FP8."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        if gguf_file:
            config = gguf_config(GgufFile(Path(source) / gguf_file))
        else:
            config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **options)
        _check_counts(config, name)
        blocks = blocks_of(config, name)
        if Path(source).is_dir():
            check_generation(Path(source))
        if blocks and Path(source).is_dir():
            check_scales(read_checkpoint(Path(source)), blocks, name)
        if config.is_encoder_decoder:
            raise IaptError(f"{name} is not supported: {ENCODER_AND_DECODER}")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError) as error:
        raise IaptError(
            f"the configuration of {name} describes no model that can be made: {_first_line(error)}"
        ) from error
    return model.eval(), blocks


def _check_counts(config: Any, name: str) -> None:
    """Refuse a configuration of more layers or experts than can be: transformers would make them all before it fails.

    Raises:
        IaptError: which field it is.
    """
    for field, value in config.get_text_config().to_dict().items():
        if isinstance(value, int) and value > MOST_LAYERS and re.search("layer|expert", field):
            raise IaptError(f"the configuration of {name} has {field}={value}, expected at most {MOST_LAYERS}")


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """What the loaders of configurations and weights raise, in our words; warnings are read, see `read_warnings`."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        with read_warnings():
            yield
    except (OSError, ValueError, AssertionError, ImportError, StrictDataclassError, SafetensorError) as error:
        where = "" if Path(name).exists() else f", which is no folder as seen from {Path.cwd()},"
        found = f", found {found_at(Path(name))}" if (Path(name) / MANIFEST_FILE).is_file() else ""
        raise IaptError(
            f"the backbone {name!r}{where} could not be loaded: {_first_line(error)} "
            "Expected a Hugging Face id and a network, a folder with config.json, tokenizer and safetensors, or a GGUF "
            f"file{found}"
        ) from error


def _load_folder(source: str, dtype: Any, trust_remote_code: bool, options: dict[str, str]) -> tuple[Any, Any]:
    """Model and tokenizer of a hub id or a folder; weights from safetensors alone, which run no code."""
    from transformers import AutoModelForCausalLM

    if Path(source).is_dir():
        read_checkpoint(Path(source))
    tokenizer = _load_tokenizer(source, trust_remote_code=trust_remote_code, **options)  # before the weights: cheaper
    model, info = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # not ignored: found in ``info``, where all of them are
        output_loading_info=True,
        **options,
    )
    check_loading(info, source)
    return model, tokenizer


def _load_tokenizer(source: str, **options: Any) -> Any:
    """What ``AutoTokenizer`` makes of a folder.

    Raises:
        IaptError: its files hold something else than transformers and tokenizers expect; see `with_one_template`.
    """
    from transformers import AutoTokenizer

    try:
        return with_one_template(AutoTokenizer.from_pretrained(source, **options), source)
    except (OSError, ValueError, ImportError, IaptError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers has no class of its own for it, and its panics are no Exception
        raise IaptError(
            f"the tokenizer of {source} cannot be read ({_first_line(error)}); get the model's tokenizer files again"
        ) from error


def _load_gguf(path: Path, dtype: Any) -> tuple[Any, Any]:
    """Model and tokenizer of a GGUF file: its fields and tensors are read here, its words by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    file = GgufFile(path)
    config = gguf_config(file)
    tokenizer = gguf_tokenizer(file)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    return _filled(empty, gguf_state_dict(file, empty, dtype), dtype, str(path)), tokenizer


def _weights_in_fp8(source: str, blocks: Blocks, name: str, options: dict[str, str]) -> dict[str, Weight]:
    """The weights of a folder or hub id in FP8, unread."""
    from huggingface_hub import snapshot_download

    folder = source
    if not Path(source).is_dir():
        folder = snapshot_download(source, revision=options.get("revision"), allow_patterns=CHECKPOINT)
    places = read_checkpoint(Path(folder))
    check_scales(places, blocks, name)
    return weights_of(places, blocks)


def _filled(empty: Any, state: dict[str, Any], dtype: Any, source: str) -> Any:
    """A model like an empty one with the weights of a checkpoint, from tensors or what is read as one by ``[...]``."""
    model, info = type(empty).from_pretrained(
        None,
        config=empty.config,
        state_dict=state,
        dtype=dtype,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    check_loading(info, source)
    return model


def _named_after(source: str, model: Any, options: dict[str, str]) -> Any:
    """A model with the name and the settings for generation that it would have, had transformers read it there."""
    from transformers import GenerationConfig

    model.config._name_or_path = source
    with contextlib.suppress(OSError):  # there are none
        model.generation_config = GenerationConfig.from_pretrained(source, **options)
    return model


def save_backbone(backbone: Backbone, folder: Path) -> None:
    """Write weights (safetensors), config and tokenizer, so that later loads take a second instead of twenty."""
    with read_warnings():
        backbone.model.save_pretrained(folder)
        backbone.tokenizer.save_pretrained(folder)


def _locate(name_or_path: str) -> tuple[str, str | None]:
    """Split a source into what ``from_pretrained`` takes and the GGUF file name, if any."""
    path = Path(name_or_path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise IaptError(f"{path} is a file but not GGUF; give its folder, a .gguf file, or a Hugging Face id")
        return str(path.parent), path.name
    if path.is_dir() and not (path / "config.json").exists():
        found = sorted(path.glob("*.gguf"))
        if len(found) != 1:
            raise IaptError(
                f"{path} holds no config.json and {len(found)} .gguf files; expected a Hugging Face model folder "
                f"or exactly one GGUF file (name the file itself to choose), found {found_at(path)}"
            )
        return str(path), found[0].name
    if not path.exists() and (path.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") > 1):
        raise IaptError(f"the backbone folder {name_or_path} does not exist; check the path given with --model")
    return name_or_path, None


def _first_line(error: BaseException) -> str:
    """The first line of an error's text, and the next where the first only announces it."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])
