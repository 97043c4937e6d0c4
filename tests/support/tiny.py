"""Small random models of every family, as a dense checkpoint in a folder.

`dense_bert` needs numpy alone; everything else needs torch and transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save_file

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Family -> what its classes in transformers start with, and how many position rows it reserves.
FAMILIES = {
    "bert": ("Bert", 0),
    "roberta": ("Roberta", 2),
    "xlm-roberta": ("XLMRoberta", 2),
    "camembert": ("Camembert", 2),
    "electra": ("Electra", 0),
    "ernie": ("Ernie", 0),
    "data2vec-text": ("Data2VecText", 2),
    "distilbert": ("DistilBert", 0),
}
# The names that DistilBERT's config has for sizes.
DISTILBERT = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
}
SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
SPECIAL = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}  # of families that reserve rows


def random_model(
    family: str,
    head: str = "ForMaskedLM",
    *,
    length: int = 64,
    seed: int = 0,
    fill: Callable[[torch.nn.Parameter, torch.Generator], Any] | None = None,
    **fields: Any,
) -> PreTrainedModel:
    """Returns a model of a family in evaluation mode, every parameter random and large enough to matter.

    Args:
        family: a key of `FAMILIES`.
        head: what the class name ends with, such as `ForMaskedLM` or `Model`.
        length: tokens that the model reads.
        seed: seed of the parameters.
        fill: fills a parameter in place; by default from a normal distribution of standard deviation 0.3.
        fields: of the config, by BERT's names; those not given are `SIZES`.
    """
    import transformers

    prefix, reserved = FAMILIES[family]
    settings = SIZES | (SPECIAL if reserved else {}) | {"max_position_embeddings": length + reserved} | fields
    if family == "distilbert":
        settings = {DISTILBERT.get(name, name): value for name, value in settings.items()}
    return filled(getattr(transformers, prefix + head), settings, seed, fill)


def filled(
    model_class: type[PreTrainedModel],
    settings: dict[str, Any],
    seed: int,
    fill: Callable[[torch.nn.Parameter, torch.Generator], Any] | None,
) -> PreTrainedModel:
    """A model of a class, in evaluation mode, whose parameters are filled as `random_model` says."""
    import torch

    torch.manual_seed(seed)
    model = model_class(model_class.config_class(**settings)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if fill is None:
                parameter.normal_(0, 0.3, generator=generator)
            else:
                fill(parameter, generator)
    return model


def dense_bert(folder: Path, seed: int = 0, length: int = 64) -> Path:
    """Writes a dense BERT with a masked-LM head, random weights, a vocabulary and a license. Needs no torch.

    Args:
        folder: where to; it must not exist.
        seed: seed of the weights.
        length: tokens that the model reads.
    """
    layers, hidden, heads, words = 2, 32, 2, 300
    sizes: dict[str, tuple[int, ...]] = {
        "bert.embeddings.word_embeddings.weight": (words, hidden),
        "bert.embeddings.position_embeddings.weight": (length, hidden),
        "bert.embeddings.token_type_embeddings.weight": (2, hidden),
        "cls.predictions.bias": (words,),
    }
    norms = ["bert.embeddings.LayerNorm", "cls.predictions.transform.LayerNorm"]
    linears = {"cls.predictions.transform.dense": (hidden, hidden)}
    for layer in range(layers):
        prefix = f"bert.encoder.layer.{layer}"
        norms += [f"{prefix}.attention.output.LayerNorm", f"{prefix}.output.LayerNorm"]
        square = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
        linears |= {f"{prefix}.{name}": (hidden, hidden) for name in square}
        linears[f"{prefix}.intermediate.dense"] = (2 * hidden, hidden)
        linears[f"{prefix}.output.dense"] = (hidden, 2 * hidden)
    for name in norms:
        sizes |= {f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)}
    for name, shape in linears.items():
        sizes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    random = np.random.default_rng(seed)
    weights = {name: random.standard_normal(shape).astype(np.float32) for name, shape in sizes.items()}
    config = {
        "architectures": ["BertForMaskedLM"],
        "model_type": "bert",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 2 * hidden,
        "vocab_size": words,
        "max_position_embeddings": length,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
    }
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("".join(f"word{number}\n" for number in range(words)))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A dense model\n")
    return folder
