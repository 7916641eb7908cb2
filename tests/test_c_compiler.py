"""C that is compiled on the machine that it runs on."""

import ctypes
import os
import pathlib
import stat
import subprocess
import sys

import pytest

from tnt_jax import c_compiler, user_cache


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "answer.c"
    path.write_text('#include "number.h"\nint answer(void) { return NUMBER; }\n')
    path.with_name("number.h").write_text("#define NUMBER 42\n")
    return path


@pytest.fixture
def compilations(tmp_path, monkeypatch):
    """The lines of a file, one for each call of the compiler that compiles; the compiler has an argument, as ccache."""
    log, wrapper = tmp_path / "calls", tmp_path / "wrapper"
    log.write_text("")
    wrapper.write_text(f'#!/bin/sh\n[ "$2" = --version ] || echo "$@" >> {log}\nexec "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CC", f"{wrapper} cc")
    return lambda: len(log.read_text().splitlines())


def load(source):
    """As the first call of a process does."""
    return c_compiler.library.__wrapped__(source, ("-O1",), (source.with_name("number.h"),), without="answers are slow")


def cached(source) -> list[pathlib.Path]:
    folder = source.parent / "cache/tnt_jax"
    return sorted(folder.iterdir()) if folder.exists() else []


def test_it_is_compiled_once_by_a_compiler_with_arguments(source, compilations):
    assert load(source).answer() == load(source).answer() == 42
    assert compilations() == 1
    assert len(cached(source)) == 1


def test_what_it_includes_the_processor_the_compiler_and_the_c_library_each_make_another_one(source, monkeypatch):
    load(source)
    source.with_name("number.h").write_text("#define NUMBER 43\n")
    assert load(source).answer() == 43
    monkeypatch.setattr(c_compiler, "processor_lines", lambda: ("flags: abacus",))
    load(source)
    monkeypatch.setattr(c_compiler.platform, "libc_ver", lambda: ("glibc", "1.0"))
    load(source)
    monkeypatch.setattr(c_compiler, "_compiler", lambda: ("cc", "1.0"))
    load(source)
    assert len(cached(source)) == 5


def test_instruction_sets_are_those_that_all_processors_have(monkeypatch):
    for lines, expected in (
        (("flags\t\t: fpu avx avx2", "model name\t: a chip"), {"fpu", "avx", "avx2"}),
        (("Features\t: fp asimd sve", "Features\t: fp asimd", "CPU part\t: 0xd0c"), {"fp", "asimd"}),
        ((), set()),
    ):
        monkeypatch.setattr(c_compiler, "processor_lines", lambda lines=lines: lines)
        assert c_compiler.processor_flags() == expected


@pytest.mark.parametrize("left", ["half of it", "nothing", "a text", "another checksum"])
def test_a_damaged_library_is_compiled_again(left, source, compilations):
    load(source)
    (path,) = cached(source)
    content = path.read_bytes()
    # Not in place: this process has it loaded.
    path.unlink()
    damaged = {"half of it": content[: len(content) // 2], "nothing": b"", "a text": b"text"}.get(left, content + b" ")
    path.write_bytes(damaged)
    path.chmod(0o700)
    assert load(source).answer() == 42
    assert compilations() == 2
    assert [each.read_bytes() == content for each in cached(source)] == [True]


def test_a_library_that_cannot_be_loaded_is_compiled_again(source, compilations, monkeypatch):
    load(source)
    library, failures = ctypes.CDLL, iter([OSError("version `GLIBC_9.9' not found")])

    def of_another_libc(path):
        for error in failures:
            raise error
        return library(path)

    monkeypatch.setattr(c_compiler.ctypes, "CDLL", of_another_libc)
    assert load(source).answer() == 42
    assert compilations() == 2


def test_what_others_could_have_written_is_not_loaded(source, compilations, monkeypatch, caplog):
    load(source)
    (path,) = cached(source)
    path.parent.chmod(0o775)
    load(source)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o755
    assert compilations() == 1
    path.chmod(0o770)
    load(source)
    assert compilations() == 2
    assert stat.S_IMODE(cached(source)[0].stat().st_mode) == 0o700
    user = os.getuid()
    monkeypatch.setattr(user_cache.os, "getuid", lambda: user + 1)
    assert load(source).answer() == 42
    assert compilations() == 3
    assert "answer.c is compiled for this process alone" in caplog.text
    assert len(cached(source)) == 1


def test_a_machine_without_a_compiler_says_so_and_goes_on(source, monkeypatch, caplog):
    monkeypatch.setenv("CC", "no-such-compiler")
    assert load(source) is None
    assert "answers are slow" in caplog.text
    assert "no-such-compiler" in caplog.text


@pytest.mark.parametrize("place", ["/proc/nothing", "/dev/null"])
def test_a_cache_that_cannot_be_written(place, source, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", place)
    assert load(source).answer() == 42
    assert "for this process alone" in caplog.text


def test_what_does_not_compile_is_said_with_the_compilers_words(source, caplog):
    source.write_text("int answer(void) { return forty_two; }\n")
    assert load(source) is None
    assert "forty_two" in caplog.text
    assert cached(source) == []


def test_a_user_without_a_home_has_a_cache_of_its_own_and_it_is_said(tmp_path):
    """As a container has it: a number that passwd does not know, and no HOME."""
    code = (
        "import logging, sys; logging.basicConfig(); from tnt_jax.user_cache import cache_folder; print(cache_folder())"
    )
    code = "import pwd; pwd.getpwuid = lambda _: (_ for _ in ()).throw(KeyError()); " + code
    variables = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=variables | {"TMPDIR": str(tmp_path), "PYTHONPATH": paths},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    folder = tmp_path / f"tnt_jax-{os.getuid()}"
    assert done.stdout.strip() == str(folder), done.stderr
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert done.stderr.count("this user has no home folder") == 1
    assert list(tmp_path.iterdir()) == [folder]
