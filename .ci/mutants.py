"""Plants one bug at a time, as `.ci/mutants.toml` lists them, runs the nearest tests, and says which bugs they miss.

`make mutants` runs all, which takes about an hour on two cores; `.ci/mutants.py optimizer` those of files whose path
has that in it, `.ci/mutants.py missed` those that no run has found. The table counts the last run of each. First
`make check` must have passed: a test that fails by itself finds nothing.
"""

import collections
import concurrent.futures
import json
import os
import queue
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
CIRCLE = ("--peers", "-m", "not nightly and not gpu and not demo")
JOBS = 2
LIMIT = 600  # seconds
OUTCOMES = ROOT / "build/mutants.json"


def planted(mutant: dict, text: str) -> str:
    """The text of the mutant's file with its bug.

    Raises:
        SystemExit: the line is not there, or not once: the list is older than the file.
    """
    if text.count(mutant["old"]) != 1:
        sys.exit(f"error: {mutant['file']} has {text.count(mutant['old'])} times {mutant['old']!r}, and should once")
    return text.replace(mutant["old"], mutant["new"])


def named(mutant: dict) -> str:
    return f"{mutant['file']}: {mutant['old'].strip()} -> {mutant['new'].strip()}"


def copy_of_tree(folder: Path) -> Path:
    """The files of the working tree that git knows."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-cf", folder / "tree.tar", "--null", "-T", "-"], cwd=ROOT, input=names, check=True)
    (folder / "tree").mkdir()
    subprocess.run(["tar", "-xf", folder / "tree.tar", "-C", folder / "tree"], check=True)
    return folder / "tree"


def outcome(tree: Path, tests: list[str], cache: Path) -> str:
    """`found`, `MISSED` or, where the tests did not end in time, `endless`, which is noticed too."""
    environment = os.environ | {
        "PYTHONPATH": str(tree),
        "PYTHONDONTWRITEBYTECODE": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
    }
    command = [sys.executable, "-P", "-m", "pytest", "-n", "0", "-x", "-q", "-p", "no:cacheprovider", *CIRCLE, *tests]
    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return "endless"
    if done.returncode > 2:  # 3: an internal error; 4: a wrong path; 5: no test
        sys.exit(f"error: pytest ended with {done.returncode} for {tests}:\n{done.stdout.decode()[-2000:]}")
    return "found" if done.returncode else "MISSED"


def main(chosen: str = "") -> None:
    mutants = tomllib.loads((ROOT / ".ci/mutants.toml").read_text())["mutant"]
    for mutant in mutants:
        planted(mutant, (ROOT / mutant["file"]).read_text())
    outcomes = json.loads(OUTCOMES.read_text()) if OUTCOMES.exists() else {}
    waiting = [mutant for mutant in mutants if outcomes.get(named(mutant), "MISSED") == "MISSED"]
    asked = waiting if chosen == "missed" else [mutant for mutant in mutants if chosen in mutant["file"]]
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(JOBS) as pool:
        trees = queue.SimpleQueue()
        for job in range(JOBS):
            (Path(folder) / str(job)).mkdir()
            trees.put(copy_of_tree(Path(folder) / str(job)))
        cache = Path(folder) / "compiled"

        def tried(mutant: dict) -> tuple[str, float]:
            tree = trees.get()
            path = tree / mutant["file"]
            text = path.read_text()
            path.write_text(planted(mutant, text))
            start = time.monotonic()
            try:
                return outcome(tree, mutant["tests"], cache), time.monotonic() - start
            finally:
                path.write_text(text)
                trees.put(tree)

        OUTCOMES.parent.mkdir(exist_ok=True)
        for mutant, (how, seconds) in zip(asked, pool.map(tried, asked), strict=True):
            print(f"{how:7} {seconds:4.0f} s  {named(mutant)}", flush=True)
            outcomes[named(mutant)] = how
            OUTCOMES.write_text(json.dumps(outcomes, indent=1))
    missed = [mutant for mutant in asked if outcomes[named(mutant)] == "MISSED"]
    print(f"{len(asked) - len(missed)} of {len(asked)} found")
    if all(named(mutant) in outcomes for mutant in mutants):
        write_table(mutants, [mutant for mutant in mutants if outcomes[named(mutant)] == "MISSED"])
    sys.exit(bool(missed))


def write_table(mutants: list[dict], missed: list[dict]) -> None:
    def package(mutant: dict) -> str:
        parts = mutant["file"].split("/")
        return parts[1] if len(parts) > 2 else "the files beside them"

    planted, left = (collections.Counter(map(package, each)) for each in (mutants, missed))
    rows = [[name, str(count), str(count - left[name])] for name, count in sorted(planted.items())]
    rows.append(["all", str(len(mutants)), str(len(mutants) - len(missed))])
    sys.path.append(str(ROOT / "benchmarks"))
    import results

    run = {"command": "make mutants", "sources": [".ci/mutants.py"], "versions": {"jax": "", "pytest": ""}}
    results.write("mutants", results.dated(run), [[["package", "planted", "found"], *rows]])
    results.write_pages()


if __name__ == "__main__":
    main(*sys.argv[1:])
