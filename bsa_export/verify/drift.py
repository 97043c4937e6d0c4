"""The drift: how far the sparse model's outputs are from the dense model's. Its status is `info`: there is no bound."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from bsa_export.converted.checks import Check, Kind, Status
from bsa_export.errors import BsaError
from bsa_export.verify.documents import documents
from bsa_export.verify.whole_model import CPU_LONGEST, EndToEnd, Inputs, attending, make_inputs

MASKED = 0.15
CPU_TOKENS = 40_000  # documents are taken until there are so many
NO_TARGET = -100

Progress = Callable[[int, int], None]


def measure_drift(runs: EndToEnd, text: Path | None = None, progress: Progress | None = None) -> Check:
    """Compares hidden states layer by layer on an input that the dense model can read (on a CPU of CPU_LONGEST tokens
    at most), and losses where there is a text.

    Args:
        runs: the model.
        text: plain text, or JSON lines with a `text` each: the documents whose masked tokens are predicted.
        progress: called with (windows done, windows in all).

    If the model has no masked-LM head or no tokenizer for the text, a figure says why there is no loss.
    """
    folder = runs.folder
    length = min(folder.source_length, CPU_LONGEST) if runs.device == "cpu" else folder.source_length
    inputs = make_inputs(folder, 1, length, runs.device, seed=2)
    sparse = _hidden_states(runs.model, inputs)
    with attending(runs.model, "sdpa"):
        dense = _hidden_states(runs.model, inputs)
    cosines = [cosine_similarity(a, b, dim=-1) for a, b in zip(sparse, dense, strict=True)]
    details = [{"layer": i, "cosine": float(x.mean()), "least": float(x.min())} for i, x in enumerate(cosines)]
    figures = {
        "length": length,
        "cosine of the last hidden states": float(cosines[-1].mean()),
        "least": float(cosines[-1].min()),
        "input": "random tokens",
    }
    if text is not None:
        try:
            losses, read = _losses(runs, text, progress)
        except BsaError as error:
            return Check(Kind.DRIFT, Status.INFO, figures=figures | {"no loss": str(error)}, details=details)
        details += losses
        figures |= {f"loss {row['attention']} at {row['window']:,}": row["loss"] for row in losses}
        figures |= {"masked tokens": losses[0]["masked tokens"], "text": read}
    return Check(Kind.DRIFT, Status.INFO, figures=figures, details=details)


@torch.no_grad()
def _hidden_states(model: Any, inputs: Inputs) -> list[Tensor]:
    """The output of each layer, float32 `[tokens, hidden]`."""
    states = model.base_model(**inputs.arguments, output_hidden_states=True).hidden_states[1:]
    return [state[inputs.attention_mask.bool()].float() for state in states]


def _losses(runs: EndToEnd, text: Path, progress: Progress | None) -> tuple[list[dict], str]:
    """The masked-LM loss of dense attention at the source's length and of sparse attention at that length and longer
    ones; and how much of the text was read.

    Raises:
        BsaError: the text cannot be read, or the model has no tokenizer or no masked-LM head for it.
    """
    folder, model = runs.folder, runs.model
    if model.get_output_embeddings() is None or not hasattr(model.config, "vocab_size"):
        raise BsaError("a loss needs a masked-LM head", found=type(model).__name__, where="--text")
    tokenizer = _tokenizer(folder.path)
    texts = documents(text)
    masked = _masked(tokenizer, texts, CPU_TOKENS if runs.device == "cpu" else None)
    tokens = sum(len(ids) for ids, _ in masked)
    cut = runs.device == "cpu" and tokens == CPU_TOKENS
    read = f"the first {tokens:,} tokens, the limit on a CPU" if cut else f"all of its {tokens:,} tokens"
    ends = [_special(tokenizer, names) for names in (("[CLS]", "<s>"), ("[SEP]", "</s>"))]
    longer = {min(8 * folder.source_length, folder.longest), folder.longest} - {folder.source_length}
    plan = [("sdpa", folder.source_length), ("block_sparse", folder.source_length)]
    plan += [("block_sparse", length) for length in sorted(longer)]
    total = sum(sum(1 for _ in _windows(masked, length, *ends)) for _, length in plan)
    done, rows = 0, []
    for implementation, length in plan:
        nats, count = 0.0, 0
        with attending(model, implementation):
            for inputs, targets in _windows(masked, length, *ends):
                nats += _nats(model, inputs.to(runs.device), targets.to(runs.device))
                count += int((targets != NO_TARGET).sum())
                done += 1
                if progress:
                    progress(done, total)
        rows.append(
            {
                "attention": "dense" if implementation == "sdpa" else "sparse",
                "window": length,
                "loss": nats / max(count, 1),
                "masked tokens": count,
            }
        )
    return rows, read


@torch.no_grad()
def _nats(model: Any, inputs: Tensor, targets: Tensor) -> float:
    """The sum of cross entropies over the masked tokens of a window. The head runs on these alone where that is
    possible."""
    picked = targets != NO_TARGET
    if not picked.any():
        return 0.0
    hidden = model.base_model(input_ids=inputs[None]).last_hidden_state[0, picked]
    head = next((getattr(model, name) for name in ("cls", "lm_head") if hasattr(model, name)), None)
    logits = head(hidden) if head is not None else model(input_ids=inputs[None]).logits[0, picked]
    return float(cross_entropy(logits.double(), targets[picked], reduction="sum"))


def _tokenizer(folder: Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise BsaError("a text needs the package tokenizers", found=str(error), where="--text") from None
    if not (folder / "tokenizer.json").is_file():
        raise BsaError("a text needs the model's tokenizer.json", found="none", where=folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _special(tokenizer: Any, names: tuple[str, ...]) -> int:
    for name in names:
        if (token := tokenizer.token_to_id(name)) is not None:
            return token
    raise BsaError(f"expected a tokenizer with one of {', '.join(names)}", found="none of them", where="tokenizer.json")


def _masked(tokenizer: Any, texts: list[str], most: int | None) -> list[tuple[Tensor, Tensor]]:
    """For each document its tokens with some masked, and the targets, NO_TARGET where there is none; int64
    `[tokens]`."""
    generator = torch.Generator().manual_seed(0)
    mask = _special(tokenizer, ("[MASK]", "<mask>"))
    documents, tokens = [], 0
    for text in texts:
        ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids, dtype=torch.int64)
        if most is not None:
            ids = ids[: most - tokens]
        chosen = torch.rand(len(ids), generator=generator) < MASKED
        documents.append((ids.masked_fill(chosen, mask), ids.masked_fill(~chosen, NO_TARGET)))
        tokens += len(ids)
        if most is not None and tokens >= most:
            break
    return documents


def _windows(
    documents: list[tuple[Tensor, Tensor]], length: int, first: int, last: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows of up to `length` tokens between the special ones at both ends: (inputs, targets), each `[tokens]`."""
    for inputs, targets in documents:
        for window, target in zip(inputs.split(length - 2), targets.split(length - 2), strict=True):
            none = window.new_tensor([NO_TARGET])
            yield (
                torch.cat([window.new_tensor([first]), window, window.new_tensor([last])]),
                torch.cat([none, target, none]),
            )
