"""Files from addresses, against servers on this machine that are slow, break off, move, or give something else."""

import hashlib
import multiprocessing

import numpy as np
import pytest
from loopback import Files

from tnt_jax.config import InputError
from tnt_jax.storage import cache, download

CONTENT = np.random.default_rng(0).bytes(3_000_000)
DIGITS = hashlib.sha256(CONTENT).hexdigest()[:8]
PATH = f"/models/tnt-{DIGITS}.pth"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("HF_HUB_OFFLINE", "TNT_JAX_MIRROR"):
        monkeypatch.delenv(name, raising=False)


def files_in_cache():
    return sorted(path.name for path in cache.cache_root().rglob("*") if path.is_file() and path.name != ".lock")


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
        with pytest.raises(InputError, match=r"cannot be reached \(it broke off after 1,000,000 of 3,000,000 bytes"):
            download.download(server.address + PATH)
        assert [kept.kind for kept in cache.kept()] == ["unfinished"]
        assert download.download(server.address + PATH).read_bytes() == CONTENT
    assert server.requests[-1][2] == "bytes=1000000-"


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


def test_a_wrong_hash_names_both_and_leaves_nothing():
    with Files({PATH: CONTENT[:-1] + b"x"}) as server:
        wrong = hashlib.sha256(CONTENT[:-1] + b"x").hexdigest()[:8]
        with pytest.raises(InputError, match=f"begins with {wrong}, and should with {DIGITS}"):
            download.download(server.address + PATH)
    assert files_in_cache() == []


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


def test_a_mirror_is_asked_first_and_the_address_itself_next(monkeypatch):
    with Files({PATH: CONTENT}) as server, Files() as mirror:
        address, place = server.address + PATH, server.address.partition("://")[2] + PATH
        monkeypatch.setenv("TNT_JAX_MIRROR", mirror.address + "/all/")
        assert download.download(address).read_bytes() == CONTENT
        assert mirror.requests[0][1] == f"/all/{place}"
        cache.clear()
        mirror.files[f"/all/{place}"] = CONTENT
        assert download.download(address).read_bytes() == CONTENT
    assert len(server.requests) == 1


def test_offline_says_what_there_is_and_the_command_for_elsewhere(monkeypatch):
    with Files({PATH: CONTENT}) as server:
        download.download(server.address + PATH)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert download.download(server.address + PATH).read_bytes() == CONTENT
        with pytest.raises(InputError) as error:
            download.download(server.address + "/other.pth")
    assert f"HF_HUB_OFFLINE is set, so nothing is fetched. In {cache.cache_root()}" in str(error.value)
    assert f"there are {server.address}{PATH}" in str(error.value)
    assert f"curl -LO {server.address}/other.pth" in str(error.value)


def test_a_cache_that_cannot_be_written_is_said_and_does_without(tmp_path, capsys):
    (tmp_path / "cache").write_text("a file in its place")
    with Files({PATH: CONTENT}) as server:
        path = download.download(server.address + PATH)
    assert path.read_bytes() == CONTENT
    assert "cannot be written" in capsys.readouterr().err
    cache.forget_temporary(path)
    assert not path.parent.exists()


def test_a_full_disk_leaves_nothing(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with Files({PATH: CONTENT}) as server:
        monkeypatch.setattr(download, "_refuse_pages", full)
        with pytest.raises(InputError, match="No space left on device"):
            download.download(server.address + PATH)
    assert not [name for name in files_in_cache() if "json" not in name]


def _fetch(address, results):
    results.put(hashlib.sha256(download.download(address).read_bytes()).hexdigest())


def test_two_processes_fetch_once():
    with Files({PATH: CONTENT}, pause=0.2) as server:
        context = multiprocessing.get_context("spawn")
        results = context.Queue()
        both = [context.Process(target=_fetch, args=(server.address + PATH, results)) for _ in range(2)]
        for process in both:
            process.start()
        assert [results.get(timeout=60) for _ in both] == [hashlib.sha256(CONTENT).hexdigest()] * 2
        for process in both:
            process.join()
    assert len(server.requests) == 1


def test_what_is_cleared_is_gone():
    with Files({PATH: CONTENT, "/b.pth": CONTENT}) as server:
        for path in (PATH, "/b.pth"):
            download.download(server.address + path)
        assert {kept.name for kept in cache.kept()} == {server.address + PATH, server.address + "/b.pth"}
        assert [kept.size > len(CONTENT) for kept in cache.clear("/b.pth")] == [True]
        assert [kept.name for kept in cache.kept()] == [server.address + PATH]
        with pytest.raises(InputError, match="is called 'nothing'"):
            cache.clear("nothing")
    assert len(cache.clear()) == 1
    assert cache.kept() == []


def test_what_is_no_address_is_refused():
    with pytest.raises(InputError, match="is no address"):
        download.download("https://")
