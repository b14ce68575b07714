"""The roof of the house: each command is a list of calls into the rooms below, and nothing imports this file."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iapt_export.errors import IaptError, ParityError, explain
from iapt_export.flags import parser

if TYPE_CHECKING:
    from iapt_export.manifest import BundleManifest, Ranges
    from iapt_export.plan import TargetPlan
    from iapt_export.progress import Steps

PARITY_FAILED = 3
INTERRUPTED = 130


def main(argv: list[str] | None = None) -> None:
    """Run the command line; see ``iapt-export --help`` for its exit codes."""
    # weights and data are read from disk unless the user names a hub model, so hub chatter only confuses
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    args = parser().parse_args(argv)
    try:
        COMMANDS[args.command](args)
    except KeyboardInterrupt:
        _fail("interrupted; nothing was left half-written, and a repeated build goes on where this one stopped")
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except Exception as error:
        text = explain(error)
        if args.debug or text is None:
            raise
        _fail(text)
        sys.exit(PARITY_FAILED if isinstance(error, ParityError) else 1)


def train(args: argparse.Namespace) -> None:
    """Train an adapter."""
    from trainers.config import IAPTConfig, TrainConfig, configs_from_fields, read_train_file
    from trainers.train import train as run

    names = {field.name for cls in (IAPTConfig, TrainConfig) for field in dataclasses.fields(cls)}
    settings = read_train_file(args.config) if args.config else {}
    settings |= {name: value for name, value in vars(args).items() if name in names}
    required = {name: getattr(args, name) or settings.pop(name, None) for name in ("model", "data", "output")}
    for name in required:
        settings.pop(name, None)
    if missing := [f"--{name}" for name, value in required.items() if not value]:
        raise IaptError(f"{', '.join(missing)} is missing; give it as a flag or in the --config file")
    method, config = configs_from_fields(settings, args.config or "the command line")
    say = (lambda line: None) if args.quiet else None
    result = run(required["model"], required["data"], required["output"], method, config, say=say)
    if args.json:
        _print_json(
            {
                "output": str(result.output),
                "steps": result.steps,
                "report": result.report and result.report.to_dict(),
                "baseline": result.baseline and result.baseline.to_dict(),
            }
        )


def build(args: argparse.Namespace) -> None:
    """Make a bundle: load, plan, export, build engines, lay out, validate, publish."""
    from iapt_export import bundle as layout
    from iapt_export.plan import (
        check_device,
        check_ranges,
        load_tenants,
        onnx_variant,
        plan_ranges,
        plan_targets,
        shared_method,
    )
    from iapt_export.progress import Steps
    from iapt_export.stages import check_output, content_key, default_cache, publish, temporary_folder

    output, cache = Path(args.output), Path(args.cache) if args.cache else default_cache()
    check_output(output)
    targets = plan_targets(args.target, args.dtype, args.opset)
    check_device(targets, args.device)
    _check_engines(targets, args.compute_capability)
    with Steps(quiet=args.quiet) as steps:
        steps(f"loading {args.model}")
        backbone = _load(args, args.model)
        tenants = load_tenants(args.adapter, backbone)
        method = shared_method(tenants)
        ranges = plan_ranges({name: getattr(args, name) for name in ("batch", "sequence", "past", "tenants")})
        spec = layout.backbone_spec(backbone)
        check_ranges(ranges, method.prompt_length, spec.max_positions, len(tenants))
        settings = {
            "targets": [dataclasses.asdict(target) for target in targets],
            "ranges": dataclasses.asdict(ranges),
            "flags": [args.compute_capability, args.seed, args.new_tokens, args.device],
        }
        key = content_key(layout.build_inputs(spec, tenants, settings))
        steps("looking for an up-to-date bundle")
        if layout.is_current(output, key):
            _finish(args, output)
            return
        job = _Job(args, cache, backbone, spec, method, ranges, steps)
        shipped = onnx_variant(targets)
        graphs = {target.variant: job.export(target, target.variant == shipped) for target in reversed(targets)}
        with temporary_folder(output) as bundle:
            layout.place_files(graphs[shipped], bundle)
            layout.place_tokenizer(backbone, bundle)
            manifest = layout.new_manifest(
                spec,
                layout.generator_spec(method, job.shape),
                ranges,
                layout.place_tenants(tenants, bundle),
                [job.target(target, graphs[target.variant], bundle) for target in targets],
                key,
            )
            manifest = layout.with_files(manifest, bundle)
            manifest.save(bundle)
            manifest = _prove(args, bundle, manifest, backbone, steps)
            manifest.save(bundle)
            publish(bundle, output)
    _finish(args, output)


def validate(args: argparse.Namespace) -> None:
    """Compare a bundle with PyTorch and say where they differ."""
    from iapt_export.manifest import BundleManifest, verify_files
    from iapt_export.progress import Steps
    from validation.compare import Settings
    from validation.report import write_report
    from validation.summary import failure
    from validation.validate import validate_bundle

    bundle = Path(args.bundle)
    manifest = BundleManifest.load(bundle)
    with Steps(quiet=args.quiet) as steps:
        steps("checking the files' hashes")
        verify_files(bundle, manifest)
        name = args.model or manifest.backbone.name_or_path
        steps(f"loading {name}")
        backbone = _load(args, name, revision=manifest.backbone.revision)
        settings = Settings(args.seed, args.new_tokens, args.device)
        report = validate_bundle(bundle, manifest, backbone, settings, steps)
    where = write_report(report, Path(args.report)) if args.report else None
    _show_report(args, report)
    if where:
        print(f"report: {where}", file=sys.stderr)
    if report.verdict != "pass":
        raise ParityError(failure(report))


def generate(args: argparse.Namespace) -> None:
    """Answer prompts with one tenant; one prompt streams, several are printed as they end."""
    from engines.sampling import Sampling
    from engines.session import Request, Session

    sampling = Sampling(args.temperature, args.top_p, args.seed)
    requests = [
        Request(args.tenant, prompt, max_new_tokens=args.max_new_tokens, sampling=sampling) for prompt in args.prompt
    ]
    texts = [""] * len(requests)
    ids: list[list[int]] = [[] for _ in requests]
    reasons: list[str | None] = [None] * len(requests)
    streams = len(requests) == 1 and not args.json
    with Session.open(args.bundle, args.target, device=args.device) as session:
        for token in session.stream(requests):
            texts[token.row] += token.text
            ids[token.row].append(token.token)
            reasons[token.row] = token.finish_reason
            if streams:
                print(token.text, end="", flush=True)
    if args.json:
        rows = zip(args.prompt, texts, ids, reasons, strict=True)
        _print_json([{"prompt": p, "text": t, "tokens": i, "finish_reason": r} for p, t, i, r in rows])
    else:
        print() if streams else print("\n---\n".join(texts))


def inspect(args: argparse.Namespace) -> None:
    """Show what a path holds."""
    from iapt_export.inspection import describe, table

    found = describe(Path(args.path))
    _show(args, found, table(found))


def doctor(args: argparse.Namespace) -> None:
    """Show what this machine can do."""
    from engines.doctor import diagnose, table

    findings = diagnose()
    _show(args, [dataclasses.asdict(finding) for finding in findings], table(findings))


COMMANDS = {
    "train": train,
    "build": build,
    "validate": validate,
    "generate": generate,
    "inspect": inspect,
    "doctor": doctor,
}


@dataclasses.dataclass
class _Job:
    """What the stages of one build share."""

    args: argparse.Namespace
    cache: Path
    backbone: Any
    spec: Any
    method: Any
    ranges: Ranges
    steps: Steps

    @property
    def shape(self) -> Any:
        """The backbone's sizes."""
        from iapt_export.interface import ModelShape

        return ModelShape.from_config(self.backbone.model.config)

    def export(self, target: TargetPlan, shipped: bool) -> Path:
        """The folder with the ONNX graphs that a target is built from, or all graphs if the bundle ships them."""
        from iapt_export import bundle as layout
        from iapt_export.export import export_graphs
        from iapt_export.manifest import GRAPHS
        from iapt_export.stages import run_stage

        names = GRAPHS if shipped else layout.ENGINE_GRAPHS
        inputs = {
            "backbone": [self.spec.fingerprint, self.spec.weights_sha256],
            "method": dataclasses.asdict(self.method),
            "variant": target.variant,
            "graphs": names,
            "versions": layout.export_versions(),
        }

        def make(folder: Path) -> None:
            backbone = self.backbone
            if target.dtype != "fp32":
                # loaded again rather than cast: transformers keeps rotary frequencies in fp32, a cast would not
                backbone = _load(self.args, self.args.model, dtype=target.dtype)
            export_graphs(
                backbone.model,
                self.method,
                folder,
                dtype=target.dtype,
                opset=target.opset,
                names=names,
                on_step=lambda text: self.steps(f"{target.variant}: {text}"),
            )

        folder, found = run_stage(self.cache, f"graphs-{target.variant}", inputs, make)
        if found:
            self.steps(f"{target.variant}: graphs are up to date")
        return folder

    def target(self, target: TargetPlan, graphs: Path, bundle: Path) -> Any:
        """Describe a target; for TensorRT, build its engines first."""
        from iapt_export import bundle as layout
        from iapt_export.interface import graph_specs
        from iapt_export.manifest import TargetSpec

        specs = graph_specs(self.method, self.shape, target.dtype)
        if target.name == "onnxruntime":
            version = layout.versions().get("onnxruntime", "not installed")
            return TargetSpec(target.name, target.dtype, target.opset, specs, version)
        return self._engines(target, specs, graphs, bundle)

    def _engines(self, target: TargetPlan, specs: Any, graphs: Path, bundle: Path) -> Any:
        from engines.engine_info import EngineInfo
        from engines.tensorrt_builder import BuildOptions, engine_from_onnx
        from engines.tensorrt_flavour import runtime_version
        from iapt_export import bundle as layout
        from iapt_export.manifest import TargetSpec, file_sha256
        from iapt_export.save import WEIGHTS_FILE
        from iapt_export.stages import run_stage

        options = BuildOptions(target.name, self.args.compute_capability)
        version = runtime_version(target.name)
        weights = file_sha256(graphs / WEIGHTS_FILE)
        sources = {name: file_sha256(graphs / f"{name}.onnx") for name in layout.ENGINE_GRAPHS}
        for name, source in sources.items():
            inputs = {
                "graph": [source, weights],
                "ranges": dataclasses.asdict(self.ranges),
                "options": dataclasses.asdict(options),
                "version": version,
            }
            text = f"{target.name}: building {name}.engine"

            def make(folder: Path, name: str = name, text: str = text) -> None:
                engine_from_onnx(
                    graphs / f"{name}.onnx",
                    folder / f"{name}.engine",
                    specs[name],
                    self.ranges,
                    options,
                    on_progress=lambda step: self.steps(text, step.done / step.total if not step.parent else None),
                )

            self.steps(text)
            folder, _ = run_stage(self.cache, f"engine-{target.name}-{name}", inputs, make)
            layout.place_files(folder, bundle / "engines" / target.name)
        engines = layout.engine_specs(specs, target.name)
        built_for = EngineInfo.load(bundle / engines["prefill"].path).compute_capability
        return TargetSpec(target.name, target.dtype, target.opset, engines, version, built_for, sources)


def _check_engines(targets: list[TargetPlan], compute_capability: str | None) -> None:
    """Refuse, before any long work, engines that cannot be built here."""
    from iapt_export.plan import TENSORRT

    plans = [target for target in targets if target.name in TENSORRT]
    if compute_capability and not plans:
        raise IaptError("--compute-capability is for TensorRT targets; add --target tensorrt-rtx or leave it out")
    for target in plans:
        from engines.tensorrt_flavour import check_target, load_tensorrt

        check_target(target.name, target.dtype, target.opset, compute_capability)
        load_tensorrt(target.name)


def _load(args: argparse.Namespace, name: str, *, dtype: str = "fp32", revision: str | None = None) -> Any:
    """The backbone of that name, under the command's flags."""
    from trainers.backbone import load_backbone

    return load_backbone(
        name, dtype=dtype, revision=args.revision or revision, trust_remote_code=args.trust_remote_code
    )


def _prove(args: argparse.Namespace, bundle: Path, manifest: BundleManifest, backbone: Any, steps: Steps) -> Any:
    """Validate a bundle that is not published yet; its manifest with parity and report files."""
    from iapt_export.bundle import with_files
    from validation.compare import Settings
    from validation.report import write_report
    from validation.summary import failure
    from validation.validate import parity_from_report, validate_bundle

    settings = Settings(args.seed, args.new_tokens, args.device)
    report = validate_bundle(bundle, manifest, backbone, settings, steps, Path(args.output).name)
    # how long it took is not part of what was built: equal inputs give equal bytes
    report = dataclasses.replace(report, targets=[dataclasses.replace(t, seconds=0.0) for t in report.targets])
    if report.verdict != "pass":
        failed = Path(args.output).with_name(f"{Path(args.output).name}-failed-report")
        where = write_report(report, failed)
        raise ParityError(f"{failure(report)}. Nothing was written to {args.output}; the report is {where}")
    steps("writing the report")
    write_report(report, bundle)
    return dataclasses.replace(with_files(manifest, bundle), parity=parity_from_report(report))


def _finish(args: argparse.Namespace, output: Path) -> None:
    """Say what stands at the output now."""
    from validation.report import read_report

    report = read_report(output / "report.json")
    _show_report(args, report)
    print(f"{output} is ready; its report is {output / 'report.html'}", file=sys.stderr)


def _show_report(args: argparse.Namespace, report: Any) -> None:
    from validation.summary import summary

    if args.json:
        _print_json(report.to_dict())
    else:
        print(summary(report))


def _show(args: argparse.Namespace, data: Any, table: Any) -> None:
    """Data as JSON where asked for, else as a rich table."""
    from rich.console import Console

    if args.json:
        _print_json(data)
    else:
        Console().print(table)


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=2, ensure_ascii=False, default=str))


def _fail(text: str) -> None:
    print(f"iapt-export: error: {text}", file=sys.stderr)
