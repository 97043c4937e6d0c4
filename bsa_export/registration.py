"""Calls `bsa_export.model.register` as soon as transformers is there: `import bsa_export` does not import it."""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.util import find_spec

# The module that defines the table of attention functions; every model class imports it.
TABLE_MODULE = "transformers.modeling_utils"


def _register() -> None:
    import_module("bsa_export.model").register()


class _AfterTransformers(MetaPathFinder):
    """Steps aside at the first import of transformers' table, and registers once that module has run.

    transformers offers no entry point that it would look up itself; an import hook is what the standard library has for
    "when that module is imported" (PEP 369 was never merged). Everything else is found by the usual finders.
    """

    def find_spec(self, fullname, path=None, target=None):
        if fullname != TABLE_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None:
            run = spec.loader.exec_module

            def exec_module(module):
                run(module)
                _register()

            spec.loader.exec_module = exec_module
        return spec


def register_with_transformers() -> None:
    """Registers now if transformers' models are imported already, else when they are."""
    if TABLE_MODULE in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterTransformers) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTransformers())
