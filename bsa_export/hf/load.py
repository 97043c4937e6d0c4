"""`load()`: a converted model in the transformers class that its config.json names."""

from __future__ import annotations

import inspect
import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError

from bsa_export.bert.expected_tensors import compare
from bsa_export.bert.families import FAMILIES, class_names
from bsa_export.converted.folder import ConvertedFolder, open_folder
from bsa_export.errors import BsaError, CheckpointError, MissingLibraryError
from bsa_export.hf.prenorm_names import CLASSES
from bsa_export.hf.register import MIN_TRANSFORMERS, register, version_of
from bsa_export.hf.stored_layout import NAME, StoredLayout
from bsa_export.hub.source import find_source
from bsa_export.text import some
from bsa_export.version import install_hint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def load(
    path: str | os.PathLike[str], *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Loads a converted model into the transformers class that its config.json names, on block-sparse attention.

    Stricter than `from_pretrained`: every weight of that class has to be there, no tensor of the encoder may be left
    over, and every layer's layout is checked. Where transformers has no class of that name for the model's type, the
    tensors decide which head the model has. A pooler without weights is left out.

    Args:
        path: the folder that bsa-convert or bsa-pull wrote, or a repository on the Hub, `org/name` or
            `org/name@revision` (a str that names no folder here), which is downloaded into huggingface_hub's cache.
        device: device of the model; the CPU by default.
        dtype: dtype of the weights; as stored by default.

    Returns:
        The model in evaluation mode.

    Raises:
        MissingLibraryError: transformers is not installed.
        CheckpointError: not a converted model, or its weights do not fit the class.
        FamilyError: config.json does not describe a BERT encoder that fits the weights.
        HubError: the repository cannot be downloaded.
        AttentionError: a stored layout is damaged.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise MissingLibraryError(
            "bsa_export.load needs transformers, which is not installed", hint=install_hint("run")
        ) from error
    if version_of(transformers) < MIN_TRANSFORMERS:
        raise CheckpointError(
            "bsa_export.load needs transformers 5.0 or newer, whose BERT calls a registered attention function",
            found=transformers.__version__,
        )
    register()
    local = Path(path) if not isinstance(path, str) else find_source(path, progress=True).path
    folder = open_folder(local)
    # Before a module is built: config.json may describe a model that fits into no memory.
    # transformers saves a model that ZeRO 3 trained under old names, such as LayerNorm.gamma, and reads them back.
    tensors = {folder.encoder.written_name(name): row for name, row in folder.tensors.items()}
    compare(tensors, folder.encoder.sparse_spec()).raise_if_any(folder.path)
    model_class = _model_class(folder)
    if not getattr(model_class, "_supports_attention_backend", False):
        raise CheckpointError(
            f"{model_class.__name__} of transformers {transformers.__version__} calls no registered attention function",
            where=folder.path,
            hint=NEWER,
        )
    model, loaded = _from_pretrained(folder, model_class, dtype)
    _refuse_misfits(folder.path, model, **loaded)
    for module in model.modules():
        if isinstance(module, StoredLayout):
            module.check()
    return model if device is None else model.to(device)  # type: ignore[arg-type]


NEWER = "install a newer transformers: pip install --upgrade transformers"
# The head that tensors of these names are, and transformers' table of the classes that have it. The first counts.
HEADS = {
    "cls.seq_relationship.": "MODEL_FOR_PRETRAINING_MAPPING",
    "cls.predictions.": "MODEL_FOR_MASKED_LM_MAPPING",
    "lm_head.": "MODEL_FOR_MASKED_LM_MAPPING",
    "generator_lm_head.": "MODEL_FOR_MASKED_LM_MAPPING",
    "discriminator_predictions.": "MODEL_FOR_PRETRAINING_MAPPING",
    "sop_classifier.": "MODEL_FOR_PRETRAINING_MAPPING",
    "predictions.": "MODEL_FOR_MASKED_LM_MAPPING",
    "decoder.": "MODEL_FOR_MASKED_LM_MAPPING",
}


def _model_class(folder: ConvertedFolder) -> type[PreTrainedModel]:
    """The class that config.json names, else that of the head that the tensors hold, else the encoder's."""
    import transformers

    from bsa_export.hf import prenorm_bert

    named = next(iter(class_names(folder.config)), None)
    own = getattr(prenorm_bert, named) if named and named in CLASSES.values() else None
    found = own or (getattr(transformers, named, None) if named else None)
    if found is not None:
        kind = getattr(getattr(found, "config_class", None), "model_type", None)
        if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) and kind in FAMILIES):
            raise CheckpointError(
                "architectures: expected a model class of a BERT family", found=named, where=folder.path / "config.json"
            )
        if FAMILIES[kind].structures == folder.encoder.family.structures:  # else it is of another model
            return found
    family = folder.encoder.family.name
    if family not in transformers.CONFIG_MAPPING:
        raise CheckpointError(
            f"transformers {transformers.__version__} has no model_type {family}", where=folder.path, hint=NEWER
        )
    tables = [table for head, table in HEADS.items() if any(name.startswith(head) for name in folder.tensors)]
    table = getattr(transformers, tables[0] if tables else "MODEL_MAPPING")
    model_class: type[PreTrainedModel] = table[transformers.CONFIG_MAPPING[family]]
    log.warning(
        "%s: architectures names %s, which transformers does not have for such a model; loaded as %s, by its tensors",
        folder.path,
        named or "no class",
        model_class.__name__,
    )
    return model_class


def _from_pretrained(
    folder: ConvertedFolder, model_class: type[PreTrainedModel], dtype: torch.dtype | None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and transformers' account of the tensors that did not fit."""
    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    has_pooler = any(re.search(r"\bpooler\.(dense\.)?weight$", name) for name in folder.tensors)
    if not has_pooler and "add_pooling_layer" in inspect.signature(model_class).parameters:
        options["add_pooling_layer"] = False
    try:
        config: Any = model_class.config_class.from_pretrained(folder.path)  # type: ignore[union-attr]
        if not hasattr(config, "tie_word_embeddings"):  # CamemBERT before transformers 5.4, whose head stayed random
            config.tie_word_embeddings = True
        return model_class.from_pretrained(  # type: ignore[return-value] # a pair, with output_loading_info
            folder.path,
            config=config,
            attn_implementation=NAME,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    except BsaError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, StrictDataclassError) as error:
        raise CheckpointError(
            f"transformers cannot build {model_class.__name__} from this config.json ({type(error).__name__}: {error})",
            where=folder.path,
        ) from error


def _refuse_misfits(
    folder: Path,
    model: PreTrainedModel,
    missing_keys: set[str],
    unexpected_keys: set[str],
    mismatched_keys: set[tuple[str, Any, Any]],
    **_: Any,
) -> None:
    """Raises CheckpointError for weights that would be random or lost.

    A head that the class does not have only gets a line in the log.
    """
    parts = ("encoder.", "embeddings.", "layers.")
    encoder = (*(f"{model.base_model_prefix}.{part}" for part in parts), *parts)
    lost = [name for name in unexpected_keys if name.startswith(encoder)]
    misfits = {
        "missing": sorted(missing_keys),
        "unexpected": sorted(lost),
        "of another shape": sorted(
            f"{name} (expected {tuple(expected)}, found {tuple(found)})" for name, found, expected in mismatched_keys
        ),
    }
    if any(misfits.values()):
        found = "; ".join(f"{kind}: {some(names)}" for kind, names in misfits.items() if names)
        hint = "is this config.json from the same model?"
        if not lost and not mismatched_keys and not any(name.startswith(encoder) for name in missing_keys):
            hint = (
                f"for a new head use {type(model).__name__}.from_pretrained, and for the encoder alone "
                f'AutoModel.from_pretrained, with attn_implementation="{NAME}"'
            )
        raise CheckpointError(
            f"its weights do not fit {type(model).__name__} as its config.json describes it ({found})",
            where=folder,
            hint=hint,
        )
    if unexpected_keys:
        log.warning("%s: %s has no place for %s", folder, type(model).__name__, some(sorted(unexpected_keys)))
