"""Train a converted masked LM on long documents, packed without padding.

    python examples/train_mlm.py --model out/ --documents docs.jsonl --output_dir trained/ --train positions

`docs.jsonl` has a `text` in each line. Documents are packed into one row; each attends to itself only
(`cu_seq_lens_q`). `--train positions` changes only the position embeddings beyond the source's length, so the outputs
for shorter texts stay the same, bit for bit. Weights are trained and saved in float32. Prints the loss on held-out
documents by place in the document. All TrainingArguments are options, such as `--bf16` and `--deepspeed zero2.json`;
for several GPUs use `torchrun`. Then run `bsa-convert trained/ made/ --trained-from out/`. Needs the extra `[train]`.
"""

import sys
from dataclasses import dataclass
from typing import Literal

import torch
from inputs import converted_folder, documents, masking_tokenizer
from transformers import AutoModelForMaskedLM, HfArgumentParser, Trainer, TrainingArguments
from transformers.data.data_collator import DataCollatorWithFlattening

import bsa_export  # noqa: F401  (registers the attention that the model's config.json names)


class Packed(DataCollatorWithFlattening):
    """Collates documents into one row and masks a share of the tokens: `labels` are -100 elsewhere."""

    def __init__(self, mask_token: int, first_position: int, share: float = 0.15):
        super().__init__(return_flash_attn_kwargs=True, position_ids_start=first_position)
        self.mask_token, self.share, self.generator = mask_token, share, torch.Generator()

    def __call__(self, rows: list[dict]) -> dict:
        ids = (batch := super().__call__(rows))["input_ids"]  # [1, tokens]
        masked = torch.rand(ids.shape, generator=self.generator) < self.share
        return batch | {"input_ids": ids.masked_fill(masked, self.mask_token), "labels": ids.masked_fill(~masked, -100)}


def train_new_positions_only(model, first_new: int) -> None:
    """Freezes everything but the position rows from `first_new` on."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    table = model.base_model.embeddings.position_embeddings.weight.requires_grad_(True)
    table.register_hook(lambda gradient: torch.cat([torch.zeros_like(gradient[:first_new]), gradient[first_new:]]))


@torch.no_grad()
def losses(model, rows: list[dict], collate: Packed, bounds: list[int]) -> list[float]:
    """Mean loss in nats of the masked tokens from each bound to the next; nan where no document is as long."""
    collate.generator.manual_seed(1)  # masks the same tokens each time
    lost, place = [], []
    for row in rows:
        batch = {k: v.to(model.device) if torch.is_tensor(v) else v for k, v in collate([row]).items()}
        labels = batch.pop("labels")[0]
        masked = labels >= 0
        logits = model(**batch).logits[0, masked].float()
        lost.append(torch.nn.functional.cross_entropy(logits, labels[masked], reduction="none").cpu())
        place.append(masked.nonzero()[:, 0].cpu())
    values, part = torch.cat(lost), torch.bucketize(torch.cat(place), torch.tensor(bounds[1:]), right=True)
    return [float(values[part == number].mean()) for number in range(len(bounds) - 1)]


@dataclass
class Choices:
    model: str
    documents: str
    train: Literal["all", "positions"] = "all"
    length: int = 4096  # tokens of a document, at most what the model reads


def main() -> None:
    choices, arguments = HfArgumentParser((Choices, TrainingArguments)).parse_args_into_dataclasses()
    folder = converted_folder(choices.model, recorded=True)
    texts = documents(choices.documents, least=2)
    tokenizer = masking_tokenizer(choices.model)
    model = AutoModelForMaskedLM.from_pretrained(choices.model, dtype="float32")
    model.accepts_loss_kwargs = False  # its loss is a mean, so Trainer has to divide it by the accumulation steps
    length = min(choices.length, folder.longest)
    bounds = [0, min(folder.source_length, length)]
    while bounds[-1] < length:
        bounds.append(min(2 * bounds[-1], length))
    rows = [{"input_ids": ids} for ids in tokenizer(texts, truncation=True, max_length=length)["input_ids"]]
    training, held_out = [row for i, row in enumerate(rows) if i % 8], rows[::8]
    if choices.train == "positions":
        positions = folder.record.origin.positions or sys.exit(f"{choices.model}: its conversion added no positions")
        arguments.weight_decay = 0.0  # it would change the other rows
        train_new_positions_only(model, positions.source_rows)
    packed = Packed(tokenizer.mask_token_id, folder.encoder.reserved)
    trainer = Trainer(model, arguments, packed, training, processing_class=tokenizer)
    before = losses(trainer.model.to(arguments.device).eval(), held_out, packed, bounds)
    trainer.train()
    trainer.save_model(arguments.output_dir)
    after = losses(trainer.model.eval(), held_out, packed, bounds)
    for start, end, old, new in zip(bounds, bounds[1:], before, after, strict=False):
        if trainer.is_world_process_zero():
            print(f"tokens {start} to {end - 1}: loss {old:.4f} before, {new:.4f} after")


if __name__ == "__main__":
    main()
