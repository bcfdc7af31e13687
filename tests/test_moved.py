"""Names of the first release that users may import still do, and say where their contents are."""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec

import pytest

import dspy_fst

OLD = {
    "asking": "reconfigured",
    "compiled": "policy_of",
    "export": "export",
    "policy": "PolicyLM",
    "saved": "load",
}


@pytest.mark.parametrize("name", sorted(OLD))
def test_a_module_of_the_first_release_imports_by_its_old_name(name):
    new = importlib.import_module(f"dspy_fst.{dspy_fst._MOVED[name]}")
    sys.modules.pop(f"dspy_fst.{name}", None)
    with pytest.warns(FutureWarning, match=f"dspy_fst.{name} is {new.__name__} now"):
        old = importlib.import_module(f"dspy_fst.{name}")
    assert getattr(old, OLD[name]) is getattr(new, OLD[name])


def test_the_old_module_of_compiled_programs_still_hands_on_load_and_save():
    sys.modules.pop("dspy_fst.compiled", None)
    with pytest.warns(FutureWarning):
        old = importlib.import_module("dspy_fst.compiled")
    assert (old.load, old.save) == (dspy_fst.load, dspy_fst.save)


def test_every_moved_module_is_tried():
    assert OLD.keys() == dspy_fst._MOVED.keys()


def test_the_names_of_evaluation_are_found_in_the_package():
    from dspy_fst.evaluation.two_by_two_table import two_by_two

    with pytest.warns(FutureWarning, match=r"two_by_two is dspy_fst\.evaluation\.two_by_two_table"):
        from dspy_fst.evaluation import two_by_two as old
    assert old is two_by_two


def test_a_name_that_never_was_is_still_an_error():
    with pytest.raises(ModuleNotFoundError, match=r"dspy_fst\.sessions"):
        importlib.import_module("dspy_fst.sessions")
    with pytest.raises(ImportError, match="no_such"):
        from dspy_fst.evaluation import no_such  # noqa: F401


@pytest.mark.parametrize(
    ("asked", "home"),
    [
        ("from dspy_fst import FSTOptimizer", "dspy_fst.optimizer"),
        ("from dspy_fst import load", "dspy_fst.saving.save_load"),
        ("import dspy_fst; dspy_fst.PolicyLM", "dspy_fst.policy_lm"),
        ("from dspy_fst.saved import load", "dspy_fst.saving.save_load"),
        ("from dspy_fst.evaluation import two_by_two", "dspy_fst.evaluation.two_by_two_table"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_error_inside_a_module_that_is_imported_late_is_shown(monkeypatch, asked, home):
    class Broken(MetaPathFinder, Loader):
        """Stands for a module whose import uses a name that its library no longer has."""

        def find_spec(self, name, path=None, target=None):
            return ModuleSpec(name, self) if name == home else None

        def exec_module(self, module):
            _ = dspy_fst.errors.no_such_name

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, home, raising=False)
    monkeypatch.delitem(sys.modules, "dspy_fst.saved", raising=False)
    with pytest.raises(ImportError, match=f"{home} cannot be imported: .*no_such_name") as shown:
        exec(asked, {})
    assert isinstance(shown.value.__cause__, AttributeError)
