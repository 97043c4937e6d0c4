"""Fine-tune a converted embedder: `python examples/train_embedder.py out/ docs.jsonl trained/`.

`docs.jsonl` has a `text` in each line. A question stands for each document: a sentence from beyond its first 512
tokens. Training pulls the two together (in-batch negatives). A quarter of the documents is held out; printed is how
well their sentences find them before and after (mean reciprocal rank). Needs sentence-transformers, datasets and
accelerate.
"""

import argparse
import json
import random
import re

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import CachedMultipleNegativesRankingLoss

import bsa_export  # noqa: F401  (registers the attention that the model's config.json names)


def late_sentences(text: str) -> list[str]:
    """Sentences from beyond about the first 512 tokens, long enough to say something."""
    found = re.split(r"(?<=[.!?])\s+", text[2500:])
    return [" ".join(sentence.split()) for sentence in found if 60 <= len(sentence) <= 300]


def mean_reciprocal_rank(model: SentenceTransformer, texts: list[str], draw: random.Random) -> float:
    """How well one late sentence of each document finds it among all of them."""
    questions = [draw.choice(late_sentences(text)) for text in texts]
    settings = {"batch_size": 8, "normalize_embeddings": True, "convert_to_tensor": True}
    scores = model.encode(questions, **settings) @ model.encode(texts, **settings).T
    ranks = (scores > scores.diagonal()[:, None]).sum(1) + 1
    return float((1 / ranks).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("documents")
    parser.add_argument("output")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=64, help="documents of a step: the others are negatives")
    parser.add_argument("--mini-batch", type=int, default=16, help="documents in memory at once")
    parser.add_argument("--rate", type=float, default=5e-5)
    options = parser.parse_args()

    draw = random.Random(0)
    with open(options.documents, encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    texts = [text for text in texts if late_sentences(text)]
    draw.shuffle(texts)
    held_out, training = texts[: len(texts) // 4], texts[len(texts) // 4 :]

    model = SentenceTransformer(options.model)
    before = mean_reciprocal_rank(model, held_out, random.Random(1))
    rows = [draw.choice(training) for _ in range(options.steps * options.batch)]
    pairs = Dataset.from_dict({"anchor": [draw.choice(late_sentences(text)) for text in rows], "positive": rows})
    arguments = SentenceTransformerTrainingArguments(
        output_dir=options.output,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=options.rate,
        warmup_steps=options.steps // 10,
        bf16=torch.cuda.is_available(),
        batch_sampler="no_duplicates",
        logging_steps=max(1, options.steps // 5),
        save_strategy="no",
        report_to="none",
    )
    loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=options.mini_batch)
    SentenceTransformerTrainer(model=model, args=arguments, train_dataset=pairs, loss=loss).train()
    model.save_pretrained(options.output)
    after = mean_reciprocal_rank(model, held_out, random.Random(1))
    print(f"{len(held_out)} held-out documents: mean reciprocal rank {before:.3f} before, {after:.3f} after")


if __name__ == "__main__":
    main()
