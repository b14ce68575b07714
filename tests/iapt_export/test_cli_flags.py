"""The command line's flags: what help teaches, what is refused as a wrong flag, what a settings file says."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import iapt_export
from iapt_export.building.build_request import BuildRequest
from iapt_export.cli import command_line
from iapt_export.contract.errors import IaptError
from iapt_export.contract.settings import summary_of
from iapt_export.flags import method_settings, with_values
from tests.bundles import run
from tests.thorough import default_for
from trainers.methods.configs import METHOD_CONFIGS, LoRAConfig, flag_name
from trainers.training import card
from trainers.training.config import TrainConfig, TrainPlaces, TrainRequest

ROOT = Path(iapt_export.__file__).resolve().parent.parent
TRAIN = ("train", "--model=m", "--data=d", "--output=o")
COMMANDS = {
    "train": ("--model -m M", "--data FILE.jsonl", "--output -o", "--config", "--prompt-length", "--learning-rate"),
    "data convert": ("SOURCE", "--format CHOICE", "--output -o FILE.jsonl", "--column NAME=COLUMN", "--every-answer"),
    "build": ("--model -m M", "--adapter -a [NAME=]DIR", "--output -o BUNDLE", "--target -t", "--opset", "--cache DIR"),
    "validate": ("BUNDLE", "--model -m M", "--report", "--seed", "--new-tokens", "--bisect", "--case"),
    "generate": ("BUNDLE", "--tenant NAME", "--prompt TEXT", "--max-new-tokens N", "--top-p", "[choices: cpu, cuda]"),
    "tenant": ("ADAPTER", "--bundle", "--output -o FILE.safetensors", "--peft-prompt-format", "--trust-remote-code"),
    "bench": ("BUNDLE", "--rows N... Rows that run at once, one table line each. [default: 1,8]", "--plot FILE.png"),
    "inspect": ("PATH", "Adapter directory, bundle, .onnx or .engine"),
    "plan": ("PATH", "--batch ROWS", "--past ENTRIES", "--tenants N", "--target T[:DTYPE]", "--method NAME"),
    "cache": ("finished stages that builds go on from", "20GB"),
    "doctor": ("what this machine can build and run",),
}


def wrapped(text: str) -> str:
    return " ".join(text.split())


def test_help_shows_every_command_a_first_run_and_the_exit_codes() -> None:
    shown = run("--help")
    assert shown.code == 0
    for command in COMMANDS:
        assert f"\n  {command.split()[0]} " in shown.out
    assert "A first run:" in shown.out and "iapt-export doctor" in shown.out
    assert "0 success · 1 bad input or damaged files · 2 wrong flags 3 an export differs" in wrapped(shown.out)
    assert "--install-completion" in shown.out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_teaches(command: str) -> None:
    shown = run(*command.split(), "--help")
    assert (shown.code, shown.err) == (0, "")
    for text in (*COMMANDS[command], "--json", "--quiet", "--verbose -v", "--debug"):
        assert text in wrapped(shown.out)
    assert not re.search(r"default: (None|False|\(|\])", shown.out) and "--prove" not in shown.out


def settings_of_train(method: str) -> dict[str, Any]:
    arguments = command_line(method)["train"].assemble_argument_collection(parse_docstring=True)
    return {argument.field_info.name: argument for argument in arguments if argument.field_info.name}


@pytest.mark.parametrize("name", METHOD_CONFIGS)
def test_help_of_train_explains_every_setting_of_the_method_asked_for(name: str) -> None:
    asked = [] if name == "IAPT" else ["--method", flag_name(name)]
    shown = wrapped(run("train", *asked, "--help").out)
    arguments = settings_of_train(flag_name(name))
    for field in (field for cls in (METHOD_CONFIGS[name], TrainConfig) for field in dataclasses.fields(cls)):
        text = arguments[field.name].parameter.help
        assert text.endswith(".") and len(text) < 140 and "\n" not in text
        assert f"--{field.name.replace('_', '-')} " in shown
        assert text[:12] in shown
    for other, cls in METHOD_CONFIGS.items():
        assert summary_of(cls)[:40] in shown
        assert (f" {flag_name(other)} {summary_of(cls)[:20]}" in shown) == (other != name), "the others, a line each"
    assert ("--bottleneck" in shown) == (name in ("IAPT", "ADEPT"))


def test_help_needs_no_torch() -> None:
    code = (
        "import atexit, sys\nfrom iapt_export.cli import main\n"
        "atexit.register(lambda: print('loaded', [name for name in ('torch', 'transformers', 'onnx', 'numpy', 'yaml') "
        "if name in sys.modules]))\nmain(['train', '--method', 'lora', '--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--target-modules" in done.stdout and done.stdout.endswith("loaded []\n")


def test_version_and_module_agree() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "iapt_export", "--version"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"iapt-export {iapt_export.__version__}\n" == run("--version").out


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (
            [],
            "iapt-export needs a command: train, build, validate, generate, serve, triton, tenant, bench, inspect",
        ),
        (["export"], 'Unknown command "export". Available commands: train, build'),
        (["build"], "iapt-export build needs --model, --output; --model is missing"),
        (["build", "-mm", "--adapter=a"], "--output is missing"),
        (["build", "--model=m", "-a=a", "-o=o", "--opset=new"], 'value for --opset: unable to convert "new" into int'),
        (["build", "--model=m", "-a=a", "-o=o", "--seed=1.5"], 'value for --seed: unable to convert "1.5" into int'),
        (
            ["generate", "b", "--tenant=x", "--prompt=a", "--tenant=y", "--prompt=b"],
            "--tenant is given twice; rows of several tenants are asked for with --requests FILE.jsonl",
        ),
        (["generate", "bundle"], "expected one of --prompt, --messages, --requests, found none of them"),
        (["validate", "bundle", "--device=tpu"], 'Invalid value "tpu" for --device. Choose from: "cpu", "cuda"'),
        (["validate", "bundle", "--new-token=3"], "Unknown option: --new-token. Did you mean --new-tokens?"),
        (["inspect"], "iapt-export inspect needs PATH; PATH is missing"),
        (["doctor", "--colour"], "Unknown option: --colour"),
        (["doctor", "here"], "'here' belongs to no flag"),
        (["bench", "bundle", "--rows"], "--rows needs a value"),
        (["bench", "bundle", "--rows", "2", "0"], 'Invalid value "0" for --rows. Must be > 0'),
        ([*TRAIN, "--method=qlora"], 'Invalid value "qlora" for --method. Choose from: "iapt", "adept"'),
        (
            [*TRAIN, "--method=lora", "--bottleneck=8"],
            "--bottleneck is a setting of --method iapt or adept, not of lora",
        ),
        ([*TRAIN, "--no-rslora"], "--no-rslora is a setting of --method lora, not of iapt"),
        ([*TRAIN, "--bottleneck=wide"], 'Invalid value for --bottleneck: unable to convert "wide" into int'),
        (["train", "--method"], "--method needs a value"),
        (["train"], "--model, --data, --output; --model is missing"),
    ],
)
def test_wrong_flags(argv: list[str], text: str) -> None:
    outcome = run(*argv)
    assert (outcome.code, outcome.out) == (2, "")
    assert text in outcome.err
    command = " ".join(["iapt-export", *argv[:1]]) if argv[:1] != ["export"] else "iapt-export"
    assert outcome.err.startswith("iapt-export: error: ") and outcome.err.endswith(f" (see {command} --help)\n")
    assert outcome.err.count("\n") == 1


def asked_of(argv: list[str]) -> dict[str, Any]:
    _, bound, _ = command_line("iapt").parse_args(with_values(argv))
    return bound.arguments


def test_flags_are_read_as_they_were_written() -> None:
    prompts = ['["a", "b"]', "[INST] hi", '{"a": 1}', "null", "true", "- one\n- two", "--- = ---", "-5 degrees"]
    words = [word for prompt in prompts for word in ("--prompt", prompt)]
    asked = asked_of(["generate", "b", "--tenant=none", *words, "--temperature", "-1", "--seed=1", "--seed=2"])
    assert asked["asked"].prompt == prompts, "no text is taken for JSON, or for nothing"
    assert (asked["asked"].tenant, asked["asked"].temperature, asked["asked"].seed) == ("none", -1.0, 2)
    assert asked_of(["inspect", "--", "true"])["path"] == Path("true")
    asked = asked_of([*TRAIN, "--bias", "false", "--resume", "True", "--no-baseline", "--scale"])
    assert not asked["settings"].bias and asked["settings"].scale
    assert asked["config"].resume and not asked["config"].baseline
    asked = asked_of(["build", "-mm", "-a", "x=y", "-a", "z", "-o", "true", "-t", "onnxruntime:int8", "-t", "tensorrt"])
    for wrong, text in (
        ({"model": Path("m")}, "model=PosixPath('m') is not text"),
        ({"batch": 4}, "batch=4 is not text"),
    ):
        with pytest.raises(IaptError, match=re.escape(text)):
            BuildRequest(**{"model": "m", "output": "o"} | wrong)  # type: ignore[arg-type]
    request = BuildRequest(model="m", adapters=["x=y", "z"], output="true", targets=["onnxruntime:int8", "tensorrt"])
    assert asked["request"] == request
    asked = asked_of(["bench", "b", "--rows", "1", "2", "-o", "found.json"])
    assert asked["asked"].rows == (1, 2) and asked["asked"].output == Path("found.json")


def test_train_reads_a_settings_file(tmp_path: Path) -> None:
    config = tmp_path / "train.yaml"
    config.write_text("model: m\nbottleneck: 8\n")
    outcome = run("train", f"--config={config}")
    assert (outcome.code, outcome.out) == (2, "") and "--data is missing (" in outcome.err
    for text, wanted in (
        ("colour: blue", "unknown field colour; known fields are activation, "),
        ("bottleneck: wide", f'value for [bottleneck] from {config}: unable to convert "wide" into int'),
        ("batch_size: 1.5", f'value for [batch_size] from {config}: unable to convert "1.5" into int'),
        ("bias: maybe", f'value for [bias] from {config}: unable to convert "maybe" into bool'),
        ("scheduler: step", 'Invalid value "step" for [scheduler]'),
        ("rank: 3", f"{config}: rank is a setting of --method lopa or lamp or dept or lora, not of iapt"),
        ("prompt_length: 0", "prompt_length=0 is not an integer from 1 to 1024"),
        ("method: qlora", "method 'qlora' is not known; use one of iapt, adept"),
    ):
        config.write_text(f"model: m\ndata: d\noutput: o\n{text}\n")
        outcome = run("train", f"--config={config}")
        assert outcome.code == 1 and wanted in outcome.err, outcome.err
    outcome = run("train", f"--config={tmp_path / 'none.yaml'}")
    assert outcome.code == 1 and "none.yaml does not exist; expected YAML" in outcome.err


@pytest.mark.parametrize("method", default_for(("IAPT", "LORA").__contains__, METHOD_CONFIGS))
def test_an_example_file_is_read_back(tmp_path: Path, method: str) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    assert run("train", f"--method={flag_name(method)}", f"--write-config={first}", "--max-steps=7").code == 0
    text = first.read_text(encoding="utf-8")
    fields = {
        field.name for cls in (TrainPlaces, METHOD_CONFIGS[method], TrainConfig) for field in dataclasses.fields(cls)
    }
    assert set(yaml.safe_load(text)) == {"method", *fields}
    assert "\n# Optimiser steps; 0 leaves it to num_epochs.\nmax_steps: 7\n" in text
    assert text.count("\n# ") >= len(fields) + 1 and "# None" not in text
    again = run("train", f"--config={first}", f"--write-config={second}")
    assert again.code == 0 and f"when it is edited: iapt-export train --config {second}" in again.err
    assert second.read_text(encoding="utf-8") == text
    for path, why in ((first, "exists and is not replaced"), (tmp_path / "no/file", "there is no folder")):
        refused = run("train", f"--write-config={path}")
        assert refused.code == 1 and why in refused.err
    assert first.read_text(encoding="utf-8") == text


def test_the_method_of_a_settings_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file's method decides which flags there are, unless a flag names another."""
    asked: list[Any] = []

    def train(request: TrainRequest, **_: Any) -> Any:
        asked.append(request.method)
        raise IaptError("enough seen")

    monkeypatch.setattr("trainers.training.train.train", train)
    config = tmp_path / "train.yaml"
    config.write_text("model: m\ndata: d\noutput: o\nmethod: lopa\n")
    for flags, method in (
        (["--head-width=3"], METHOD_CONFIGS["LOPA"](head_width=3)),
        (["--method=prefix-tuning", "--projection=true"], METHOD_CONFIGS["PREFIX_TUNING"](projection=True)),
        (["--method", "lora", "--target-modules=q_proj,o_proj"], LoRAConfig(target_modules=("q_proj", "o_proj"))),
        (["--method=iapt"], METHOD_CONFIGS["IAPT"]()),
    ):
        outcome = run("train", f"--config={config}", *flags)
        assert "enough seen" in outcome.err, outcome.err
        assert asked.pop() == method
    config.write_text("model: m\ndata: d\noutput: o\nmethod: qlora\n")
    outcome = run("train", f"--config={config}")
    assert outcome.code == 1 and "method 'qlora' is not known; use one of iapt, adept" in outcome.err
    config.write_text("model: m\ndata: d\noutput: o\nmethod: lopa\nbottleneck: 3\n")
    text = "bottleneck is a setting of --method iapt or adept, not of lopa"
    assert text in run("train", f"--config={config}").err
    config.write_text(
        "model: m\ndata: d\noutput: o\nmethod: lora\ntarget_modules: [q_proj, o_proj]\nlearning_rate: 1e-3\n"
    )
    run("train", f"--config={config}", "--alpha=4")
    assert asked.pop() == LoRAConfig(target_modules=("q_proj", "o_proj"), alpha=4.0)


def test_the_command_in_a_model_card_asks_for_the_same_run() -> None:
    method = LoRAConfig(rslora=True, target_modules=("q_proj", "o_proj"))
    config = TrainConfig(baseline=False, group_by_length=False, learning_rate=1e-3, scheduler="cosine", max_steps=9)
    adapter = SimpleNamespace(method=method, peft_type="LORA")
    ran: Any = SimpleNamespace(model_name="m", data="d.jsonl", output="o", adapter=adapter, config=config)
    words = with_values(shlex.split(card.command_line(ran))[1:])
    _, bound, _ = command_line(method_settings(words[1:])[0]).parse_args(words)
    places = TrainPlaces("m", "d.jsonl", "o")
    assert (bound.arguments["places"], bound.arguments["settings"], bound.arguments["config"]) == (
        places,
        method,
        config,
    )


def test_completion_is_installed_where_the_shell_looks(tmp_path: Path) -> None:
    environment = {**os.environ, "HOME": str(tmp_path)}
    argv = [sys.executable, "-m", "iapt_export", "--install-completion", "--shell", "bash"]
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    (script,) = (path for path in tmp_path.rglob("iapt-export") if path.is_file())
    assert "--max-new-tokens" in script.read_text(encoding="utf-8") and str(script) in done.stdout.replace("\n", "")
