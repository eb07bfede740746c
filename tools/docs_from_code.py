"""Write the generated part of docs/architecture.md: one line per source file, from the first line of its docstring.

python tools/docs_from_code.py            rewrite the table
python tools/docs_from_code.py --check    exit 1 if it is not what the code says
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "architecture.md"
BEGIN, END = "<!-- files: written by tools/docs_from_code.py -->", "<!-- end of files -->"
ROOMS = ("server", "engine", "kernels", "chat_templates", "benchmarks", "tools")


def first_line(path: Path) -> str:
    """What a file says it is."""
    if path.suffix == ".jinja":
        return "The template of the family of this name."
    docstring = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    paragraph = docstring.split("\n\n", 1)[0].replace("\n", " ")
    head, dot, _ = paragraph.partition(". ")
    return (head + dot.strip()).replace("|", "\\|")


def table() -> str:
    """The rows, room by room."""
    root = PAGE.parent.parent
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py", "*.jinja"]
    names = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True).stdout.split()
    lines = []
    for room in ROOMS:
        lines += [f"\n### {room}/\n", "| file | what it is |", "| --- | --- |"]
        for name in sorted(names):
            path = root / name
            told = first_line(path) if name.startswith(room + "/") and path.exists() else ""
            if told:
                lines.append(f"| `{name}` | {told} |")
    return "\n".join(lines)


def main() -> int:
    """Rewrite or check the page."""
    text = PAGE.read_text("utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    wanted = f"{before}{BEGIN}\n{table()}\n\n{END}{after}"
    if "--check" in sys.argv:
        if text != wanted:
            print("docs/architecture.md is not what the code says; run: python tools/docs_from_code.py")
        return int(text != wanted)
    PAGE.write_text(wanted, "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
