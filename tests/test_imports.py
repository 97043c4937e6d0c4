"""Imports of the package: downwards only, without circles, declared, and without torch where nothing is computed.

Every import counts: also those inside functions, under TYPE_CHECKING, and `import_module("...")`.
"""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from bsa_export.version import EXTRAS

ROOT = Path(__file__).resolve().parent.parent
# From the top down. Each may import what stands below it, and modules of the last line each other.
LAYERS = (
    ("__main__",),
    ("cli",),
    ("deepspeed_compat", "model"),
    ("verify",),
    ("hf",),
    ("conversion",),
    ("hub",),
    ("converted",),
    ("attention",),
    ("bert",),
    ("sparsity",),
    ("checkpoint",),
    ("ops",),
    ("files", "text", "errors", "version"),
)
MOST_ROOT_MODULES = 8  # next to __init__ and __main__, which Python names
HEAVY = ("torch", "triton", "deepspeed", "transformers", "tokenizers", "accelerate", "matplotlib")
# Packages that need no library of an extra.
LIGHT = (
    "cli",
    "conversion",
    "hub",
    "converted",
    "bert",
    "sparsity",
    "checkpoint",
    "files",
    "text",
    "errors",
    "version",
)
# Where a distribution has another name.
DISTRIBUTIONS = {"huggingface_hub": "huggingface-hub", "sentence_transformers": "sentence-transformers"}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in sorted((ROOT / "bsa_export").rglob("*.py"))}


def imports(source: str, package: str) -> set[str]:
    """The modules that a file imports, anywhere in it. `package` is what its relative imports start from."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                found.add(inner if inner in MODULES else module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return found


def imports_of(name: str, path: Path) -> set[str]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return imports(path.read_text(), package) - {name}


GRAPH = {name: imports_of(name, path) for name, path in MODULES.items()}
OWN = {name: {other for other in found if other.split(".")[0] == "bsa_export"} for name, found in GRAPH.items()}


def part(name: str) -> str:
    """The package or root module that a module belongs to, as LAYERS names it; empty for the package root."""
    return name.removeprefix("bsa_export").removeprefix(".").split(".")[0]


def third_party(name: str) -> set[str]:
    """The distributions that a module imports."""
    tops = {other.split(".")[0] for other in GRAPH[name]} - set(sys.stdlib_module_names) - {"bsa_export"}
    return {DISTRIBUTIONS.get(top, top) for top in tops}


def declared() -> tuple[set[str], dict[str, set[str]]]:
    """setup.cfg: the core's requirements, and those of each extra, by name; extras that an extra names are resolved."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras: dict[str, set[str]] = {}

    def requirements(extra: str) -> set[str]:
        found: set[str] = set()
        for line in setup["options.extras_require"][extra].strip().splitlines():
            inner = re.fullmatch(r"bsa_export\[(.*)\]", line.strip())
            found |= set().union(*map(requirements, inner[1].split(","))) if inner else {line.split(";")[0].strip()}
        return found

    for extra in setup["options.extras_require"]:
        extras[extra] = requirements(extra)
    core = set(setup["options"]["install_requires"].strip().splitlines())
    return core, extras


def names(requirements: set[str]) -> set[str]:
    return {re.match(r"[\w-]+", requirement)[0].lower() for requirement in requirements}


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("import torch.nn as nn", "torch.nn"),
        ("from bsa_export.hub import source", "bsa_export.hub.source"),
        ("from bsa_export.hub import push", "bsa_export.hub"),
        ("from . import source", "bsa_export.hub.source"),
        ("from ..files import read_json", "bsa_export.files"),
        ("def f():\n    from bsa_export import files", "bsa_export.files"),
        ("if TYPE_CHECKING:\n    import bsa_export.files", "bsa_export.files"),
        ("importlib.import_module('bsa_export.files')", "bsa_export.files"),
    ],
)
def test_each_kind_of_import_is_seen(line, found):
    """As if the line stood in a module of bsa_export.hub."""
    assert imports(line, "bsa_export.hub") == {found}


def test_modules_have_no_circle():
    list(TopologicalSorter(OWN).static_order())  # raises CycleError, which lists the circle


def test_each_package_imports_only_what_is_below_it():
    rank = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    assert {part(name) for name in MODULES} - {""} == set(rank), "a package or root module without a layer, or gone"
    lowest = len(LAYERS) - 1
    upwards = [
        f"{name} imports {other}"
        for name, found in OWN.items()
        for other in sorted(found)
        if part(name) and part(name) != part(other)
        if not part(other) or not (rank[part(other)] > rank[part(name)] or rank[part(other)] == lowest)
    ]
    assert not upwards, "\n".join(upwards)


def test_the_root_has_few_modules():
    files = {path.stem for path in (ROOT / "bsa_export").glob("*.py")} - {"__init__", "__main__"}
    assert len(files) <= MOST_ROOT_MODULES, files


def test_click_is_imported_by_the_commands_alone():
    with_click = {name for name in GRAPH if "click" in third_party(name)}
    assert with_click and {part(name) for name in with_click} == {"cli"}


def test_everything_imported_is_declared():
    core, extras = declared()
    for name in MODULES:
        found = third_party(name)
        allowed = names(core | (extras["plot"] if part(name) in LIGHT else extras["all"]))
        assert found <= allowed, f"{name} imports {', '.join(found - allowed)}"
    assert names(core) <= set().union(*map(third_party, MODULES)), "a requirement that nothing imports"


@pytest.mark.parametrize("extra", EXTRAS)
def test_messages_name_the_libraries_of_an_extra(extra):
    assert set(EXTRAS[extra]) == declared()[1][extra]


WITHOUT_HEAVY = """
import sys, importlib
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {heavy!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
for name in {modules!r}:
    importlib.import_module(name)
"""


def test_light_packages_import_where_no_extra_is_installed():
    modules = sorted(name for name in MODULES if part(name) in (*LIGHT, ""))
    program = WITHOUT_HEAVY.format(heavy=HEAVY, modules=modules)
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_commands_end_with_help_before_anything_heavy_is_imported():
    """Measured where everything is installed: an import that is guarded by `try` would be seen too."""
    program = (
        "import sys; from bsa_export.cli import COMMANDS, main\n"
        "for name in COMMANDS: main([name, '--help'], standalone_mode=False)\n"
        f"print(sorted({{name.split('.')[0] for name in sys.modules}} & {{*{HEAVY!r}, 'numpy', 'huggingface_hub'}}))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"
