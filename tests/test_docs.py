"""docs/architecture.md says what is there: the files that it names exist, and its layers are those that are tested."""

import re
from pathlib import Path

from test_imports import LAYERS

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text()


def test_the_files_of_the_map_exist():
    feature_map = PAGE.partition("## Where is what")[2].partition("\n## ")[0]
    named = re.findall(r"`([\w/]+(?:\.py|/))`", feature_map)
    assert len(named) > 40
    assert not [name for name in named if not (ROOT / "bsa_export" / name).exists()]


def test_every_package_is_on_the_map():
    packages = {path.parent.name for path in (ROOT / "bsa_export").glob("*/__init__.py")}
    assert not [name for name in packages if f"`{name}/" not in PAGE]


def test_its_layers_are_the_tested_ones():
    line = next(line for line in PAGE.splitlines() if line.startswith("`cli` > "))
    shown = [{name.removesuffix(".py") for name in re.findall(r"`([\w.]+)`", layer)} for layer in line.split(" > ")]
    assert shown == [set(layer) for layer in LAYERS[1:]]  # above the commands is __main__ alone


def test_every_example_is_listed():
    page = (ROOT / "docs" / "running.md").read_text()
    assert not [path.name for path in (ROOT / "examples").glob("*.py") if f"(../examples/{path.name})" not in page]
