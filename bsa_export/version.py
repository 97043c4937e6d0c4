"""The version, the project's address and its extras, in a module that imports nothing."""

from __future__ import annotations

__version__ = "0.1.0"

# The one place that names it: package metadata, README's links on an index and model cards take it from here.
# Set it to the public repository before the first release; nobody can register a name under .example.
PROJECT_URL = "https://bsa-export.example/bsa_export"

# What each extra of setup.cfg brings; a test compares the two.
_RUN = ("torch>=2.8", "triton>=3.4", "transformers>=5.0,<6", "tokenizers>=0.22.1")
EXTRAS = {
    "run": _RUN,
    "verify": (*_RUN, "deepspeed>=0.16,<0.19.7"),
    "plot": ("matplotlib>=3.7",),
    "sentences": (*_RUN, "sentence-transformers>=5.2"),
    "train": (*_RUN, "accelerate>=1.1", "datasets>=2.19"),
}


def install_hint(extra: str) -> str:
    """Returns the command that installs an extra next to this package, as the hint of a message.

    It names the libraries, so it works wherever the package came from. `pip install "bsa_export[run]"` needs an index
    that has the package.

    Args:
        extra: a key of `EXTRAS`.
    """
    return "pip install " + " ".join(f'"{library}"' for library in EXTRAS[extra])


def install_command(extra: str) -> str:
    """Returns the command that installs this package with an extra from `PROJECT_URL`, for readers of a model card."""
    return f'pip install "bsa_export[{extra}] @ git+{PROJECT_URL}"'
