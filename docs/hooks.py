"""What MkDocs does not know by itself: the command line's own help, and links to files that are no pages."""

from __future__ import annotations

import json
import re
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from iapt_export.cli import command_line
from iapt_export.schemas import schemas
from trainers.methods.forms import METHODS

MARK = "<!-- commands -->"
METHODS_MARK = "<!-- methods -->"
SCHEMAS_MARK = "<!-- schemas -->"
MORE, LESS = ("models.md", "start.md", "serving.md"), ("reference/python.md", "decisions.md")
"""Pages that stand before others in what the search finds, and behind them."""


def on_files(files: Files, config: Any) -> Files:
    """Lay the JSON Schemas beside the page that names them."""
    for name, schema in schemas().items():
        text = json.dumps(schema, indent=2) + "\n"
        files.append(File.generated(config, f"reference/schemas/{name}", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Write what the marks stand for; a link out of the folder becomes the file's name."""
    name = page.file.src_uri
    page.meta["search"] = {"boost": 10 if name == "choose.md" else 3 if name in MORE else 0.3 if name in LESS else 1}
    if MARK in markdown:
        markdown = markdown.replace(MARK, commands())
    if METHODS_MARK in markdown:
        markdown = markdown.replace(METHODS_MARK, "\n".join(settings(name) for name in METHODS))
    if SCHEMAS_MARK in markdown:
        titles = {name: schema["title"] for name, schema in schemas().items()}
        rows = [f"- [{name}](schemas/{name}): {title}" for name, title in titles.items()]
        markdown = markdown.replace(SCHEMAS_MARK, "\n".join(rows))
    return re.sub(r"\[([^]]+)\]\((?:\.\./)+([^)]+)\)", r"\1 (`\2`)", markdown)


def commands() -> str:
    """Each command with its parameters, as ``--help`` has them."""
    text = command_line("iapt").generate_docs()
    text = text[text.index("## iapt-export train") :]
    start, end = text.index("**Method**:"), text.index("**Training**:")  # other methods have other settings
    return text[:start] + "Each method has [settings of its own](#settings-of-each-method).\n\n" + text[end:]


def settings(name: str) -> str:
    """A method's settings."""
    shown = name.lower().replace("_", "-")
    text = command_line(shown).generate_docs()
    text = text[text.index("**Method**:") + len("**Method**:") : text.index("**Training**:")].strip()
    first, _, rest = text.partition("\n\n")
    table = rest[rest.index("* `--") :] if "* `--" in rest else rest
    return f"### `--method {shown}`\n\n{first}\n\n{table}\n"
