"""`deepspeed.ops.sparse_attention` for code that still imports it, on this package's layouts and kernels.

DeepSpeed deleted the module in 0.19.7. Importing this package (or calling `install()`) makes
`from deepspeed.ops.sparse_attention import ...` and its submodules resolve here wherever the installed DeepSpeed has
none, or no DeepSpeed is installed.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

PACKAGE = "deepspeed.ops.sparse_attention"

# DeepSpeed's module -> the module here whose names it gets.
STAND_INS = {
    PACKAGE: "bsa_export.deepspeed_compat.sparse_attention",
    f"{PACKAGE}.sparsity_config": "bsa_export.deepspeed_compat.sparsity_config",
    f"{PACKAGE}.sparse_self_attention": "bsa_export.attention",
    f"{PACKAGE}.bert_sparse_self_attention": "bsa_export.attention",
    f"{PACKAGE}.sparse_attention_utils": "bsa_export.deepspeed_compat.sparse_attention_utils",
    f"{PACKAGE}.matmul": "bsa_export.deepspeed_compat.matmul",
    f"{PACKAGE}.softmax": "bsa_export.deepspeed_compat.softmax",
}
PARENTS = ("deepspeed", "deepspeed.ops")


class _StandIn(Loader):
    """Fills a module with the public names of the one that stands in for it."""

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ in PARENTS:
            module.__doc__ = (
                "No DeepSpeed: only deepspeed.ops.sparse_attention is here, from bsa_export.deepspeed_compat."
            )
        else:
            source = import_module(STAND_INS[module.__name__])
            vars(module).update({name: value for name, value in vars(source).items() if not name.startswith("_")})
        # A package imports what it holds, as DeepSpeed's do: `import deepspeed` is enough for all of it.
        for name in (*PARENTS, *STAND_INS):
            if name.rpartition(".")[0] == module.__name__:
                import_module(name)


class _Finder(MetaPathFinder):
    """Finds DeepSpeed's sparse attention. At the end of `sys.meta_path` it is asked only for what no other finder
    has.
    """

    def __init__(self, names: Collection[str]):
        self.names = names

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.names:
            return None
        return ModuleSpec(fullname, _StandIn(), is_package=fullname in (*PARENTS, PACKAGE))


_last = _Finder({*STAND_INS, *PARENTS})
_first = _Finder(STAND_INS)
_replaced: dict[str, ModuleType] = {}  # DeepSpeed's own modules that `install(force=True)` found imported


def install(force: bool = False) -> None:
    """Makes `deepspeed.ops.sparse_attention` importable where it is not.

    Args:
        force: replace an installed DeepSpeed's own module too, imported already or not. Objects that old code got
            from it before keep working as they did.
    """
    if _last not in sys.meta_path:
        sys.meta_path.append(_last)
    if force and _first not in sys.meta_path:
        sys.meta_path.insert(0, _first)
        own = [name for name in STAND_INS if name in sys.modules and not _is_stand_in(sys.modules[name])]
        _replaced.update({name: sys.modules.pop(name) for name in own})
        for name in own:
            import_module(name)  # this also puts it into its parent, where old code may look for it


def uninstall() -> None:
    """Removes the stand-ins, imported or not, and restores what `install(force=True)` replaced."""
    for finder in (_first, _last):
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)
    for name in (*STAND_INS, *PARENTS):
        if name in sys.modules and _is_stand_in(sys.modules[name]):
            parent, child = _parent(name)
            if getattr(parent, child, None) is sys.modules.pop(name):
                delattr(parent, child)
    for name, module in _replaced.items():
        sys.modules[name] = module
        parent, child = _parent(name)
        setattr(parent, child, module)
    _replaced.clear()


def _is_stand_in(module: ModuleType) -> bool:
    return isinstance(getattr(getattr(module, "__spec__", None), "loader", None), _StandIn)


def _parent(name: str) -> tuple[ModuleType | None, str]:
    """The imported module that this one is in, and its name there."""
    parent, _, child = name.rpartition(".")
    return sys.modules.get(parent), child


install()
