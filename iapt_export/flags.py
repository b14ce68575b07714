"""The command line's grammar: one function adds one command's flags, shared groups are plain functions."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import shutil
import sys
import textwrap
from typing import Any

from iapt_export import __version__
from iapt_export.building.stage_cache import CACHE_VARIABLE
from iapt_export.contract.errors import IaptError
from iapt_export.contract.settings import field_help, summary_of
from trainers.methods.configs import DEFAULT_METHOD, METHOD_CONFIGS, config_of, flag_name
from trainers.training.config import TrainConfig, read_train_file

EPILOG = """\
a first run:
  iapt-export doctor
  iapt-export train    --model HuggingFaceTB/SmolLM2-135M-Instruct --data reviews.jsonl --output adapters/reviews
  iapt-export build    --model HuggingFaceTB/SmolLM2-135M-Instruct --adapter adapters/reviews --output bundle
  iapt-export generate bundle --tenant reviews --prompt "A film to remember."

exit codes:
  0 success · 1 bad input or damaged files · 2 wrong flags · 3 an export differs from PyTorch · 130 interrupted
"""


def parser(argv: list[str] | None = None) -> argparse.ArgumentParser:
    """The whole command line.

    Args:
        argv: what will be parsed, by default the process's arguments; ``train`` has the flags of the method that
            is named there.
    """
    argv = sys.argv[1:] if argv is None else argv
    root = argparse.ArgumentParser(
        prog="iapt-export",
        description="Train prompt-tuning adapters, export them with their backbone to ONNX and TensorRT, prove parity.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root.add_argument("--version", action="version", version=f"iapt-export {__version__}")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, add, text in (
        ("train", functools.partial(_train, method=_method_of(argv)), "train an adapter on a JSONL file"),
        ("build", _build, "export a backbone with adapters, build engines, validate; writes a bundle"),
        ("validate", _validate, "compare a bundle with PyTorch again"),
        ("generate", _generate, "answer a prompt with one tenant of a bundle; streams tokens"),
        ("tenant", _tenant, "write an adapter as a file that a running session of a bundle takes in"),
        ("bench", _bench, "measure how fast a bundle answers: first token, next tokens, throughput, memory"),
        ("inspect", _inspect, "show what an adapter, a bundle, an ONNX file or an engine holds"),
        ("doctor", _doctor, "show what this machine can build and run, and how to get what is missing"),
    ):
        command = commands.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", formatter_class=_Formatter
        )
        add(command)
        command.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
        command.add_argument("--quiet", action="store_true", help="no progress on stderr")
        command.add_argument("--debug", action="store_true", help="show the stack trace of an error")
    return root


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, but not those that only say that a flag was not given."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, argparse.SUPPRESS) or action.default == []:
            return action.help
        return super()._get_help_string(action)


def _model(command: argparse.ArgumentParser, *, required: bool, text: str, unset: Any = None) -> None:
    group = command.add_argument_group("backbone")
    group.add_argument("--model", "-m", required=required, metavar="M", help=text)
    group.add_argument("--revision", metavar="REV", default=unset, help="commit or branch of the model on the hub")
    group.add_argument(
        "--trust-remote-code",
        action="store_true",
        default=unset or False,
        help="run code from the model's repository",
    )


def _method_of(argv: list[str]) -> str:
    """The method that ``train`` is asked for; the default where that cannot be told, which is an error later on."""
    if argv[:1] != ["train"]:
        return DEFAULT_METHOD
    peek = argparse.ArgumentParser(add_help=False)
    peek.add_argument("--method", nargs="?")
    peek.add_argument("--config", nargs="?")
    found, _ = peek.parse_known_args(argv[1:])
    try:
        settings = read_train_file(found.config) if found.config else {}
        name = str(found.method or settings.get("method", DEFAULT_METHOD))
        config_of(name)
    except IaptError:
        return DEFAULT_METHOD
    return name


def _train(command: argparse.ArgumentParser, method: str) -> None:
    _model(command, required=False, text="Hugging Face id, local folder, or GGUF file", unset=argparse.SUPPRESS)
    command.add_argument(
        "--data",
        metavar="FILE.jsonl",
        help="one example a line: instruction/input/output, prompt/completion, or messages",
    )
    command.add_argument("--output", "-o", metavar="ADAPTER", help="adapter directory to write")
    command.add_argument("--config", metavar="FILE.yaml", help="any of these settings by name; flags win over the file")
    own = config_of(method)
    others = {flag_name(name): summary_of(cls) for name, cls in METHOD_CONFIGS.items() if cls is not own}
    choice = command.add_argument_group(
        "method", f"{summary_of(own)}\nThe others, whose settings --method NAME --help shows:\n{_lines(others)}"
    )
    names = [flag_name(name) for name in METHOD_CONFIGS]
    choice.add_argument(
        "--method",
        choices=names,
        metavar="NAME",
        help=f"what is trained: {', '.join(names)} (without: {DEFAULT_METHOD})",
    )
    for group, cls in ((choice, own), (command.add_argument_group("training"), TrainConfig)):
        texts = field_help(cls)
        for field in dataclasses.fields(cls):
            if field.name in ("revision", "trust_remote_code"):
                continue  # every command that loads a backbone has them
            text = f"{texts[field.name]} (default: {_shown(field.default)})".replace("%", "%%")
            group.add_argument(_flag(field.name), dest=field.name, default=argparse.SUPPRESS, metavar="X", help=text)


def _build(command: argparse.ArgumentParser) -> None:
    _model(command, required=True, text="Hugging Face id, local folder, or GGUF file or folder")
    command.add_argument(
        "--adapter",
        "-a",
        dest="adapters",
        action="append",
        default=[],
        metavar="[NAME=]DIR",
        help="adapter directory, once for each tenant; the tenant is called NAME, or as its folder is",
    )
    command.add_argument("--output", "-o", required=True, metavar="BUNDLE", help="bundle to write")
    targets = command.add_argument_group("targets")
    targets.add_argument(
        "--target",
        "-t",
        dest="targets",
        action="append",
        default=[],
        metavar="T[:DTYPE]",
        help="onnxruntime, tensorrt-rtx or tensorrt, once for each (without any: onnxruntime); onnxruntime:int8 and "
        "onnxruntime:int4 store the backbone's weights in 8 or 4 bits",
    )
    targets.add_argument("--dtype", metavar="DTYPE", help="fp32, fp16 or bf16, for targets that name none")
    targets.add_argument("--opset", type=int, metavar="N", help="20 or 23 (without: 23)")
    targets.add_argument(
        "--compute-capability", metavar="X.Y", help="GPU generation to build for, such as 8.9 (without: portable)"
    )
    targets.add_argument(
        "--rational",
        choices=("function", "plugin"),
        default="function",
        help="ai.iapt::Rational in TensorRT engines: standard operators, or the plugin that 'make cpp' builds",
    )
    ranges = command.add_argument_group("ranges that graphs and engines are built for: MAX, or MIN:OPT:MAX")
    ranges.add_argument("--batch", default="1:4:8", help="rows of one batch")
    ranges.add_argument("--sequence", default="1:64:512", help="instruction tokens of a row")
    ranges.add_argument("--past", default="1:256:1024", help="cache entries of a row: prompts, instruction, answer")
    ranges.add_argument("--tenants", default="1:4:64", help="tenants installed side by side")
    methods = command.add_argument_group("methods")
    _peft_prompt_format(methods)
    methods.add_argument(
        "--merge-lora",
        action="store_true",
        help="add the one LoRA adapter to the backbone's weights: no cost, but no other tenant",
    )
    methods.add_argument(
        "--fold-embeddings",
        action="store_true",
        help="ship ADePT's token offsets as one embedding table a tenant: less arithmetic, more memory",
    )
    _comparison(command)
    command.add_argument(
        "--cache",
        metavar="DIR",
        help=f"where finished stages are kept (without: ${CACHE_VARIABLE} or the user's cache)",
    )


def _peft_prompt_format(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--peft-prompt-format",
        choices=("plain", "chat"),
        default="plain",
        help="how prompts are fed to adapters that stock PEFT wrote, which do not say: as they are, or in the "
        "tokenizer's chat template",
    )


def _comparison(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("comparison with PyTorch")
    group.add_argument("--seed", type=int, default=0, help="order in which prompts are mixed")
    group.add_argument("--new-tokens", type=int, default=64, help="greedy tokens for each prompt")
    group.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where ONNX Runtime runs")


def _validate(command: argparse.ArgumentParser) -> None:
    command.add_argument("bundle", metavar="BUNDLE")
    _model(command, required=False, text="where the bundle's backbone is now (without: where it was at build)")
    command.add_argument("--report", metavar="DIR", help="write report.json and report.html there")
    command.add_argument("--junit", metavar="FILE", help="write the checks there as JUnit XML, for CI")
    command.add_argument("--quick", action="store_true", help="few prompts, few tokens, no long cases: half a minute")
    command.add_argument("--case", metavar="NAME", help="run this case alone; an unknown name lists them all")
    command.add_argument("--bisect", action="store_true", help="look inside the graphs also where nothing failed")
    _comparison(command)


def _generate(command: argparse.ArgumentParser) -> None:
    command.add_argument("bundle", metavar="BUNDLE")
    command.add_argument("--tenant", required=True, metavar="NAME", help="whose adapter answers")
    command.add_argument(
        "--prompt", required=True, action="append", metavar="TEXT", help="once for each row of a batch"
    )
    command.add_argument("--target", metavar="T", help="which of the bundle's targets runs (without: the first)")
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where ONNX Runtime runs")
    command.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="longest answer")
    command.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    command.add_argument("--top-p", type=float, default=1.0, help="nucleus of the probabilities to sample from")
    command.add_argument("--seed", type=int, default=0, help="seed of sampling")


def _tenant(command: argparse.ArgumentParser) -> None:
    command.add_argument("adapter", metavar="ADAPTER", help="DIR or NAME=DIR; the folder's name is the tenant's else")
    command.add_argument("--bundle", required=True, help="the bundle that shall serve it, or one of its kind")
    command.add_argument("--output", "-o", required=True, metavar="FILE.safetensors", help="file to write")
    _peft_prompt_format(command)
    _model(command, required=False, text="where the bundle's backbone is now (without: where it was at build)")


def _bench(command: argparse.ArgumentParser) -> None:
    command.add_argument("bundle", help="bundle folder")
    command.add_argument("--target", help="target to run (without: the bundle's first)")
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where ONNX Runtime runs")
    command.add_argument(
        "--rows", type=_count, nargs="+", default=[1, 8], help="rows that run at once, one table line each"
    )
    command.add_argument("--prompt-tokens", type=_count, default=128, help="tokens of each instruction")
    command.add_argument("--new-tokens", type=_count, default=64, help="tokens of each answer")
    command.add_argument("--repeat", type=_count, default=5, help="rounds after one to warm up; medians are shown")
    command.add_argument("--output", "-o", metavar="FILE.json", help="also write everything that was measured")
    command.add_argument("--plot", metavar="FILE.png", help="also draw the time between tokens")


def _count(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def _inspect(command: argparse.ArgumentParser) -> None:
    command.add_argument("path", metavar="PATH", help="adapter directory, bundle, .onnx or .engine file")


def _doctor(command: argparse.ArgumentParser) -> None:
    del command


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return ",".join(default)
    if isinstance(default, bool):
        return str(default).lower()
    return str(default) or "empty"


def _lines(texts: dict[str, str]) -> str:
    """A name and its text a line, wrapped as argparse wraps."""
    width, edge = shutil.get_terminal_size().columns - 2, 2 + max(map(len, texts)) + 2
    return "\n".join(
        textwrap.fill(text, max(width, 40), initial_indent=f"  {name}".ljust(edge), subsequent_indent=" " * edge)
        for name, text in texts.items()
    )
