"""The tree of docs/contributing.md: `python .ci/tree.py` writes it, from the first sentence of each file.

That is a module's docstring, or a comment at the top in C and in a page. Empty files are left out.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE, BEGIN, END = ROOT / "docs/contributing.md", "<!-- tree -->\n", "<!-- end of tree -->\n"
SENTENCE = re.compile(r"(.+?)(?:\.?$|(?<!\.)\.\s)", re.S)
COMMENT = re.compile(r"(?:/\*|<!--)(.+?)(?:\*/|-->)", re.S)
KINDS = (".py", ".c", ".h", ".cu", ".html")


def sentence_of(path: Path) -> str:
    """The first sentence that a file says of itself."""
    text = path.read_text()
    said = ast.get_docstring(ast.parse(text)) if path.suffix == ".py" else COMMENT.search(text)[1]
    return " ".join(SENTENCE.match(said.strip())[1].split())


def tree() -> str:
    """A line for each file of the package, the files of a folder before the folders in it."""
    paths = [path.relative_to(ROOT) for path in (ROOT / "tnt_jax").rglob("*") if path.suffix in KINDS]
    lines, folders = [], set()
    for path in sorted(paths, key=lambda path: [(part != path.name, part) for part in path.parts]):
        if not (ROOT / path).stat().st_size:
            continue
        for folder in reversed(path.parents[:-1]):
            if folder not in folders:
                folders.add(folder)
                lines.append(f"{'  ' * (len(folder.parts) - 1)}{folder.name}/")
        lines.append(f"{'  ' * (len(path.parts) - 1) + path.name:<36}{sentence_of(ROOT / path)}")
    return "\n".join(lines) + "\n"


def page() -> str:
    """The page with the tree as it is now."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    return f"{before}{BEGIN}```text\n{tree()}```\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page())
