"""The roof of the house: each command is a list of calls into the rooms below, and nothing imports this file."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from iapt_export.contract.errors import IaptError, ParityError, explain
from iapt_export.flags import parser

PARITY_FAILED = 3
INTERRUPTED = 130


def main(argv: list[str] | None = None) -> None:
    """Run the command line; see ``iapt-export --help`` for its exit codes."""
    # weights and data are read from disk unless the user names a hub model, so hub chatter only confuses
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    args = parser(argv).parse_args(argv)
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
    from trainers.methods.configs import DEFAULT_METHOD, config_of
    from trainers.training.config import TrainConfig, TrainRequest, configs_from_fields, read_train_file
    from trainers.training.train import train as run

    settings = read_train_file(args.config) if args.config else {}
    named = settings.pop("method", DEFAULT_METHOD)
    chosen = config_of(str(args.method or named))
    names = {field.name for cls in (chosen, TrainConfig) for field in dataclasses.fields(cls)}
    settings |= {name: value for name, value in vars(args).items() if name in names}
    required = {name: getattr(args, name) or settings.pop(name, None) for name in ("model", "data", "output")}
    for name in required:
        settings.pop(name, None)
    if missing := [f"--{name}" for name, value in required.items() if not value]:
        raise IaptError(f"{', '.join(missing)} is missing; give it as a flag or in the --config file")
    method, config = configs_from_fields(chosen, settings, args.config or "the command line")
    say = (lambda line: None) if args.quiet else None
    result = run(TrainRequest(**required, method=method, config=config), say=say)
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
    """Make a bundle, or find it up to date, and show its report."""
    from iapt_export.building.build import build as run
    from iapt_export.building.build_request import BuildRequest
    from iapt_export.progress import Steps

    names = {field.name for field in dataclasses.fields(BuildRequest)}
    settings = {name: value for name, value in vars(args).items() if name in names}
    with Steps(quiet=args.quiet) as steps:
        run(BuildRequest(**settings), steps)
    _finish(args, Path(args.output))


def validate(args: argparse.Namespace) -> None:
    """Compare a bundle with PyTorch and say where they differ."""
    from iapt_export.contract.manifest import BundleManifest, verify_files
    from iapt_export.progress import Steps
    from trainers.decoder.backbone import load_backbone
    from validation.judging.compare import Settings
    from validation.reporting.junit import write_junit
    from validation.reporting.report import write_report
    from validation.reporting.summary import failure
    from validation.validate import validate_bundle

    _check_folders(args.junit)
    bundle = Path(args.bundle)
    manifest = BundleManifest.load(bundle)
    with Steps(quiet=args.quiet) as steps:
        steps("checking the files' hashes")
        verify_files(bundle, manifest)
        name = args.model or manifest.backbone.name_or_path
        steps(f"loading {name}")
        revision = args.revision or manifest.backbone.revision
        backbone = load_backbone(name, revision=revision, trust_remote_code=args.trust_remote_code)
        depth = "quick" if args.quick else "full"
        settings = Settings(args.seed, args.new_tokens, args.device, depth, args.case, args.bisect)
        report = validate_bundle(bundle, manifest, backbone, settings, steps)
    if args.junit:
        write_junit(report, Path(args.junit))
    where = write_report(report, Path(args.report)) if args.report else None
    _show_report(args, report)
    if where:
        print(f"report: {where}", file=sys.stderr)
    if report.verdict != "pass":
        raise ParityError(failure(report))


def generate(args: argparse.Namespace) -> None:
    """Answer prompts with one tenant; one prompt streams, several are printed when all have ended."""
    from engines.serving.sampling import Sampling
    from engines.serving.session import Request, Session

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
            texts[token.index] += token.text
            ids[token.index].append(token.token)
            reasons[token.index] = token.finish_reason
            if streams:
                print(token.text, end="", flush=True)
    if args.json:
        rows = zip(args.prompt, texts, ids, reasons, strict=True)
        _print_json([{"prompt": p, "text": t, "tokens": i, "finish_reason": r} for p, t, i, r in rows])
    else:
        print() if streams else print("\n---\n".join(texts))


def tenant(args: argparse.Namespace) -> None:
    """Write an adapter as a file that a running session takes in."""
    from iapt_export.building.tenant_file import write_tenant_file
    from iapt_export.contract.manifest import BundleManifest
    from trainers.decoder.backbone import load_backbone

    spec = BundleManifest.load(Path(args.bundle)).backbone
    backbone = load_backbone(
        args.model or spec.name_or_path,
        revision=args.revision or spec.revision,
        trust_remote_code=args.trust_remote_code,
    )
    card = write_tenant_file(args.adapter, Path(args.bundle), Path(args.output), backbone, args.peft_prompt_format)
    if args.json:
        _print_json(dataclasses.asdict(card))
    else:
        print(f"{args.output} holds tenant {card.name} ({card.trained_form}); Session.add_tenant takes it", flush=True)


def bench(args: argparse.Namespace) -> None:
    """Measure how fast a bundle answers."""
    from engines.bench import measure, plot, report, table
    from engines.serving.session import Session
    from iapt_export.progress import Steps

    _check_folders(args.output, args.plot)
    with Session.open(args.bundle, args.target, device=args.device) as session, Steps(quiet=args.quiet) as steps:
        figures = [
            measure(session, rows, args.prompt_tokens, args.new_tokens, args.repeat, steps) for rows in args.rows
        ]
        found = report(session, figures)
    _show(args, found, table(found))  # first, so that it is not lost where writing fails
    if args.output:
        Path(args.output).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if args.plot:
        plot(found, Path(args.plot))


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
    "tenant": tenant,
    "bench": bench,
    "inspect": inspect,
    "doctor": doctor,
}


def _check_folders(*paths: str | None) -> None:
    """Refuse files that cannot be written before the work whose result they are to hold."""
    for path in paths:
        if path and not Path(path).parent.is_dir():
            raise IaptError(f"{path} cannot be written: there is no folder {Path(path).parent}; make it first")


def _finish(args: argparse.Namespace, output: Path) -> None:
    """Say what stands at the output now."""
    from validation.reporting.report import read_report

    report = read_report(output / "report.json")
    _show_report(args, report)
    print(f"{output} is ready; its report is {output / 'report.html'}", file=sys.stderr)


def _show_report(args: argparse.Namespace, report: Any) -> None:
    from validation.reporting.summary import summary

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
