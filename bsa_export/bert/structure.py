"""Where the tensors of an encoder are: the modules of each structure, their shapes, and which of them gets a layout.

Names are those behind the encoder's prefix, as transformers stores them (5.24, `save_pretrained`). A shape is in fields
of config.json: `hidden_size`, or a sum of products such as `query_size + 2 * key_value_size`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bsa_export.errors import FamilyError

WORDS = "embeddings.word_embeddings.weight"
POSITIONS = "embeddings.position_embeddings.weight"
TOKEN_TYPES = "embeddings.token_type_embeddings.weight"
LAST_NORM = "encoder.FinalLayerNorm"
MASTER_LAYOUT = "sparse_self_attention.master_layout"  # behind the attention module, DeepSpeed's name
# A stored layout of any structure: (its attention module), (the number of its layer).
STORED_LAYOUT = re.compile(
    r"(.*\b(?:layer|layers|albert_layer_groups)\.(\d+)\.(?:albert_layers\.0\.)?"
    rf"(?:attention\.self|self_attn|attention|attn))\.{re.escape(MASTER_LAYOUT)}"
)

Shape = tuple[str, ...]
Tensors = Mapping[str, "Part"]


@dataclass(frozen=True)
class Part:
    """A module of an encoder, with a `weight` and mostly a `bias`; or a tensor alone.

    Attributes:
        shape: of the weight, in fields of config.json; the bias has its first size. Empty for any shape.
        bias: whether it has a bias, or the field of config.json that says so.
        only_if: the field of config.json without which the module is absent; `not FIELD` for the contrary.
        required: whether a checkpoint must have it where `only_if` holds.
        first: the first layer that has it.
        is_tensor: whether the name is that of a tensor, which has no weight and no bias.
    """

    shape: Shape
    bias: bool | str = True
    only_if: str = ""
    required: bool = True
    first: int = 0
    is_tensor: bool = False

    def tensors(self, name: str, config: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
        """The names of its tensors and their shapes; none where config.json says that the module is absent."""
        if self.only_if and not holds(self.only_if, config):
            return
        if self.is_tensor:
            yield name, self.shape
            return
        yield f"{name}.weight", self.shape
        if holds(self.bias, config) if isinstance(self.bias, str) else self.bias:
            yield f"{name}.bias", self.shape[:1]


def holds(condition: str, config: Mapping[str, Any]) -> bool:
    """Whether a field of config.json is set, or with `not FIELD` is not."""
    name = condition.removeprefix("not ")
    return bool(config.get(name)) == (name == condition)


@dataclass(frozen=True, eq=False)
class Structure:
    """The modules of an encoder by their names behind its prefix.

    Attributes:
        outside: the modules outside of the layers.
        inside: the modules of a layer.
        words: the word embeddings; a checkpoint has an encoder where it has a tensor of this name.
        layer: the path of a layer, with `{}` for its number.
        attention: the module of a layer that calls the attention function. It gets the layout.
        projections: the modules of a layer that make query, key and value; one, where they are fused in this order.
        norm: the layer's module through which the input of the projections passes; empty where the layer before has
            normed it.
        layers: the field of config.json that counts the layers which have weights of their own.
    """

    outside: Tensors
    inside: Tensors
    words: str = WORDS
    layer: str = "encoder.layer.{}"
    attention: str = "attention.self"
    projections: tuple[str, ...] = ("attention.self.query", "attention.self.key", "attention.self.value")
    norm: str = ""
    layers: str = "num_hidden_layers"

    def layout_name(self, layer: int) -> str:
        """The name of a layer's layout."""
        return f"{self.layer.format(layer)}.{self.attention}.{MASTER_LAYOUT}"

    def layer_of(self, inner: str) -> tuple[int, str] | None:
        """The number of the layer that a name belongs to, and the name in it; None for a name outside of layers."""
        match = re.match(re.escape(self.layer).replace(r"\{\}", r"(\d+)") + r"\.(.*)", inner)
        return (int(match[1]), match[2]) if match else None

    def count_in(self, inner: Collection[str]) -> int:
        """How many names behind the prefix are those of this structure's layers."""
        places = (place for name in inner if (place := self.layer_of(name)))
        return sum(name in self.inside or name.rpartition(".")[0] in self.inside for _, name in places)

    def tops(self) -> set[str]:
        """What the names of its tensors begin with, up to the first dot."""
        return {name.partition(".")[0] for name in (*self.outside, self.layer)}


@dataclass(frozen=True)
class LocalLayers:
    """Which layers attend to the tokens near by only, by fields of config.json.

    Attributes:
        kinds: the field that lists the kind of each layer.
        local: the kind of a local layer.
        wide: the kind of the other layers.
        every: the field that counts, where `kinds` is absent, from one global layer to the next; the first is global.
        width: the field with the tokens of the band, half of them to each side.
        defaults: the values of `every` and `width` where config.json has none.
    """

    kinds: str
    local: str
    wide: str
    every: str
    width: str
    defaults: Mapping[str, int]

    def windows(self, config: Mapping[str, Any], layers: int) -> list[int | None]:
        """How many tokens to each side a layer attends to; None for a layer without a band.

        Raises:
            FamilyError: the fields say nothing that can be.
        """
        kinds = config.get(self.kinds)
        every, width = (config.get(name, self.defaults[name]) for name in (self.every, self.width))
        for name, value in ((self.width, width), *(((self.every, every),) if kinds is None else ())):
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
                raise FamilyError(f"{name}: expected a positive integer", found=repr(value), where="config.json")
        if kinds is None:
            return [width // 2 if layer % every else None for layer in range(layers)]
        if not isinstance(kinds, list) or len(kinds) != layers:
            raise FamilyError(
                f"{self.kinds}: expected the kind of each of {layers} layers",
                found=repr(kinds)[:80],
                where="config.json",
            )
        for kind in kinds:
            if kind not in (self.local, self.wide):
                raise FamilyError(
                    f"{self.kinds}: expected {self.local} or {self.wide}", found=repr(kind)[:80], where="config.json"
                )
        return [width // 2 if kind == self.local else None for kind in kinds]


MODERNBERT_LOCAL = LocalLayers(
    "layer_types",
    "sliding_attention",
    "full_attention",
    "global_attn_every_n_layers",
    "local_attention",
    {"global_attn_every_n_layers": 3, "local_attention": 128},
)


def norm(**choices: Any) -> Part:
    """A layer norm, or an RMS norm with `bias=False`."""
    return Part(("hidden_size",), **choices)


def square(**choices: Any) -> Part:
    """A product from the hidden size to the hidden size."""
    return Part(("hidden_size", "hidden_size"), **choices)


def table(rows: str, **choices: Any) -> Part:
    """An embedding table with the size of the hidden states."""
    return Part((rows, "hidden_size"), bias=False, **choices)


def _without(tensors: Tensors, *names: str) -> Tensors:
    return {name: part for name, part in tensors.items() if name not in names}


_EMBEDDING = ("embedding_size",)  # the hidden size, where a family does not project its embeddings
_PROJECTIONS = {f"attention.self.{name}": square() for name in ("query", "key", "value")}
_FEED_FORWARD = {
    "attention.output.dense": square(),
    "intermediate.dense": Part(("intermediate_size", "hidden_size")),
    "output.dense": Part(("hidden_size", "intermediate_size")),
}
_BERT_EMBEDDINGS = {
    "embeddings.word_embeddings": Part(("vocab_size", *_EMBEDDING), bias=False),
    "embeddings.position_embeddings": Part(
        ("max_position_embeddings", *_EMBEDDING), bias=False, only_if="position_table"
    ),
    "embeddings.token_type_embeddings": Part(("type_vocab_size", *_EMBEDDING), bias=False),
    "embeddings.LayerNorm": Part(_EMBEDDING),
}
_POOLER = {"pooler.dense": square(required=False)}
# Norms after each sublayer, or before it where `pre_layer_norm` says so.
BERT = Structure(
    outside={**_BERT_EMBEDDINGS, **_POOLER, LAST_NORM: norm(only_if="last_layer_norm")},
    inside={
        **_PROJECTIONS,
        **_FEED_FORWARD,
        "attention.output.LayerNorm": norm(only_if="not pre_layer_norm"),
        "output.LayerNorm": norm(only_if="not pre_layer_norm"),
        "PreAttentionLayerNorm": norm(only_if="pre_layer_norm"),
        "PostAttentionLayerNorm": norm(only_if="pre_layer_norm"),
    },
)
ELECTRA = Structure(
    outside={
        **_BERT_EMBEDDINGS,
        "embeddings_project": Part(("hidden_size", *_EMBEDDING), only_if="projected_embeddings"),
    },
    inside=BERT.inside,
)
ROBERTA_PRE_NORM = Structure(
    outside={**_BERT_EMBEDDINGS, **_POOLER, "LayerNorm": norm()},
    inside={**_PROJECTIONS, **_FEED_FORWARD, "attention.LayerNorm": norm(), "intermediate.LayerNorm": norm()},
    norm="attention.LayerNorm",
)
XLM_ROBERTA_XL = Structure(
    outside={**_without(_BERT_EMBEDDINGS, "embeddings.LayerNorm"), **_POOLER, "encoder.LayerNorm": norm()},
    inside={**_PROJECTIONS, **_FEED_FORWARD, "attention.self_attn_layer_norm": norm(), "LayerNorm": norm()},
    norm="attention.self_attn_layer_norm",
)
_FREQUENCIES = Part(("half_head_dim",), required=False, is_tensor=True, only_if="not position_table")
ESM = Structure(
    outside={
        **_without(_BERT_EMBEDDINGS, "embeddings.LayerNorm", "embeddings.token_type_embeddings"),
        **_POOLER,
        "embeddings.layer_norm": norm(only_if="emb_layer_norm_before"),
        # ESM-2 on the Hub has a table that its class never reads.
        "embeddings.position_embeddings.weight": Part((), required=False, is_tensor=True, only_if="not position_table"),
        "encoder.emb_layer_norm_after": norm(),
        "contact_head.regression": Part(("1", "num_hidden_layers * num_attention_heads"), required=False),
        # transformers loads stored frequencies, which may be rounded, instead of computing them. It saves them under
        # the first name, and under the second one, with its asterisk, from 5.24 on.
        "rotary_embeddings.inv_freq": _FREQUENCIES,
        "encoder.layer.*.attention.self.rotary_embeddings.inv_freq": _FREQUENCIES,
    },
    inside={
        **_PROJECTIONS,
        **_FEED_FORWARD,
        "attention.LayerNorm": norm(),
        "LayerNorm": norm(),
        "attention.self.rotary_embeddings.inv_freq": _FREQUENCIES,
    },
    norm="attention.LayerNorm",
)
_ALBERT_ATTENTION = {f"attention.{name}": square() for name in ("query", "key", "value", "dense")}
ALBERT = Structure(
    outside={
        **_BERT_EMBEDDINGS,
        "encoder.embedding_hidden_mapping_in": Part(("hidden_size", *_EMBEDDING)),
        "pooler": square(required=False),
    },
    inside={
        **_ALBERT_ATTENTION,
        "attention.LayerNorm": norm(),
        "ffn": Part(("intermediate_size", "hidden_size")),
        "ffn_output": Part(("hidden_size", "intermediate_size")),
        "full_layer_layer_norm": norm(),
    },
    layer="encoder.albert_layer_groups.{}.albert_layers.0",
    attention="attention",
    projections=("attention.query", "attention.key", "attention.value"),
    layers="num_hidden_groups",
)
# Models that loop over their layers themselves: `layers.N.self_attn`, and a rotary module next to the layers.
_SELF_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_TYPED_EMBEDDINGS = {
    "embeddings.word_embeddings": table("vocab_size"),
    "embeddings.token_type_embeddings": table("type_vocab_size"),
    "embeddings.LayerNorm": norm(),
}


def _self_attention(bias: bool | str) -> Tensors:
    keys = Part(("key_value_size", "hidden_size"), bias=bias)
    return {
        "self_attn.q_proj": Part(("query_size", "hidden_size"), bias=bias),
        "self_attn.k_proj": keys,
        "self_attn.v_proj": keys,
        "self_attn.o_proj": Part(("hidden_size", "query_size"), bias=bias),
    }


def _gated(bias: bool | str, down: bool | str) -> Tensors:
    up = Part(("intermediate_size", "hidden_size"), bias=bias)
    return {
        "mlp.gate_proj": up,
        "mlp.up_proj": up,
        "mlp.down_proj": Part(("hidden_size", "intermediate_size"), bias=down),
    }


def _post_norm(attention: Tensors, feed_forward: Tensors) -> Structure:
    """Norms after each sublayer, in the names of transformers' classes."""
    norms = {"post_attention_layernorm": norm(), "post_mlp_layernorm": norm()}
    return Structure(
        outside={**_TYPED_EMBEDDINGS, **_POOLER},
        inside={**attention, **feed_forward, **norms},
        layer="layers.{}",
        attention="self_attn",
        projections=_SELF_ATTENTION,
    )


def _fused(bias: bool) -> Part:
    return Part(("query_size + 2 * key_value_size", "hidden_size"), bias=bias)


_TWO_PRODUCTS = {
    "mlp.fc1": Part(("intermediate_size", "hidden_size")),
    "mlp.fc2": Part(("hidden_size", "intermediate_size")),
}
GTE = _post_norm(_self_attention(bias=True), _gated(bias=False, down=True))
NOMIC_BERT = _post_norm(_self_attention(bias=False), _gated(bias=False, down=False))
JINA = _post_norm(_self_attention(bias=True), _TWO_PRODUCTS)
# The names that the models' own code gave, which transformers reads and writes. Layouts stay with `self_attn`.
GTE_STORED = Structure(
    outside=GTE.outside,
    inside={
        "attention.qkv_proj": _fused(bias=True),
        "attention.o_proj": Part(("hidden_size", "query_size")),
        "attn_ln": norm(),
        "mlp.up_gate_proj": Part(("2 * intermediate_size", "hidden_size"), bias=False),
        "mlp.down_proj": Part(("hidden_size", "intermediate_size")),
        "mlp_ln": norm(),
    },
    layer="encoder.layer.{}",
    attention="self_attn",
    projections=("attention.qkv_proj",),
)
_STORED_NORMS = {"norm1": norm(), "norm2": norm()}
_STORED_EMBEDDINGS = {**_without(_TYPED_EMBEDDINGS, "embeddings.LayerNorm"), "emb_ln": norm()}
NOMIC_BERT_STORED = Structure(
    outside={**_STORED_EMBEDDINGS, **_POOLER},
    inside={
        "attn.Wqkv": _fused(bias=False),
        "attn.out_proj": Part(("hidden_size", "query_size"), bias=False),
        "mlp.fc11": Part(("intermediate_size", "hidden_size"), bias=False),
        "mlp.fc12": Part(("intermediate_size", "hidden_size"), bias=False),
        "mlp.fc2": Part(("hidden_size", "intermediate_size"), bias=False),
        **_STORED_NORMS,
    },
    layer="encoder.layers.{}",
    attention="self_attn",
    projections=("attn.Wqkv",),
)
JINA_STORED = Structure(
    outside={**_STORED_EMBEDDINGS, **_POOLER},
    inside={
        "mixer.Wqkv": _fused(bias=True),
        "mixer.out_proj": Part(("hidden_size", "query_size")),
        **_TWO_PRODUCTS,
        **_STORED_NORMS,
    },
    layer="encoder.layers.{}",
    attention="self_attn",
    projections=("mixer.Wqkv",),
)
EUROBERT = Structure(
    outside={"embed_tokens": table("vocab_size"), "norm": norm(bias=False)},
    inside={
        **_self_attention(bias="attention_bias"),
        **_gated(bias="mlp_bias", down="mlp_bias"),
        "input_layernorm": norm(bias=False),
        "post_attention_layernorm": norm(bias=False),
    },
    words="embed_tokens.weight",
    layer="layers.{}",
    attention="self_attn",
    projections=_SELF_ATTENTION,
    norm="input_layernorm",
)
MODERNBERT = Structure(
    outside={
        "embeddings.tok_embeddings": table("vocab_size"),
        "embeddings.norm": norm(bias="norm_bias"),
        "final_norm": norm(bias="norm_bias"),
    },
    inside={
        "attn_norm": norm(bias="norm_bias", first=1),
        "attn.Wqkv": Part(("3 * hidden_size", "hidden_size"), bias="attention_bias"),
        "attn.Wo": square(bias="attention_bias"),
        "mlp_norm": norm(bias="norm_bias"),
        "mlp.Wi": Part(("2 * intermediate_size", "hidden_size"), bias="mlp_bias"),
        "mlp.Wo": Part(("hidden_size", "intermediate_size"), bias="mlp_bias"),
    },
    words="embeddings.tok_embeddings.weight",
    layer="layers.{}",
    attention="attn",
    projections=("attn.Wqkv",),
    norm="attn_norm",
)
