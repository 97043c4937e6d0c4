"""Train a converted masked LM on long documents, packed without padding.

    python examples/train_mlm.py --model out/ --documents docs.jsonl --output_dir trained/ --train positions

`docs.jsonl` has a `text` in each line. Documents are packed into one row; each attends to itself only
(`cu_seq_lens_q`). `--train positions` changes nothing but the position rows beyond the source's length, so what the
model answers to shorter texts stays the same, bit for bit; `--train all` changes everything. The loss on held-out
documents is printed before and after. All of transformers' TrainingArguments are options: `--bf16`, `--deepspeed
zero2.json`; several GPUs by `torchrun`.
"""

import json
from dataclasses import dataclass

import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments

import bsa_export  # noqa: F401  (registers the attention that the model's config.json names)

SHARE = 0.15  # of the tokens is masked


class Packed:
    """Collates documents into one row: `input_ids`, `labels`, `position_ids` and where each document begins."""

    def __init__(self, mask_token: int, first_position: int, seed: int = 0):
        self.mask_token, self.first_position = mask_token, first_position
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, rows: list[dict]) -> dict:
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        ids = torch.cat([torch.tensor(row["input_ids"]) for row in rows])
        masked = torch.rand(len(ids), generator=self.generator) < SHARE
        places = torch.cat([torch.arange(length) for length in lengths.tolist()])
        ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        longest = int(lengths.max())
        return {
            "input_ids": ids.masked_fill(masked, self.mask_token)[None],
            "labels": ids.masked_fill(~masked, -100)[None],
            "position_ids": (places + self.first_position)[None],
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": longest,
            "max_length_k": longest,
        }


def train_new_positions_only(model, first_new: int) -> None:
    """Freezes everything but the position rows from `first_new` on."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    table = model.base_model.embeddings.position_embeddings.weight.requires_grad_(True)
    table.register_hook(lambda gradient: torch.cat([torch.zeros_like(gradient[:first_new]), gradient[first_new:]]))


@torch.no_grad()
def losses(model, rows: list[dict], collate: Packed, source_length: int) -> tuple[float, float]:
    """Mean loss in nats of masked tokens within the source's length, and beyond it."""
    near, far = [], []
    for row in rows:
        batch = {k: v.to(model.device) if torch.is_tensor(v) else v for k, v in collate([row]).items()}
        labels = batch.pop("labels")[0]
        lost = torch.nn.functional.cross_entropy(model(**batch).logits[0].float(), labels, reduction="none")
        place = torch.arange(len(labels), device=labels.device)
        near.append(lost[(labels >= 0) & (place < source_length)])
        far.append(lost[(labels >= 0) & (place >= source_length)])
    return float(torch.cat(near).mean()), float(torch.cat(far).mean())


@dataclass
class Choices:
    model: str
    documents: str
    train: str = "all"  # or "positions"
    length: int = 4096  # tokens of a document, at most what the model reads
    source_length: int = 512


def main() -> None:
    choices, arguments = HfArgumentParser((Choices, TrainingArguments)).parse_args_into_dataclasses()
    arguments.remove_unused_columns = False
    tokenizer = AutoTokenizer.from_pretrained(choices.model)
    model = AutoModelForMaskedLM.from_pretrained(choices.model)
    first = (
        getattr(model.base_model.embeddings, "padding_idx", -1) + 1
    )  # RoBERTa's positions start behind the padding's
    with open(choices.documents, encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    rows = [tokenizer(text, truncation=True, max_length=choices.length, return_attention_mask=False) for text in texts]
    rows = [{"input_ids": row["input_ids"]} for row in rows]
    if choices.train == "positions":
        train_new_positions_only(model, first + choices.source_length)
    trainer = Trainer(
        model,
        arguments,
        Packed(tokenizer.mask_token_id, first),
        [row for i, row in enumerate(rows) if i % 8],
        processing_class=tokenizer,
    )
    found = []
    for train in (lambda: trainer.model.to(arguments.device), trainer.train):
        train()
        check = Packed(tokenizer.mask_token_id, first, seed=1)
        found.append(losses(trainer.model.eval(), rows[::8], check, choices.source_length))
    trainer.save_model(arguments.output_dir)
    for what, old, new in zip(("within", "beyond"), *found, strict=True):
        print(f"{what} {choices.source_length} tokens: loss {old:.4f} before, {new:.4f} after")


if __name__ == "__main__":
    main()
