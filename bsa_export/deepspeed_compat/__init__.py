"""`deepspeed.ops.sparse_attention` for code that still imports it, on this package's layouts and kernels.

DeepSpeed deleted the module in 0.19.7. Importing this package (or calling `install()`) makes
`from deepspeed.ops.sparse_attention import ...` and its submodules resolve here wherever the installed DeepSpeed has none,
or no DeepSpeed is installed.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec

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

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        if module.__name__ in PARENTS:
            module.__doc__ = (
                "No DeepSpeed: only deepspeed.ops.sparse_attention is here, from bsa_export.deepspeed_compat."
            )
            return
        source = import_module(STAND_INS[module.__name__])
        vars(module).update({name: value for name, value in vars(source).items() if not name.startswith("_")})


class _Finder(MetaPathFinder):
    """Answers for DeepSpeed's sparse attention; at the end of `sys.meta_path`, only for what nobody else has."""

    def __init__(self, names):
        self.names = names

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in self.names:
            return None
        return ModuleSpec(fullname, _StandIn(), is_package=fullname in (*PARENTS, PACKAGE))


_last = _Finder({*STAND_INS, *PARENTS})
_first = _Finder(STAND_INS)


def install(force: bool = False) -> None:
    """Makes `deepspeed.ops.sparse_attention` importable where it is not.

    Args:
        force: take the place of an installed DeepSpeed's own module too, imported already or not. Objects that old code
            got from it before keep working as they did.
    """
    if _last not in sys.meta_path:
        sys.meta_path.append(_last)
    if force and _first not in sys.meta_path:
        for name in STAND_INS:
            sys.modules.pop(name, None)
        sys.meta_path.insert(0, _first)


def uninstall() -> None:
    """Takes the stand-ins away again; modules that were imported from them go too."""
    for finder in (_first, _last):
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)
    for name in (*STAND_INS, *PARENTS):
        if isinstance(getattr(getattr(sys.modules.get(name), "__spec__", None), "loader", None), _StandIn):
            del sys.modules[name]


install()
