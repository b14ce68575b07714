"""Plant faults in a real, quantised bundle and see which checks catch them.

    python -m tests.validation.planted BUNDLE

Two comparisons may find them: with activations rounded, whose limits are wide, and without. Tiny bundles are tested
with more faults; this says what is found where weights and activations are a trained model's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.serving.tenants import TenantBank
from iapt_export.contract.manifest import BundleManifest
from tests.validation.faults import instruction_flag_lost, place_off_by_one, stepping
from trainers.decoder.backbone import load_backbone
from validation.judging.compare import Settings
from validation.judging.result import TargetResult
from validation.reporting.summary import summary
from validation.validate import validate_bundle

RESULTS = Path("benchmarks/results/tolerances")


def main() -> None:
    """Run what `build` compares once without a fault and once with each; print and write what failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="a bundle of IAPT tenants with the target onnxruntime:int8 or :int4")
    parser.add_argument("--model", help="where the bundle's backbone is now")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    manifest = BundleManifest.load(args.bundle)
    backbone = load_backbone(args.model or manifest.backbone.name_or_path)
    found = {}
    for name, plant in FAULTS.items():
        with pytest.MonkeyPatch.context() as patches:
            plant(args.bundle, patches)
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


def other_tenant(rows: slice) -> Callable[[Path, pytest.MonkeyPatch], None]:
    """These rows of a batch have the next tenant's weights."""
    honest = TenantBank.indices

    def indices(self: TenantBank, tenants: Any) -> dict[str, np.ndarray]:
        made = honest(self, tenants)
        for index in made.values():
            index[rows] = np.where(index[rows] < 0, -1, (index[rows] + 1) % len(self.tenants))
        return made

    return lambda _, patches: patches.setattr(TenantBank, "indices", indices)


def stale_values(stepper: Any, step: int) -> None:
    """One layer's newest values are those of the entry before, at every step."""
    buffers = list(stepper.buffers.values())
    for row, length in enumerate(stepper.lengths):
        values = buffers[len(buffers) // 2 | 1]
        values[row, :, length - 1] = values[row, :, length - 2]


FAULTS: dict[str, Callable[[Path, pytest.MonkeyPatch], None]] = {
    "none": lambda _, patches: None,
    "every row has another tenant's weights": other_tenant(slice(None)),
    "one row of a batch has": other_tenant(slice(1)),
    "instructions are read without prompts": instruction_flag_lost,
    "generated tokens are turned by the next position": place_off_by_one,
    "one layer's newest values are stale": stepping(stale_values),
}


if __name__ == "__main__":
    main()
