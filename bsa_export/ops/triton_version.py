"""Whether the installed Triton can be used here, and if not, the true reason."""

from __future__ import annotations

import os
import re
from functools import cache
from importlib.util import find_spec

import numpy as np

OLDEST = (3, 4)  # the first one with tensor descriptors
INTERPRETER_FOR_NUMPY_2_4 = (3, 7)  # before it, a scalar is converted by int() of an array, which numpy 2.4 refuses


def interpreting() -> bool:
    """Whether Triton runs kernels on the CPU, slowly: TRITON_INTERPRET=1."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def unusable(descriptors: bool) -> str | None:
    """Why kernels cannot run with the installed Triton, or None.

    Args:
        descriptors: whether they need `triton.tools.tensor_descriptor`.
    """
    try:
        import triton
    except ImportError as error:
        return "triton is not installed" if error.name == "triton" else f"triton cannot be imported ({error})"
    version = _numbers(triton.__version__)
    if descriptors and version < OLDEST:
        return (
            f"triton {triton.__version__} is older than 3.4, the first release with tensor descriptors: "
            'pip install "triton>=3.4"'
        )
    if descriptors and find_spec("triton.tools.tensor_descriptor") is None:
        return f"triton {triton.__version__} has no triton.tools.tensor_descriptor"
    if interpreting() and version < INTERPRETER_FOR_NUMPY_2_4 and _numbers(np.__version__) >= (2, 4):
        return (
            f"the interpreter of triton {triton.__version__} does not work with numpy {np.__version__}: "
            'pip install "numpy<2.4" or "triton>=3.7"'
        )
    return None


def _numbers(version: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(number) for number in re.findall("[0-9]+", version)[:2])
