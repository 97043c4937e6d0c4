"""The config of `prenorm_bert`: BERT's, with the fields in which DeepSpeed's recipe and GENA-LM differ from it.

transformers alone does not know its `model_type`: there the model fails to load, and never computes something else.
"""

from transformers.models.bert.configuration_bert import BertConfig

from bsa_export.hf.prenorm_names import MODEL_TYPE


class BsaBertConfig(BertConfig):
    """BERT's config, and where the norms are and how positions enter. The field names are GENA-LM's.

    Attributes:
        pre_layer_norm: a layer norm before each sublayer (`PreAttentionLayerNorm`, `PostAttentionLayerNorm`) instead
            of BERT's after it.
        last_layer_norm: a layer norm after the last layer (`encoder.FinalLayerNorm`); None means as `pre_layer_norm`.
        position_embedding_type: `absolute`, a table of `max_position_embeddings` rows, or `rotary`.
        rotary_dim: how many elements of each head are rotated, an even number; None means all of them.
        rotary_base: base of the rotary frequencies.
        max_position_embeddings: tokens of the longest input, also for rotary positions.
    """

    model_type = MODEL_TYPE

    pre_layer_norm: bool = True
    last_layer_norm: bool | None = None
    position_embedding_type: str = "absolute"
    rotary_dim: int | None = None
    rotary_base: float | int = 10000.0
