import gc
import sys
import types

import pytest

from fastnabla.utils.quick_imports import quick_imports


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether collection was on, each time that memory was left out of it."""
    calls: list[bool] = []
    monkeypatch.setattr(gc, "freeze", lambda: calls.append(gc.isenabled()))
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    return calls


def test_nothing_is_collected_before_the_libraries_are_there(
    frozen: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    with quick_imports():
        assert not gc.isenabled()
    assert gc.isenabled() and frozen == [False]


def test_a_failed_import_is_collected(frozen: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    with pytest.raises(ImportError), quick_imports():
        raise ImportError
    assert gc.isenabled() and not frozen


def test_a_process_that_has_torch_is_left_as_it_is(frozen: list[bool]) -> None:
    with quick_imports():
        assert gc.isenabled()
    assert not frozen


def test_a_notebook_is_left_as_it_is(frozen: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    with quick_imports():
        assert gc.isenabled()
    assert not frozen


def test_collection_stays_off_where_it_is_off(frozen: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    gc.disable()
    try:
        with quick_imports():
            pass
        assert not gc.isenabled() and not frozen
    finally:
        gc.enable()
