"""The sentence embeddings check: sentence-transformers computes the same vectors of short texts with the source and
with the converted folder.

It runs on the CPU, with every block kept, so both models compute the same. All modules of modules.json take part.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bsa_export.converted.checks import Check, Kind, result, skipped
from bsa_export.converted.folder import ConvertedFolder
from bsa_export.hf.stored_layout import NAME as SPARSE
from bsa_export.verify.whole_model import every_block_kept
from bsa_export.version import install_hint

PART = "sentence embeddings"
MODULES = "modules.json"
TEXTS = ("a", "A short text.", "Block-sparse attention reads long documents.", "Zwei kurze Sätze. Hier ist der zweite.")
# Largest difference of two embeddings, in units of their largest element: float32, or weights rounded to a smaller
# dtype.
TOLERANCE = {"keep": 1e-3, "fp32": 1e-3, "fp16": 2e-2, "bf16": 1e-1}


def check_embeddings(folder: ConvertedFolder, source: Path) -> Iterator[Check]:
    """Compares the embeddings of TEXTS. No check where the source is not a model of sentence-transformers.

    Args:
        folder: the converted folder.
        source: what was converted, a folder or a file in it.
    """
    top = source if source.is_dir() else source.parent
    if not (top / MODULES).is_file():
        return
    if find_spec("sentence_transformers") is None:
        yield skipped(Kind.WHOLE_MODEL, f"sentence-transformers is not installed; {install_hint('sentences')}", PART)
        return
    record = folder.record
    if record is None or (record.positions is not None and record.positions.interpolated):
        yield skipped(Kind.WHOLE_MODEL, "the position embeddings are interpolated, so the embeddings differ", PART)
        return
    expected = _embeddings(_load(top, "eager"))
    try:
        model = _load(folder.path, SPARSE)
        with every_block_kept(model):
            found = _embeddings(model)
    except Exception as error:  # the source was loaded and ran with the same libraries
        words = " ".join(str(error).split())[:300]
        fault = f"sentence-transformers cannot run it, and runs the source: {type(error).__name__}: {words}"
        yield result(Kind.WHOLE_MODEL, [fault], part=PART)
        return
    yield compare(expected, found, TOLERANCE[record.options.dtype])


def compare(expected: Tensor, found: Tensor, tolerance: float) -> Check:
    """The check of embeddings `[texts, size]`."""
    if expected.shape != found.shape:
        fault = f"expected embeddings of {list(expected.shape)} as from the source, found {list(found.shape)}"
        return result(Kind.WHOLE_MODEL, [fault], part=PART)
    largest = float((expected - found).abs().max() / expected.abs().max().clamp(min=1e-12))
    figures = {"texts": len(expected), "largest relative difference": largest}
    faults = []
    if not largest <= tolerance:  # NaN too
        faults.append(
            f"the embeddings differ from the source's by {largest:.3g} of their size, the bound is {tolerance:g}"
        )
    return result(Kind.WHOLE_MODEL, faults, figures, part=PART)


def _load(folder: Path, attention: str) -> Any:
    from sentence_transformers import SentenceTransformer

    options = {"attn_implementation": attention}
    return SentenceTransformer(str(folder), device="cpu", model_kwargs=options, local_files_only=True).float().eval()


def _embeddings(model: Any) -> Tensor:
    return torch.as_tensor(model.encode(list(TEXTS), convert_to_tensor=True, show_progress_bar=False)).float().cpu()
