"""What these tests share: tiny random models, files of tensors, and the command as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from support.tiny import FAMILIES
from support.tiny import random_model as tiny

from bsa_export.cli.convert import main

__all__ = [
    "CLASSES",
    "LENGTH",
    "RESERVED",
    "config",
    "convert",
    "converted",
    "inputs",
    "record",
    "refused",
    "same_bits",
    "save",
    "save_tensors",
    "tensors",
    "tiny",
]

CLASSES = {family: prefix for family, (prefix, _) in FAMILIES.items()}
RESERVED = {family: reserved for family, (_, reserved) in FAMILIES.items() if reserved}
LENGTH = 64  # tokens that they read


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
    """The folder `out` next to a source, made by `bsa-convert source out OPTIONS`."""
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
