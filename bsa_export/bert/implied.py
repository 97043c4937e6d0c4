"""What the tensors of a checkpoint say about fields of config.json that it leaves out, or that its recipe did not read.

The tensors decide where config.json is silent. Where both say something else, nothing is converted.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from bsa_export.bert.expected_tensors import FLOATS, Sizes
from bsa_export.bert.families import FREQUENCIES, Family, class_names, written_name
from bsa_export.bert.structure import LAST_NORM, POSITIONS
from bsa_export.checkpoint.dtypes import read
from bsa_export.checkpoint.table import Tensor
from bsa_export.errors import FamilyError

Fields = dict[str, Any]

PADDED_TO = (8, 16, 32, 64, 128)  # vocabularies, so that matrix products are fast
ROTARY_BASE = 10_000  # where config.json states none
# How far stored frequencies may be from the computed ones, relative to them.
ROUNDING = {"F64": 1e-6, "F32": 1e-5, "F16": 2.0**-10, "BF16": 2.0**-7}
_PRE_NORM = re.compile(r"encoder\.layer\.\d+\.(Pre|Post)AttentionLayerNorm\..*")
LEAST_F16 = 2.0**-24  # absolute: smaller ones are stored as a multiple of it


def implied_vocabulary(tensors: Mapping[str, Tensor], name: str, config: Mapping[str, Any]) -> Fields:
    """`vocab_size` where config.json has none, or has it without the padding to a round number of rows.

    DeepSpeed's recipe takes the size from its tokenizer, and pads it to a multiple of 8.

    Args:
        tensors: of the checkpoint.
        name: that of the word embeddings.
        config: content of config.json.
    """
    words, stated = tensors.get(name), config.get("vocab_size")
    if words is None or len(words.shape) != 2:
        return {}
    rows = words.shape[0]
    if stated is None:
        return {"vocab_size": rows}
    if not isinstance(stated, int) or isinstance(stated, bool) or stated < 1:
        return {}
    padded = [-(-stated // multiple) * multiple for multiple in PADDED_TO]
    return {"vocab_size": rows} if rows != stated and rows in padded else {}


def implied_norms_and_positions(
    family: Family, tensors: Mapping[str, Tensor], prefix: str, config: Mapping[str, Any], sizes: Sizes
) -> Fields:
    """Where the layer norms are, how positions enter, and the class, of a family whose config.json chooses them.

    Args:
        family: one that `chooses_norms`.
        tensors: of the checkpoint; rotary frequencies are read.
        prefix: the encoder's.
        config: content of config.json in the fields that are written.
        sizes: those of config.json.

    Raises:
        FamilyError: config.json says otherwise than the tensors, or the rotary positions cannot be computed.
    """
    written = {written_name(family, prefix, name) for name in tensors}
    start = f"{family.written_prefix}." if prefix else ""
    inner = {name.removeprefix(start) for name in written if name.startswith(start)}
    frequencies = {name: row for name, row in tensors.items() if re.fullmatch(re.escape(prefix) + FREQUENCIES, name)}
    table, stated = POSITIONS in inner, config.get("position_embedding_type")
    rotary = bool(frequencies) or (not table and stated == "rotary")
    found: Fields = {
        "pre_layer_norm": any(_PRE_NORM.fullmatch(name) for name in inner),
        "last_layer_norm": f"{LAST_NORM}.weight" in inner or f"{LAST_NORM}.bias" in inner,
        "position_embedding_type": "rotary" if rotary else "absolute",
    }
    if table and rotary:
        raise FamilyError("expected one kind of positions", found=f"{prefix}{POSITIONS} and {next(iter(frequencies))}")
    if rotary:
        found |= _rotary(frequencies, config, sizes)
    for name, value in found.items():
        if config.get(name) not in (None, value):
            raise FamilyError(
                f"{name}: expected {_json(value)}, which is what the tensors are",
                found=_json(config[name]),
                where="config.json",
                hint="is this config.json from the same model?",
            )
    return found | _head(family, tensors, written, config)


def computed_frequencies(rotary_dim: int, base: float) -> np.ndarray:
    """The rotary frequencies, float64 `[rotary_dim / 2]`: pair i turns by `base ** (-2 i / rotary_dim)` a token."""
    return float(base) ** (-np.arange(0, rotary_dim, 2) / rotary_dim)


def _rotary(frequencies: Mapping[str, Tensor], config: Mapping[str, Any], sizes: Sizes) -> Fields:
    """`rotary_dim` and `rotary_base`, checked against the frequencies that are stored."""
    head_dim = sizes.hidden_size // sizes.num_attention_heads
    shapes = {row.shape for row in frequencies.values()}
    stated, base = config.get("rotary_dim"), config.get("rotary_base")
    if len(shapes) > 1 or any(len(shape) != 1 for shape in shapes):
        name, row = next(iter(frequencies.items()))
        raise FamilyError("expected the same rotary frequencies in each layer", found=list(row.shape), where=name)
    dim = 2 * next(iter(shapes))[0] if shapes else head_dim if stated is None else stated
    if not isinstance(dim, int) or isinstance(dim, bool) or dim % 2 or not 0 < dim <= head_dim:
        raise FamilyError(
            f"rotary_dim: expected an even number up to the {head_dim} elements of a head",
            found=repr(dim),
            where=next(iter(frequencies), "config.json"),
        )
    for name, row in frequencies.items():
        if row.dtype not in FLOATS:
            raise FamilyError("expected rotary frequencies of a floating dtype", found=row.dtype, where=name)
    if base is None:
        base = _base_of(frequencies, dim)
    if not isinstance(base, (int, float)) or isinstance(base, bool) or not 1 < base < 1e12:
        raise FamilyError("rotary_base: expected a number above 1", found=repr(base), where="config.json")
    for name, row in frequencies.items():
        if not _are_frequencies(row, dim, base):
            raise FamilyError(
                f"expected the frequencies of rotary_base {base} and rotary_dim {dim}",
                found="others",
                where=name,
                hint="state the rotary_base that the model was trained with in config.json",
            )
    return {"rotary_dim": dim, "rotary_base": base}


def _are_frequencies(row: Tensor, dim: int, base: float) -> bool:
    """Whether a tensor holds the frequencies of a base, as far as its dtype can."""
    stored = read(row, float32=row.dtype != "F64")
    return np.allclose(stored, computed_frequencies(dim, base), rtol=ROUNDING[row.dtype], atol=LEAST_F16)


def _base_of(frequencies: Mapping[str, Tensor], dim: int) -> int:
    """The base that stored frequencies have, a whole number; ROTARY_BASE where they are its own, or there are none."""
    row = next(iter(frequencies.values()), None)
    if row is None or dim == 2 or _are_frequencies(row, dim, ROTARY_BASE):
        return ROTARY_BASE
    last = float(read(row, float32=row.dtype != "F64")[-1])  # base ** (-(dim - 2) / dim)
    return round(min(last ** (-dim / (dim - 2)), 1e12)) if last > 0 else ROTARY_BASE


def _head(family: Family, tensors: Mapping[str, Tensor], written: Collection[str], config: Mapping[str, Any]) -> Fields:
    """`architectures`, where config.json names no class, and `num_labels`, where it names no labels."""
    found: Fields = {}
    if not class_names(config):
        parts = {part for name in written for part in name.split(".")}
        found["architectures"] = [family.encoder_class.removesuffix("Model") + _class_ending(parts)]
    labels = [row.shape[0] for name, row in tensors.items() if name.endswith("classifier.weight") and row.shape]
    if labels and not {"num_labels", "id2label"} & config.keys():
        found["num_labels"] = labels[0]
    return found


def _class_ending(parts: Collection[str]) -> str:
    """How the name of a class ends, by the parts of its tensors' names."""
    if "predictions" in parts:
        return "ForPreTraining" if "seq_relationship" in parts else "ForMaskedLM"
    if "qa_outputs" in parts:
        return "ForQuestionAnswering"
    if "classifier" in parts:
        return "ForSequenceClassification" if "pooler" in parts else "ForTokenClassification"
    return "Model"


def _json(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)
