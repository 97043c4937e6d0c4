"""Imports of the package: no circles, layouts stay data to the kernels, and heavy packages only where they compute."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "triton", "deepspeed", "transformers", "matplotlib", "huggingface_hub")
# What imports torch when it is imported; everything else runs without.
COMPUTES = ("attention", "model", "ops", "deepspeed_compat", "verify")
WITHOUT = (
    "verify.checks",
    "verify.file",
    "verify.folder",
    "verify.formulas",
    "verify.layout",
    "verify.run",
    "verify.weights",
)


def imports(path: Path) -> set[str]:
    """The modules that a file imports when it is imported itself, not inside functions; a package's names by their module."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in inner}
    return found


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in sorted((ROOT / "bsa_export").rglob("*.py"))}
GRAPH = {name: imports(path) for name, path in MODULES.items()}


def within(name: str, parts: tuple[str, ...]) -> bool:
    return any(name == f"bsa_export.{part}" or name.startswith(f"bsa_export.{part}.") for part in parts)


def test_there_are_no_circles():
    own = {name: {other for other in found if other in MODULES} - {name} for name, found in GRAPH.items()}
    order = list(TopologicalSorter(own).static_order())  # raises CycleError
    assert (
        order.index("bsa_export.errors")
        < order.index("bsa_export.conversion.plan")
        < order.index("bsa_export.conversion.convert")
    )


def test_kernels_know_layouts_only_as_data():
    upper = {
        "bsa_export.sparsity.configs",
        "bsa_export.sparsity.patterns",
        "bsa_export.sparsity.facts",
        "bsa_export.attention",
        "bsa_export.conversion.plan",
    }
    for name, found in GRAPH.items():
        if within(name, ("ops",)):
            assert not found & upper, name


def test_only_what_computes_imports_heavy_packages():
    heavy = {name for name, found in GRAPH.items() if any(other.split(".")[0] in HEAVY for other in found)}
    assert heavy, "the test sees no import at all"
    for name in heavy:
        assert within(name, COMPUTES) and not within(name, WITHOUT) or within(name, ("hub",)), name


def test_click_is_imported_by_the_commands_alone():
    with_click = {name for name, found in GRAPH.items() if "click" in found}
    assert with_click and all(within(name, ("cli",)) for name in with_click)
