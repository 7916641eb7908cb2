"""Files from addresses, against servers on this machine that are slow, break off, move, or give something else."""

import errno
import fcntl
import os
import subprocess
import sys
import urllib.request
from hashlib import sha256

import filelock
import numpy as np
import pytest
from commands import ROOT
from loopback import Files

from tnt_jax.config import InputError
from tnt_jax.storage import download
from tnt_jax.user_cache import cache_path, process_folder

CONTENT = np.random.default_rng(0).bytes(3_000_000)
DIGITS = sha256(CONTENT).hexdigest()[:8]
PATH = f"/models/tnt-{DIGITS}.pth"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


def files_in_cache():
    return sorted(path.name for path in cache_path().rglob("*") if path.is_file() and path.name != ".lock")


def test_a_file_is_fetched_once_and_kept():
    with Files({PATH: CONTENT}) as server:
        path = download.download(server.address + PATH)
        assert path.read_bytes() == CONTENT
        assert download.download(server.address + PATH) == path
    assert len(server.requests) == 1
    assert download.download(server.address + PATH) == path  # nobody listens any more


def test_what_broke_off_goes_on_where_it_was():
    with Files({PATH: CONTENT}, breaks=[1_000_000, 500_000]) as server:
        assert download.download(server.address + PATH).read_bytes() == CONTENT
    assert [asked for _, _, asked in server.requests] == [None, "bytes=1000000-", "bytes=1500000-"]


def test_another_process_goes_on_where_one_ended(monkeypatch):
    monkeypatch.setattr(download, "TRIES", 1)
    with Files({PATH: CONTENT}, breaks=[1_000_000, 0]) as server:
        with pytest.raises(InputError, match=r"cannot be fetched: it broke off after 1,000,000 of 3,000,000 bytes"):
            download.download(server.address + PATH)
        assert [entry.kind for entry in download.cache_entries()] == ["unfinished"]
        assert download.download(server.address + PATH).read_bytes() == CONTENT
    assert server.requests[-1][2] == "bytes=1000000-"


def test_a_server_that_falls_silent_is_given_up(monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    monkeypatch.setattr(download, "TRIES", 2)
    with Files({PATH: CONTENT}, pause=3) as server, pytest.raises(InputError, match=r"cannot be fetched: .*timed out"):
        download.download(server.address + PATH)


def test_a_file_that_changed_meanwhile_is_fetched_anew():
    other = CONTENT[::-1]
    path = "/models/plain.pth"
    with Files({path: other}, breaks=[1_000_000]) as server:
        serve = server.serve

        def change(request):
            serve(request)
            server.files[path] = CONTENT

        server.serve = change
        assert download.download(server.address + path).read_bytes() == CONTENT


def test_a_server_without_ranges_gives_the_whole_again():
    with Files({PATH: CONTENT}, breaks=[1_000_000], ranges=False) as server:
        assert download.download(server.address + PATH).read_bytes() == CONTENT


def test_a_redirect_is_followed():
    with Files({"/there": CONTENT}, redirects={PATH: "/there"}) as server:
        assert download.download(server.address + PATH).read_bytes() == CONTENT


def test_a_wrong_hash_names_both_and_leaves_nothing(monkeypatch):
    monkeypatch.setattr(download, "HASHED_HOSTS", ("127.0.0.1",))
    with Files({PATH: CONTENT[:-1] + b"x"}) as server:
        wrong = sha256(CONTENT[:-1] + b"x").hexdigest()[:8]
        with pytest.raises(InputError, match=f"should begin with {DIGITS}, as its name says, and begins with {wrong}"):
            download.download(server.address + PATH)
    assert files_in_cache() == []


def test_digits_in_a_name_are_a_hash_only_where_that_is_the_custom():
    path = "/tnt_s-20240131.safetensors"
    with Files({path: CONTENT}) as server:
        assert download.download(server.address + path).read_bytes() == CONTENT
    assert "download.openmmlab.com" in download.HASHED_HOSTS


@pytest.mark.parametrize(
    ("served", "message"),
    [
        ({}, r"answers 404 .*curl -LO http"),
        ({"files": {PATH: b"<!DOCTYPE html><html>log in</html>"}}, "gives a web page, not a checkpoint"),
        ({"files": {PATH: CONTENT}, "kind": "text/html; charset=utf-8"}, "gives a web page, not a checkpoint"),
    ],
)
def test_what_is_no_file_is_said(served, message):
    with Files(**served) as server, pytest.raises(InputError, match=message):
        download.download(server.address + PATH)
    assert files_in_cache() == []


@pytest.mark.parametrize("code", [408, 429, 503])
def test_a_server_that_is_busy_is_asked_again_when_it_says(code, monkeypatch):
    waited = []
    monkeypatch.setattr(download.time, "sleep", waited.append)
    with Files({PATH: CONTENT}) as server:
        serve, answers = server.serve, iter([lambda request: request.reply(code, Retry_After="7")])
        server.serve = lambda request: next(answers, serve)(request)
        assert download.download(server.address + PATH).read_bytes() == CONTENT
    assert [seconds for seconds in waited if seconds] == [7.0]  # the server sleeps as well, for no time


@pytest.mark.parametrize(
    ("given", "asked"), [("/é/a b.pth", "/%C3%A9/a%20b.pth"), ("/%C3%A9/a%20b.pth", "/%C3%A9/a%20b.pth")]
)
def test_letters_of_every_kind_are_asked_for_as_a_server_has_them(given, asked):
    with Files({asked: CONTENT}) as server:
        path = download.download(server.address + given)
    assert (path.name, path.read_bytes()) == ("a b.pth", CONTENT)


@pytest.mark.parametrize("address", ["https://", "https://host/a%00.pth", "https://me:secret@host/a", "https://[/a"])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(InputError, match="is no address that is fetched") as error:
        download.download(address)
    assert "secret" not in str(error.value)


def test_https_is_not_left_by_a_redirect():
    follow = download._Redirects().redirect_request
    secure, plain = (urllib.request.Request(f"{scheme}://host/a") for scheme in ("https", "http"))
    for request, to in ((secure, "http://host/b"), (secure, "ftp://host/b"), (plain, "ftp://host/b")):
        with pytest.raises(InputError, match="which is not https"):
            follow(request, None, 302, "Found", {}, to)
    for request, to in ((secure, "https://other/b"), (plain, "http://other/b"), (plain, "https://other/b")):
        assert follow(request, None, 302, "Found", {}, to).full_url == to


def test_what_is_secret_in_an_address_is_sent_and_goes_nowhere_else(tmp_path, capsys):
    path = "/tnt.pth?X-Signature=SECRET"
    with Files({path: CONTENT}) as server:
        download.download(server.address + path + "#SECRET")
        with pytest.raises(InputError) as error:
            download.download(server.address + "/other.pth?token=SECRET")
    told = str(error.value) + capsys.readouterr().err + str([entry.name for entry in download.cache_entries()])
    told += "".join(f"{path} {path.read_bytes()}" for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert "SECRET" not in told
    assert f"{server.address}/tnt.pth" in told


def test_offline_says_so_and_the_command_for_elsewhere(monkeypatch):
    with Files({PATH: CONTENT}) as server:
        download.download(server.address + PATH)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert download.download(server.address + PATH).read_bytes() == CONTENT
        with pytest.raises(InputError) as error:
            download.download(server.address + "/other.pth")
    assert "HF_HUB_OFFLINE is set, so nothing is fetched" in str(error.value)
    assert str(error.value).count(server.address) == 2
    assert f"curl -LO {server.address}/other.pth" in str(error.value)


def test_a_cache_that_cannot_be_written_is_said_and_does_without(tmp_path, capsys):
    (tmp_path / "cache").write_text("a file in its place")
    with Files({PATH: CONTENT}) as server:
        path = download.download(server.address + PATH)
    assert path.read_bytes() == CONTENT
    assert "cannot be written" in capsys.readouterr().err
    assert process_folder() in path.parents


def test_a_full_disk_leaves_nothing(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with Files({PATH: CONTENT}) as server:
        monkeypatch.setattr(download, "_refuse_pages", full)
        with pytest.raises(InputError, match="No space left on device"):
            download.download(server.address + PATH)
    assert not [name for name in files_in_cache() if "json" not in name]


FETCH = """
import hashlib, sys
from tnt_jax.storage.download import download
print(hashlib.sha256(download(sys.argv[1]).read_bytes()).hexdigest())
"""


def test_two_processes_fetch_once():
    with Files({PATH: CONTENT}, pause=0.2) as server:
        command = [sys.executable, "-c", FETCH, server.address + PATH]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        assert [process.communicate(timeout=60)[0].strip() for process in both] == [sha256(CONTENT).hexdigest()] * 2
    assert len(server.requests) == 1


def test_a_disk_without_locks_keeps_nobody_waiting(monkeypatch):
    def missing(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    class NoWait(filelock.FileLock):
        def __init__(self, path):
            super().__init__(path, timeout=1)  # or the test would hang

    monkeypatch.setattr(fcntl, "flock", missing)
    monkeypatch.setattr(filelock, "FileLock", NoWait)
    with Files({PATH: CONTENT}) as server, pytest.warns(UserWarning, match="flock not supported"):
        assert download.download(server.address + PATH).read_bytes() == CONTENT


def test_what_is_cleared_is_gone():
    with Files({PATH: CONTENT, "/b.pth": CONTENT}) as server:
        for path in (PATH, "/b.pth"):
            download.download(server.address + path)
        assert {entry.name for entry in download.cache_entries()} == {server.address + PATH, server.address + "/b.pth"}
        assert [entry.size > len(CONTENT) for entry in download.clear_cache("/b.pth")] == [True]
        assert [entry.name for entry in download.cache_entries()] == [server.address + PATH]
        with pytest.raises(InputError, match="is called 'nothing'"):
            download.clear_cache("nothing")
    assert len(download.clear_cache()) == 1
    assert download.cache_entries() == []
