"""Train a converted sentence-transformers model to find long documents by a sentence from anywhere in them.

    python examples/train_embedder.py --model out/ --documents docs.jsonl --output_dir trained/ --bf16 \
        --per_device_train_batch_size 128 --max_steps 60 --learning_rate 5e-5 --dataloader_num_workers 4

Each line of `docs.jsonl` has a `text` and, if there is one, a `query` that it answers; else a sentence of the text is
drawn each time. In the test, each held-out document must be found by a sentence from beyond its first 512 tokens. All
SentenceTransformerTrainingArguments are options. Needs the extras `[train]` and `[sentences]`.
"""

import json
import random
import re
from dataclasses import dataclass
from itertools import accumulate, chain

import torch
from datasets import Dataset
from inputs import json_lines  # imports bsa_export, which registers the attention that config.json names
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import CachedMultipleNegativesRankingLoss as Loss
from torch.nn.utils.rnn import pad_sequence
from transformers import HfArgumentParser

LEAST, MOST, SEEN = 12, 128, 512  # tokens of a query; tokens at a document's start from which no held-out query is


@dataclass
class Choices:
    model: str
    documents: str
    heldout: int = 150  # documents
    length: int = 16384  # tokens of a document in training
    scale: float = 20.0  # of the cosine similarity; 1 / temperature
    mini_batch: int = 32  # texts in a pass; gradients are cached (GradCache), so that a batch may be larger


def document(tokenizer, length: int, text: str, query: str | None = None, **_) -> dict:
    """A text with its token ids, those of the queries to draw from, and what must find it if it is held out."""
    sentences = [part for part in re.split(r"(?<=[.!?:])\s+|\n\s*\n", text) if part.strip()] or [text]
    *ids, asked = tokenizer([*sentences, query or ""], add_special_tokens=False, truncation=False)["input_ids"]
    starts = list(accumulate(map(len, ids), initial=0))
    far = [i for i, part in enumerate(ids) if SEEN <= starts[i] < length and len(part) >= LEAST]
    ids = [part[: length - start] for part, start in zip(ids, starts, strict=False) if start < length]
    queries = [asked] if query else [part for part in ids if len(part) >= LEAST] or ids[:1]
    heldout_query = query or (sentences[random.choice(far)] if far else None)
    return {"text": text, "ids": list(chain(*ids)), "queries": queries, "heldout_query": heldout_query}


class Collator:
    valid_label_columns = ()  # the trainer asks for them

    def __init__(self, tokenizer, documents: list[dict]):
        self.tokenizer, self.documents = tokenizer, documents

    def __call__(self, rows: list[dict]) -> dict:
        """Padded queries and documents, from numbers of documents."""
        chosen, batch = [self.documents[row["number"]] for row in rows], {}
        queries = [random.choice(one["queries"])[:MOST] for one in chosen]
        for name, texts in (("query", queries), ("document", [one["ids"] for one in chosen])):
            ids = [torch.tensor([self.tokenizer.cls_token_id, *text, self.tokenizer.sep_token_id]) for text in texts]
            batch[f"{name}_input_ids"] = pad_sequence(ids, batch_first=True, padding_value=self.tokenizer.pad_token_id)
            batch[f"{name}_attention_mask"] = pad_sequence([torch.ones_like(one) for one in ids], batch_first=True)
        return batch


def mrr(model: SentenceTransformer, documents: list[dict]) -> float:
    """Mean reciprocal rank of each document for its query."""
    settings = {"batch_size": 8, "convert_to_tensor": True, "normalize_embeddings": True}
    queries, texts = (model.encode([one[key] for one in documents], **settings) for key in ("heldout_query", "text"))
    scores = queries @ texts.T  # [queries, documents]
    return float((1 / (1 + (scores > scores.diagonal()[:, None]).sum(1))).mean())


def main() -> None:
    choices, arguments = HfArgumentParser((Choices, SentenceTransformerTrainingArguments)).parse_args_into_dataclasses()
    random.seed(arguments.seed)
    model = SentenceTransformer(choices.model, model_kwargs={"dtype": "float32"})
    length = min(choices.length, model.max_seq_length) - 2
    documents = [document(model.tokenizer, length, **row) for row in json_lines(choices.documents, text=str)]
    random.shuffle(documents)
    heldout = [one for one in documents if one["heldout_query"]][: choices.heldout]
    documents = [one for one in documents if one["text"] not in {other["text"] for other in heldout}]
    if len(heldout) < choices.heldout or not documents:
        raise SystemExit(f"--heldout {choices.heldout}: found {len(heldout)} with a query, {len(documents)} to train")
    numbers, collate = Dataset.from_dict({"number": range(len(documents))}), Collator(model.tokenizer, documents)
    loss = Loss(model, choices.scale, mini_batch_size=choices.mini_batch)
    trainer = SentenceTransformerTrainer(model, arguments, numbers, loss=loss, data_collator=collate)
    before, _, after = mrr(model, heldout), trainer.train(), mrr(model, heldout)
    print(f"{len(documents)} documents, {len(heldout)} held out: MRR {before:.3f} before, {after:.3f} after")
    model.save_pretrained(arguments.output_dir)
    with open(f"{arguments.output_dir}/heldout.jsonl", "w", encoding="utf-8") as file:
        for number, one in enumerate(heldout):
            print(json.dumps({"kind": "document", "id": number, "text": one["text"]}), file=file)
            print(json.dumps({"kind": "query", "query": one["heldout_query"], "document": number}), file=file)


if __name__ == "__main__":
    main()
