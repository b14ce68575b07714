"""Load a model so that it is the one in the checkpoint: every weight there, none left over, no warning unread."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iapt_export.contract.errors import IaptError
from iapt_export.contract.schema import parse_json, read_object
from iapt_export.contract.weights_header import METADATA, raw_header

EXPECTED_WARNINGS = (
    "Using the explicit factor",  # yarn: llama.cpp and the file mean the explicit factor too
    "we recommend the use of this field over `original_max_position_embeddings`",  # longrope: both give one factor
)
"""Parts of warnings that were read and say nothing that a user must know."""

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
"""What transformers calls a checkpoint's files: an index of many, or one, which it reads where both are there."""
EXPLICIT = "transformers_weights"
"""Field of ``config.json`` that names another file in their place."""

AGAIN = "download the checkpoint again"

MAX_NAMED = 8
"""Weights named in an error; the rest are counted."""


@dataclass(frozen=True)
class Place:
    """Where a tensor of a checkpoint stands, and what its file's header says of it."""

    file: Path
    dtype: str
    """As safetensors calls it (``BF16``)."""
    shape: tuple[int, ...]


def read_checkpoint(folder: Path) -> dict[str, Place]:
    """The tensors of the files that transformers loads a checkpoint from, by their headers: no weight is read.

    Args:
        folder: a local one.

    Returns:
        Tensor to its place; nothing where there are no such files.

    Raises:
        IaptError: a file is missing or cut off, or has not the tensors that the index says; each named.
    """
    if (folder / "config.json").is_file() and read_object(folder / "config.json", AGAIN).get(EXPLICIT) is not None:
        raise IaptError(
            f"{folder / 'config.json'} names its weights ({EXPLICIT}), which is not followed here; rename the file to "
            f"{SINGLE} or {INDEX} and drop the field"
        )
    places: dict[str, str] = {}
    if not (folder / SINGLE).is_file():
        if not (folder / INDEX).is_file():
            return {}
        listed = read_object(folder / INDEX, AGAIN).get("weight_map")
        if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
            raise IaptError(f"{folder / INDEX} has no weight_map of names to files; {AGAIN}")
        places = listed
    found: dict[str, dict[str, Place]] = {}
    problems = []
    for name in sorted(set(places.values())) or [SINGLE]:
        try:
            found[name] = _tensors(folder / name)
        except FileNotFoundError:
            problems.append(f"{name} is not there")
        except ValueError as error:
            problems.append(f"{name} {error}")
    problems += [
        f"{file} has no {tensor}, which {INDEX} places there"
        for tensor, file in places.items()
        if file in found and tensor not in found[file]
    ]
    if problems:
        raise IaptError(f"the checkpoint {folder} is not whole: {named(problems)}; {AGAIN}")
    return {tensor: place for tensors in found.values() for tensor, place in tensors.items()}


def _tensors(path: Path) -> dict[str, Place]:
    """The tensors of one safetensors file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no safetensors file, or shorter or longer than its header says.
    """
    size = path.stat().st_size
    try:
        header, data_bytes = raw_header(path)
    except ValueError as error:
        raise ValueError(f"is {size:,} bytes long, and its header does not fit into it") from error
    fields = parse_json(header)
    try:
        fields.pop(METADATA, None)
        tensors = {
            str(name): Place(path, str(item["dtype"]), tuple(map(int, item["shape"]))) for name, item in fields.items()
        }
        wanted = size - data_bytes + max((int(item["data_offsets"][1]) for item in fields.values()), default=0)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError("has a header that safetensors does not know") from error
    if wanted != size:
        raise ValueError(f"is {size:,} bytes long, expected {wanted:,}")
    return tensors


def check_loading(info: dict[str, Any], name: str) -> None:
    """Refuse a model whose weights are not those of its checkpoint.

    Args:
        info: what ``from_pretrained(…, output_loading_info=True)`` returns beside the model. Tied weights that are
            stored once are not counted as missing there.
        name: of the checkpoint, for the text.

    Raises:
        IaptError: weights that the checkpoint lacks (transformers draws them at random, others each time), that the
            model has no place for, or that have another shape; all named.
    """
    problems = []
    if missing := sorted(info["missing_keys"]):
        problems.append(f"these are missing and would be drawn at random: {named(missing)}")
    if unused := sorted(info["unexpected_keys"]):
        problems.append(f"these have no place in the model: {named(unused)}")
    if mismatched := sorted((item[0], *map(tuple, item[1:3])) for item in info["mismatched_keys"]):
        shapes = [f"{key} {list(stored)}, expected {list(wanted)}" for key, stored, wanted in mismatched]
        problems.append(f"these have another shape than its configuration says: {named(shapes)}")
    if errors := info.get("error_msgs"):
        problems.append("; ".join(map(str, errors)))
    if problems:
        raise IaptError(
            f"the weights of {name!r} do not fill its model: {'. '.join(problems)}. "
            "Download the checkpoint again, or check that its configuration belongs to it"
        )


def named(names: list[str]) -> str:
    """The first `MAX_NAMED` of them, and how many more there are."""
    more = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


@contextlib.contextmanager
def read_warnings() -> Iterator[None]:
    """Catch what transformers logs, show no progress bars, and pass the warnings on when the loading went well.

    Where it fails, the error says what the warnings would have said.
    """
    from transformers.utils import logging as theirs

    logger = theirs.get_logger("transformers")
    caught = _Caught(logging.WARNING)
    handlers, level, propagate = logger.handlers, logger.level, logger.propagate
    bars = theirs.is_progress_bar_enabled()
    logger.handlers = [caught]
    logger.propagate = False  # transformers lets it propagate where the environment has CI set
    logger.setLevel(logging.WARNING)
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        logger.handlers = handlers
        logger.propagate = propagate
        logger.setLevel(level)
        if bars:
            theirs.enable_progress_bar()
    for text in dict.fromkeys(caught.texts):
        if not any(part in text for part in EXPECTED_WARNINGS):
            logging.getLogger(__name__).warning("transformers says: %s", text)


class _Caught(logging.Handler):
    """Keeps the texts of what is logged."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def check_generation(folder: Path) -> None:
    """Refuse a ``generation_config.json`` that says nothing of use: transformers passes over a broken one in silence.

    Raises:
        IaptError: it is no JSON object, or what ends an answer is no token's number.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return
    ends = read_object(path, "get it again, or remove it: config.json says what ends an answer then").get(
        "eos_token_id"
    )
    tokens = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(token) is int for token in tokens):
        raise IaptError(f"{path} has eos_token_id={ends!r}, expected the number of a token, or a list of them")
