"""The README tells the truth: its commands, flags, targets, links and names exist."""

from __future__ import annotations

import math
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from iapt_export.building.build_request import BuildRequest
from iapt_export.cli import command_line
from iapt_export.flags import method_settings
from trainers.decoder.backbone_sizes import Sizes
from trainers.methods.configs import config_of
from trainers.methods.forms import METHODS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
FIRST_SCREEN_LINES = 20
MAX_WORDS = 700
"""Tables and the picture included."""


def code_blocks(language: str, document: Path = ROOT / "README.md") -> list[str]:
    text = document.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def shell_commands() -> list[list[str]]:
    return [words for document in DOCUMENTS for words in commands_of(document)]


def commands_of(document: Path) -> list[list[str]]:
    """Every command of a document's shell blocks, as its words; quoted line breaks stay inside their word."""
    commands: list[list[str]] = []
    for block in code_blocks("sh", document):
        pending = ""
        for line in block.replace("\\\n", " ").splitlines():
            pending = f"{pending}\n{line}" if pending else line
            try:
                words = shlex.split(pending, comments=True)
            except ValueError:  # a quotation that goes on in the next line
                continue
            pending = ""
            if words:
                commands.append(words)
        assert not pending
    return commands


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))


def known_flags() -> dict[str, set[str]]:
    app = command_line("iapt")
    found = {name: app[name] for name in app if not name.startswith("-")}
    for name, group in [(name, command) for name, command in found.items() if command.default_command is None]:
        del found[name]  # a command of commands
        found |= {f"{name} {inner}": group[inner] for inner in group if not inner.startswith("-")}
    return {
        name: {flag for argument in command.assemble_argument_collection() for flag in argument.names}
        for name, command in found.items()
    }


def test_the_two_commands_stand_in_the_first_screen():
    first = "\n".join(README.splitlines()[:FIRST_SCREEN_LINES])
    assert "make demo" in first
    assert "make test" in first


@pytest.mark.parametrize("words", [words for words in shell_commands() if words[0] == "iapt-export"], ids=" ".join)
def test_commands_parse(words):
    method, _ = method_settings(words[2:])
    command, *_ = command_line(method).parse_args(words[1:])
    assert command.__name__ in words[1:3]


@pytest.mark.parametrize("words", [words for words in shell_commands() if words[0] == "optimum-cli"], ids=" ".join)
def test_commands_of_optimum_parse(words):
    ours = ["build", *words[3:]] if words[1:3] == ["export", "iapt"] else words[2:]
    command, *_ = command_line("iapt").parse_args(ours)
    assert command.__name__ == ours[0]


def test_every_command_is_shown_and_exists():
    texts = [document.read_text("utf-8") for document in DOCUMENTS]
    assert [name for name in known_flags() if not any(f"iapt-export {name}" in text for text in texts)] == []
    assert set(re.findall(r"iapt-export ([a-z]+)", README)) <= set(known_flags())


def test_the_readme_is_short():
    assert len(README.split()) <= MAX_WORDS


def test_flags_in_prose_exist():
    program = (ROOT / "engines" / "cpp" / "apps" / "iapt_run.cc").read_text(encoding="utf-8")
    flags = set.union(*known_flags().values(), re.findall(r"^  (--[a-z-]+)", program, flags=re.MULTILINE))
    for document in DOCUMENTS:
        mentioned = set(re.findall(r"`(--[a-z-]+)", document.read_text(encoding="utf-8")))
        assert mentioned <= flags, f"{document.name} mentions {mentioned - flags}"


def test_make_targets_exist():
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        named = set(re.findall(r"(?:`|^\s*|\()make ([a-z-]+)", text, flags=re.MULTILINE))
        assert named <= make_targets(), f"{document.name} names {named - make_targets()}"


def test_links_resolve():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_extras_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {name for group in re.findall(r"\[([a-z,-]+)\]\"", README) for name in group.split(",")}
    assert named
    assert named <= set(project["optional-dependencies"])


def test_python_example_runs(tiny_build, capsys):
    (example,) = code_blocks("python")
    for shown, tiny in (("bundle", str(tiny_build.bundle)), ("reviews", "alpha"), ("news", "beta")):
        assert f'"{shown}"' in example
        example = example.replace(f'"{shown}"', repr(tiny))
    exec(compile(example, "README.md", "exec"), {})
    rows = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line[:1].isdigit()}
    assert rows == {"0", "1"}


def test_python_example_of_training_and_building_asks_for_what_it_shows(monkeypatch):
    *_, example = code_blocks("python", ROOT / "docs" / "start.md")
    asked = []
    monkeypatch.setattr("trainers.train", asked.append, raising=False)
    monkeypatch.setattr("iapt_export.build", asked.append, raising=False)
    exec(compile(example, "README.md", "exec"), {})
    training, building = asked
    assert building == BuildRequest(model=training.model, adapters=[training.output], output="bundle")
    assert training.config.num_epochs == 1 and training.data == "reviews.jsonl"


def test_the_choice_of_weights_follows_from_the_benchmark():
    """Its figures are rounded, so a new measurement need not be copied; one that changes the choice must be."""
    choose, speed = ((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("choose", "benchmarks"))
    cases = r"^\| ours, no tenant(?:, (int[48]))? \| ([18]) \| \d+ \| [\d.]+ \| (\d+) \| (\d+) \|$"
    measured = {
        (dtype or "fp32", rows): (int(tokens), int(memory))
        for dtype, rows, tokens, memory in re.findall(cases, speed, flags=re.MULTILINE)
    }
    stated = re.findall(
        r"^\| `onnxruntime:(\w+)` \| [^|]+\| ([\d.]+), ([\d.]+) \| (\d+) MiB", choose, flags=re.MULTILINE
    )
    assert [dtype for dtype, *_ in stated] == ["fp32", "int8", "int4"]
    for dtype, *speeds, memory in stated:
        for rows, speed_up in zip("18", speeds, strict=True):
            found = measured[dtype, rows][0] / measured["fp32", rows][0]
            assert float(speed_up) == pytest.approx(found, rel=0.15), (dtype, rows)
        assert int(memory) == pytest.approx(measured[dtype, "1"][1], rel=0.15), dtype


def test_the_methods_table_ranks_as_the_comparison_does():
    choose, results = ((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("choose", "results"))
    table = results.split("<!-- table comparison -->")[1].split("<!-- end -->")[0]
    ranks = dict(re.findall(r"^\| ([A-Z][^|]+) \|.*\| ([\d.]+) \|$", table, flags=re.MULTILINE))
    names = {"P-tuning v2": "prefix-tuning", "LAMP (our reading)": "lamp"}
    wanted = {names.get(name, name.lower()): rank for name, rank in ranks.items() if "tokens" not in name}
    wanted["prompt-tuning"] = " to ".join(sorted(rank for name, rank in ranks.items() if "tokens" in name))
    stated = re.findall(r"^\| `([a-z-]+)` \| [^|]+ \| ([\d. to]+) \|", choose, flags=re.MULTILINE)
    assert dict(stated) == wanted


def test_the_methods_table_counts_the_parameters_of_smollm2():
    table = (ROOT / "docs" / "choose.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z-]+)` \|.*\| ([\d,]+) \|$", table, flags=re.MULTILINE)
    width, inner, keys = 576, 1536, 192
    linears = {"self_attn.q_proj": (width, width), "self_attn.v_proj": (width, keys), "mlp.up_proj": (width, inner)}
    sizes = Sizes(width, 30, 3, 64, 49152, linears)
    assert len(rows) == len(METHODS)
    for name, stated in rows:
        config = config_of(name)()
        method = METHODS[name.upper().replace("-", "_")]
        counted = sum(math.prod(shape) for shape in method.shapes(config, sizes).values())
        assert int(stated.replace(",", "")) == counted, name
