"""One tiny bundle for many tests: a two-layer Llama with three tenants, built once a run."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from engines.serving.loading import stepper_over
from engines.serving.session import Request, Session
from iapt_export import BuildRequest, build
from iapt_export.building.layout import with_files
from iapt_export.cli import main
from iapt_export.contract.manifest import BundleManifest, hash_line
from tests.tiny import COMMON, save_tiny_backbone, tiny_llama
from tests.traces import run_folder
from trainers.adapters.adapter import Adapter, AdapterConfig
from trainers.adapters.directory import save_adapter
from trainers.decoder.backbone import config_fingerprint, load_backbone
from trainers.decoder.backbone_sizes import Sizes
from trainers.decoder.insertion import sizes_of
from trainers.decoder.method import Method
from trainers.methods.configs import IAPTConfig, LAMPConfig, LoPAConfig, PrefixTuningConfig, PromptTuningConfig
from trainers.methods.forms import new_method

METHOD = IAPTConfig(bottleneck=8)
MIXED: dict[str, Any] = {
    "topics": PromptTuningConfig(prompt_length=4),
    "movies": METHOD,
    "style": PrefixTuningConfig(prompt_length=7),
    "taste": LoPAConfig(prompt_length=6, rank=2),
    "mood": LAMPConfig(init_length=20, rank=3, window=5),
}
"""Tenants of several methods in one bundle."""
NUM_LAYERS = 2
WIDTH = COMMON["hidden_size"]
SIZES = sizes_of(tiny_llama(num_hidden_layers=NUM_LAYERS))
TENANTS = ("alpha", "beta", "gamma")
PROMPTED = dict(zip(TENANTS, ("newline", "chat", "plain"), strict=True))
"""How each is asked."""
NEW_TOKENS = 8
PROMPTS = (
    "the film is a quiet joy",
    "a dull story",
    "is this positive or negative? the first scene to the last",
    "grain oil trade",
    "what is the topic of this news text? money",
    "nobody will remember",
    "you are a helpful assistant",
    "noisy and dull, yes or no?",
)
RANGES = {"batch": "1:2:8", "sequence": "1:16:96", "past": "5:64:160", "tenants": "1:3:4"}


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class TinyBuild:
    """A finished build and everything that went into it; tests read it and change copies only."""

    model: Path
    adapters: dict[str, Path]
    cache: Path
    bundle: Path

    def request(self, output: Path, *names: str, **fields: Any) -> BuildRequest:
        """What builds these tenants (all, when none is named) to ``output``; other ``fields`` may be given."""
        adapters = [self.adapters[name] for name in names or self.adapters]
        places = {"model": str(self.model), "adapters": adapters, "output": output, "cache": self.cache}
        return BuildRequest(**{**places, **RANGES, "new_tokens": NEW_TOKENS, **fields})

    def arguments(self, output: Path, *names: str, cache: Path | None = None) -> list[str]:
        """The command line of `request`."""
        adapters = [f"--adapter={self.adapters[name]}" for name in names or self.adapters]
        places = [f"--model={self.model}", f"--output={output}", f"--cache={cache or self.cache}"]
        ranges = [f"--{name}={text}" for name, text in RANGES.items()]
        return ["build", *places, *adapters, *ranges, f"--new-tokens={NEW_TOKENS}"]


def run(*argv: str | Path) -> Outcome:
    """Run the command line in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(word) for word in argv])
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    return Outcome(code, out.getvalue(), err.getvalue())


def random_method(seed: int, config: Any = METHOD, sizes: Sizes = SIZES) -> Method:
    """A method whose effect differs clearly from another seed's, unlike that of an untrained one."""
    source = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = new_method(config, sizes)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=source)
            parameter.add_(noise * (0.05 if name in ("numerator", "denominator") else 0.5))
            if name == "query":
                parameter.mul_(0.1)  # or pooling would pick one token, and a padding that is read would not show
    return module.eval().requires_grad_(False)


def tiny_adapter(seed: int, method: Any = METHOD, fingerprint: str = "tiny", **fields: Any) -> Adapter:
    """An adapter in memory; ``fields`` of its configuration may differ from the tiny backbone's."""
    sizes = dataclasses.replace(
        SIZES, **{name: fields[name] for name in ("hidden_size", "num_layers") if name in fields}
    )
    config = AdapterConfig(
        base_model_name_or_path="model",
        backbone_fingerprint=fingerprint,
        method=method,
        **{**dataclasses.asdict(sizes), "prompt_format": "chat" if seed % 2 else "plain", **fields},
    )
    return Adapter(config, dict(random_method(seed, method, sizes).state_dict()))


def save_tiny_adapter(folder: Path, seed: int, fingerprint: str, method: Any = METHOD, **fields: Any) -> Path:
    """Write an adapter directory with example prompts, and return it."""
    adapter = tiny_adapter(seed, method, fingerprint, **fields)
    save_adapter(folder, adapter.config, adapter.tensors)
    lines = [json.dumps({"prompt": f"{text} {folder.name}"}) for text in PROMPTS]
    (folder / "examples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def save_tiny_inputs(root: Path) -> tuple[Path, dict[str, Path]]:
    """Write the backbone and the adapters of `TENANTS`."""
    model = tiny_llama(num_hidden_layers=NUM_LAYERS)
    folder = save_tiny_backbone(root / "model", model)
    fingerprint = config_fingerprint(model.config)
    adapters = {
        name: save_tiny_adapter(root / name, seed, fingerprint, prompt_format=form)
        for seed, (name, form) in enumerate(PROMPTED.items())
    }
    return folder, adapters


@pytest.fixture(scope="session")
def tiny_build(tmp_path_factory: pytest.TempPathFactory) -> TinyBuild:
    """The build that all tests of a run share, whichever worker needs it first; read only."""
    root = run_folder(tmp_path_factory) / "tiny-build"
    built = TinyBuild(root / "model", {name: root / name for name in TENANTS}, root / "cache", root / "bundle")
    with FileLock(root.with_suffix(".lock")):
        if not built.bundle.exists():
            save_tiny_inputs(root)
            build(built.request(built.bundle))
    return built


@pytest.fixture(scope="session")
def mixed_build(tmp_path_factory: pytest.TempPathFactory, tiny_build: TinyBuild) -> TinyBuild:
    """The tenants of `MIXED` over the tiny backbone, shared alike."""
    root = run_folder(tmp_path_factory) / "mixed-build"
    adapters = {name: root / name for name in MIXED}
    built = TinyBuild(tiny_build.model, adapters, tiny_build.cache, root / "bundle")
    with FileLock(root.with_suffix(".lock")):
        if not built.bundle.exists():
            fingerprint = load_backbone(str(tiny_build.model)).fingerprint
            for seed, (name, config) in enumerate(MIXED.items()):
                save_tiny_adapter(root / name, seed, fingerprint, config)
            build(built.request(built.bundle, tenants="1:5:8"))
    return built


@pytest.fixture(scope="session")
def small_cache_build(tmp_path_factory: pytest.TempPathFactory, tiny_build: TinyBuild) -> TinyBuild:
    """The tenants of `tiny_build` in int8, weights and cache; not proven, though it says so: the limits were measured
    on larger models.
    """
    folder = run_folder(tmp_path_factory) / "small-cache"
    built = dataclasses.replace(tiny_build, bundle=folder)
    stored = {"targets": ("onnxruntime:int8",), "quantise": "cache=8"}
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            manifest = build(built.request(folder, **stored, prove=False))
            dataclasses.replace(manifest, parity=dataclasses.replace(manifest.parity, verdict="pass")).save(folder)
    return built


@pytest.fixture
def tiny_bundle(tiny_build: TinyBuild, tmp_path: Path) -> Path:
    """A copy of the tiny bundle that a test may damage."""
    return Path(shutil.copytree(tiny_build.bundle, tmp_path / "bundle"))


def tokens_of(session: Session, requests: list[Request]) -> list[list[int]]:
    """What a session answers, as token ids."""
    return [answer.tokens for answer in session.generate(requests)]


def session_over(bundle: Path, runners: dict[str, Any]) -> Session:
    """A session whose prefill and decode run on these runners."""
    manifest = BundleManifest.load(bundle)
    target = manifest.target()
    return Session(bundle, manifest, target, stepper_over(bundle, manifest, target, runners, in_place=False))


def change_manifest(bundle: Path, **fields: Any) -> None:
    """Overwrite top-level fields of a bundle's manifest."""
    path = bundle / "manifest.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | fields), encoding="utf-8")
    seal(bundle)


def seal(bundle: Path) -> None:
    """Give a manifest that a test changed the hash that fits it."""
    (bundle / "manifest.sha256").write_text(hash_line((bundle / "manifest.json").read_bytes()), encoding="utf-8")


def rehash(bundle: Path) -> None:
    """Make the manifest agree with the files as they are now, so that only a comparison can tell."""
    with_files(BundleManifest.load(bundle), bundle).save(bundle)
