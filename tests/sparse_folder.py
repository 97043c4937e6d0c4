"""Small models of every family, converted; and the dense class under stored layouts, which judges them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from support.tiny import FAMILIES as PREFIXES
from support.tiny import random_model

from bsa_export.conversion.convert import convert_source as convert
from bsa_export.conversion.options import Options
from bsa_export.hub.source import Source

BLOCK, HEADS, LAYERS = 16, 4, 2
SHORT, LONGEST = 64, 128  # tokens that the source reads, and the converted model
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 64,
}
COMMON = {"vocab_size": 100, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "tie_word_embeddings": True}
# Family -> the class of the source, that of the converted model, and how many position rows the family reserves.
FAMILIES = {
    "bert": ("BertForMaskedLM", "BertForMaskedLM", 0),
    "roberta": ("RobertaForMaskedLM", "RobertaForMaskedLM", 2),
    "xlm-roberta": ("XLMRobertaForMaskedLM", "XLMRobertaForMaskedLM", 2),
    "camembert": ("CamembertForMaskedLM", "CamembertForMaskedLM", 2),
    "electra": ("ElectraForPreTraining", "ElectraForPreTraining", 0),
    "ernie": ("ErnieForMaskedLM", "ErnieForMaskedLM", 0),
    "data2vec-text": ("Data2VecTextForMaskedLM", "Data2VecTextForMaskedLM", 2),
    "distilbert": ("DistilBertForMaskedLM", "BertForMaskedLM", 0),
}
# Random blocks for each layer and head: no two layouts are equal.
RANDOM = {
    "mode": "bigbird",
    "parameters": {
        "num_random_blocks": 1,
        "num_sliding_window_blocks": 1,
        "num_global_blocks": 1,
        "different_layout_per_head": True,
    },
    "different_layout_per_layer": True,
}


def dense_folder(path: Path, family: str = "bert", class_name: str | None = None, **changes) -> Path:
    """A small random dense model."""
    source_class, _, _ = FAMILIES[family]
    head = (class_name or source_class).removeprefix(PREFIXES[family][0])

    def fill(parameter: torch.nn.Parameter, generator: torch.Generator) -> None:
        if parameter.ndim > 1:  # the usual initialisation is so flat that a wrong mask would hardly show
            parameter.normal_(0, 0.5, generator=generator)

    model = random_model(family, head, length=SHORT, fill=fill, **(SIZES | COMMON | changes))
    model.save_pretrained(path)
    return path


def converted(source: Path, out: Path, **options) -> Path:
    """What bsa-convert makes of a folder; `options` are those of `convert.Options`."""
    convert(Source(source), out, Options(**options))
    return out


def sparse_folder(path: Path, family: str = "bert", class_name: str | None = None, options=RANDOM, **changes) -> Path:
    """The small model, converted to twice the length."""
    source = dense_folder(path / "source", family, class_name, **changes)
    return converted(source, path / "out", max_length=LONGEST, block=BLOCK, **options)


def layout_name(prefix: str, layer: int) -> str:
    return f"{prefix}encoder.layer.{layer}.attention.self.sparse_self_attention.master_layout"


def layouts_in(folder: Path) -> list[torch.Tensor]:
    """The stored layouts, uint8 `[heads, n, n]` a layer."""
    tensors = load_file(folder / "model.safetensors")
    (prefix,) = (name.removesuffix(layout_name("", 0)) for name in tensors if name.endswith(layout_name("", 0)))
    layers = sum(name.endswith("master_layout") for name in tensors)
    return [tensors[layout_name(prefix, layer)] for layer in range(layers)]


def change(folder: Path, tensors=None, **config) -> Path:
    """Edits a folder: its tensors by a function, and entries of its config.json."""
    file = folder / "model.safetensors"
    if tensors:
        save_file(tensors(load_file(file)), file, metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def token_mask(layout: torch.Tensor, block: int, length: int) -> torch.Tensor:
    """Bool `[heads, length, length]`: which pairs of tokens a layout keeps."""
    n = -(-length // block)
    kept = layout[:, :n, :n].bool().repeat_interleave(block, -2).repeat_interleave(block, -1)
    return kept[:, :length, :length]


def masked_by_layouts(model, layouts: list[torch.Tensor], block: int, keep: torch.Tensor):
    """The dense model, each layer under its layout and `keep`, as a 4-D boolean mask.

    `keep` is the tokenizer's mask `[batch, seq]`, or which pairs take part, bool `[batch, 1, seq, seq]`.
    """
    keep = keep.bool()[:, None, None, :] if keep.ndim == 2 else keep

    def under(mask):
        return lambda module, args, kwargs: (args, kwargs | {"attention_mask": mask})

    for layer, layout in zip(model.base_model.encoder.layer, layouts, strict=True):
        mask = token_mask(layout, block, keep.shape[-1])[None] & keep
        layer.attention.self.register_forward_pre_hook(under(mask), with_kwargs=True)
    return model


def batch(length: int = 100, padding: str = "none") -> dict:
    """Three texts of random tokens; two of them padded, if any."""
    ids = torch.randint(4, COMMON["vocab_size"], (3, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padding == "right":
        mask[1, -(length // 3) :], mask[2, length // 3 :] = 0, 0
    elif padding == "left":
        mask[1, : length // 3], mask[2, : -(length // 3)] = 0, 0
    return {"input_ids": ids.masked_fill(mask == 0, COMMON["pad_token_id"]), "attention_mask": mask}


@torch.no_grad()
def outputs(model, inputs: dict) -> torch.Tensor:
    """Outputs at real tokens, float64."""
    out = model(**inputs)
    out = out.logits if "logits" in out else out.last_hidden_state
    return out[inputs["attention_mask"].bool()].double()


def assert_as_good_as_dense(found: torch.Tensor, exact: torch.Tensor, dense: torch.Tensor) -> None:
    """At most twice the error of the dense class in the same dtype, both against float64."""
    found_error, dense_error = (found - exact).abs().max(), (dense - exact).abs().max()
    assert 0 < dense_error < 0.5 * exact.abs().max()
    assert found_error <= 2 * dense_error, (float(found_error), float(dense_error))
