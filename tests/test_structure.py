"""The house rules that a program can check: import arrows, light imports, sizes."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import trainers
from trainers.methods.configs import METHOD_CONFIGS

ROOT = Path(trainers.__file__).resolve().parent.parent
"""Where the packages are, also where a wheel of them is installed and the tests stand elsewhere."""
PACKAGES = ("trainers", "iapt_export", "engines", "validation")
CONTRACT = "iapt_export.contract"
ALLOWED = {
    "trainers": (CONTRACT, "trainers"),
    "iapt_export": ("trainers", "iapt_export"),
    "engines": (CONTRACT, "engines"),
    "validation": PACKAGES,
}
"""Package to the modules of this project that it may import: the contract, itself and what stands to its left."""
ROOF = {
    "iapt_export.cli": "iapt_export.__main__",
    "iapt_export.building.build": "iapt_export.cli",
    "iapt_export.building.jobs": "iapt_export.building.build",
    "iapt_export.building.rounding_search": "iapt_export.building.build",
}
"""The modules that may look right, each with the only one that may import it."""
ROOMS = {
    "trainers": ("decoder", "methods", "adapters", "training"),
    "iapt_export": ("contract", "graphs", "building"),
    "engines": ("onnxruntime", "openvino", "tensorrt", "cuda", "serving", "http", "triton"),
    "validation": ("sides", "judging", "locating", "reporting"),
}
"""The folders of each package; docs/architecture.md says what is in which."""
DOORS = {
    "trainers.decoder": "attention backbone backbone_sizes family generate importance insertion instruction method "
    "quantise rounded scaled stored streamed",
    "trainers.methods": "configs forms lora prefix_tuning rational",
    "trainers.adapters": "adapter directory peft_format",
    "trainers.training": "config convert train",
    "iapt_export.contract": "disk errors graphs integrity kinds low_bits manifest places probes prompt_format "
    "resources schema settings sizes tenant_card types weights_header",
    "iapt_export.graphs": "export installed interface ops passes save table",
    "iapt_export.building": "build build_request footprint layout plan stage_cache tenant_file",
    "engines.onnxruntime": "cores devices runner",
    "engines.openvino": "runner",
    "engines.tensorrt": "builder engine_info flavour runner",
    "engines.cuda": "driver libraries memory",
    "engines.serving": "conversation generation grammar loading request sampling session stepper tenants text",
    "engines.http": "server",
    "engines.triton": "repository",
    "validation.sides": "cases engine_graphs peft_side portable recording reference rounding stepping taps truth",
    "validation.judging": "compare engine_interface metrics peft result shipped tolerances",
    "validation.locating": "locate",
    "validation.reporting": "junit report summary",
}
"""The files (or folders) of a room that may be imported from outside it; all others are its own business."""
MAX_ROOM_ARROWS = {"trainers": 6, "iapt_export": 15, "engines": 18, "validation": 15}
"""Pairs of rooms (or of files beside the rooms) in a package of which one imports the other, at most."""
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
MAX_PARAMETERS = 8

SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
OTHERS = ("tests", "examples", "benchmarks", "optimum")
EVERYTHING = sorted([*SOURCES, *(path for folder in OTHERS for path in (ROOT / folder).rglob("*.py"))])


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """Every imported module with its line; ``from a import b`` counts as ``a.b`` where that is a module."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                location = ROOT / full.replace(".", "/")
                yield node.lineno, full if location.with_suffix(".py").is_file() or location.is_dir() else base


def arrow_violations(path: Path) -> list[str]:
    importer = module_name(path)
    problems = []
    for line, name in imported_modules(path):
        if name.split(".")[0] not in PACKAGES:
            continue
        if ROOF.get(name, importer) != importer:
            problems.append(f"{path.relative_to(ROOT)}:{line} imports {name}, which only {ROOF[name]} may")
        allowed = PACKAGES if importer in ROOF else ALLOWED[importer.split(".")[0]]
        # A bare package holds nothing but its docstring and version, so importing it crosses no wall by itself.
        if not any(is_within(name, module) for module in allowed):
            problems.append(f"{path.relative_to(ROOT)}:{line} imports {name}; allowed are {', '.join(allowed)}")
    return problems


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def num_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    arguments = function.args
    names = [item.arg for item in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]]
    return len([name for name in names if name not in ("self", "cls")])


def test_imports_point_left():
    problems = [problem for path in SOURCES for problem in arrow_violations(path)]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("importer", "line", "is_wrong"),
    [
        ("trainers/fake.py", "import iapt_export.graphs.twins", True),
        ("trainers/fake.py", "import iapt_export.contract.errors", False),
        ("trainers/fake.py", "from trainers.training import config", False),
        ("iapt_export/fake.py", "from engines.runner import Runner", True),
        ("iapt_export/fake.py", "def f():\n    import validation.compare", True),
        ("iapt_export/fake.py", "from iapt_export import cli", True),
        ("iapt_export/fake.py", "from . import cli", True),
        ("iapt_export/fake.py", "from trainers.methods.iapt import IAPT", False),
        ("iapt_export/__main__.py", "from iapt_export.cli import main", False),
        ("iapt_export/cli.py", "from iapt_export.building.build import build", False),
        ("iapt_export/fake.py", "from iapt_export.building.build import build", True),
        ("engines/fake.py", "from iapt_export.graphs import twins", True),
        ("engines/fake.py", "from iapt_export.contract.manifest import GraphSpec", False),
        ("engines/fake.py", "import trainers.training.config", True),
        ("validation/fake.py", "import engines.serving.session, trainers.decoder.generate", False),
    ],
)
def test_the_arrow_test_sees_what_it_should(importer, line, is_wrong, tmp_path, monkeypatch):
    for module in (
        "iapt_export/cli.py",
        "iapt_export/building/build.py",
        "iapt_export/graphs/twins.py",
        "iapt_export/contract/manifest.py",
        "trainers/training/config.py",
    ):
        (tmp_path / module).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / module).touch()
    path = tmp_path / importer
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(line, encoding="utf-8")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert bool(arrow_violations(path)) == is_wrong


def test_nobody_asks_a_method_for_its_name() -> None:
    """What a method does differently is a field or hook of `trainers.decoder.method.Method`, not a test elsewhere."""
    names = {name for name in METHOD_CONFIGS if name != "IAPT"}  # which is a name of the project, too
    for path in [path for path in SOURCES if module_name(path).split(".")[0] != "trainers"]:
        for line, module in imported_modules(path):
            if is_within(module, "trainers.methods"):
                assert module.rpartition(".")[2] in ("configs", "forms", "rational"), f"{path}:{line}"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not isinstance(node, ast.Constant) or node.value not in names, f"{path}:{node.lineno}"


def import_graph() -> dict[str, set[str]]:
    """Every module of the packages and of the benchmarks to those of them that it imports."""
    paths = [*SOURCES, *(ROOT / "benchmarks").rglob("*.py")]
    names = {module_name(path): path for path in paths}
    return {name: {found for _, found in imported_modules(path)} & names.keys() for name, path in names.items()}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """One list for each circle that a depth-first walk runs into."""
    found: list[list[str]] = []
    finished: set[str] = set()

    def walk(name: str, trail: list[str]) -> None:
        if name in trail:
            found.append([*trail[trail.index(name) :], name])
        elif name not in finished:
            for other in sorted(graph.get(name, ())):
                walk(other, [*trail, name])
            finished.add(name)

    for name in sorted(graph):
        walk(name, [])
    return found


def room(name: str) -> str:
    """The room of a module, or its own name where it stands beside the rooms."""
    package, *rest = name.split(".")
    return f"{package}.{rest[0]}" if rest else package


def room_graph(package: str) -> dict[str, set[str]]:
    graph: dict[str, set[str]] = {}
    for name, others in import_graph().items():
        if name.split(".")[0] == package:
            own = {room(other) for other in others if other.split(".")[0] == package}
            graph.setdefault(room(name), set()).update(own - {room(name), package})
    return graph


def test_no_circle_between_files():
    found = circles(import_graph())
    assert not found, "; ".join(" -> ".join(circle) for circle in found)


def test_the_circle_test_sees_one():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c", "b"]]


@pytest.mark.parametrize("package", PACKAGES)
def test_rooms_form_no_circle_and_few_arrows(package):
    graph = room_graph(package)
    assert not circles(graph)
    arrows = [f"{name} -> {other}" for name, others in sorted(graph.items()) for other in sorted(others)]
    assert len(arrows) <= MAX_ROOM_ARROWS[package], f"{len(arrows)} arrows: {', '.join(arrows)}"


def used_doors() -> dict[str, set[str]]:
    """Room to the files and folders of it that somebody outside imports."""
    used: dict[str, set[str]] = {name: set() for name in DOORS}
    for importer, others in import_graph().items():
        for name in others:
            if (
                room(name) in used
                and room(name) not in (room(importer), name)
                and not importer.startswith("benchmarks")
            ):
                used[room(name)].add(name.split(".")[2])
    return used


def test_rooms_are_entered_by_their_doors():
    assert DOORS.keys() == {f"{package}.{name}" for package, names in ROOMS.items() for name in names}
    assert {name: " ".join(sorted(files)) for name, files in used_doors().items()} == DOORS


@pytest.mark.parametrize("package", PACKAGES)
def test_rooms_are_those_that_are_described(package):
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    folders = {path.name for path in (ROOT / package).iterdir() if (path / "__init__.py").is_file()}
    assert folders == set(ROOMS[package])
    undescribed = [name for name in ROOMS[package] if f"`{package}/{name}/`" not in page and f"`{name}/`" not in page]
    assert not undescribed


def test_a_file_name_means_one_thing():
    homes: dict[str, set[str]] = {}
    for path in SOURCES:
        if path.name != "__init__.py":
            homes.setdefault(path.name, set()).add(path.relative_to(ROOT).parts[0])
    shared = {name: sorted(packages) for name, packages in homes.items() if len(packages) > 1}
    assert not shared, f"the same file name in several packages: {shared}"


@pytest.mark.parametrize(
    "module",
    [
        "iapt_export",
        "iapt_export.contract.manifest",
        "trainers",
        "trainers.adapters.adapter",
        "iapt_export.building.tenant_file",
        "engines",
        "engines.runner",
        "validation",
        "validation.judging.result",
    ],
)
def test_import_is_light(module):
    heavy = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "tensorrt", "tensorrt_rtx", "matplotlib")
    code = f"import sys, {module}; print(*[name for name in {heavy!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_manifest_and_errors_need_the_standard_library_alone():
    code = "import sys, iapt_export.contract.manifest; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    result = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, env={}
    )
    foreign = set(result.stdout.split()) - set(sys.stdlib_module_names) - set(PACKAGES) - {"__main__"}
    assert not {name for name in foreign if not name.startswith("_")}


def test_files_have_one_subject():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in EVERYTHING}
    long = [f"{path.relative_to(ROOT)}: {length}" for path, length in lengths.items() if length > MAX_FILE_LINES]
    assert not long, f"more than {MAX_FILE_LINES} lines; split by subject: {', '.join(long)}"


def test_functions_fit_on_a_screen():
    long = []
    for path in EVERYTHING:
        for function in functions(path):
            length = (function.end_lineno or function.lineno) - function.lineno + 1
            if length > MAX_FUNCTION_LINES:
                long.append(f"{path.relative_to(ROOT)}:{function.lineno} {function.name}: {length}")
    assert not long, f"more than {MAX_FUNCTION_LINES} lines: {', '.join(long)}"


def test_functions_take_few_parameters():
    wide = [
        f"{path.relative_to(ROOT)}:{function.lineno} {function.name}: {num_parameters(function)}"
        for path in SOURCES
        for function in functions(path)
        if num_parameters(function) > MAX_PARAMETERS
    ]
    assert not wide, f"more than {MAX_PARAMETERS} parameters; make a dataclass: {', '.join(wide)}"


def test_no_script_stands_for_a_module_of_python():
    """``python benchmarks/x.py`` looks for every import beside x first: an ``http.py`` there breaks torch's."""
    scripts = [path for path in EVERYTHING if path.relative_to(ROOT).parts[0] in ("benchmarks", "examples")]
    assert scripts
    assert not [str(path.relative_to(ROOT)) for path in scripts if path.stem in sys.stdlib_module_names]


def test_no_drawer_for_odds_and_ends():
    drawers = [str(path.relative_to(ROOT)) for path in SOURCES if path.stem in ("utils", "util", "helpers", "common")]
    assert not drawers, f"a helper lives beside its user or in a file named after what it does: {drawers}"
