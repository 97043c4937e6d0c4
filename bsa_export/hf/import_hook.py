"""Registers this package with transformers once that is imported, because `import bsa_export` does not import it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# A module of transformers -> the module here whose `register` is called after its import: what reads every
# config.json, the table of attention functions, the table of configs, and the auto classes.
HOMES = {
    "transformers.configuration_utils": "bsa_export.hf.config_key",
    "transformers.modeling_utils": "bsa_export.hf.register",
    "transformers.models.auto.configuration_auto": "bsa_export.hf.auto_classes",
    "transformers.models.auto.modeling_auto": "bsa_export.hf.auto_classes",
}


class _AfterTransformers(MetaPathFinder):
    """Calls `register` after the import of one module of transformers, and then removes itself.

    transformers has no entry point that it looks up, and the standard library has no other way to wait for an import
    (PEP 369 was never merged). The other finders find every module.
    """

    def __init__(self, name: str):
        self.name = name

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
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
                import_module(HOMES[self.name]).register()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign] # a look-up alone is no import yet
        return spec


def register() -> None:
    """Registers `block_sparse` with transformers: now if its models are imported already, else when they are.

    `import bsa_export` calls it.
    """
    for name, home in HOMES.items():
        if name in sys.modules:
            import_module(home).register()
        elif not any(isinstance(finder, _AfterTransformers) and finder.name == name for finder in sys.meta_path):
            sys.meta_path.insert(0, _AfterTransformers(name))


def unregister() -> None:
    """Removes the import hook, and what was registered with transformers and torch.

    A sparse model that was built before raises AttentionError when it is called, because transformers looks its
    attention function up by name at every call. After `register()` it works again.
    """
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _AfterTransformers)]
    for home in HOMES.values():
        if module := sys.modules.get(home):
            module.unregister()
