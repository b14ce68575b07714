"""Plant faults in a quantised bundle and see which checks catch them: ``python benchmarks/planted.py --help``.

Two comparisons may find them: with activations rounded, whose limits are wide, and without. tests/validation/faults.py
has more faults, on tiny bundles.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from engines.serving.cache import HostCache
from engines.serving.in_place_stepper import InPlaceStepper
from engines.serving.tenants import TenantBank
from iapt_export.contract.manifest import BundleManifest
from trainers.decoder.backbone import load_backbone
from validation.judging.compare import Settings
from validation.judging.result import TargetResult
from validation.reporting.summary import summary
from validation.validate import validate_bundle


def main() -> None:
    """Run what `build` compares once without a fault and once with each; print and write what failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="a bundle of IAPT tenants with the target onnxruntime:int8 or :int4")
    parser.add_argument("--model", help="where the bundle's backbone is now")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/tolerances"))
    args = parser.parse_args()
    manifest = BundleManifest.load(args.bundle)
    backbone = load_backbone(args.model or manifest.backbone.name_or_path)
    found = {}
    for name, fault in FAULTS.items():
        with fault():
            report = validate_bundle(args.bundle, manifest, backbone, Settings())
        print(name, summary(report), sep="\n", flush=True)
        found[name] = {target.name: outcome(target) for target in report.targets}
    dtype = manifest.target().dtype
    path = args.output / f"planted-{dtype}.json"
    path.write_text(json.dumps({"dtype": dtype, "faults": found}, indent=1) + "\n", encoding="utf-8")


def outcome(target: TargetResult) -> dict[str, Any]:
    """The stages that failed, the largest typical error where that is judged, and the place that was named."""
    typical = [check.measured["relative"] for check in target.checks if check.stage == "typical logits"]
    place = target.bisection and target.bisection.finding
    return {
        "failed": sorted({check.stage for check in target.checks if not check.passed}),
        **({"typical logits": max(typical)} if typical else {}),
        **({"located": f"step {place.step}, {place.tensor}: {place.source}"} if place else {}),
    }


def other_tenant() -> AbstractContextManager[Any]:
    """Every row is given the next tenant's weights."""
    honest = TenantBank.indices

    def indices(self: TenantBank, tenants: Any) -> dict[str, np.ndarray]:
        return {name: (index + 1) % len(self.tenants) for name, index in honest(self, tenants).items()}

    return patch.object(TenantBank, "indices", indices)


def one_row_of_another_tenant() -> AbstractContextManager[Any]:
    """The first row of each batch alone is."""
    honest = TenantBank.indices

    def indices(self: TenantBank, tenants: Any) -> dict[str, np.ndarray]:
        made = honest(self, tenants)
        for index in made.values():
            index[0] = (index[0] + 1) % len(self.tenants)
        return made

    return patch.object(TenantBank, "indices", indices)


def no_prompts() -> AbstractContextManager[Any]:
    """Instructions are read as if they were generated tokens."""
    return stepping(lambda arguments, reads: {**arguments, "reads": False})


def next_position() -> AbstractContextManager[Any]:
    """Decode steps turn queries and keys by the next position; they are written where they belong."""
    return stepping(lambda arguments, reads: {**arguments, "places": arguments["places"] + (not reads)})


def stepping(change: Callable[[dict[str, Any], bool], dict[str, Any]]) -> AbstractContextManager[Any]:
    """Change what a step is given."""
    honest = InPlaceStepper._run

    def run(self: InPlaceStepper, first: int, ids: Any, places: Any, **rest: Any) -> np.ndarray:
        return honest(self, **change({"first": first, "ids": ids, "places": places, **rest}, rest["reads"]))

    return patch.object(InPlaceStepper, "_run", run)


@contextmanager
def stale_entry() -> Iterator[None]:
    """One layer's newest values are those of the entry before, at every step."""
    honest = InPlaceStepper.step

    def step(self: InPlaceStepper, tokens: Any) -> np.ndarray:
        assert isinstance(self.cache, HostCache)
        values = list(self.cache.buffers.values())[len(self.cache.buffers) // 2 | 1]
        for row, length in enumerate(self.lengths):
            values[row, :, length - 1] = values[row, :, length - 2]
        return honest(self, tokens)

    with patch.object(InPlaceStepper, "step", step):
        yield


FAULTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "none": nullcontext,
    "every row has another tenant's weights": other_tenant,
    "one row of a batch has": one_row_of_another_tenant,
    "instructions are read without prompts": no_prompts,
    "generated tokens are turned by the next position": next_position,
    "one layer's newest values are stale": stale_entry,
}


if __name__ == "__main__":
    main()
