"""Proof that a converted folder is right: checks that return values. The file and layout checks need no torch.

`bsa_export.verify("out/")` runs them all: the package itself can be called.
"""

from __future__ import annotations

import sys
from inspect import signature
from types import ModuleType
from typing import Any

from bsa_export.converted.checks import Check, Kind, Status
from bsa_export.converted.integrity import check_file, check_layout
from bsa_export.verify.run import verify
from bsa_export.verify.verification import Verification

__all__ = ["Check", "Kind", "Status", "Verification", "check_file", "check_layout", "verify"]


class _CallablePackage(ModuleType):
    """The package under the name that the Python API has for its function."""

    __signature__ = signature(verify)

    def __call__(self, *arguments: Any, **options: Any) -> Verification:
        return verify(*arguments, **options)


_CallablePackage.__call__.__doc__ = verify.__doc__
sys.modules[__name__].__class__ = _CallablePackage
