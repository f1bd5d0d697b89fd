"""The source tree keeps to its floors, its sizes and its names: see docs/architecture.md."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

_FILE = Path(__file__).parents[1] / "tools" / "house.py"
_spec = importlib.util.spec_from_file_location("house", _FILE)
assert _spec is not None
assert _spec.loader is not None
house = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(house)


@pytest.mark.parametrize(
    "find",
    ["upward_imports", "import_circles", "long_modules", "long_functions", "repeated_names", "words_about_death"],
)
def test_the_house_is_in_order(find: str) -> None:
    assert getattr(house, find)() == []


def test_the_source_does_not_grow_beyond_its_ceiling() -> None:
    assert sum(house.lines(file) for _, file in house.modules()) <= house.CEILING


def test_an_import_that_goes_up_a_floor_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sync").mkdir()
    (tmp_path / "sync" / "exact.py").write_text("from unisono.training.step import Stepper\n")
    (tmp_path / "tree.py").write_text("import unisono.order\n\n\ndef lazy():\n    from unisono.elastic import link\n")
    (tmp_path / "order.py").write_text("from unisono.tree import Span\n")
    monkeypatch.setattr(house, "SOURCE", tmp_path)
    assert house.upward_imports() == [
        "sync/exact.py (floor 3) imports unisono.training.step",
        "tree.py (floor 1) imports unisono.elastic",
    ]
    assert house.import_circles() == ["order <-> tree"]
