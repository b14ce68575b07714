"""The backbone as a build's stages need it: outlined over its files, or loaded in a type, one at a time."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path
from typing import Any

from iapt_export.building.adapter_argument import parse_adapters
from iapt_export.building.build_request import BuildRequest
from iapt_export.building.plan import TargetPlan
from iapt_export.contract.disk import Stamp, stamp_of
from iapt_export.contract.errors import IaptError
from trainers.decoder.backbone import Backbone, load_backbone
from trainers.decoder.stored import load_mapped, outline_of
from trainers.decoder.streamed import copies_compared, has_room_for, streamed

READ = {".safetensors", ".json", ".jsonl", ".gguf", ".jinja", ".model", ".py"}
"""Ends of the names of a model's or an adapter's files that decide what is built."""


class Backbones:
    """The backbone in the type that a stage needs; only one is in memory at a time.

    Loaded again rather than cast: transformers keeps rotary frequencies in fp32, a cast would not.
    """

    def __init__(self, request: BuildRequest) -> None:
        self._request = request
        self._dtype = ""
        self._backbone: Backbone | None = None
        self._mapped: Backbone | None = None
        self._outlines: dict[str, Backbone | None] = {}
        self._stamps = self._file_stamps()
        # these compute with the weights before the graphs are written
        self._is_outlined = not (request.merge_lora or request.fold_embeddings)

    def load(self, dtype: str) -> Backbone:
        """The backbone as PyTorch computes with it."""
        if self._backbone is None or dtype != self._dtype:
            self.drop()
            self._dtype = dtype
            self._backbone = load_backbone(self._request.model, dtype=dtype, **self._options())
        return self._backbone

    def outline(self, dtype: str) -> Backbone:
        """The backbone for all but computing with it: its weights stay in their files where that can be."""
        if self._backbone is not None and dtype == self._dtype:
            return self._backbone
        if self._is_outlined and self._mapped is None:
            self._mapped = load_mapped(self._request.model, **self._options())
        if self._mapped is not None and dtype not in self._outlines:
            self._outlines[dtype] = outline_of(self._mapped, dtype)
        made = self._outlines.get(dtype)
        if made is None:
            self._is_outlined = False
            return self.load(dtype)
        if self._backbone is not None:
            self.drop()
        return made

    def check_unchanged(self) -> None:
        """Refuse to keep what was made of files that another program changed meanwhile, under the hash of others.

        Files of the adapters count as well: they are loaded once, and hashed later.

        Raises:
            IaptError: which they are.
        """
        now = self._file_stamps()
        for folder, before in self._stamps.items():
            changed = sorted(name for name in before | now[folder] if before.get(name) != now[folder].get(name))
            if changed:
                raise IaptError(f"{', '.join(changed[:5])} of {folder} changed during the build; build again")

    def _file_stamps(self) -> dict[Path, dict[str, Stamp]]:
        adapters = (path for path, _ in parse_adapters(self._request.adapters).values())
        return {folder: file_stamps(folder) for folder in (Path(self._request.model), *adapters)}

    def to_compare(self, targets: list[TargetPlan]) -> Backbone:
        """The backbone in fp32 for the proof: in memory, or `streamed` where that is too small."""
        outline = self.outline("fp32")
        copies = copies_compared(target.rounding for target in targets)
        if self._is_outlined and not has_room_for(outline.model, copies):
            return dataclasses.replace(outline, model=streamed(outline.model))
        return self.load("fp32")

    def _options(self) -> dict[str, Any]:
        return {"revision": self._request.revision, "trust_remote_code": self._request.trust_remote_code}

    def drop(self) -> None:
        """Let go of what `load` loaded."""
        self._backbone = None
        gc.collect()  # modules refer to each other, so counting references frees nothing


def file_stamps(model: Path) -> dict[str, Stamp]:
    """What tells that the files of a local model or an adapter are those of before."""
    files = sorted(path for path in model.iterdir() if path.suffix in READ) if model.is_dir() else [model]
    return {path.name: stamp for path in files if (stamp := stamp_of(path))}
