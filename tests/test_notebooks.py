"""The notebooks run as a user would run them, on a tiny model; and what they show was seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bundles import TinyBuild

nbformat = pytest.importorskip("nbformat", reason="needs the extra docs")

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
MOST_BYTES = 150_000
SECONDS = 1200


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tiny_build: TinyBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = pytest.importorskip("nbclient", reason="needs the extra dev")
    if "peft" in path.stem:
        pytest.importorskip("peft", reason="makes an adapter with it")
    notebook = nbformat.read(path, as_version=4)
    (parameter,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert parameter.source.startswith('MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"')
    parameter.source = f"MODEL = {str(tiny_build.model)!r}"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IAPT_EXPORT_CACHE", str(tmp_path / "cache"))
    client.NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    plots = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    if "peft" in path.stem:
        assert "pass" in said and "the same tokens as PEFT" in said
    else:
        assert "pass ['reviews']" in said and len(plots) == 3
    assert (tmp_path / "bundle" / "report.html").is_file()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_keeps_what_was_seen_and_no_more(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert outputs and path.stat().st_size < MOST_BYTES
    text = "".join(output.get("text", "") for output in outputs)
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)
    assert "pass" in text and "/" + "home/" not in text and "/" + "tmp/" not in text


def test_there_are_two() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["bring_a_peft_adapter", "train_and_serve"]
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert all(f"notebooks/{path.name}" in site for path in NOTEBOOKS)
