"""BERT encoders with the norm before each sublayer, and with rotary positions: DeepSpeed's own recipe, and GENA-LM.

Made from transformers' BERT. Tensor names are BERT's, and for the norms of DeepSpeed's recipe:

    encoder.layer.N.PreAttentionLayerNorm    with pre_layer_norm, instead of attention.output.LayerNorm
    encoder.layer.N.PostAttentionLayerNorm   with pre_layer_norm, instead of output.LayerNorm
    encoder.FinalLayerNorm                   with last_layer_norm
    embeddings.position_embeddings           only with absolute positions

Sources: DeepSpeedExamples' `bing_bert` and GENA_LM's `modeling_bert.py`, for which layer computes what.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert import modeling_bert as bert

from bsa_export.errors import AttentionError
from bsa_export.hf.prenorm_config import BsaBertConfig
from bsa_export.hf.rotary import rotary_angles
from bsa_export.ops.rotary import rotated


class RotarySelfAttention(bert.BertSelfAttention):
    """BERT's self-attention with rotary positions."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, rotary: Any = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attends over `[batch, seq, hidden]`; `rotary` is what `rotary_angles` returns."""
        heads = (*hidden_states.shape[:-1], -1, self.attention_head_size)
        query, key, value = (
            linear(hidden_states).view(heads).transpose(1, 2) for linear in (self.query, self.key, self.value)
        )
        name = self.config._attn_implementation
        attend = bert.eager_attention_forward if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        context, probabilities = attend(
            self,
            rotated(query, *rotary),
            rotated(key, *rotary),
            value,
            attention_mask,
            dropout=self.dropout.p if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return context.reshape(*hidden_states.shape).contiguous(), probabilities


class RotaryEmbeddings(bert.BertEmbeddings):
    """BERT's embeddings without a position table."""

    def __init__(self, config: BsaBertConfig):
        super().__init__(config)
        del self.position_embeddings

    def forward(  # type: ignore[override] # no cache
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        words = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if token_type_ids is None:
            token_type_ids = torch.zeros(words.shape[:-1], dtype=torch.long, device=words.device)
        return self.dropout(self.LayerNorm(words + self.token_type_embeddings(token_type_ids)))


class BsaBertLayer(bert.BertLayer):
    """One layer. Norms that it does not have are `nn.Identity`."""

    def __init__(self, config: BsaBertConfig, layer_idx: int | None = None):
        super().__init__(config, layer_idx=layer_idx)
        if config.position_embedding_type == "rotary":
            self.attention.self = RotarySelfAttention(config, layer_idx=layer_idx)
        self.PreAttentionLayerNorm: nn.Module = nn.Identity()
        self.PostAttentionLayerNorm: nn.Module = nn.Identity()
        if config.pre_layer_norm:
            self.PreAttentionLayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            self.PostAttentionLayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            self.attention.output.LayerNorm = self.output.LayerNorm = nn.Identity()

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: None = None,
        encoder_attention_mask: None = None,
        **kwargs: Any,
    ) -> Tensor:
        """`[batch, seq, hidden]` to the same."""
        attended, _ = self.attention.self(
            self.PreAttentionLayerNorm(hidden_states), attention_mask=attention_mask, **kwargs
        )
        hidden_states = self.attention.output(attended, hidden_states)  # adds the residual
        return self.output(self.intermediate(self.PostAttentionLayerNorm(hidden_states)), hidden_states)


class BsaBertEncoder(bert.BertEncoder):
    """The layers, and the last norm."""

    def __init__(self, config: BsaBertConfig):
        nn.Module.__init__(self)
        self.config = config
        self.layer = nn.ModuleList([BsaBertLayer(config, layer_idx=i) for i in range(config.num_hidden_layers)])
        last = config.pre_layer_norm if config.last_layer_norm is None else config.last_layer_norm
        self.FinalLayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if last else nn.Identity()

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        packed: Any = None,
        **kwargs: Any,
    ) -> Any:
        """`hidden_states` `[batch, seq, hidden]`, or `[1, tokens, hidden]` where `bsa_export.hf.unpadding` packed
        them.
        """
        if packed is not None:
            kwargs["packed"] = packed
        if self.config.position_embedding_type == "rotary":
            if position_ids is None:
                seq = hidden_states.shape[1] if packed is None or packed.indices is None else packed.batch_shape[1]
                position_ids = torch.arange(seq, device=hidden_states.device)[None]
            if packed is not None and packed.indices is not None:
                position_ids = position_ids.expand(packed.batch_shape).flatten()[packed.indices][None]
            head_dim = self.config.hidden_size // self.config.num_attention_heads
            rotary_dim = head_dim if self.config.rotary_dim is None else self.config.rotary_dim
            kwargs["rotary"] = rotary_angles(position_ids, rotary_dim, self.config.rotary_base, hidden_states.dtype)
        output = super().forward(hidden_states, attention_mask, **kwargs)
        output.last_hidden_state = self.FinalLayerNorm(output.last_hidden_state)
        return output


class BsaBertModel(bert.BertModel):
    """The encoder, with BERT's call and outputs."""

    config_class = BsaBertConfig
    _no_split_modules = ["BertEmbeddings", "RotaryEmbeddings", "BsaBertLayer"]
    _can_record_outputs = {"hidden_states": BsaBertLayer, "attentions": bert.BertSelfAttention}

    def __init__(self, config: BsaBertConfig, add_pooling_layer: bool = True):
        bert.BertPreTrainedModel.__init__(self, config)
        _check(config)
        self.gradient_checkpointing = False
        rotary = config.position_embedding_type == "rotary"
        self.embeddings = RotaryEmbeddings(config) if rotary else bert.BertEmbeddings(config)
        self.encoder = BsaBertEncoder(config)
        self.pooler = bert.BertPooler(config) if add_pooling_layer else None
        self.post_init()


def _check(config: BsaBertConfig) -> None:
    """Raises AttentionError for a config that the model cannot compute."""
    if config.position_embedding_type not in ("absolute", "rotary"):
        raise AttentionError(
            "position_embedding_type: expected absolute or rotary", found=repr(config.position_embedding_type)
        )
    if config.is_decoder or config.add_cross_attention:
        raise AttentionError("expected an encoder", found="is_decoder or add_cross_attention")
    head_dim = config.hidden_size // config.num_attention_heads
    rotary_dim = head_dim if config.rotary_dim is None else config.rotary_dim
    if config.position_embedding_type == "rotary" and (rotary_dim % 2 or not 0 < rotary_dim <= head_dim):
        raise AttentionError(f"rotary_dim: expected an even number up to the head's {head_dim}", found=rotary_dim)


def _with_encoder(model: Any, config: BsaBertConfig, add_pooling_layer: bool = True) -> None:
    """What all models with a head begin with: `num_labels` and the encoder."""
    bert.BertPreTrainedModel.__init__(model, config)
    model.num_labels = config.num_labels
    model.bert = BsaBertModel(config, add_pooling_layer=add_pooling_layer)


class BsaBertForMaskedLM(bert.BertForMaskedLM):
    config_class = BsaBertConfig

    def __init__(self, config: BsaBertConfig):
        _with_encoder(self, config, add_pooling_layer=False)
        self.cls = bert.BertOnlyMLMHead(config)
        self.post_init()


class BsaBertForPreTraining(bert.BertForPreTraining):
    config_class = BsaBertConfig

    def __init__(self, config: BsaBertConfig):
        _with_encoder(self, config)
        self.cls = bert.BertPreTrainingHeads(config)
        self.post_init()


class BsaBertForQuestionAnswering(bert.BertForQuestionAnswering):
    config_class = BsaBertConfig

    def __init__(self, config: BsaBertConfig):
        _with_encoder(self, config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, int(config.num_labels or 0))
        self.post_init()


def _classifier(model: Any, config: BsaBertConfig) -> None:
    """The parts that both classification models have behind the encoder."""
    dropout = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
    model.dropout = nn.Dropout(dropout)
    model.classifier = nn.Linear(config.hidden_size, int(config.num_labels or 0))
    model.post_init()


class BsaBertForSequenceClassification(bert.BertForSequenceClassification):
    config_class = BsaBertConfig

    def __init__(self, config: BsaBertConfig):
        _with_encoder(self, config)
        _classifier(self, config)


class BsaBertForTokenClassification(bert.BertForTokenClassification):
    config_class = BsaBertConfig

    def __init__(self, config: BsaBertConfig):
        _with_encoder(self, config, add_pooling_layer=False)
        _classifier(self, config)
