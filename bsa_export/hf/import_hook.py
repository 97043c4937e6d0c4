"""Calls `bsa_export.hf.register.register` once transformers is imported, because `import bsa_export` does not import it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# The module that defines the table of attention functions; every model class imports it.
TABLE_MODULE = "transformers.modeling_utils"


def _register() -> None:
    import_module("bsa_export.hf.register").register()


class _AfterTransformers(MetaPathFinder):
    """Registers once transformers' table is imported, and then removes itself.

    transformers has no entry point that it looks up, and the standard library has no other way to wait for an import (PEP 369
    was never merged). The other finders find every module.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TABLE_MODULE:
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            if self in sys.meta_path:  # `unregister` may have come between
                sys.meta_path.remove(self)
                _register()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign] # a look-up alone is no import yet
        return spec


def register() -> None:
    """Registers `block_sparse` with transformers: now if its models are imported already, else when they are.

    `import bsa_export` calls it.
    """
    if TABLE_MODULE in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterTransformers) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTransformers())


def unregister() -> None:
    """Undoes what `import bsa_export` changes in a process: the import hook, and what was registered with transformers and torch.

    A sparse model that was built before raises AttentionError when it is called, because transformers looks its attention function up
    by name at every call. After `register()` it works again.
    """
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _AfterTransformers)]
    if registered := sys.modules.get("bsa_export.hf.register"):
        registered.unregister()
