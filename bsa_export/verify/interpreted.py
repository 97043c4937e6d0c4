"""Triton's kernels without a GPU: through Triton's interpreter, one head of each layer, at a small length.

Triton reads TRITON_INTERPRET when it is imported, so this runs in a process of its own (`verify.worker`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bsa_export.converted.checks import Check, Kind, skipped
from bsa_export.converted.folder import ConvertedFolder
from bsa_export.ops.dispatch import backends
from bsa_export.verify.attention_inputs import Projections, tensor
from bsa_export.verify.controls import backend_control
from bsa_export.verify.outputs import Call, Ledger, Situation, excerpt, padding, pick, window_of

DTYPES = {"triton": ["float16", "float32"], "deepspeed": ["float16"]}
HOW = "Triton's interpreter on the CPU"
TOKENS = 128
# Queries of all heads together: DeepSpeed's softmax is a program for each.
MOST_QUERIES = 1152


class Interpreted:
    """The comparison of one backend in this process, where TRITON_INTERPRET=1 was set before triton was imported.

    The heads of several layers are computed as the heads of one call, each with its own weights and its own excerpt of
    its layout.

    Args:
        folder: the converted folder.
        backend: `triton` or `deepspeed`.
    """

    def __init__(self, folder: ConvertedFolder, backend: str):
        self.folder, self.backend = folder, backend
        self.blocks = pick(folder.longest // folder.block, max(3, TOKENS // folder.block))
        self.length = len(self.blocks) * folder.block
        count = max(1, min(folder.layers, MOST_QUERIES // self.length))
        layers = sorted({round(i * (folder.layers - 1) / max(1, count - 1)) for i in range(count)})
        self.heads = [(layer, layer % folder.heads) for layer in layers]
        self.unavailable = backends()[backend]

    @cached_property
    def calls(self) -> list[tuple[list[tuple[int, int]], dict[str, Any]]]:
        """For each window that layers have: their heads, and the inputs that `inputs_of` makes of them."""
        windows = self.folder.windows
        groups = [
            [pair for pair in self.heads if windows[pair[0]] == window]
            for window in dict.fromkeys(windows[layer] for layer, _ in self.heads)
        ]
        return [(group, self.inputs_of(group)) for group in groups]

    def inputs_of(self, heads: list[tuple[int, int]]) -> dict[str, Any]:
        """The arguments of `block_sparse_attention` for (layer, head) pairs of layers with the same window; query, key
        and value float32 `[1, heads, length, head_dim]`."""
        projections = Projections(self.folder, torch.device("cpu"))
        taken: list[list[Tensor]] = []
        layouts = []
        for layer, head in heads:
            taken.append([x[:, head] for x in projections(layer, 1, self.length)])
            layout = tensor(self.folder.tensors[self.folder.layout_name(layer)])[head : head + 1]
            layouts.append(excerpt(layout, self.blocks))
        query, key, value = (torch.stack(x, 1) for x in zip(*taken, strict=True))
        layout = torch.cat(layouts)
        inputs = {"query": query, "key": key, "value": value, "layout": layout, "block": self.folder.block}
        return inputs | window_of(self.folder, heads[0][0])

    def outputs(self) -> Check:
        """The outputs check."""
        if self.unavailable is not None:
            return skipped(Kind.OUTPUTS, self.unavailable, self.backend)
        layers = tuple(layer for layer, _ in self.heads)
        whole = Situation("a head of each layer", self.length, layers, blocks=self.blocks)
        short = Situation("the same, less a token, padded", self.length - 1, layers, blocks=self.blocks)
        ledger = Ledger(self.backend, HOW, self.folder.not_finite)
        for heads, inputs in self.calls:
            for dtype in DTYPES[self.backend]:
                ledger.enter(Call(inputs, getattr(torch, dtype)), heads, whole, dtype)
            if self.backend == "triton":
                cut = {name: x[:, :, :-1] if name in ("query", "key", "value") else x for name, x in inputs.items()}
                cut["key_padding_mask"] = padding(self.length - 1, torch.device("cpu"))[1:]
                ledger.enter(Call(cut, torch.float16), heads, short, "float16")
        return ledger.check([whole, short])

    def controls(self) -> Iterator[Check]:
        """The control, where the backend can run."""
        if self.unavailable is None:
            yield backend_control(self.folder, "cpu", self.backend, DTYPES[self.backend][0])
