"""Tiny random models of every family, and the command as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from bsa_export.cli.convert import main

# What class names of transformers start with.
CLASSES = {
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "camembert": "Camembert",
    "electra": "Electra",
    "ernie": "Ernie",
    "data2vec-text": "Data2VecText",
    "distilbert": "DistilBert",
}
RESERVED = {"roberta": 2, "xlm-roberta": 2, "camembert": 2, "data2vec-text": 2}
LENGTH = 64  # tokens that they read
SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
DISTILBERT_SIZES = {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}


def tiny(family: str, head: str = "ForMaskedLM", seed: int = 0, length: int = LENGTH, **fields):
    """A model of a family whose every parameter is random, and large enough to matter."""
    special = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3} if family in RESERVED else {}
    sizes = DISTILBERT_SIZES if family == "distilbert" else SIZES
    config = getattr(transformers, f"{CLASSES[family]}Config")(
        **(sizes | special | {"max_position_embeddings": length + RESERVED.get(family, 0)} | fields)
    )
    generator = torch.Generator().manual_seed(seed)
    model = getattr(transformers, CLASSES[family] + head)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model


def save(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def save_tensors(folder: Path, tensors: dict[str, torch.Tensor], config: dict) -> Path:
    """A folder with a pickle of tensors and a config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def convert(*arguments: object) -> Result:
    """`bsa-convert ARGUMENTS`, in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def converted(source: Path, *options: object) -> Path:
    """The folder `out` beside a source, made by `bsa-convert source out OPTIONS`."""
    target = source.parent / "out"
    result = convert(source, target, *options)
    assert result.exit_code == 0, result.output
    return target


def refused(*arguments: object) -> str:
    """The one sentence with which `bsa-convert ARGUMENTS` refuses."""
    result = convert(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == "" and result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    return result.stderr.removeprefix("Error: ").rstrip("\n")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a converted folder."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def record(folder: Path) -> dict:
    return json.loads((folder / "conversion.json").read_text())


def config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(x.contiguous().reshape(-1).view(torch.uint8) for x in (one, other)))


def inputs(length: int = LENGTH, pad: int = 1, choices: bool = False) -> dict[str, torch.Tensor]:
    """A batch of two texts, the second one padded to `length` on the right."""
    ids = torch.randint(4, 99, (2, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, length - 9 :] = 0
    batch = {"input_ids": ids.masked_fill(mask == 0, pad), "attention_mask": mask}
    return {name: tensor[:, None] for name, tensor in batch.items()} if choices else batch
