"""The interchange check: each layer's state dict loads with `strict=True` into this package's module and into
DeepSpeed's."""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch import nn

from bsa_export.attention import BertSparseSelfAttention
from bsa_export.bert.structure import MASTER_LAYOUT
from bsa_export.converted.checks import Check, Kind, result, skipped
from bsa_export.converted.folder import ConvertedFolder
from bsa_export.converted.integrity import expected_layouts
from bsa_export.verify.attention_inputs import tensor


def check_interchange(folder: ConvertedFolder) -> list[Check]:
    """Loads each layer's query, key, value and layout with `strict=True` into both modules, and compares what they
    then hold. If a model's projections have other names or are fused, only the layouts load; a figure says so.

    DeepSpeed's classes are read from its source files (`ops.deepspeed_source`). The package itself is not imported,
    because that takes seconds. Where DeepSpeed has a class for the sparsity config, the layout that it makes is
    compared with the stored one too.
    """
    sizes = SimpleNamespace(hidden_size=folder.encoder.sizes.hidden_size, num_attention_heads=folder.heads)
    ours = BertSparseSelfAttention(sizes, _EveryBlock(folder), max_seq_length=folder.longest)
    alone = {"layers": folder.layers} | _not_shared(folder)
    checks = [result(Kind.INTERCHANGE, list(_load_faults(folder, ours)), alone, part="bsa_export")]
    theirs = deepspeed_classes()
    if isinstance(theirs, str):
        return [*checks, skipped(Kind.INTERCHANGE, theirs, "deepspeed")]
    module = theirs.BertSparseSelfAttention(sizes)
    # Its Bert class has 2048 tokens; longer ones are made by exchanging the attention inside.
    module.sparse_self_attention = theirs.SparseSelfAttention(_EveryBlock(folder), max_seq_length=folder.longest)
    faults = list(_load_faults(folder, module))
    figures: dict[str, int | str] = {**alone}
    made = _deepspeed_layouts(folder, theirs)
    if made is not None:
        figures["layouts made by it"] = "equal"
        for layer, layout in enumerate(made):
            stored = tensor(folder.tensors[folder.layout_name(layer)]).to(layout.dtype)
            if folder.windows[layer] is None and not torch.equal(layout, stored):
                figures["layouts made by it"] = "different"
                faults.append(f"layer {layer}: DeepSpeed makes another layout from the same sparsity config and seed")
    return [*checks, result(Kind.INTERCHANGE, faults, figures, part="deepspeed")]


class _EveryBlock:
    """A sparsity config for modules whose layout comes from the file."""

    def __init__(self, folder: ConvertedFolder):
        self.num_heads, self.block = folder.heads, folder.block

    def make_layout(self, seq_len: int) -> torch.Tensor:
        n = seq_len // self.block
        return torch.ones(self.num_heads, n, n, dtype=torch.int64)


SHARED = ("query", "key", "value")  # DeepSpeed's names of the projections


def _has_projections(folder: ConvertedFolder) -> bool:
    """Whether the projections are those of DeepSpeed's module."""
    return tuple(name.rpartition(".")[2] for name in folder.encoder.projection_names(0)) == SHARED


def _not_shared(folder: ConvertedFolder) -> dict[str, str]:
    """What DeepSpeed's module cannot have of this model, as a figure."""
    reasons = []
    if not _has_projections(folder):
        own = [name.rpartition(".")[2] for name in folder.encoder.projection_names(0)]
        reasons.append(f"{' and '.join(own)} instead of {', '.join(SHARED)}")
    if folder.encoder.position_name is None:
        reasons.append("rotary positions")
    if any(window is not None for window in folder.windows):
        reasons.append("the windows of local layers")
    return {"not shared": "; ".join(reasons)} if reasons else {}


def _load_faults(folder: ConvertedFolder, module: nn.Module) -> Iterator[str]:
    parts = ("sparse_self_attention", *(SHARED if _has_projections(folder) else ()))
    if not _has_projections(folder):
        module = nn.ModuleDict({"sparse_self_attention": module.get_submodule("sparse_self_attention")})
    own = folder.encoder.dense_spec()  # ALBERT's attention also has a norm, ESM's its frequencies
    for layer in range(folder.layers):
        start = folder.layout_name(layer).removesuffix(MASTER_LAYOUT)
        names = {name.removeprefix(start): name for name in folder.tensors if name.startswith(start)}
        state = {
            inner: tensor(folder.tensors[name])
            for inner, name in names.items()
            if inner.startswith(parts) or name not in own
        }
        if "query.weight" in state:
            module.to(state["query.weight"].dtype)
        try:
            module.load_state_dict(state, strict=True)
        except RuntimeError as error:
            yield f"layer {layer}: {' '.join(str(error).split())}"
            continue
        for name, loaded in module.state_dict().items():
            if not torch.equal(loaded.to(state[name].dtype).nan_to_num(), state[name].nan_to_num()):
                yield f"layer {layer}: {name} is not what was loaded"


def _deepspeed_layouts(folder: ConvertedFolder, theirs: SimpleNamespace) -> Iterator[torch.Tensor] | None:
    """The layouts that DeepSpeed's own class makes for each layer, one after the other; None where a rule of its own
    made none."""
    made = getattr(theirs.configs, type(folder.sparsity).__name__, None)
    expected, _ = expected_layouts(folder)
    if made is None or expected is None or folder.record is None:
        return None
    config, record = made(**folder.sparsity.to_parameters()), folder.record
    differ = record.options.different_layout_per_layer

    def layouts() -> Iterator[torch.Tensor]:
        state = random.getstate()
        random.seed(record.seed)
        try:
            first = config.make_layout(folder.longest)
            for layer in range(folder.layers):
                yield config.make_layout(folder.longest) if differ and layer else first
        finally:
            random.setstate(state)

    return layouts()


def deepspeed_classes() -> SimpleNamespace | str:
    """DeepSpeed's `BertSparseSelfAttention`, `SparseSelfAttention` and, as `configs`, its module of sparsity configs;
    or why there are none."""
    try:
        from bsa_export.ops.deepspeed_source import find
    except ImportError as error:
        return f"cannot be imported here: {error}"
    folder = find()
    if isinstance(folder, str):
        return folder
    folder = folder / "ops/sparse_attention"
    try:
        configs = _read(folder / "sparsity_config.py")
        attention = _read(folder / "sparse_self_attention.py", **vars(configs))
        bert = _read(folder / "bert_sparse_self_attention.py", **vars(configs) | vars(attention))
    except (OSError, SyntaxError, NameError, ImportError) as error:
        return f"its sparse attention cannot be read: {error}"
    return SimpleNamespace(
        BertSparseSelfAttention=bert.BertSparseSelfAttention,
        SparseSelfAttention=attention.SparseSelfAttention,
        configs=configs,
    )


def _read(path: Path, **names: object) -> ModuleType:
    """A module of deepspeed from its file, with `names` instead of what it imports from deepspeed."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [
        statement
        for statement in tree.body
        if not (isinstance(statement, ast.ImportFrom) and (statement.module or "").partition(".")[0] == "deepspeed")
    ]
    module = ModuleType(f"bsa_export.verify.deepspeed_{path.stem}")
    vars(module).update({name: value for name, value in names.items() if not name.startswith("__")})
    exec(compile(tree, path, "exec"), vars(module))
    return module
