"""What commands share on the command line: groups of flags as dataclasses that cyclopts reads, and its errors in words.

The flags that a command has for itself stand in its signature in `iapt_export.cli`, those of ``build`` and ``train``
in the dataclasses that Python callers fill as well.
"""

import dataclasses
import itertools
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Group, Parameter
from cyclopts.config import Dict
from cyclopts.types import ExistingDirectory, NonNegativeInt, PositiveInt

from iapt_export.building.build_request import Device
from iapt_export.contract.errors import IaptError
from iapt_export.contract.integrity import Checks
from iapt_export.contract.settings import size_of, summary_of
from trainers.methods.configs import DEFAULT_METHOD, METHOD_CONFIGS, config_of, flag_name, of_another
from trainers.training.config import TrainConfig, TrainPlaces, read_train_file

EPILOG = """\
A first run:

  iapt-export doctor
  iapt-export train --model HuggingFaceTB/SmolLM2-135M-Instruct \\
      --data reviews.jsonl --output adapters/reviews
  iapt-export build --model HuggingFaceTB/SmolLM2-135M-Instruct \\
      --adapter adapters/reviews --output bundle
  iapt-export generate bundle --tenant reviews --prompt "A film to remember."

Exit codes:

  0 success · 1 bad input or damaged files · 2 wrong flags
  3 an export differs from PyTorch · 130 interrupted
"""
EXAMPLE = {"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "data": "train.jsonl", "output": "adapters/mine"}
"""What ``--write-config`` writes where no flag says more."""


PEFT_HELP = (
    "How prompts are fed to an adapter of stock PEFT, which does not say: as they are (plain), with a line break "
    "behind them (newline), or in the chat template; has to be given where the tokenizer has one."
)
DryRun = Annotated[bool, Parameter(help="Say what would be made, and what it needs; write nothing.")]


def _shown(value: Any) -> str | None:
    """A default as help shows it; None where it only says that a flag was not given."""
    if value is None or value is False or value in ("", ()):
        return None
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


FLAT = Parameter(name="*")
PLAIN = Parameter(allow_repeating=True, negative_bool=(), negative_iterable=(), show_default=_shown)
"""What holds for every flag: the last of repeated ones counts, and there is no ``--no-flag``."""


@Parameter(name="*", group=Group("Backbone", sort_key=1))
@dataclass(frozen=True, kw_only=True)
class Backbone:
    """Where a bundle's backbone is now."""

    model: Annotated[str | None, Parameter(alias="-m", metavar="M")] = None
    """Where the bundle's backbone is now; without it, where it was at build."""
    revision: Annotated[str | None, Parameter(metavar="REV")] = None
    """Commit or branch of the model on the hub."""
    trust_remote_code: bool = False
    """Run code from the model's repository."""


@Parameter(name="*", group=Group("Comparison with PyTorch", sort_key=2))
@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How a bundle is compared, and where that is written."""

    report: Annotated[Path | None, Parameter(metavar="DIR")] = None
    """Write report.json and report.html there."""
    junit: Annotated[Path | None, Parameter(metavar="FILE")] = None
    """Write the checks there as JUnit XML, for CI."""
    trust: Annotated[Path | None, Parameter(metavar="KEY.pem")] = None
    """Public ed25519 key; the bundle must be signed with its private key (build --sign)."""
    quick: bool = False
    """Few prompts, few tokens, no long cases: half a minute."""
    case: Annotated[str | None, Parameter(metavar="NAME")] = None
    """Run this case alone; an unknown name lists them all."""
    bisect: bool = False
    """Look inside the graphs also where nothing failed."""
    seed: int = 0
    """Order in which prompts are mixed."""
    new_tokens: PositiveInt = 64
    """Greedy tokens for each prompt."""
    device: Device = "cpu"
    """Where ONNX Runtime runs."""
    no_peft_check: bool = False
    """Leave out the comparison with PEFT itself, which is made where it is installed and has the tenant's method."""
    adapters: Annotated[Sequence[str], Parameter(("--adapter", "-a"), metavar="[NAME=]DIR")] = ()
    """Compare this adapter in the place of the bundle's tenants, as the tenant command ships it; repeatable."""
    runner: Annotated[Literal["openvino"] | None, Parameter(metavar="R")] = None
    """Run the portable graphs in another runtime, openvino, instead of the bundle's targets."""


@dataclass(frozen=True, kw_only=True)
class _Running:
    """What runs where."""

    target: Annotated[str | None, Parameter(metavar="T")] = None
    """Which of the bundle's targets runs; without it, the first."""
    device: Device = "cpu"
    """Where ONNX Runtime runs."""
    drafts: Annotated[NonNegativeInt, Parameter(metavar="K")] = 0
    """Guess up to K tokens of a row at once from what was read, where that pays; for bundles of build --drafts."""
    trust: Annotated[Path | None, Parameter(metavar="KEY.pem")] = None
    """Public ed25519 key; the bundle must be signed with its private key (build --sign)."""
    allow_unproven: bool = False
    """Open also a bundle whose comparison with PyTorch was not made, or failed."""

    @property
    def checks(self) -> Checks:
        """What is asked of the bundle."""
        return {"trust": self.trust, "allow_unproven": self.allow_unproven}


def _check_instruction(_: Any, asked: "Answering") -> None:
    """One source of instructions, and with it what belongs to it."""
    given = [name for name in ("prompt", "messages", "requests") if getattr(asked, name)]
    if len(given) != 1:
        flags = " and ".join(f"--{name}" for name in given)
        raise ValueError(f"expected one of --prompt, --messages, --requests, found {flags or 'none of them'}")
    for name in ("tenant", "system"):
        if given == ["requests"] and getattr(asked, name) is not None:
            raise ValueError(f"--{name} is for --prompt and --messages; each line of --requests has a field {name}")


@Parameter(name="*", validator=_check_instruction)
@dataclass(frozen=True, kw_only=True)
class Answering(_Running):
    """Which answers are wanted, and how they are made."""

    tenant: Annotated[str | None, Parameter(metavar="NAME", allow_repeating=False)] = None
    """Whose adapter answers, or the backbone's name; with --prompt or --messages. Without, where there is no other, the
    backbone."""
    prompt: Annotated[list[str] | None, Parameter(metavar="TEXT")] = None
    """The instruction; once for each row of a batch."""
    messages: Annotated[Path | None, Parameter(metavar="FILE.json")] = None
    """Instead: a conversation, a list of {role, content}, the user's words last."""
    requests: Annotated[Path | None, Parameter(metavar="FILE.jsonl")] = None
    """Instead: a request a line, of any tenants: {"tenant": ..., "prompt": ...}, and other fields of Request."""
    system: Annotated[str | None, Parameter(metavar="TEXT")] = None
    """System prompt; without it, the one of the tenant's training; an empty text for none."""
    max_new_tokens: Annotated[int, Parameter(metavar="N")] = 64
    """Longest answer; like the next three, also of lines of --requests that do not say."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Nucleus of the probabilities to sample from."""
    seed: int = 0
    """Seed of sampling."""


@FLAT
@dataclass(frozen=True, kw_only=True)
class Measuring(_Running):
    """What is measured and where it is kept."""

    rows: Annotated[tuple[PositiveInt, ...], Parameter(consume_multiple=(1, None), metavar="N...")] = (1, 8)
    """Rows that run at once, one table line each."""
    prompt_tokens: PositiveInt = 128
    """Tokens of each instruction."""
    new_tokens: PositiveInt = 64
    """Tokens of each answer."""
    repeat: PositiveInt = 5
    """Rounds after one to warm up; medians are shown."""
    output: Annotated[Path | None, Parameter(alias="-o", metavar="FILE.json")] = None
    """Also write everything that was measured."""
    plot: Annotated[Path | None, Parameter(metavar="FILE.png")] = None
    """Also draw the time between tokens."""


@FLAT
@dataclass(frozen=True, kw_only=True)
class Keeping:
    """What a cache keeps."""

    cache: Annotated[ExistingDirectory | None, Parameter(metavar="DIR")] = None
    """The cache; without it, $IAPT_EXPORT_CACHE or the one in the user's cache folder."""
    prune: bool = False
    """Remove what killed builds left, then the stages that were not used for longest until --max-size is kept."""
    max_size: Annotated[str, Parameter(metavar="SIZE", validator=lambda _, text: size_of(text))] = "20GB"
    """What --prune lets stay; 0 for nothing."""

    @property
    def max_bytes(self) -> int:
        """``max_size`` as a number."""
        return size_of(self.max_size)


@FLAT
@dataclass(frozen=True, kw_only=True)
class Serving(_Running):
    """Where a server listens, whom it lets in, and how it ends."""

    host: Annotated[str, Parameter(metavar="ADDRESS")] = "127.0.0.1"
    """Where to listen; 0.0.0.0 for every interface."""
    port: Annotated[int, Parameter(metavar="N")] = 8000
    """Port to listen on; 0 takes a free one."""
    keys: Annotated[Path | None, Parameter(metavar="FILE.json")] = None
    """API keys, each with its tenants: {"KEY": ["reviews"], "OTHER KEY": ["*"]}; without it, everybody is let in."""
    tenants: Annotated[Path | None, Parameter(metavar="DIR")] = None
    """Folder whose NAME.safetensors are installed when a request names them."""
    admin_token: Annotated[str | None, Parameter(metavar="TOKEN", env_var="IAPT_ADMIN_TOKEN")] = None
    """Lets whoever has it load and unload tenants of that folder over HTTP; better given as IAPT_ADMIN_TOKEN."""
    max_waiting: PositiveInt = 256
    """Requests that may wait for a row; beyond that, clients get status 429."""
    max_rows_per_tenant: Annotated[PositiveInt | None, Parameter(metavar="N")] = None
    """Rows that one tenant has at once at most, so that no flood of long answers takes them all; without it, any."""
    threads: Annotated[PositiveInt | None, Parameter(metavar="N")] = None
    """Of ONNX Runtime on the CPU; without it, as many as this process may use cores."""
    metrics_prefix: Annotated[str, Parameter(metavar="TEXT")] = "vllm:"
    """What names of metrics begin with."""
    ready_delay: Annotated[float, Parameter(metavar="SECONDS")] = 0.0
    """At SIGTERM, how long /ready says no before the server stops listening."""
    drain: Annotated[float, Parameter(metavar="SECONDS")] = 60.0
    """At SIGTERM, how long answers under way may take."""
    stuck_after: Annotated[float, Parameter(metavar="SECONDS")] = 600.0
    """A step that takes longer hangs, and /health says 503; raise it where a slow machine reads long texts."""
    no_verify: bool = False
    """Do not check the files' hashes at the start."""


@FLAT
@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is trained, and a file of settings."""

    method: Annotated[Literal[tuple(map(flag_name, METHOD_CONFIGS))], Parameter(metavar="NAME")] = DEFAULT_METHOD  # type: ignore[valid-type]
    """What is trained; --method NAME --help shows its settings."""
    config: Annotated[Path | None, Parameter(metavar="FILE.yaml")] = None
    """Any of these settings by name; flags win over the file."""
    write_config: Annotated[Path | None, Parameter(metavar="FILE.yaml")] = None
    """Train nothing; write an example for --config, every setting with its meaning."""


@Parameter(name="*", group=Group("Output", sort_key=9))
@dataclass(frozen=True, kw_only=True)
class Common:
    """What every command takes."""

    json: bool = False
    """Print the result as JSON on stdout."""
    quiet: bool = False
    """Nothing but errors on stderr: no progress, no warnings."""
    log: Annotated[Path | None, Parameter(metavar="FILE")] = None
    """Add to this file, with times, what is done and noted, warnings, and the stack trace of an error."""
    verbose: Annotated[bool, Parameter(alias="-v")] = False
    """Say on stderr what is noted on the way, such as what each pass changed."""
    debug: bool = False
    """Show the stack trace of an error."""


def with_values(argv: list[str]) -> list[str]:
    """``--flag true`` and ``--flag "- some text"`` with a ``=``, without which the parser takes them for no values."""
    words: list[str] = []
    for word in argv:
        is_value = word.lower() in ("true", "false") or (word.startswith("-") and len(word.split()) > 1)
        if is_value and words and words[-1][:2] == "--" != words[-1] and "=" not in words[-1]:
            word = f"{words.pop()}={word}"
        words.append(word)
    return words


def method_settings(argv: list[str]) -> tuple[str, list[Dict]]:
    """What ``train`` is asked for before its flags can be known.

    Args:
        argv: the words after ``train``.

    Returns:
        The method, and what stands in for flags that are not given: the ``--config`` file's settings first.

    Raises:
        IaptError: the file cannot be read, names an unknown method, or has settings that this method has not.
    """
    asked, path, example = (_value_of(flag, argv) for flag in ("--method", "--config", "--write-config"))
    settings = read_train_file(path) if path else {}
    of_file = str(settings.pop("method", DEFAULT_METHOD))
    method = flag_name(asked if asked in map(flag_name, METHOD_CONFIGS) else of_file)
    known = {field.name for cls in (TrainPlaces, config_of(method), TrainConfig) for field in dataclasses.fields(cls)}
    for name in sorted(settings.keys() - known):
        told = of_another(name, method) or f"unknown field {name}; known fields are {', '.join(sorted(known))}"
        raise IaptError(f"{path}: {told}")
    sources = [(settings, path), (EXAMPLE if example else {}, "")]
    # under the command's name: the parser drops settings that are called as a command, such as data, from a flat file
    return method, [Dict({"train": data}, source=source) for data, source in sources]


def _value_of(flag: str, argv: list[str]) -> str:
    """What stands after a flag, where it is given last; empty without it."""
    value = ""
    for word, after in itertools.pairwise([*argv, ""]):
        name, equals, own = word.partition("=")
        if name == flag:
            value = own if equals else after
    return value


def methods_help(name: str) -> str:
    """What a method is, and the others a line each."""
    lines = [summary_of(config_of(name)), "", "The others, whose settings --method NAME --help shows:"]
    for other, cls in METHOD_CONFIGS.items():
        if flag_name(other) != name:
            lead = f"  {flag_name(other)}".ljust(17)
            lines += textwrap.wrap(summary_of(cls), 74, initial_indent=lead, subsequent_indent=" " * 17)
    return "\n".join(lines)


def example_file(train: App, values: dict[str, Any]) -> str:
    """Settings as YAML that ``--config`` takes, below each its meaning.

    Args:
        train: the command, whose flags say what each setting means.
        values: setting to value.
    """
    import yaml

    lines = [f"# iapt-export train --config FILE.yaml: settings of --method {values['method']}; flags win over them"]
    for argument in train.assemble_argument_collection(parse_docstring=True):
        if (name := argument.field_info.name) in values:
            value = list(values[name]) if isinstance(values[name], tuple) else values[name]
            lines += ["", *(f"# {line}" for line in textwrap.wrap(str(argument.parameter.help), 98))]
            lines.append(yaml.safe_dump({name: value}).rstrip())
    return "\n".join(lines) + "\n"
