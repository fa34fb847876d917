"""In: the notebook, the command line, the schemas. Out: pages that MkDocs makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent


def tutorial(notebook: dict[str, Any]) -> str:
    """Return the cells of a notebook as Markdown."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"]).replace("  # fmt: skip", "")
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    return "\n\n".join(parts) + "\n"


def command_line() -> str:
    """Return what --help says of every command, with its options in a table."""
    from typer.main import get_command

    from hirelc_deploy.cli import app

    found: list[str] = [
        "# Command line",
        "*This page answers: which commands and options are there?*",
        "Exit codes: 0 done, 1 the check says no, 2 bad input, 3 target not available, 4 the limits cannot be met, "
        "130 interrupted with results kept. One sentence on standard error says why. With `--json` standard output "
        "holds one JSON object alone; `hirelc-deploy schema COMMAND` prints its schema ([file formats](formats.md)).",
    ]

    def describe(command: Any, name: str) -> None:
        text = (command.help or "").replace("\b\n", "").replace("\b", "")
        text, _, example = text.partition("Example: ")
        found.extend([f"## {name}", text.strip()])
        if example:
            found.append(f"    {example.strip()}")
        rows = []
        for parameter in command.params:
            options = ", ".join(f"`{option}`" for option in [*parameter.opts, *parameter.secondary_opts])
            shown = f"`{parameter.name.upper()}`" if parameter.param_type_name == "argument" else options
            needed = "needed" if parameter.required else ""
            default = parameter.default if isinstance(parameter.default, int | float | str) else None
            if default is not None and not isinstance(default, bool) and not needed:
                needed = f"`{default}`"
            said = (getattr(parameter, "help", "") or "").replace("|", "\\|")
            rows.append(f"| {shown} | {said} | {needed} |")
        if rows:
            found.append("\n".join(["| option | what it says | default |", "| --- | --- | --- |", *rows]))
        for inner_name, inner in sorted(getattr(command, "commands", {}).items()):
            describe(inner, f"{name} {inner_name}")

    top = get_command(app)
    for name, command in sorted(top.commands.items()):  # type: ignore[attr-defined]
        describe(command, name)
    return "\n\n".join(found) + "\n"


def schemas() -> str:
    """Return every JSON schema, under its name."""
    from hirelc_deploy.schemas import NAMES, schema

    parts = ["## Schemas", "As `hirelc-deploy schema NAME` prints them."]
    for name in NAMES:
        value = schema(name)
        parts += [f"### {name}", value["description"], f"```json\n{json.dumps(value, indent=1)}\n```"]
    return "\n\n".join(parts) + "\n"


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made."""
    from mkdocs.structure.files import File

    notebook = json.loads((DOCS / "tutorial.ipynb").read_text("utf-8"))
    files.append(File.generated(config, "tutorial.md", content=tutorial(notebook)))
    files.append(File.generated(config, "cli.md", content=command_line()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put the schemas behind the page of file formats."""
    return f"{markdown}\n\n{schemas()}" if page.file.src_uri == "formats.md" else markdown
