"""`load()`: a converted model in the transformers class that its config.json names."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path

import torch

from bsa_export.bert.families import find_family, read_config
from bsa_export.checkpoint.open import open_checkpoint
from bsa_export.errors import CheckpointError, MissingLibraryError
from bsa_export.hf.register import MIN_TRANSFORMERS, register, version_of
from bsa_export.hf.stored_layout import NAME, StoredLayout
from bsa_export.hub.source import find_source
from bsa_export.text import some
from bsa_export.version import install_hint

log = logging.getLogger(__name__)


def load(path: str | Path, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None):
    """Loads a converted model into the transformers class that its config.json names, on block-sparse attention.

    Stricter than `from_pretrained`: every weight of that class must be there, nothing of the encoder may be left over,
    and every layer's layout is checked. A class that transformers does not have gives way to the one whose head the tensors
    hold, and a pooler without weights is left out.

    Args:
        path: the folder that bsa-convert or bsa-pull wrote, or a repository of the Hub, `org/name` or
            `org/name@revision` (a str that names no folder here), which goes into huggingface_hub's cache.
        device: where the model goes; the CPU by default.
        dtype: of the weights; as stored by default.

    Returns:
        The model (`transformers.PreTrainedModel`) in evaluation mode.

    Raises:
        CheckpointError: it is no converted model, or its weights do not fit the class.
        HubError: the Hub does not give it.
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
    folder = path if isinstance(path, Path) else find_source(path, progress=True).path
    names = _names(folder)
    model_class = _model_class(folder, names)
    options = {} if dtype is None else {"dtype": dtype}
    has_pooler = any(name.endswith("pooler.dense.weight") for name in names)
    if not has_pooler and "add_pooling_layer" in inspect.signature(model_class.__init__).parameters:
        options["add_pooling_layer"] = False
    config = model_class.config_class.from_pretrained(folder)
    if not hasattr(config, "tie_word_embeddings"):  # CamemBERT's before transformers 5.4, which left its head random
        config.tie_word_embeddings = True
    model, loaded = model_class.from_pretrained(
        folder,
        config=config,
        attn_implementation=NAME,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **options,
    )
    _refuse_misfits(folder, model, **loaded)
    for module in model.modules():
        if isinstance(module, StoredLayout):
            module.check()
    return model if device is None else model.to(device)


def _names(folder: Path) -> list[str]:
    """The names of a converted model's tensors."""
    if not (folder / "config.json").is_file():
        found = "no folder" if not folder.is_dir() else "none"
        raise CheckpointError("expected a converted model's folder with a config.json", where=folder, found=found)
    return list(open_checkpoint(folder).tensors)


# The head that tensors of these names are, and transformers' table of the classes that have it.
HEADS = {
    "cls.predictions.": "MODEL_FOR_MASKED_LM_MAPPING",
    "lm_head.": "MODEL_FOR_MASKED_LM_MAPPING",
    "generator_lm_head.": "MODEL_FOR_MASKED_LM_MAPPING",
    "discriminator_predictions.": "MODEL_FOR_PRETRAINING_MAPPING",
}


def _model_class(folder: Path, names: list[str]) -> type:
    """The class that config.json names, else that of the head that the tensors hold, else the encoder's."""
    import transformers

    config = read_config(folder / "config.json")
    named = next(iter(config.get("architectures") or ()), None)
    if hasattr(transformers, str(named)):
        return getattr(transformers, named)
    family = find_family(config, names).name
    tables = [table for head, table in HEADS.items() if any(name.startswith(head) for name in names)]
    table = getattr(transformers, tables[0] if tables else "MODEL_MAPPING")
    model_class = table[transformers.CONFIG_MAPPING[family]]
    log.warning(
        "%s: architectures names %s, which transformers does not have; loaded as %s, by its tensors",
        folder,
        named or "no class",
        model_class.__name__,
    )
    return model_class


def _refuse_misfits(folder: Path, model, missing_keys, unexpected_keys, mismatched_keys, **_) -> None:
    """Raises CheckpointError for weights that would be random or lost.

    A head that the class does not have only gets a line in the log.
    """
    encoder = f"{model.base_model_prefix}.encoder.", f"{model.base_model_prefix}.embeddings.", "encoder.", "embeddings."
    lost = [name for name in unexpected_keys if name.startswith(encoder)]
    misfits = {
        "missing": sorted(missing_keys),
        "unexpected": sorted(lost),
        "of another shape": sorted(
            f"{name} (expected {tuple(expected)}, found {tuple(found)})" for name, found, expected in mismatched_keys
        ),
    }
    if any(misfits.values()):
        told = "; ".join(f"{kind}: {some(names)}" for kind, names in misfits.items() if names)
        hint = "is this config.json from the same model?"
        if not lost and not mismatched_keys and not any(name.startswith(encoder) for name in missing_keys):
            hint = (
                f"for a new head use {type(model).__name__}.from_pretrained, and for the encoder alone "
                f'AutoModel.from_pretrained, with attn_implementation="{NAME}"'
            )
        raise CheckpointError(
            f"its weights do not fit {type(model).__name__} as its config.json describes it ({told})",
            where=folder,
            hint=hint,
        )
    if unexpected_keys:
        log.warning("%s: %s has no place for %s", folder, type(model).__name__, some(sorted(unexpected_keys)))
