"""Tables of our own figures are those of their files, and the files are of today's code."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys

import pytest
from commands import ROOT
from small_runs import config_file

sys.path.append(str(ROOT / "benchmarks"))
import results

NAMES = sorted(path.stem for path in results.FOLDER.glob("*.jsonl"))
# Tables with figures that are not of a run: sizes and published accuracies, which other tests hold.
NOT_RUN = {"README.md: name", "docs/weights.md: published checkpoint"}


@pytest.mark.parametrize("page", results.PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_files(page):
    text = page.read_text()
    assert text == results.with_tables(text), "python benchmarks/results.py writes the tables"
    assert text.count("<!-- results: ") == text.count("<!-- end of results -->") == len(results.BLOCK.findall(text))


def test_every_file_is_shown():
    shown = {
        name for page in results.PAGES for names, _ in results.BLOCK.findall(page.read_text()) for name in names.split()
    }
    assert shown >= set(NAMES)
    assert shown - set(NAMES) <= {"mutants"}, "of these there is no file; mutants get theirs by `make mutants`"


@pytest.mark.parametrize("name", NAMES)
def test_figures_are_of_todays_code(name):
    run, tables = results.read(name)
    assert run["sources"]
    assert run["code"] == results.code_hash(run["sources"]), (
        f"{', '.join(run['sources'])} changed after {run['date']}: "
        f"python benchmarks/results.py take {name}, or take the table out"
    )
    for columns, *rows in tables:
        assert rows
        assert {len(row) for row in rows} == {len(columns)}


@pytest.mark.parametrize("page", results.PAGES, ids=lambda page: page.name)
def test_a_table_of_figures_has_a_file(page):
    rest = results.BLOCK.sub("", page.read_text())
    for (first, *_), *rows in results.tables_in(rest):
        cells = [cell for _, *cells in rows for cell in cells if cell]
        figures = [cell for cell in cells if re.match(r"[-~<>]?\d[\d.,]*( |%|$)", cell)]
        is_exempt = f"{page.relative_to(ROOT)}: {first}" in NOT_RUN
        assert is_exempt or 2 * len(figures) < len(cells), f"{first} | ...: {figures[:5]}"


def test_code_is_what_is_computed():
    one = '"""Of a module."""\nX = 1  # one\n\n\ndef f():\n    """Of a\n    function."""\n    return "# 1"\n'
    assert results.code_of(one, "f.py") == 'X = 1\ndef f():\n    return "# 1"'
    assert results.code_of("/* a\nb */ int x; // c\n\nint y;\n", "f.c") == " int x;\nint y;"


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A project of one program, whose table is 7 and 8."""
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    (tmp_path / "program.py").write_text("print('done\\n| a | b |\\n|---|--:|\\n| x | 7 |\\n| y | 8 |')\n")
    return tmp_path


def test_a_command_runs_again_and_its_table_comes_into_the_page(tree):
    text = "Before.\n\n<!-- results: one -->\n<!-- end of results -->\n\nAfter.\n"
    results.take("one", command=f"{sys.executable} program.py", sources=["program.py"], machine="a machine")
    page = results.with_tables(text)
    assert "| a | b |\n| --- | --- |\n| x | 7 |\n| y | 8 |\n\n" in page
    assert "a machine; jax " in page
    assert page == results.with_tables(page)
    (tree / "program.py").write_text("print('| a | b |\\n|---|---|\\n| x | 9 |')\n")
    assert results.read("one")[0]["code"] != results.code_hash(["program.py"])
    results.take("one")
    assert results.read("one")[0]["code"] == results.code_hash(["program.py"])
    assert "| x | 9 |" in results.with_tables(page)


def test_tables_with_the_same_columns_are_one(tree):
    for name in ("one", "two"):
        results.take(name, command=f"{sys.executable} program.py", sources=["program.py"])
    page = results.with_tables("<!-- results: one two -->\n<!-- end of results -->\n")
    assert page.count("| a | b |") == 1
    assert page.count("| x | 7 |") == 2
    lines = [json.loads(line) for line in (tree / "one.jsonl").read_text().splitlines()]
    assert lines[1:] == [{"columns": ["a", "b"]}, {"row": ["x", "7"]}, {"row": ["y", "8"]}]


def test_versions_are_of_this_python_or_of_the_peers(monkeypatch):
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        results.version_of("a_package_of_the_peer")
    monkeypatch.setenv("PEER_PYTHON", "echo")
    assert results.version_of("jax") == importlib.metadata.version("jax")
    assert "a_package_of_the_peer" in results.version_of("a_package_of_the_peer")


@pytest.mark.nightly
def test_a_configuration_is_trained_twice_and_is_a_row(tmp_path):
    command = [sys.executable, "benchmarks/trained.py", config_file(tmp_path), "--again", "--keep", tmp_path / "run"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (((*_, last), (_, *first, reached, minutes, again)),) = results.tables_in(done.stdout)
    assert (last, again) == ("trained again", "the same bits")
    assert first == ["0", "360", "top-1"]
    assert re.fullmatch(r"\d+\.\d\d \(\d+\.\d\d to \d+\.\d\d\)", reached)
    assert float(minutes) > 0
    assert (tmp_path / "run/model.json").exists() or (tmp_path / "run/config.json").exists()


def test_a_source_that_is_not_there_is_named(tree):
    with pytest.raises(FileNotFoundError, match=r"gone\.py: no such file"):
        results.code_hash(["gone.py"])
