"""Tiny random models of the families, converted by the real converter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from support import more_families, tiny
from support.more_families import KINDS
from support.tiny import FAMILIES

SMALL = {
    "vocab_size": 120,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}


@dataclass(frozen=True)
class Case:
    """A model and its conversion. `family` is a key of `tiny.FAMILIES` or `more_families.KINDS`; `parameters` are those
    of the mode, as items."""

    family: str = "bert"
    source_length: int = 64
    max_length: int | None = 256
    mode: str | None = None
    block: int | None = 16
    parameters: tuple = ()
    seed: int = 0
    per_layer: bool = False
    positions: str = "tile"
    dtype: str = "keep"
    source_dtype: str = "float32"
    format: str = "safetensors"
    shard: int | None = None


def make_source(case: Case, path: Path) -> Path:
    """Saves a random model of the case's family into `path`."""
    import torch

    def fill(parameter: torch.nn.Parameter, generator: torch.Generator) -> None:
        # the usual initialisation is so flat that attention hardly matters
        parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.15, generator=generator)

    random_model = (tiny if case.family in FAMILIES else more_families).random_model
    model = random_model(case.family, length=case.source_length, seed=case.seed, fill=fill, **SMALL)
    model.to(getattr(torch, case.source_dtype)).save_pretrained(path)
    if case.format == "sparse":
        _make_sparse(path, model.config)
    if case.format == "bin":
        from safetensors.torch import load_file

        state = load_file(path / "model.safetensors")
        (path / "model.safetensors").unlink()
        torch.save(state, path / "pytorch_model.bin")
    return path


def _make_sparse(path: Path, config) -> None:
    """Turns a saved model into one that was trained sparse with DeepSpeed: its class' layout for 2048 tokens, int64,
    in each layer."""
    import json

    import torch
    from safetensors.torch import load_file, save_file

    from bsa_export.sparsity.configs import FixedSparsityConfig

    sparsity = FixedSparsityConfig(config.num_attention_heads, 16, num_local_blocks=3)
    layout = torch.from_numpy(sparsity.make_layout(2048)).long()
    name = "bert.encoder.layer.{}.attention.self.sparse_self_attention.master_layout"
    tensors = load_file(path / "model.safetensors")
    tensors |= {name.format(layer): layout.clone() for layer in range(config.num_hidden_layers)}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    sparse = {
        "sparse_config_cls": "deepspeed.ops.sparse_attention:FixedSparsityConfig",
        "sparse_attention": sparsity.to_parameters(),
    }
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(content | sparse))


def clean_cases(count: int, seed: int = 0) -> list[Case]:
    """Conversions drawn with a seed over families, modes, blocks, lengths, positions, dtypes, formats and shards; the
    first are one of each family and a source that is sparse already."""
    import random

    rng = random.Random(seed)
    cases = [Case(family) for family in FAMILIES] + [Case(format="sparse", max_length=None, block=None)]
    modes = {
        None: ((),),
        "fixed": ((), (("different_layout_per_head", True), ("num_different_global_patterns", 2))),
        "variable": ((), (("num_random_blocks", 2), ("local_window_blocks", (1, 2)))),
        "bigbird": ((), (("different_layout_per_head", True), ("num_random_blocks", 2))),
        "bslongformer": ((), (("global_block_indices", (0, 3)),)),
        "local": ((), (("attention", "unidirectional"),)),
        "dense": ((),),
    }
    while len(cases) < count:
        mode = rng.choice(list(modes))
        block = rng.choice([16, 32, 64])
        source_length = rng.choice([32, 64, 96, 128])
        parameters = rng.choice(modes[mode])
        family = rng.choice([*FAMILIES, *KINDS])
        has_table = family in FAMILIES or not KINDS[family].is_rotary
        cases.append(
            Case(
                family=family,
                source_length=source_length,
                max_length=block * rng.choice([4, 5, 7, 8, 16]),
                mode=mode,
                block=block,
                parameters=parameters,
                seed=rng.randrange(1000),
                per_layer="num_random_blocks" in dict(parameters) and rng.random() < 0.5,
                positions=rng.choice(["tile", "tile", "interpolate" if has_table else "tile"]),
                dtype=rng.choice(["keep", "keep", "fp32", "fp16", "bf16"]),
                source_dtype=rng.choice(["float32", "float32", "float16", "bfloat16"]),
                format=rng.choice(["safetensors", "bin"]),
                shard=rng.choice([None, None, 50_000]),
            )
        )
    return cases[:count]


def make(case: Case, path: Path) -> tuple[Path, Path]:
    """Makes the source and its conversion in `path`: (source folder, converted folder)."""
    from bsa_export.conversion.convert import convert_source as convert
    from bsa_export.conversion.options import Options
    from bsa_export.hub.source import Source

    source = make_source(case, path / "source")
    options = Options(
        max_length=case.max_length,
        mode=case.mode,
        block=case.block,
        parameters={name: list(x) if isinstance(x, tuple) else x for name, x in case.parameters},
        seed=case.seed,
        different_layout_per_layer=case.per_layer,
        positions=case.positions,
        dtype=case.dtype,
    )
    convert(Source(source), path / "out", options, max_shard_size=case.shard)
    return source, path / "out"
