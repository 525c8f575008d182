"""Packages that count as not installed for a while."""

import importlib.util
import sys

import pytest

from fastnabla.utils.hidden_packages import hidden_packages


def test_hidden_packages() -> None:
    sys.modules.pop("this", None)
    with hidden_packages("this", "json"):
        assert importlib.util.find_spec("this") is None
        with pytest.raises(ModuleNotFoundError):
            import this  # noqa: F401
        import json  # imported before

        assert json.dumps(1) == "1"
    assert importlib.util.find_spec("this") is not None and "json" in sys.modules
