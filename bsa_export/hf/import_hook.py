"""Calls `bsa_export.hf.register.register` as soon as transformers is there: `import bsa_export` does not import it."""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder

# The module that defines the table of attention functions; every model class imports it.
TABLE_MODULE = "transformers.modeling_utils"


def _register() -> None:
    import_module("bsa_export.hf.register").register()


class _AfterTransformers(MetaPathFinder):
    """Registers once transformers' table has been imported, and steps aside then.

    transformers offers no entry point that it would look up itself; an import hook is what the standard library has for
    "when that module is imported" (PEP 369 was never merged). Everything is found by the other finders.
    """

    def find_spec(self, fullname, path=None, target=None):
        if fullname != TABLE_MODULE:
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None:
            run = spec.loader.exec_module

            def exec_module(module):
                run(module)
                _register()
                if self in sys.meta_path:
                    sys.meta_path.remove(self)

            spec.loader.exec_module = exec_module  # it may only have been looked up: not yet the time to step aside
        return spec


def register_with_transformers() -> None:
    """Registers now if transformers' models are imported already, else when they are."""
    if TABLE_MODULE in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterTransformers) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTransformers())
