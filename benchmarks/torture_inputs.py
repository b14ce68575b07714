"""Mutated inputs for everything that reads a file: each is read, or refused in words, in time and in little memory."""

from __future__ import annotations

import json
import random
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engines.request_file import read_messages, read_requests
from engines.serving.chat_template import ChatTemplate
from engines.serving.sampling import Sampling
from engines.serving.tenants import read_tenant_file
from engines.serving.text import TextCodec
from engines.tensorrt.engine_info import EngineInfo
from iapt_export.contract.errors import IaptError
from iapt_export.contract.integrity import open_manifest
from iapt_export.contract.manifest import BundleManifest
from iapt_export.contract.probes import Probes
from tests.native.differential import mutations
from trainers.adapters.directory import load_adapter
from trainers.training.config import read_train_file
from trainers.training.data import read_examples
from validation.reporting.report import read_report

CPU_SECONDS = 1.0
GROWTH_MIB = 64.0


@dataclass(frozen=True)
class Reader:
    """What reads one kind of file, and a good file to begin from."""

    name: str
    seed: bytes
    read: Callable[[Path], Any]
    """Reads the file at a path, whose folder holds what else is needed."""
    file: str
    """The file's name there."""
    beside: Path | None = None
    """Folder whose files stand beside it."""
    share: float = 1.0
    """How many inputs it gets, compared with the others; readers that are slow get fewer."""


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
    growth_mib: float = 0.0
    """By which the largest memory that this process ever had grew."""


def readers(bundle: Path, adapter: Path, engine: dict[str, Any]) -> list[Reader]:
    """All of them, with the files of a bundle and an adapter to begin from."""
    line = {"tenant": "alpha", "prompt": "a", "temperature": 0.5, "seed": 1, "stop": ["x"], "stop_token_ids": [1]}
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    example = {"instruction": "joy?", "input": "a film", "output": "yes"}
    talk = [{"role": "user", "content": "hello there"}]

    def of(name: str) -> bytes:
        return (bundle / name).read_bytes()

    return [
        Reader("manifest", of("manifest.json"), lambda path: BundleManifest.load(path.parent), "manifest.json"),
        Reader("tenant", of("tenants/alpha.safetensors"), read_tenant_file, "alpha.safetensors"),
        Reader("probes", of("probes.json"), lambda path: Probes.load(path.parent), "probes.json"),
        Reader("tokenizer", of("tokenizer.json"), lambda p: TextCodec(p.parent).encode("a", "plain"), "tokenizer.json"),
        Reader(
            "tokenizer settings",
            of("tokenizer_config.json"),
            lambda path: TextCodec(path.parent).render(talk),
            "tokenizer_config.json",
            bundle,
            0.3,
        ),
        Reader(
            "template",
            of("chat_template.jinja"),
            lambda path: ChatTemplate(path.read_text("utf-8", "replace"), {"bos_token": "<s>"}).render(talk),
            "chat_template.jinja",
            share=0.5,
        ),
        Reader(
            "adapter", (adapter / "adapter_config.json").read_bytes(), _adapter, "adapter_config.json", adapter, 0.3
        ),
        Reader(
            "adapter weights",
            (adapter / "adapter_model.safetensors").read_bytes(),
            _adapter,
            "adapter_model.safetensors",
            adapter,
            0.3,
        ),
        Reader("report", of("report.json"), read_report, "report.json"),
        Reader(
            "engine record", json.dumps(engine).encode(), lambda p: EngineInfo.load(p.with_suffix(".engine")), "e.json"
        ),
        Reader("requests", json.dumps(line).encode(), lambda p: read_requests(p, 8, Sampling()), "r.jsonl"),
        Reader("conversation", json.dumps(messages).encode(), read_messages, "m.json"),
        Reader("data", (json.dumps(example) + "\n").encode() * 4, read_examples, "d.jsonl"),
        Reader("settings", b"max_steps: 3\nlearning_rate: 0.1\nseed: 1\n", read_train_file, "s.yaml"),
    ]


def _adapter(path: Path) -> Any:
    return load_adapter(path.parent)


def torment(reader: Reader, work: Path, count: int, seed: int = 0) -> Findings:
    """Give a reader mutated inputs."""
    folder = work / reader.name
    shutil.copytree(reader.beside, folder) if reader.beside else folder.mkdir(parents=True)
    path, found = folder / reader.file, Findings(reader.name)
    path.write_bytes(reader.seed)
    reader.read(path)  # the seed itself is good; and what is loaded once is loaded now
    before = _peak_mib()
    kind = "safetensors" if reader.file.endswith(".safetensors") else "manifest"  # how its values can be changed
    for number, (_, data) in enumerate(mutations({kind: [reader.seed]}, count, seed)):
        path.write_bytes(data)
        began = time.process_time()
        try:
            reader.read(path)
            found.accepted += 1
        except IaptError:
            pass
        except Exception as error:
            found.raw.append(f"{reader.name} {number}: {type(error).__name__}: {str(error)[:200]}")
        if time.process_time() - began > CPU_SECONDS:
            found.slow.append(f"{reader.name} {number}")
        found.inputs += 1
    found.growth_mib = round(_peak_mib() - before, 1)
    shutil.rmtree(folder)
    return found


def altered_bundles(bundle: Path, work: Path, count: int, seed: int = 0) -> Findings:
    """Change bytes anywhere in a bundle: each must be refused while hashes are checked."""
    copy, source, found = (
        Path(shutil.copytree(bundle, work / "altered")),
        random.Random(seed),
        Findings("altered bundle"),
    )
    paths = sorted(path for path in copy.rglob("*") if path.is_file())
    for _ in range(count):
        path = source.choice(paths)
        before = path.read_bytes()
        changed = bytearray(before)
        for _ in range(source.choice((1, 1, 3))):
            changed[source.randrange(len(changed))] ^= source.randrange(1, 256)
        path.write_bytes(changed)
        found.inputs += 1
        try:
            open_manifest(copy)
            found.accepted += bytes(changed) != before
        except IaptError:
            pass
        except Exception as error:
            found.raw.append(f"{path.name}: {type(error).__name__}: {str(error)[:200]}")
        path.write_bytes(before)
    open_manifest(copy)  # it is good again, so that the refusals were those of the changes
    shutil.rmtree(copy)
    return found


def told(found: Findings) -> dict[str, Any]:
    """As the record has it: the first faults, and how many there are."""
    return {**asdict(found), "raw": found.raw[:20], "num_raw": len(found.raw), "num_slow": len(found.slow)}


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
