"""Every command and every snippet of the README and of docs/ runs, or says above it why it does not."""

import dataclasses
import os
import re
import runpy
import shlex
import subprocess
import sys

import commands
import jax.numpy as jnp
import numpy as np
import pytest
from commands import ROOT
from PIL import Image

import tnt_jax
from tnt_jax.commands.cli import config_of

PAGES = sorted(["README.md", *(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))])
BLOCK = re.compile(r"(?:^<!-- not run: (.+?) -->\n)?(?:^<!-- [^\n]* -->\n)?^```(\w*)\n(.*?)^```$", re.M | re.S)
RUN_ELSEWHERE = {"docs/weights.md"}  # tests/test_weights_page.py runs the table, test_publish.py and others the rest
# What others test too: trainings, pictures, and every command by itself.
LONG = {
    f"docs/{name}.md"
    for name in ("detection", "evaluation", "export", "models", "own_images", "pictures", "segmentation", "training")
}
NOT_COMMANDS = {"yaml", "dockerfile", "json", "text"}


def blocks(page: str) -> list[tuple[str, str, str]]:
    """The reason why it is not run (or nothing), the language and the text of each fenced block."""
    return BLOCK.findall((ROOT / page).read_text())


def commands_in(text: str) -> list[list[str]]:
    """The command lines of a block, as our own Python runs them."""
    lines = text.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines if line.strip()]
    return [[word.removeprefix(".venv/bin/") for word in line] for line in words if line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with what the pages name: a run of digits, an image of a digit, photographs."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("my_digit.png", "bird.jpg"):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8)).save(folder / name)
    run(folder, ["python", "train.py", "--epochs", "1", "--run-dir", "runs/digits"])
    return folder


def run(folder, command: list[str]) -> str:
    program, script, *arguments = command
    assert program == "python", f"{command}: only Python commands are run; say above the block why it is not"
    script = [script] if script.startswith("-") else [str(ROOT / script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, *script, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-1000:]}{done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.parametrize("page", PAGES)
def test_what_is_not_run_says_why(page):
    text = (ROOT / page).read_text()
    assert text.count("```") == 2 * len(blocks(page)), "a fenced block that this test does not see"
    for reason in re.findall(r"<!-- not run: (.*?) -->", text):
        assert len(reason.split()) > 3, reason
    assert text.count("<!-- not run") == sum(bool(reason) for reason, _, _ in blocks(page))


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=getattr(pytest.mark, "nightly" if page in LONG else "slow"))
        for page in PAGES
        if page not in RUN_ELSEWHERE
    ],
)
def test_every_block_runs(page, folder, monkeypatch):
    monkeypatch.chdir(folder)
    names = {"tnt_jax": tnt_jax}
    for reason, language, text in blocks(page):
        if reason or language in NOT_COMMANDS:
            continue
        if language == "python":
            exec(compile(text, page, "exec"), names)
            continue
        for command in commands_in(text):
            run(folder, command)


CELL = re.compile(r"^\|[^|]*\|[^|]*\| `([^`]+)` \|$", re.M)
TYPED = CELL.findall((ROOT / "docs/coming_from.md").read_text())


@pytest.mark.nightly
@pytest.mark.parametrize("typed", TYPED)
def test_what_one_types_here_runs(typed, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    if typed == "python train.py --run-dir gs://BUCKET/run":  # tests/training/test_bucket.py has a bucket
        return
    if "folder:photos" in typed:
        for number in range(100):
            path = folder / f"photos/{'cats' if number % 2 else 'dogs'}/{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng(number).integers(0, 256, (48, 48), np.uint8)).save(path)
    program, *arguments = shlex.split(typed)
    if program == "python" or program.startswith("tnt-"):
        script = arguments.pop(0) if program == "python" else f"tnt_jax/commands/{program.removeprefix('tnt-')}.py"
        short = ["--epochs", 1, "--run-dir", tmp_path / "run"] if script == "train.py" else []
        code, _, err = commands.run(script, *short, *arguments)
        assert code == 0, err
        return
    config = dataclasses.replace(config_of("digits"), run_dir=str(tmp_path / "run"), epochs=1)
    exec(compile(typed, "docs/coming_from.md", "exec"), {"tnt_jax": tnt_jax, "jnp": jnp, "config": config})


def test_every_row_has_something_to_type():
    rows = [line for line in (ROOT / "docs/coming_from.md").read_text().splitlines() if line.startswith("|")]
    assert len(TYPED) == len(rows) - 2 > 15


def test_the_page_for_contributors_names_what_is_there():
    """Files to read, places to add to and their tests exist; so do the commands of the three circles."""
    text = (ROOT / "docs/contributing.md").read_text()
    named = re.findall(
        r"`((?:tnt_jax/|tests/|configs/|data/|training/|export/|models/|storage/|visualize/|commands/)[\w./]*)`", text
    )
    assert len(named) > 30
    missing = [name for name in named if not any((ROOT / place / name).exists() for place in ("", "tnt_jax"))]
    assert not missing
    targets = (ROOT / "Makefile").read_text()
    assert all(f"\n{name}:" in targets for name in set(re.findall(r"`make ([\w-]+)`", text)))


def test_the_tree_for_contributors_has_a_line_for_each_file():
    """`python .ci/tree.py` writes it."""
    tree = runpy.run_path(str(ROOT / ".ci/tree.py"))
    assert (ROOT / "docs/contributing.md").read_text() == tree["page"]()
    names = re.findall(r"^ +(\w+\.\w+) +\S", tree["tree"](), re.M)
    assert {"config.py", "loop.py", "inner_layer.c", "norm_gradient.cu", "page.html"} < set(names)
    assert len(names) > 170
