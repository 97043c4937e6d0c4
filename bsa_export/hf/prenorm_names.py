"""The names that transformers' auto classes have for `prenorm_bert`, in a module that imports nothing."""

MODEL_TYPE, CONFIG_CLASS = "bsa_bert", "BsaBertConfig"
# A table of transformers' auto classes -> the class for it.
CLASSES = {
    "MODEL_MAPPING": "BsaBertModel",
    "MODEL_FOR_MASKED_LM_MAPPING": "BsaBertForMaskedLM",
    "MODEL_FOR_PRETRAINING_MAPPING": "BsaBertForPreTraining",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING": "BsaBertForQuestionAnswering",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING": "BsaBertForSequenceClassification",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING": "BsaBertForTokenClassification",
}
