"""Our own figures: files in benchmarks/results/, and the tables that pages have of them.

    python benchmarks/results.py               writes every table into its page
    python benchmarks/results.py take NAME     runs the command of a file again and keeps the tables that it prints
    python benchmarks/results.py take NAME --command "python benchmarks/x.py" --sources benchmarks/x.py

The first line of a file says what was run: the command, the date, versions, the machine in words, and the sources with
a hash of their code, in which comments and docstrings do not count. Sources are the benchmark, of kernels their files
as well, and of a run its configuration. Then come the tables, each with a line of columns and a line for each row. In a
page a table stands between `<!-- results: NAME -->` and `<!-- end of results -->`; tables of several names that have
the same columns are one. tests/test_results.py fails where page and file differ, or where the code is no longer that
which was run: then run it again, or take the table out.
"""

import argparse
import ast
import contextlib
import datetime
import hashlib
import importlib.metadata
import io
import json
import os
import pathlib
import platform
import re
import subprocess
import tokenize

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks/results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?<=^<!-- results: )([\w -]+?)( -->\n).*?(?=^<!-- end of results -->$)", re.M | re.S)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
Table = list[list[str]]  # columns first


def code_of(text: str, name: str) -> str:
    """The lines of a source without its comments, its docstrings and what is empty."""
    if not name.endswith(".py"):
        text = re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.S)
    else:
        lines = text.splitlines()
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                row, column = token.start
                lines[row - 1] = lines[row - 1][:column]
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
                first = node.body[0]
                lines[first.lineno - 1 : first.end_lineno] = [""] * (first.end_lineno - first.lineno + 1)
        text = "\n".join(lines)
    return "\n".join(line.rstrip() for line in text.splitlines() if line.strip())


def code_hash(sources: list[str]) -> str:
    """Of the code of all sources, which are names or patterns below the root.

    Raises:
        FileNotFoundError: no file is called so.
    """
    digest = hashlib.sha256()
    for source in sources:
        paths = sorted(ROOT.glob(source))
        if not paths:
            raise FileNotFoundError(f"{source}: no such file; expected a source below {ROOT}")
        for path in paths:
            digest.update(f"{path.relative_to(ROOT)}\n{code_of(path.read_text(), path.name)}\n".encode())
    return digest.hexdigest()[:16]


def tables_in(text: str) -> list[Table]:
    """The Markdown tables of what a command printed."""
    tables, rows = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")])
        elif rows:
            tables.append([row for row in rows if not all(re.fullmatch(":?-+:?", cell) for cell in row)])
            rows = []
    return tables


def read(name: str) -> tuple[dict, list[Table]]:
    """What was run, and the tables that came out."""
    run, *lines = map(json.loads, (FOLDER / f"{name}.jsonl").read_text().splitlines())
    tables = []
    for line in lines:
        if "columns" in line:
            tables.append([line["columns"]])
        else:
            tables[-1].append(line["row"])
    return run, tables


def write(name: str, run: dict, tables: list[Table]) -> None:
    """Makes the file of a run."""
    lines = [run]
    for columns, *rows in tables:
        lines += [{"columns": columns}, *({"row": row} for row in rows)]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (FOLDER / f"{name}.jsonl").write_text(text)


def rendered(names: str) -> str:
    """The tables of files in Markdown, those with the same columns as one, and a line of where each comes from. A file
    that is not there yet has nothing."""
    joined, lines = {}, []
    for name in names.split():
        if not (FOLDER / f"{name}.jsonl").exists():
            continue
        run, tables = read(name)
        for columns, *rows in tables:
            joined.setdefault(tuple(columns), []).extend(rows)
        versions = ", ".join(f"{package} {version}" for package, version in run["versions"].items())
        lines.append(f"`{run['command']}`, {run['date']}, {run['machine']}; {versions}.")
    parts = [
        "\n".join(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows))
        for columns, rows in joined.items()
    ]
    return "\n\n".join([*parts, "\n".join(lines)]) + "\n" if lines else ""


def with_tables(text: str) -> str:
    """A page with its tables as the files have them."""
    return BLOCK.sub(lambda found: found[1] + found[2] + rendered(found[1]), text)


def machine() -> str:
    """The processor, and how many cores this process may use."""
    about = pathlib.Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", about.read_text()) if about.exists() else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} {'core' if cores == 1 else 'cores'} of an {found[1] if found else platform.machine()}"


def version_of(package: str) -> str:
    """Of this Python's package, or of that of `PEER_PYTHON`, which runs others' code for some benchmarks."""
    peer = os.environ.get("PEER_PYTHON")
    with contextlib.nullcontext() if peer is None else contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run([peer, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def dated(run: dict) -> dict:
    """What was run with the date, this machine if none is said, the hash of its code, and the packages' versions."""
    run = {"machine": machine()} | run | {"date": str(datetime.date.today()), "code": code_hash(run["sources"])}
    return run | {"versions": {package: version_of(package) for package in run["versions"]}}


def take(name: str, **said: object) -> None:
    """Runs a command and keeps its tables. What is not said is as in the file that is there, but for the machine."""
    run = read(name)[0] if (FOLDER / f"{name}.jsonl").exists() else {"versions": {"jax": "", "flax": ""}}
    run.pop("machine", None)
    run = dated(run | {key: value for key, value in said.items() if value})
    done = subprocess.run(run["command"], shell=True, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    write(name, run, tables_in(done.stdout))


def write_pages() -> None:
    """Every table into its page."""
    for page in PAGES:
        page.write_text(with_tables(page.read_text()))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = arguments.add_subparsers(dest="what")
    taking = commands.add_parser("take", help="runs a command and keeps its tables")
    taking.add_argument("name")
    taking.add_argument("--command", help="by default that of the file")
    taking.add_argument("--sources", nargs="+", help="what the figures depend on; by default that of the file")
    taking.add_argument("--machine", help="in words; by default the processor and its cores")
    taking.add_argument("--packages", nargs="+", help="whose versions matter")
    given = arguments.parse_args()
    if given.what == "take":
        versions = dict.fromkeys(given.packages or ())
        take(given.name, command=given.command, sources=given.sources, machine=given.machine, versions=versions)
    write_pages()


if __name__ == "__main__":
    main()
