"""Train a converted sentence-transformers model to find long documents by a sentence from anywhere in them.

    python examples/train_embedder.py --model out/ --documents docs.jsonl --output_dir trained/ --bf16 \
        --per_device_train_batch_size 128 --num_train_epochs 40 --learning_rate 5e-5 --dataloader_num_workers 4

Each line of `docs.jsonl` (or `.jsonl.gz`) has a `text` and, if there is one, a `query` that it answers. Without one, a
sentence of the document is drawn each time that the document is used. The other documents of the batch are negatives.
Some documents are held out: a sentence from beyond the first 512 tokens must find each, before and after training. They
are written to `trained/heldout.jsonl`, which `tests/benchmarks/long_documents.py --qmsum` reads. All of
SentenceTransformerTrainingArguments are options. Needs the extras `[sentences,train]`.
"""

import gzip
import json
import random
import re
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import CachedMultipleNegativesRankingLoss
from torch.nn.utils.rnn import pad_sequence
from transformers import HfArgumentParser

import bsa_export  # noqa: F401  (registers the attention that the model's config.json names)

LEAST, MOST, SEEN = 12, 128, 512  # tokens of a query; tokens at a document's start from which no held-out query is


@dataclass
class Choices:
    model: str
    documents: str
    heldout: int = 150  # documents
    length: int = 16384  # tokens of a document in training, at most what the model reads
    crop: float = 1.0  # in training, documents are cut at random to this share of their sentences or more
    passage: int = 1  # in training, up to so many consecutive sentences are a query
    scale: float = 20.0  # of the cosine similarity; 1 / temperature
    mini_batch: int = 32  # texts in a pass; gradients are cached (GradCache), so that a batch may be larger


class Document:
    """A text in sentences, tokenized once."""

    def __init__(self, tokenizer, length: int, text: str, query: str | None = None, **_):
        sentences = [part for part in re.split(r"(?<=[.!?:])\s+|\n\s*\n", text) if part.strip()] or [text]
        settings = {"add_special_tokens": False, "truncation": False, "verbose": False}
        *ids, self.query = tokenizer([*sentences, query or ""], **settings)["input_ids"]
        starts = list(accumulate(map(len, ids), initial=0))
        far = [i for i, part in enumerate(ids) if SEEN <= starts[i] < length and len(part) >= LEAST]
        self.text, self.far_query = text, query or (sentences[random.choice(far)] if far else None)
        self.sentences = [part[: length - start] for part, start in zip(ids, starts, strict=False) if start < length]

    def draw(self, choices: Choices) -> tuple[list[int], list[int]]:
        """Token ids of a query, and of the document or a part of it that holds the query."""
        size = random.randint(max(1, int(choices.crop * len(self.sentences))), len(self.sentences))
        start = random.randrange(len(self.sentences) - size + 1)
        part = self.sentences[start : start + size]
        first = random.choice([i for i, sentence in enumerate(part) if len(sentence) >= LEAST] or [0])
        passage = chain(*part[first : first + random.randint(1, choices.passage)])
        return (self.query or list(passage))[:MOST], list(chain(*part))


class Collator:
    valid_label_columns = ()  # the trainer asks for them

    def __init__(self, tokenizer, documents: list[Document], choices: Choices):
        self.tokenizer, self.documents, self.choices = tokenizer, documents, choices

    def __call__(self, rows: list[dict]) -> dict:
        """Padded queries and documents, from numbers of documents."""
        first, last = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        pairs = [self.documents[row["number"]].draw(self.choices) for row in rows]
        batch = {}
        for name, texts in zip(("query", "document"), zip(*pairs, strict=True), strict=True):
            ids = [torch.tensor([first, *text, last]) for text in texts]
            batch[f"{name}_input_ids"] = pad_sequence(ids, batch_first=True, padding_value=self.tokenizer.pad_token_id)
            batch[f"{name}_attention_mask"] = pad_sequence([torch.ones_like(one) for one in ids], batch_first=True)
        return batch


def mrr(model: SentenceTransformer, documents: list[Document]) -> float:
    """Mean reciprocal rank of each document for its query."""
    settings = {"batch_size": 8, "convert_to_tensor": True, "normalize_embeddings": True}
    texts = model.encode([document.text for document in documents], **settings)
    scores = model.encode([document.far_query for document in documents], **settings) @ texts.T  # [queries, documents]
    return float((1 / (1 + (scores > scores.diagonal()[:, None]).sum(1))).mean())


def main() -> None:
    choices, arguments = HfArgumentParser((Choices, SentenceTransformerTrainingArguments)).parse_args_into_dataclasses()
    random.seed(arguments.seed)
    model = SentenceTransformer(choices.model, model_kwargs={"dtype": "float32"})
    length = min(choices.length, model.max_seq_length) - 2
    with (gzip.open if choices.documents.endswith(".gz") else open)(choices.documents, "rt", encoding="utf-8") as lines:
        documents = [Document(model.tokenizer, length, **json.loads(line)) for line in lines]
    random.shuffle(documents)
    heldout = [document for document in documents if document.far_query][: choices.heldout]
    documents = [document for document in documents if document not in heldout]
    trainer = SentenceTransformerTrainer(
        model,
        arguments,
        Dataset.from_dict({"number": range(len(documents))}),
        loss=CachedMultipleNegativesRankingLoss(model, choices.scale, mini_batch_size=choices.mini_batch),
        data_collator=Collator(model.tokenizer, documents, choices),
    )
    before = mrr(model, heldout)
    trainer.train()
    after = mrr(model, heldout)
    print(f"{len(documents)} documents, {len(heldout)} held out: MRR {before:.3f} before, {after:.3f} after")
    model.save_pretrained(arguments.output_dir)
    with open(Path(arguments.output_dir, "heldout.jsonl"), "w", encoding="utf-8") as file:
        for number, document in enumerate(heldout):
            print(json.dumps({"kind": "document", "id": number, "text": document.text}), file=file)
            print(json.dumps({"kind": "query", "query": document.far_query, "document": number}), file=file)


if __name__ == "__main__":
    main()
