"""The list of planted bugs fits the sources: `make mutants` plants them and runs the tests."""

import tomllib

import pytest
from commands import ROOT

MUTANTS = tomllib.loads((ROOT / ".ci/mutants.toml").read_text())["mutant"]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant["file"])
def test_each_bug_can_be_planted_and_its_tests_are_there(mutant):
    assert (ROOT / mutant["file"]).read_text().count(mutant["old"]) == 1
    assert mutant["new"] != mutant["old"]
    for test in mutant["tests"]:
        assert (ROOT / test).is_file()
