"""The command that lists and clears the cache."""

import sys

import pytest
from loopback import Files

from tnt_jax.commands import cache
from tnt_jax.storage.download import download


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["cache", *arguments])
    cache.main()


def test_it_lists_and_clears(own_cache, monkeypatch, capsys):
    with Files({"/a.pth": bytes(2_000_000), "/b.pth": bytes(1_000_000)}) as server:
        download(server.address + "/a.pth")
        download(server.address + "/b.pth")
    capsys.readouterr()
    run(monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split() for line in lines[:2]) == [
        ["1.0", "MB", "file", server.address + "/b.pth"],
        ["2.0", "MB", "file", server.address + "/a.pth"],
    ]
    assert lines[2].split() == ["3.0", "MB", "in", str(own_cache / "tnt_jax")]
    run(monkeypatch, "--clear", "/a.pth")
    assert "2.0 MB removed from" in capsys.readouterr().out
    run(monkeypatch, "--clear")
    run(monkeypatch)
    assert capsys.readouterr().out.splitlines()[-1].split()[0] == "0.0"
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, "name")
    assert end.value.code == 2
