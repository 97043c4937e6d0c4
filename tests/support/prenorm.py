"""The mathematics of pre-norm and rotary BERT encoders in plain PyTorch, from tensor names and fields of config.json.

It shares no code with the package. Tensors and results are float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]


def norm(tensors: Tensors, name: str, x: Tensor, eps: float) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + eps) * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def linear(tensors: Tensors, name: str, x: Tensor) -> Tensor:
    return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def turned(x: Tensor, dim: int, base: float) -> Tensor:
    """Elements i and i + dim / 2 of `[seq, head_dim]` as a complex number, turned by its position times a frequency."""
    half, (seq, _) = dim // 2, x.shape
    pairs = torch.complex(x[:, :half], x[:, half:dim])
    frequencies = torch.tensor([base ** (-2 * i / dim) for i in range(half)], dtype=torch.float64)
    pairs = pairs * torch.polar(torch.ones(seq, half, dtype=torch.float64), torch.arange(seq)[:, None] * frequencies)
    return torch.cat([pairs.real, pairs.imag, x[:, dim:]], dim=1)


def encoded(
    tensors: Tensors,
    config: Mapping[str, Any],
    ids: Tensor,
    token_types: Tensor,
    keys: Tensor,
    layouts: Any = None,
) -> Tensor:
    """The last hidden states `[seq, hidden]` of one sequence.

    Args:
        tensors: by the names of the encoder, without a prefix.
        config: sizes, and `pre_layer_norm`, `last_layer_norm`, `position_embedding_type`, `rotary_dim`, `rotary_base`.
        ids, token_types: int64 `[seq]`.
        keys: bool `[seq]`, which tokens are not padding.
        layouts: bool `[layers, heads, seq, seq]`, or None to attend to all.
    """
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    eps, seq, dim = config["layer_norm_eps"], len(ids), config["hidden_size"] // config["num_attention_heads"]
    x = tensors["embeddings.word_embeddings.weight"][ids]
    x = x + tensors["embeddings.token_type_embeddings.weight"][token_types]
    if config["position_embedding_type"] == "absolute":
        x = x + tensors["embeddings.position_embeddings.weight"][:seq]
    x = norm(tensors, "embeddings.LayerNorm", x, eps)
    for i in range(layers):
        layer = f"encoder.layer.{i}"

        def attend(y: Tensor, i: int = i, layer: str = layer) -> Tensor:
            contexts = []
            for head in range(heads):
                part = slice(head * dim, (head + 1) * dim)
                q, k, v = (
                    linear(tensors, f"{layer}.attention.self.{n}", y)[:, part] for n in ("query", "key", "value")
                )
                if config["position_embedding_type"] == "rotary":
                    q, k = (turned(z, config.get("rotary_dim") or dim, config["rotary_base"]) for z in (q, k))
                scores = q @ k.T / math.sqrt(dim)
                kept = keys[None].expand(seq, seq) if layouts is None else layouts[i][head] & keys
                exps = torch.exp(scores - scores.max()) * kept
                total = exps.sum(1, keepdim=True)
                contexts.append(exps / torch.where(total == 0, 1.0, total) @ v)
            return linear(tensors, f"{layer}.attention.output.dense", torch.cat(contexts, dim=1))

        def feed(y: Tensor, layer: str = layer) -> Tensor:
            return linear(tensors, f"{layer}.output.dense", gelu(linear(tensors, f"{layer}.intermediate.dense", y)))

        if config["pre_layer_norm"]:
            x = x + attend(norm(tensors, f"{layer}.PreAttentionLayerNorm", x, eps))
            x = x + feed(norm(tensors, f"{layer}.PostAttentionLayerNorm", x, eps))
        else:
            x = norm(tensors, f"{layer}.attention.output.LayerNorm", x + attend(x), eps)
            x = norm(tensors, f"{layer}.output.LayerNorm", x + feed(x), eps)
    last = config["pre_layer_norm"] if config["last_layer_norm"] is None else config["last_layer_norm"]
    return norm(tensors, "encoder.FinalLayerNorm", x, eps) if last else x


def head_outputs(tensors: Tensors, head: str, x: Tensor, keys: Tensor, eps: float) -> list[Tensor]:
    """What a head computes from the last hidden states: those of the real tokens, and of the sequence.

    Args:
        tensors: by the names of the encoder and the heads, without a prefix.
        head: `Model`, `MaskedLM`, `PreTraining`, `QuestionAnswering`, `SequenceClassification` or
            `TokenClassification`.
        x: `[seq, hidden]`, from `encoded`.
        keys: bool `[seq]`.
    """
    pooled = torch.tanh(linear(tensors, "pooler.dense", x[0])) if "pooler.dense.weight" in tensors else None
    if head in ("MaskedLM", "PreTraining"):
        name = "cls.predictions.transform"
        y = norm(tensors, f"{name}.LayerNorm", gelu(linear(tensors, f"{name}.dense", x)), eps)
        logits = (y @ tensors["embeddings.word_embeddings.weight"].T + tensors["cls.predictions.bias"])[keys]
        return [logits] if head == "MaskedLM" else [logits, linear(tensors, "cls.seq_relationship", pooled)]
    if head == "SequenceClassification":
        return [linear(tensors, "classifier", pooled)]
    if head == "QuestionAnswering":
        return list(linear(tensors, "qa_outputs", x)[keys].unbind(-1))
    if head == "TokenClassification":
        return [linear(tensors, "classifier", x)[keys]]
    return [x[keys]] if pooled is None else [x[keys], pooled]
