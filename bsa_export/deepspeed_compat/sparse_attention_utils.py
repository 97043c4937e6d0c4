"""`SparseAttentionUtils`: long positions and sparse self-attention for a Hugging Face BERT or RoBERTa in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bsa_export.attention import BertSparseSelfAttention, added
from bsa_export.errors import AttentionError


class _SelfAttention(BertSparseSelfAttention):
    """`BertSparseSelfAttention` with the call that Hugging Face's attention layers make of their `self`."""

    def __init__(self, config: Any, sparsity_config: Any, max_seq_length: int):
        super().__init__(config, sparsity_config, max_seq_length)
        self.sparse_self_attention.attn_mask_mode = "add"  # as Hugging Face means its masks

    def forward(  # type: ignore[override] # Hugging Face's layers expect a tuple
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Returns the context layer and None for the probabilities.

        Args:
            attention_mask: the tokenizer's `[batch, seq]`; or 4-D, what broadcasts to `[batch, heads, seq, seq]`,
                bool or added to the scores.
        """
        if kwargs.get("output_attentions"):
            raise AttentionError("output_attentions=True: block-sparse attention never holds the probabilities")
        if attention_mask is not None:
            if attention_mask.ndim == 2:
                attention_mask = attention_mask.bool()
            elif attention_mask.shape[1:3] != (1, 1):
                return self.context_layer(hidden_states, attn_mask=added(attention_mask)), None
        return super().forward(hidden_states, attention_mask), None


class SparseAttentionUtils:
    """The static methods of DeepSpeed's class of that name (0.19.6), for today's transformers models."""

    @staticmethod
    def extend_position_embedding(model: Any, max_position: int) -> Any:
        """Repeats the position embeddings up to `max_position` rows, in place; RoBERTa's reserved rows stay in front.

        Raises:
            AttentionError: (a ValueError) the model is neither BERT nor RoBERTa, or has that many positions already.
        """
        embeddings = _encoder(model).embeddings
        table = embeddings.position_embeddings
        reserved = _reserved_rows(table)
        own = table.weight.detach()[reserved:]
        if max_position <= len(own):
            raise AttentionError(
                f"max_position: expected more than the model's {len(own)} positions", found=max_position
            )
        repeated = own.repeat(-(-max_position // len(own)), 1)[:max_position]
        table.weight = nn.Parameter(torch.cat([table.weight.detach()[:reserved], repeated]), table.weight.requires_grad)
        table.num_embeddings = model.config.max_position_embeddings = rows = reserved + max_position
        ids = torch.arange(rows, device=table.weight.device)[None]
        for name, value in (("position_ids", ids), ("token_type_ids", torch.zeros_like(ids))):
            if name in dict(embeddings.named_buffers()):
                setattr(embeddings, name, value)
        return model

    @staticmethod
    def update_tokenizer_model_max_length(tokenizer: Any, max_position: int) -> Any:
        """Sets the length up to which the tokenizer truncates, and the one that it saves."""
        tokenizer.model_max_length = max_position
        tokenizer.init_kwargs["model_max_length"] = max_position
        return tokenizer

    @staticmethod
    def replace_model_self_attention_with_sparse_self_attention(
        model: Any, max_position: int, sparsity_config: Any = None
    ) -> Any:
        """Puts a `BertSparseSelfAttention` with the layer's own query, key and value into every layer, in place.

        Args:
            model: a Hugging Face BERT or RoBERTa, with or without a head.
            max_position: tokens of the longest input; the length of the master layout.
            sparsity_config: by default `FixedSparsityConfig(num_heads=config.num_attention_heads)`.

        Raises:
            AttentionError: (a ValueError) the model is neither BERT nor RoBERTa, is a decoder, or has fewer positions.
        """
        encoder = _encoder(model)
        table = encoder.embeddings.position_embeddings
        positions = len(table.weight) - _reserved_rows(table)
        if max_position > positions:
            raise AttentionError(
                f"max_position: expected at most the model's {positions} positions",
                found=max_position,
                hint="extend them with extend_position_embedding",
            )
        SparseAttentionUtils.replace_self_attention_layer_with_sparse_self_attention_layer(
            model.config, encoder.encoder.layer, sparsity_config, max_seq_length=max_position
        )
        # These import torch._dynamo, which takes a second.
        from bsa_export.hf.register import register
        from bsa_export.hf.stored_layout import IN_MEMORY

        # No layer is dense now: the tokenizer's mask reaches the layers as it is, not as [batch, 1, seq, seq].
        config = getattr(encoder, "config", None)
        if config is not None and hasattr(config, "_attn_implementation") and register():
            config._attn_implementation = IN_MEMORY
        return model

    @staticmethod
    def replace_self_attention_layer_with_sparse_self_attention_layer(
        config: Any, layers: Iterable[Any], sparsity_config: Any = None, max_seq_length: int | None = None
    ) -> Any:
        """The same for layers; the master layout is `max_seq_length` or `config.max_position_embeddings` long."""
        if getattr(config, "is_decoder", False):
            raise AttentionError("expected an encoder: sparse self-attention has no causal mask", found="is_decoder")
        for layer in layers:
            dense = layer.attention.self
            length = max_seq_length or config.max_position_embeddings
            sparse = _SelfAttention(config, sparsity_config, max_seq_length=length)
            sparse.query, sparse.key, sparse.value = dense.query, dense.key, dense.value
            layer.attention.self = sparse.to(dense.query.weight.device).train(dense.training)
        return layers

    @staticmethod
    def pad_to_block_size(
        block_size: int,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        pad_token_id: int,
        model_embeddings: Callable[[Tensor], Tensor],
    ) -> tuple[int, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Pads a batch on the right to whole blocks; each of the inputs `[batch, seq]` may be None.

        Args:
            model_embeddings: the word embeddings (a callable), needed with `inputs_embeds` `[batch, seq, hidden]`.

        Returns:
            The number of tokens added, then the five inputs; a mask is made where there was none and padding came in.
        """
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None:
            raise AttentionError("expected input_ids or inputs_embeds", found="neither")
        batch, length = given.shape[:2]
        added = -length % block_size
        if added:
            if inputs_embeds is not None:
                padding = torch.full((batch, added), pad_token_id, dtype=torch.long, device=given.device)
                inputs_embeds = torch.cat([inputs_embeds, model_embeddings(padding)], dim=1)
            if attention_mask is None:
                attention_mask = torch.ones(batch, length, dtype=torch.long, device=given.device)
            attention_mask = F.pad(attention_mask, (0, added), value=0)
            input_ids = None if input_ids is None else F.pad(input_ids, (0, added), value=pad_token_id)
            position_ids = None if position_ids is None else F.pad(position_ids, (0, added), value=pad_token_id)
            token_type_ids = None if token_type_ids is None else F.pad(token_type_ids, (0, added), value=0)
        return added, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds

    @staticmethod
    def unpad_sequence_output(pad_len: int, sequence_output: Tensor) -> Tensor:
        """Cuts what `pad_to_block_size` added off `[batch, seq, hidden]`."""
        return sequence_output[:, :-pad_len] if pad_len else sequence_output


def _encoder(model: nn.Module) -> Any:
    """The part with `embeddings` and `encoder`, of a model with or without a head."""
    for base in (getattr(model, "bert", None), getattr(model, "roberta", None), model):
        if hasattr(base, "embeddings") and hasattr(getattr(base, "encoder", None), "layer"):
            return base
    raise AttentionError("expected a Hugging Face BERT or RoBERTa", found=type(model).__name__)


def _reserved_rows(table: nn.Embedding) -> int:
    """The rows that RoBERTa keeps for padding, in front of the first position."""
    return 0 if table.padding_idx is None else table.padding_idx + 1
