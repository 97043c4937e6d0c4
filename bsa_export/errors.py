"""The exceptions whose text may be shown to a user as it is. Everything else keeps its traceback."""

from __future__ import annotations

from bsa_export.text import printable


class BsaError(Exception):
    """Something the user can understand and act on, in one sentence, safe to print whatever a file put into it.

    Args:
        message: what is wrong, or what was expected.
        found: what was found instead.
        where: the file, tensor or option that it is about; comes first.
        hint: the next step; comes last.
    """

    def __init__(self, message: str, *, found: object = None, where: object = None, hint: str | None = None):
        text = message if where is None else f"{printable(where, 500)}: {message}"
        if found is not None:
            text += f", found {printable(found, 500)}"
        if hint is not None:
            text += f"; {hint}"
        super().__init__(printable(text))


class CheckpointError(BsaError):
    """A file cannot be read as a checkpoint, or cannot be written."""


class UnsafePickleError(CheckpointError):
    """A pickle calls a function that rebuilding tensors does not need. Nothing was executed."""


class FamilyError(BsaError):
    """The checkpoint is not of a BERT family, or does not fit its config.json."""


class SparsityError(BsaError, ValueError):
    """A sparsity config or a layout is invalid."""


class AttentionError(BsaError, ValueError):
    """A call of attention that no backend, or not the named one, computes."""


class HubError(BsaError):
    """The Hub, or the way to it, refused."""


class MissingLibraryError(BsaError, ImportError):
    """A library of an extra is not installed."""
