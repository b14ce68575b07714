"""The command line's grammar: one function adds one command's flags, shared groups are plain functions."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from iapt_export import __version__
from iapt_export.stages import CACHE_VARIABLE
from trainers.config import IAPTConfig, TrainConfig, field_help

EPILOG = """\
a first run:
  iapt-export doctor
  iapt-export train    --model HuggingFaceTB/SmolLM2-135M-Instruct --data reviews.jsonl --output adapters/reviews
  iapt-export build    --model HuggingFaceTB/SmolLM2-135M-Instruct --adapter adapters/reviews --output bundle
  iapt-export generate bundle --tenant reviews --prompt "A film to remember."

exit codes:
  0 success · 1 bad input or damaged files · 2 wrong flags · 3 an export differs from PyTorch · 130 interrupted
"""


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    root = argparse.ArgumentParser(
        prog="iapt-export",
        description="Train prompt-tuning adapters, export them with their backbone to ONNX and TensorRT, prove parity.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root.add_argument("--version", action="version", version=f"iapt-export {__version__}")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, add, text in (
        ("train", _train, "train an IAPT adapter on a JSONL file"),
        ("build", _build, "export a backbone with adapters, build engines, validate; writes a bundle"),
        ("validate", _validate, "compare a bundle with PyTorch again"),
        ("generate", _generate, "answer a prompt with one tenant of a bundle; streams tokens"),
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


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but not those that only say that a flag was not given."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, argparse.SUPPRESS) or action.default == []:
            return action.help
        return super()._get_help_string(action)


def _model(command: argparse.ArgumentParser, *, required: bool, text: str) -> None:
    group = command.add_argument_group("backbone")
    group.add_argument("--model", "-m", required=required, metavar="M", help=text)
    group.add_argument("--revision", metavar="REV", help="commit or branch of the model on the hub")
    group.add_argument("--trust-remote-code", action="store_true", help="run code from the model's repository")


def _train(command: argparse.ArgumentParser) -> None:
    _model(command, required=False, text="Hugging Face id, local folder, or GGUF file")
    command.add_argument(
        "--data",
        metavar="FILE.jsonl",
        help="one example a line: instruction/input/output, prompt/completion, or messages",
    )
    command.add_argument("--output", "-o", metavar="ADAPTER", help="adapter directory to write")
    command.add_argument("--config", metavar="FILE.yaml", help="any of these settings by name; flags win over the file")
    for title, cls in (("method (IAPT, arXiv 2405.18203)", IAPTConfig), ("training", TrainConfig)):
        group = command.add_argument_group(title)
        texts = field_help(cls)
        for field in dataclasses.fields(cls):
            text = f"{texts[field.name]} (default: {_shown(field.default)})".replace("%", "%%")
            group.add_argument(_flag(field.name), dest=field.name, default=argparse.SUPPRESS, metavar="X", help=text)


def _build(command: argparse.ArgumentParser) -> None:
    _model(command, required=True, text="Hugging Face id, local folder, or GGUF file or folder")
    command.add_argument(
        "--adapter",
        "-a",
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
        action="append",
        default=[],
        metavar="T[:DTYPE]",
        help="onnxruntime, tensorrt-rtx or tensorrt, once for each (without any: onnxruntime)",
    )
    targets.add_argument("--dtype", metavar="DTYPE", help="fp32, fp16 or bf16, for targets that name none")
    targets.add_argument("--opset", type=int, metavar="N", help="20 or 23 (without: 23)")
    targets.add_argument(
        "--compute-capability", metavar="X.Y", help="GPU generation to build for, such as 8.9 (without: portable)"
    )
    ranges = command.add_argument_group("ranges that graphs and engines are built for: MAX, or MIN:OPT:MAX")
    ranges.add_argument("--batch", default="1:4:8", help="rows of one batch")
    ranges.add_argument("--sequence", default="1:64:512", help="instruction tokens of a row")
    ranges.add_argument("--past", default="5:256:1024", help="cache entries of a row: prompts, instruction, answer")
    ranges.add_argument("--tenants", default="1:4:64", help="tenants installed side by side")
    _comparison(command)
    command.add_argument(
        "--cache",
        metavar="DIR",
        help=f"where finished stages are kept (without: ${CACHE_VARIABLE} or the user's cache)",
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


def _inspect(command: argparse.ArgumentParser) -> None:
    command.add_argument("path", metavar="PATH", help="adapter directory, bundle, .onnx or .engine file")


def _doctor(command: argparse.ArgumentParser) -> None:
    del command


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _shown(default: Any) -> str:
    return repr(default) if default == "" else str(default).lower() if isinstance(default, bool) else str(default)
