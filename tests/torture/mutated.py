"""Mutated inputs for everything that reads a file: each is read, or refused in words, in time and in little memory."""

from __future__ import annotations

import json
import operator
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from pydantic import ValidationError

from engines.http.access import Access
from engines.http.protocol import ChatRequest, read_body
from engines.http.refusals import RefusalError
from engines.request_file import read_messages, read_requests
from engines.serving.chat_template import ChatTemplate
from engines.serving.sampling import Sampling
from engines.serving.tenants import read_tenant_file
from engines.serving.text import TextCodec
from engines.tensorrt.engine_info import EngineInfo, EngineTensor, ProfileShape
from iapt_export.contract.errors import IaptError
from iapt_export.contract.integrity import open_manifest
from iapt_export.contract.manifest import BundleManifest
from iapt_export.contract.probes import Probes
from tests.native.differential import mutations
from tests.trainers.decoder.gguf_files import TinyFile, write
from trainers.adapters.adapter import CONFIG_FILE, WEIGHTS_FILE
from trainers.adapters.directory import load_adapter
from trainers.adapters.peft_format import peft_fields, to_peft_tensors
from trainers.decoder.backbone import load_backbone, load_outline
from trainers.decoder.insertion import sizes_of
from trainers.methods.configs import PromptTuningConfig
from trainers.methods.forms import new_method
from trainers.training.config import read_train_file
from trainers.training.records import read_examples
from validation.reporting.report import read_report
from validation.sides.cases import read_examples as validation_examples

CPU_SECONDS = 1.0
LONGEST_SECONDS = 60
BOS = {"bos_token": "<s>"}
TALK = [{"role": "user", "content": "hello there"}]
ENGINE = EngineInfo(
    target="tensorrt-rtx",
    runtime_version="1.7.1.116",
    compute_capability="8.9",
    source_sha256="0" * 64,
    sha256="1" * 64,
    size_bytes=64,
    seconds=1.5,
    inputs=[EngineTensor("input_ids", "int64", [-1, -1])],
    outputs=[EngineTensor("logits", "fp16", [-1, 1, 320])],
    profiles=[{"input_ids": ProfileShape([1, 1], [2, 16], [8, 96])}],
)
GROWTH_MIB = 64.0


@dataclass(frozen=True)
class Reader:
    """What reads one kind of file, and a good file to begin from."""

    name: str
    seed: bytes
    read: Callable[[Path], Any]
    """Reads the file at a path, whose folder holds what else is needed."""
    file: str
    """The file's name there; empty for any of the files beside, which the reader then finds by itself."""
    beside: Path | None = None
    """Folder whose files stand beside it."""
    share: float = 1.0
    """How many inputs it gets, compared with the others; readers that are slow get fewer."""
    refusals: tuple[type[Exception], ...] = (IaptError,)
    """What it may raise."""
    hashed: bool = False
    """Whether hashes are checked, so that nothing that was changed may be accepted."""


@dataclass
class Findings:
    """What mutated inputs of one reader came to."""

    name: str
    inputs: int = 0
    accepted: int = 0
    raw: list[str] = field(default_factory=list)
    """Exceptions that are no refusal."""
    slow: list[str] = field(default_factory=list)
    """Inputs that took more than `CPU_SECONDS` of computing."""
    wrong: int = 0
    """Changed inputs that were accepted although hashes were checked."""
    growth_mib: float = 0.0
    """By which memory grew at most while a batch was read."""


def readers(bundle: Path, adapter: Path, model: Path, fp8: Path, engine: dict[str, Any]) -> list[Reader]:
    """All of them, with good files to begin from.

    Args:
        bundle: with the tenant ``alpha``.
        adapter: a folder.
        model: its backbone's folder.
        fp8: folder of a model whose weights are stored in FP8.
        engine: fields of an engine's record.
    """
    return [*_of_bundles(bundle), *_of_training(adapter, model, fp8), *_of_requests(engine)]


def _of_bundles(bundle: Path) -> list[Reader]:
    def of(name: str, read: Callable[[Path], Any], share: float = 1.0, beside: Path | None = None) -> Reader:
        return Reader(name, (bundle / name).read_bytes(), read, Path(name).name, beside, share)

    return [
        of("manifest.json", lambda path: BundleManifest.load(path.parent), 2.0),
        of("tenants/alpha.safetensors", read_tenant_file),
        of("probes.json", lambda path: Probes.load(path.parent), 0.5),
        of("tokenizer.json", lambda path: TextCodec(path.parent).encode("a", "plain")),
        of("tokenizer_config.json", lambda path: TextCodec(path.parent).render(TALK), 0.2, bundle),
        of("chat_template.jinja", lambda path: ChatTemplate(path.read_text("utf-8", "replace"), BOS).render(TALK)),
        of("report.json", read_report),
        Reader("a bundle with its hashes", b"", open_manifest, "", bundle, 0.5, hashed=True),
    ]


def _of_training(adapter: Path, model: Path, fp8: Path) -> list[Reader]:
    backbone = load_backbone(str(model))
    sizes, method = sizes_of(backbone.model), PromptTuningConfig(prompt_length=4)
    stock = {**peft_fields(method, sizes), "peft_type": "PROMPT_TUNING", "base_model_name_or_path": "tiny"}
    tensors = to_peft_tensors(method, dict(new_method(method, sizes).state_dict()), sizes)
    example = {"instruction": "joy?", "input": "a film", "output": "yes"}

    def peft(path: Path) -> Any:
        (path.parent / WEIGHTS_FILE).write_bytes(safetensors.torch.save(tensors))
        return load_adapter(path.parent, backbone, peft_prompt_format="plain")

    with tempfile.TemporaryDirectory() as folder:
        gguf = write(Path(folder) / "tiny.gguf", TinyFile("llama", layers=1)).read_bytes()
    return [
        *(
            Reader(name, (adapter / name).read_bytes(), lambda path: load_adapter(path.parent), name, adapter, 0.5)
            for name in (CONFIG_FILE, WEIGHTS_FILE)
        ),
        Reader("stock PEFT's " + CONFIG_FILE, json.dumps(stock).encode(), peft, CONFIG_FILE, share=0.5),
        Reader("training data", (json.dumps(example) + "\n").encode() * 4, read_examples, "d.jsonl"),
        Reader("settings", b"max_steps: 3\nlearning_rate: 0.1\nseed: 1\n", read_train_file, "s.yaml"),
        Reader("examples", b'{"prompt": "a film"}\n' * 3, validation_examples, "examples.jsonl"),
        Reader("config.json", (model / "config.json").read_bytes(), _outline, "config.json", share=0.1),
        *(
            Reader(f"{of} {name}", (folder / name).read_bytes(), _model, name, folder, 0.015)
            for of, folder, name in (
                ("a model's", model, "tokenizer.json"),
                ("a model's", model, "tokenizer_config.json"),
                ("a model's", model, "model.safetensors"),
                ("an FP8 model's", fp8, "model.safetensors"),
            )
        ),
        Reader("GGUF", gguf, lambda path: load_outline(str(path)), "tiny.gguf", share=0.1),
    ]


def _outline(path: Path) -> Any:
    return load_outline(str(path.parent))


def _model(path: Path) -> Any:
    return load_backbone(str(path.parent))


def _of_requests(engine: dict[str, Any]) -> list[Reader]:
    line = {"tenant": "alpha", "prompt": "a", "temperature": 0.5, "seed": 1, "stop": ["x"], "stop_token_ids": [1]}
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    chat = {"model": "alpha", "messages": messages, "max_tokens": 8, "stop": ["x"], "logit_bias": {"5": 1.0}}
    json_schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
    keys = {"key": ["alpha"], "other key": ["*"]}

    def sent(path: Path) -> Any:
        return ChatRequest.model_validate(read_body(path.read_bytes())).requests()

    def of(name: str, seed: Any, read: Callable[[Path], Any], **fields: Any) -> Reader:
        return Reader(name, json.dumps(seed).encode(), read, "file.json", **fields)

    refusals = (IaptError, RefusalError, ValidationError)
    return [
        of("an engine's record", engine, lambda path: EngineInfo.load(path.with_suffix(".engine"))),
        of("requests", line, lambda path: read_requests(path, 8, Sampling())),
        of("a conversation", messages, read_messages),
        of("a body of HTTP", {**chat, "response_format": json_schema}, sent, refusals=refusals),
        of("API keys", keys, lambda path: Access.read(path, None)),
    ]


def torment(reader: Reader, work: Path, count: int, seed: int = 0, found: Findings | None = None) -> Findings:
    """Give a reader ``count`` mutated inputs, and add what comes of it to ``found``."""
    folder, found = work / "inputs", found or Findings(reader.name)
    shutil.copytree(reader.beside, folder) if reader.beside else folder.mkdir(parents=True)
    if reader.file:
        (folder / reader.file).write_bytes(reader.seed)
    reader.read(folder / reader.file)  # the seed itself is good; and what is loaded once is loaded now
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the largest memory so far
    before = _peak_mib()
    for number, (path, data) in enumerate(_changes(reader, folder, count, seed), found.inputs):
        good = path.read_bytes()
        path.write_bytes(data)
        error, seconds = _timed(reader, folder / reader.file)
        if seconds > CPU_SECONDS:  # once more: a busy machine's processor time is longer, too
            error, seconds = min((error, seconds), _timed(reader, folder / reader.file), key=operator.itemgetter(1))
        if error is None:
            found.accepted += 1
            found.wrong += reader.hashed and data != good
        elif not isinstance(error, reader.refusals):
            found.raw.append(f"{reader.name} {number}: {type(error).__name__}: {str(error)[:200]}")
        if seconds > CPU_SECONDS:
            found.slow.append(f"{reader.name} {number}: {seconds:.1f} seconds")
        path.write_bytes(good)
    reader.read(folder / reader.file)  # it is good again, so that the refusals were those of the changes
    found.inputs += count
    found.growth_mib = max(found.growth_mib, round(_peak_mib() - before, 1))
    shutil.rmtree(folder)
    return found


def _timed(reader: Reader, path: Path) -> tuple[Exception | None, float]:
    """What reading raised, and the processor time it took."""
    began = time.process_time()
    signal.alarm(LONGEST_SECONDS)  # one that hangs ends all of this
    try:
        reader.read(path)
    except Exception as error:
        return error, time.process_time() - began
    finally:
        signal.alarm(0)
    return None, time.process_time() - began


def _changes(reader: Reader, folder: Path, count: int, seed: int) -> Iterator[tuple[Path, bytes]]:
    """Files, and what to write there."""
    if reader.file:
        kind = "safetensors" if reader.file.endswith(".safetensors") else "manifest"  # how its values can be changed
        yield from ((folder / reader.file, data) for _, data in mutations({kind: [reader.seed]}, count, seed))
        return
    source, paths = random.Random(seed), sorted(path for path in folder.rglob("*") if path.is_file())
    for _ in range(count):
        path = source.choice(paths)
        changed = bytearray(path.read_bytes())
        for _ in range(source.choice((1, 1, 3))):
            changed[source.randrange(len(changed))] ^= source.randrange(1, 256)
        yield path, bytes(changed)


def _peak_mib() -> float:
    """The largest memory of this process since it was forgotten."""
    (line,) = (line for line in Path("/proc/self/status").read_text("ascii").splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024
