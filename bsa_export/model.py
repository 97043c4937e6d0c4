"""Old names of what is now in `bsa_export.hf`: models that earlier releases pickled whole refer to them."""

from bsa_export.hf.attention import attention, key_padding_mask
from bsa_export.hf.load import load
from bsa_export.hf.register import _refuse_longer, _refuse_longer_in_row, register
from bsa_export.hf.stored_layout import IN_MEMORY, NAME, StoredLayout
from bsa_export.hf.unpadding import pad_input as _restore_padding
from bsa_export.hf.unpadding import unpad_input as _drop_padding

__all__ = [
    "IN_MEMORY",
    "NAME",
    "StoredLayout",
    "_drop_padding",
    "_refuse_longer",
    "_refuse_longer_in_row",
    "_restore_padding",
    "attention",
    "key_padding_mask",
    "load",
    "register",
]
