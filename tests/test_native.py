"""C that is compiled on the machine that it runs on."""

import pytest

from tnt_jax import native


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "answer.c"
    path.write_text('#include "number.h"\nint answer(void) { return NUMBER; }\n')
    path.with_name("number.h").write_text("#define NUMBER 42\n")
    return path


def load(source):
    """As the first call of a process does."""
    return native.library.__wrapped__(source, ("-O1",), (source.with_name("number.h"),), without="answers are slow")


def test_it_is_compiled_once(source, monkeypatch, tmp_path):
    assert load(source).answer() == 42
    monkeypatch.setenv("CC", "no-such-compiler")
    assert load(source).answer() == 42
    assert len(list((tmp_path / "cache/tnt_jax").iterdir())) == 1


def test_it_is_compiled_anew_when_what_it_includes_changes_and_on_another_processor(source, monkeypatch, tmp_path):
    load(source)
    source.with_name("number.h").write_text("#define NUMBER 43\n")
    assert load(source).answer() == 43
    monkeypatch.setattr(native, "processor_flags", lambda: "flags: abacus")
    load(source)
    assert len(list((tmp_path / "cache/tnt_jax").iterdir())) == 3


def test_a_machine_without_a_compiler_says_so_and_goes_on(source, monkeypatch, caplog):
    monkeypatch.setenv("CC", "no-such-compiler")
    assert load(source) is None
    assert "answers are slow" in caplog.text
    assert "no-such-compiler" in caplog.text


def test_what_does_not_compile_is_said_with_the_compilers_words(source, caplog, tmp_path):
    source.write_text("int answer(void) { return forty_two; }\n")
    assert load(source) is None
    assert "forty_two" in caplog.text
    assert list((tmp_path / "cache/tnt_jax").iterdir()) == []
