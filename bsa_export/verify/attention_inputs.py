"""Queries, keys and values of each layer: its own weights on seeded inputs of the size that they have in the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from bsa_export.bert.structure import BERT, POSITIONS, TOKEN_TYPES, WORDS
from bsa_export.checkpoint import table
from bsa_export.checkpoint.dtypes import read
from bsa_export.converted.folder import ConvertedFolder


def tensor(row: table.Tensor) -> Tensor:
    """A row of a table as a tensor of its dtype, on the CPU."""
    array = torch.from_numpy(read(row))
    return array.view(torch.bfloat16) if row.dtype == "BF16" else array


def turned(x: Tensor, rotary_dim: int, base: float) -> Tensor:
    """Applies rotary positions: elements i and i + rotary_dim / 2 of a head are a complex number, which turns by
    `base ** (-2 i / rotary_dim)` at each position. The elements from rotary_dim on stay.

    Args:
        x: float32 `[batch, heads, length, head_dim]`.
    """
    half = rotary_dim // 2
    exponents = torch.arange(half, dtype=torch.float64, device=x.device) * (-2 / rotary_dim)
    angles = torch.arange(x.shape[2], dtype=torch.float64, device=x.device)[:, None] * base**exponents
    wide = x.double()
    pairs = torch.complex(wide[..., :half], wide[..., half:rotary_dim]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag, wide[..., rotary_dim:]], dim=-1).to(x.dtype)


def rotation(config: Mapping[str, Any], layer: int, head_dim: int) -> tuple[int, float]:
    """How many elements of a head are rotated, and the base of their frequencies, by the fields of config.json.

    Scaled frequencies are not computed: the inputs only have to be of the right kind.
    """
    base = config.get("rotary_base") or config.get("rope_theta") or 10_000
    stated = config.get("rope_parameters") or {}
    kinds = config.get("layer_types") or []
    stated = stated.get(kinds[layer], stated) if layer < len(kinds) else stated
    return config.get("rotary_dim") or head_dim, float(stated.get("rope_theta") or base)


class Projections:
    """Computes what reaches the attention of each layer.

    The first layer gets the model's embeddings of seeded tokens. The others get seeded normal noise through the weight
    and bias of the LayerNorm before them, whose scale is that of the hidden states there. With norms before each
    sublayer, the layer's own one comes between. Encoders that are not built as BERT is get noise in every layer.
    Rotary positions are applied.

    Args:
        folder: whose weights count.
        device: where to compute.
        seed: of tokens and noise.
    """

    def __init__(self, folder: ConvertedFolder, device: torch.device, seed: int = 0):
        self.folder, self.device, self.seed = folder, device, seed
        self._layer: int | None = None
        self._weights: dict[str, Tensor] = {}

    def __call__(self, layer: int, batch: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of a layer, float32 `[batch, heads, length, head_dim]`."""
        encoder, sizes = self.folder.encoder, self.folder.encoder.sizes
        hidden = self._hidden(layer, batch, length)
        modules = [name.removeprefix(self.folder.prefix) for name in encoder.projection_names(layer)]
        if layer != self._layer:
            names = [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]
            self._weights = {name: self._take(name) for name in names if self._has(name)}
            self._layer = layer
        made = [linear(hidden, self._weights[f"{x}.weight"], self._weights.get(f"{x}.bias")) for x in modules]
        of_queries, of_keys = sizes.query_size, sizes.key_value_size
        parts = torch.cat(made, dim=-1).split([of_queries, of_keys, of_keys], dim=-1)
        heads = [part.view(batch, length, -1, sizes.head_dim).transpose(1, 2) for part in parts]
        query, key, value = (x.repeat_interleave(self.folder.heads // x.shape[1], dim=1) for x in heads)
        if encoder.position_name is None:
            dim, base = rotation(encoder.config, layer, sizes.head_dim)
            query, key = turned(query, dim, base), turned(key, dim, base)
        return query, key, value

    def _hidden(self, layer: int, batch: int, length: int) -> Tensor:
        """What a layer's projections get, `[batch, length, hidden]`."""
        structure = self.folder.encoder.structure
        if structure.words != WORDS or structure.inside is not BERT.inside:
            name, noise = f"{structure.layer.format(layer)}.{structure.norm}", self._noise(layer, batch, length)
            return self._norm(name, noise) if self._has(f"{name}.weight") else noise
        if not self.folder.encoder.config.get("pre_layer_norm"):
            if layer == 0:
                return self._embedded(batch, length)
            return self._norm(f"encoder.layer.{layer - 1}.output.LayerNorm", self._noise(layer, batch, length))
        stream = self._embedded(batch, length) if layer == 0 else self._noise(layer, batch, length)
        return self._norm(f"encoder.layer.{layer}.PreAttentionLayerNorm", stream)

    def _has(self, name: str) -> bool:
        return self.folder.prefix + name in self.folder.tensors

    def _take(self, name: str) -> Tensor:
        return tensor(self.folder.tensors[self.folder.prefix + name]).to(self.device, torch.float32)

    def _embedded(self, batch: int, length: int) -> Tensor:
        """The embeddings of seeded tokens, `[batch, length, hidden]`. Tables are read by rows."""
        folder, encoder = self.folder, self.folder.encoder
        ids = np.random.default_rng(self.seed).integers(encoder.sizes.vocab_size, size=batch * length)
        places = encoder.reserved + np.arange(length)
        hidden = self._rows(WORDS, ids).view(batch, length, -1)
        if folder.prefix + POSITIONS in folder.tensors:
            hidden = hidden + self._rows(POSITIONS, places)
        if folder.prefix + TOKEN_TYPES in folder.tensors:
            hidden = hidden + self._take(TOKEN_TYPES)[0]
        hidden = self._norm("embeddings.LayerNorm", hidden)
        if folder.prefix + "embeddings_project.weight" in folder.tensors:
            hidden = linear(hidden, self._take("embeddings_project.weight"), self._take("embeddings_project.bias"))
        return hidden

    def _rows(self, name: str, rows: np.ndarray) -> Tensor:
        row = self.folder.tensors[self.folder.prefix + name]
        assert isinstance(row.data, table.FileRange)
        width = row.nbytes // row.shape[0]
        table_ = np.memmap(row.data.path, np.uint8, "r", row.data.offset, (row.shape[0], width))
        distinct, place = np.unique(rows, return_inverse=True)
        data = table.Computed(lambda: iter([np.ascontiguousarray(table_[distinct]).reshape(-1).data]))
        picked = tensor(table.Tensor(row.dtype, (len(distinct), *row.shape[1:]), data))
        return picked[torch.from_numpy(place)].to(self.device, torch.float32)

    def _noise(self, layer: int, batch: int, length: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1000 + layer)
        return torch.randn(batch, length, self.folder.encoder.sizes.hidden_size, generator=generator).to(self.device)

    def _norm(self, name: str, hidden: Tensor) -> Tensor:
        weight = self._take(f"{name}.weight")
        bias = self._take(f"{name}.bias") if self._has(f"{name}.bias") else None
        return layer_norm(hidden, weight.shape, weight, bias, self.folder.config.get("layer_norm_eps", 1e-12))
