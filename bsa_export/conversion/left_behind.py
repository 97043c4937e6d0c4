"""Why a file next to the weights is not carried over, by its name."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from enum import Enum
from fnmatch import fnmatch

from bsa_export.checkpoint.open import NOT_WEIGHTS, WEIGHT_ENDINGS
from bsa_export.converted.card import PICTURES
from bsa_export.converted.names import CARD, CONVERSION_RECORD, PULL_RECORD, VERIFICATION_RECORD

LICENSES = tuple(f"{name}{end}" for name in ("license", "licence", "notice", "copying") for end in ("", "[-._]*"))
RECORDS = (CONVERSION_RECORD, VERIFICATION_RECORD, PULL_RECORD, *PICTURES)
CARD_FILES = (CARD, "*.png", "*.svg", "*.jpg")
CODE = ("*.py", "*.pyc", "*.so", "*.sh", "*.ipynb", "__pycache__")
ADAPTERS = ("adapter_*",)
OTHER_FORMATS = (
    "*.h5", "*.msgpack", "*.ot", "*.onnx", "*.onnx_data", "*.gguf", "*.ggml", "*.tflite", "*.keras", "*.pb",
    "*.mlmodel", "*.mlpackage", "*.ckpt.data-*", "*.ckpt.index", "*.ckpt.meta", "openvino_*", "onnx", "openvino",
    "coreml",
)  # fmt: skip
TRAINING_STATE = (
    *(name for name in NOT_WEIGHTS if not fnmatch("adapter_model.bin", name)),
    "trainer_state.json", "training_args*", "sampler*.bin", "sampler*.pt", "events.out.tfevents*", "latest",
    "checkpoint-*", "global_step*", "runs", "logs", "wandb", "mlruns", "eval",
)  # fmt: skip
PICKLES = (
    *(f"*{ending}" for ending in WEIGHT_ENDINGS if ending != ".safetensors"),
    "*.pkl",
    "*.pickle",
    "*.joblib",
    "*.npy",
    "*.npz",
)


class LeftBehind(str, Enum):
    """Why a file of the source is not carried over; notes show the value."""

    CARD = "the source's model card"
    STALE = "of the conversion, changed or deleted since"
    OTHER_VOCABULARY = "of the conversion, whose vocabulary has another size; save the trained tokenizer with the model"
    REPLACED = "replaced by a new one"
    RECORD = "a record of the source's own conversion"
    OTHER_FORMAT = "weights in another format"
    SAME_WEIGHTS = "another file of the encoder's weights"
    OTHER_WEIGHTS = "weights of another model"
    UNREADABLE = "not readable as tensors"
    ADAPTER = "an adapter, not merged into the weights"
    TRAINING_STATE = "state of a training run"
    CODE = "code"
    LINK = "a link out of the folder"
    HIDDEN = "hidden"
    NOT_OF_THE_MODEL = "not a file of the model, its tokenizer or its modules"

    __str__ = str.__str__


# In the folder of a module every other folder counts: a route of a router may have any name.
SKIPPED_FOLDERS = {"__pycache__": LeftBehind.CODE, "onnx": LeftBehind.OTHER_FORMAT, "openvino": LeftBehind.OTHER_FORMAT}
# Files of every repository of the Hub that no note needs to name.
UNREMARKABLE = (LeftBehind.CARD, LeftBehind.REPLACED, LeftBehind.RECORD, LeftBehind.HIDDEN)


def reason_by_name(name: str) -> LeftBehind | None:
    """Why a file or folder is left behind whatever is in it."""
    if name.startswith("."):
        return LeftBehind.HIDDEN
    kinds: list[tuple[LeftBehind, Sequence[str]]] = [
        (LeftBehind.CODE, CODE),
        (LeftBehind.ADAPTER, ADAPTERS),
        (LeftBehind.TRAINING_STATE, TRAINING_STATE),
        (LeftBehind.OTHER_FORMAT, OTHER_FORMATS),
    ]
    return next((reason for reason, patterns in kinds if matches(name, patterns)), None)


def matches(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
