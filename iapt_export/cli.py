"""The roof of the house: each command is a list of calls into the rooms below, and nothing imports this file."""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Group, Parameter
from cyclopts.config import Dict
from cyclopts.help import DefaultFormatter, PanelSpec
from rich.box import Box

from engines.triton.repository import TritonRepository, write_repository
from iapt_export import __version__, flags, showing
from iapt_export.building.build_request import BuildRequest
from iapt_export.building.footprint import Load
from iapt_export.contract.errors import IaptError, ParityError, explain
from iapt_export.contract.integrity import open_manifest
from iapt_export.contract.manifest import BundleManifest
from iapt_export.contract.prompt_format import PromptFormat
from iapt_export.flags import FLAT, Answering, Backbone, Choice, Common, Comparison, Keeping, Measuring, Serving
from iapt_export.progress import Steps, large_imports, listening
from iapt_export.showing import check_folders, fail, print_json, show, show_answers, show_report, show_stream
from trainers.methods.configs import DEFAULT_METHOD, config_of
from trainers.training.config import TrainConfig, TrainPlaces, TrainRequest
from trainers.training.convert import Conversion

BundleFolder = Annotated[Path, Parameter(metavar="BUNDLE", help="Bundle folder.")]
NO_FRAME = Box("    \n" * 8)  # help is plain tables under their titles, which logs and pagers take

WRONG_FLAGS = 2
PARITY_FAILED = 3
INTERRUPTED = 130


def main(argv: list[str] | None = None) -> None:
    """Run the command line; see ``iapt-export --help`` for its exit codes."""
    # weights and data are read from disk unless the user names a hub model, so hub chatter only confuses
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # it tries five times, and says so each time
    argv = flags.with_values(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    try:
        method, sources = flags.method_settings(argv[1:]) if argv[:1] == ["train"] else (DEFAULT_METHOD, [])
        app = command_line(method, sources)
        if not argv:
            commands = ", ".join(name for name in app if name[0] != "-")
            fail(f"iapt-export needs a command: {commands} (see iapt-export --help)")
            sys.exit(WRONG_FLAGS)
        try:
            command, bound, _ = app.parse_args(argv)
        except CycloptsError as error:
            fail(showing.refusal(error, app, method, argv))
            token = getattr(error, "token", None)
            sys.exit(WRONG_FLAGS if token is None or token.source == "cli" else 1)
        common = bound.kwargs.get("common", Common())
        debug = common.debug
        check_folders(common.log)
        with listening(quiet=common.quiet, verbose=common.verbose, file=common.log):
            command(*bound.args, **bound.kwargs)
    except KeyboardInterrupt as stop:
        build_text = "interrupted; nothing was left half-written, and a repeated build goes on where this one stopped"
        fail(str(stop) or build_text)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except Exception as error:
        text = explain(error)
        if debug or text is None:
            raise
        fail(text)
        sys.exit(PARITY_FAILED if isinstance(error, ParityError) else 1)


def command_line(method: str, sources: Sequence[Dict] = ()) -> App:
    """Every command with its flags.

    Args:
        method: the method whose settings ``train`` takes.
        sources: where ``train`` finds what no flag says.
    """
    app = App(
        name="iapt-export",
        help="Train prompt-tuning adapters, export them with their backbone to ONNX and TensorRT, prove parity.",
        help_epilogue=flags.EPILOG,
        help_format="plaintext",
        help_formatter=DefaultFormatter(panel_spec=PanelSpec(box=NO_FRAME)),
        version=f"iapt-export {__version__}",
        default_parameter=flags.PLAIN,
        config=(showing.whole_numbers, showing.no_empty_paths),
        exit_on_error=False,
        print_error=False,
    )
    commands: list[Callable[..., None]] = [build, validate, generate, serve, triton, tenant, bench, inspect]
    commands += [plan, cache, doctor]
    for place, command in enumerate([train_command(method), *commands]):
        app.command(command, sort_key=2 * place, help_epilogue="")
    data = App(name="data", help="Bring data into the form that train reads.", help_epilogue="", sort_key=1)
    data.command(convert, help_epilogue="")
    app.command(data)
    app["train"].config = (*sources, showing.whole_numbers, showing.no_empty_paths)
    app.register_install_completion_command(help="Complete commands and flags in this shell from now on.")
    return app


def train_command(method: str) -> Callable[..., None]:
    """``train`` with the settings of one method as flags."""
    chosen = config_of(method)
    defaults = chosen()
    own = Parameter("*", negative_bool="no-", group=Group("Method", help=flags.methods_help(method), sort_key=1))
    training = Parameter("*", negative_bool="no-", group=Group("Training", sort_key=2))

    def train(
        *,
        places: Annotated[TrainPlaces, FLAT],
        choice: Choice = Choice(),
        settings: Annotated[chosen, own] = defaults,  # type: ignore[valid-type]
        config: Annotated[TrainConfig, training] = TrainConfig(),
        common: Common = Common(),
    ) -> None:
        """Train an adapter on a JSONL file."""
        if example := choice.write_config:
            check_folders(example)
            if example.exists():
                raise IaptError(f"{example} exists and is not replaced; give --write-config another name")
            values = {"method": method} | vars(places) | vars(settings) | vars(config)
            example.write_text(flags.example_file(command_line(method)["train"], values), encoding="utf-8")
            told = f"{example} holds every setting; when it is edited: iapt-export train --config {example}"
            print(told, file=sys.stderr)
            return
        with large_imports():
            from trainers.training.train import train as run

        request = TrainRequest(**vars(places), method=settings, config=config)
        result = run(request, say=Steps(quiet=common.quiet).line)
        if common.json:
            report, baseline = (scores and scores.to_dict() for scores in (result.report, result.baseline))
            print_json({"output": result.output, "steps": result.steps, "report": report, "baseline": baseline})

    return train


def convert(
    source: Annotated[Path, Parameter(metavar="SOURCE", help="File that another tool wrote.")],
    /,
    *,
    asked: Annotated[Conversion, FLAT],
    common: Common = Common(),
) -> None:
    """Write CSV, ShareGPT or Alpaca data as the JSON Lines that train reads."""
    from trainers.training.convert import convert as run

    check_folders(asked.output)
    done = run(source, asked)
    if not common.quiet:
        records = "1 record" if done.records == 1 else f"{done.records:,} records"
        print("\n".join((f"{asked.output} holds {records}", *done.notes)), file=sys.stderr)
    if common.json:
        print_json(dataclasses.asdict(done))


def build(*, request: Annotated[BuildRequest, FLAT], dry_run: flags.DryRun = False, common: Common = Common()) -> None:
    """Export a backbone with adapters, build engines, validate; writes a bundle."""
    with large_imports():
        from iapt_export.building import build as building
        from validation.reporting.report import read_report
        from validation.reporting.summary import summary

    with Steps(quiet=common.quiet) as steps:
        outlook = building.foresee(request, steps) if dry_run else None
        if outlook is None:
            building.build(request, steps, steps.line)
    if outlook is not None:
        show_report(common.json, outlook, building.Outlook.text)
        return
    output = Path(request.output)
    show_report(common.json, read_report(output / "report.json"), summary)
    if not common.quiet:
        print(f"{output} is ready; its report is {output / 'report.html'}", file=sys.stderr)


def validate(
    bundle: BundleFolder,
    /,
    *,
    backbone: Backbone = Backbone(),
    asked: Comparison = Comparison(),
    common: Common = Common(),
) -> None:
    """Compare a bundle with PyTorch again."""
    with large_imports():
        from trainers.decoder.backbone import load_backbone_of
        from validation.judging.compare import Settings
        from validation.reporting.junit import write_junit
        from validation.reporting.report import write_report
        from validation.reporting.summary import failure, summary
        from validation.validate import compared_targets, loader_for, validate_bundle

    check_folders(asked.junit, report=asked.report)
    # what is no bundle, or cannot be run there, is refused in one line before the backbone is loaded
    compared_targets(BundleManifest.load(bundle), asked.runner or "", asked.device)
    with Steps(quiet=common.quiet) as steps:
        steps("checking the files' hashes")
        manifest = open_manifest(bundle, trust=asked.trust, allow_unproven=True)
        steps(f"loading {backbone.model or manifest.backbone.name_or_path}")
        loaded = load_backbone_of(bundle, manifest.backbone, **vars(backbone), load=loader_for(manifest))
        depth = "quick" if asked.quick else "full"
        how = (depth, asked.case, asked.bisect, not asked.no_peft_check, asked.runner or "", tuple(asked.adapters))
        settings = Settings(asked.seed, asked.new_tokens, asked.device, *how)
        found = validate_bundle(bundle, manifest, loaded, settings, steps)
    show_report(common.json, found, summary)  # first, so that it is not lost where writing fails
    if asked.junit:
        write_junit(found, asked.junit)
    where = write_report(found, asked.report) if asked.report else None
    if where and not common.quiet:
        print(f"report: {where}", file=sys.stderr)
    if found.verdict != "pass":
        raise ParityError(failure(found))


def generate(bundle: BundleFolder, /, *, asked: Answering = Answering(), common: Common = Common()) -> None:
    """Answer with tenants of a bundle; one instruction streams, several are printed in their order."""
    from engines.request_file import check_named, read_messages, read_requests, refuse_lines
    from engines.serving.sampling import Sampling
    from engines.serving.session import Request, Session

    sampling = Sampling(asked.temperature, asked.top_p, asked.seed)
    settings: dict[str, Any] = {"max_new_tokens": asked.max_new_tokens, "sampling": sampling, "system": asked.system}
    if asked.requests:
        lines = read_requests(asked.requests, asked.max_new_tokens, sampling)
    elif asked.messages:
        lines = {1: Request(asked.tenant or "", messages=read_messages(asked.messages), **settings)}
    else:
        lines = {n: Request(asked.tenant or "", prompt, **settings) for n, prompt in enumerate(asked.prompt or (), 1)}
    session = Session.open(bundle, asked.target, device=asked.device, drafts=asked.drafts, **asked.checks)
    if not asked.requests:
        check_named(asked.tenant, session.tenants)
    problems = []
    for number, request in lines.items():
        where = f"line {number}" if asked.requests else str(asked.messages or f"request {number - 1}")
        try:
            session.check(request, where)
        except IaptError as error:
            if not asked.requests:
                raise
            problems.append(str(error) if str(error).startswith(where) else f"{where}: {error}")
    if asked.requests:
        refuse_lines(asked.requests, problems)
    requests = list(lines.values())
    with session:
        if len(requests) == 1 and not common.json:
            show_stream(session.stream(requests))
        else:
            show_answers(requests, session.generate(requests), asked, common.json)


def serve(bundle: BundleFolder, /, *, asked: Serving = Serving(), common: Common = Common()) -> None:
    """Serve a bundle over HTTP, by OpenAI's protocol; the model picks the tenant."""
    from engines.http import server
    from engines.serving.session import Session, Share

    places = (asked.host, asked.port, asked.keys, asked.tenants, asked.admin_token, asked.metrics_prefix)
    waits: Any = {"ready_delay_s": asked.ready_delay, "drain_s": asked.drain, "stuck_after_s": asked.stuck_after}
    config = server.ServerConfig(*places, **waits, log_level="error" if common.quiet else "info")
    settings: dict[str, Any] = {"max_waiting": asked.max_waiting, "threads": asked.threads, "drafts": asked.drafts}
    settings |= {**asked.checks, "verify": not asked.no_verify}
    session = Session.open(bundle, asked.target, device=asked.device, **settings)
    session.set_share("*", Share(max_rows=asked.max_rows_per_tenant))
    server.serve(session, config)


def triton(bundle: BundleFolder, /, *, asked: Annotated[TritonRepository, FLAT], common: Common = Common()) -> None:
    """Write a model repository for NVIDIA Triton, whose python backend runs a session of the bundle."""
    folder = write_repository(bundle, asked)
    if common.json:
        print_json({"model": folder})
    else:
        print(f"{folder} is ready: tritonserver --model-repository {asked.output}")


def tenant(
    adapter: Annotated[str, Parameter(metavar="ADAPTER", help="DIR or NAME=DIR; without NAME, the folder's is taken.")],
    /,
    *,
    bundle: Annotated[Path, Parameter(metavar="BUNDLE", help="The bundle that shall serve it, or one of its kind.")],
    output: Annotated[Path, Parameter(alias="-o", metavar="FILE.safetensors", help="File to write.")],
    peft_prompt_format: Annotated[PromptFormat | None, Parameter(help=flags.PEFT_HELP)] = None,
    backbone: Backbone = Backbone(),
    common: Common = Common(),
) -> None:
    """Write an adapter as a file that a running session of a bundle takes in."""
    with large_imports():
        from iapt_export.building.tenant_file import write_tenant_file

    check_folders(output)

    def load() -> Any:
        from trainers.decoder.backbone import load_backbone_of

        return load_backbone_of(bundle, BundleManifest.load(bundle).backbone, **vars(backbone))

    card = write_tenant_file(adapter, bundle, output, load, peft_prompt_format)
    if common.json:
        print_json(dataclasses.asdict(card))
    else:
        print(f"{output} holds tenant {card.name} ({card.trained_form}); Session.add_tenant takes it", flush=True)


def bench(bundle: BundleFolder, /, *, asked: Measuring = Measuring(), common: Common = Common()) -> None:
    """Measure how fast a bundle answers: first token, next tokens, throughput, memory."""
    from engines.bench import check_plot, measure, plot, report, table
    from engines.serving.session import Session

    check_folders(asked.output, asked.plot)
    if asked.plot:
        check_plot(asked.plot)
    with (
        Session.open(bundle, asked.target, device=asked.device, drafts=asked.drafts, **asked.checks) as session,
        Steps(quiet=common.quiet) as steps,
    ):
        sizes = (asked.prompt_tokens, asked.new_tokens, asked.repeat)
        figures = [measure(session, rows, *sizes, steps) for rows in asked.rows]
        found = report(session, figures, asked.device)
    show(common.json, found, table(found))  # first, so that it is not lost where writing fails
    if asked.output:
        asked.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if asked.plot:
        plot(found, asked.plot)


def inspect(
    path: Annotated[
        Path, Parameter(metavar="PATH", help="Adapter directory, bundle, .onnx or .engine file, model, tenant's file.")
    ],
    /,
    *,
    model: Annotated[
        str | None, Parameter(alias="-m", metavar="M", help="Backbone with which build would take the adapter at PATH.")
    ] = None,
    everything: Annotated[
        bool, Parameter(("--all",), help="Show every line of long lists, such as a bundle's files.")
    ] = False,
    common: Common = Common(),
) -> None:
    """Show what a model, an adapter, a bundle or one of its files holds, and whether it is supported."""
    from iapt_export.inspection import describe, table

    found = describe(path, model)
    show(common.json, found, table(found, everything))


def plan(
    path: Annotated[str, Parameter(metavar="PATH", help="Bundle, or a model: Hugging Face id, folder, GGUF file.")],
    /,
    *,
    load: Annotated[Load, FLAT] = Load(),
    common: Common = Common(),
) -> None:
    """Show what memory a bundle takes when it serves, and with what that grows; reads no weights."""
    from iapt_export.building.footprint import plan_memory, table

    shares = plan_memory(path, load)
    show(common.json, [dataclasses.asdict(share) for share in shares], table(path, shares))


def cache(*, asked: Keeping = Keeping(), common: Common = Common()) -> None:
    """Show the finished stages that builds go on from, and remove what is old or left over."""
    from iapt_export.building.stage_cache import default_cache, prune, stages, table

    folder = asked.cache or default_cache()
    if asked.prune:
        removed = prune(folder, asked.max_bytes)
        size = sum(stage.size_bytes for stage in removed)
        print(f"{folder}: removed {len(removed)} stages ({size:,} bytes)", file=sys.stderr)
    found = stages(folder)
    show(common.json, [dataclasses.asdict(stage) for stage in found], table(folder, found))


def doctor(
    *,
    model: Annotated[
        str | None, Parameter(alias="-m", metavar="M", help="Also say whether this backbone is supported.")
    ] = None,
    common: Common = Common(),
) -> None:
    """Show what this machine can build and run, and how to get what is missing."""
    from engines.doctor import MISSING, diagnose, model_finding, table

    findings = diagnose()
    if model:
        from iapt_export.inspection import describe_model

        findings.append(model_finding(model, describe_model(model)))
    show(common.json, [dataclasses.asdict(finding) for finding in findings], table(findings))
    if model and findings[-1].status == MISSING:
        raise IaptError(f"{model} cannot be used: {findings[-1].detail}")
