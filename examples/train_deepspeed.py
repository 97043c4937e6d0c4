"""Train a converted masked LM on the DeepSpeed engine, save it, and convert what was saved.

    torchrun --nproc-per-node 2 examples/train_deepspeed.py --model out/ --documents docs.jsonl --output_dir run/ \
        --stage 3 --bf16 --max_steps 100

`docs.jsonl` has a `text` in each line. `--stage` is that of ZeRO: 2 shards gradients and optimizer states, 3 the
weights too. All of transformers' TrainingArguments are options; `--resume_from_checkpoint run/checkpoint-100` continues
a run. At the end `run/trained` holds the weights gathered from all ranks, and `run/converted` a converted folder made
from the fp32 master weights in the last checkpoint. Needs the extra `[train]`, and deepspeed.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from inputs import converted_folder, documents, masking_tokenizer
from transformers import (
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

import bsa_export


@dataclass
class Choices:
    model: str
    documents: str
    stage: int = 2
    length: int = 4096  # tokens of a document, at most what the model reads


def deepspeed_config(stage: int) -> dict:
    """A DeepSpeed config for ZeRO; "auto" stands for what TrainingArguments say."""
    return {
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        "bf16": {"enabled": "auto"},
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
    }


def main() -> None:
    choices, rest = HfArgumentParser(Choices).parse_args_into_dataclasses(return_remaining_strings=True)
    # Before the model is loaded: with ZeRO 3 its weights are sharded while they are read.
    rest += ["--deepspeed", json.dumps(deepspeed_config(choices.stage))]
    (arguments,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(rest)

    length = min(choices.length, converted_folder(choices.model).longest)
    texts = documents(choices.documents)
    tokenizer = masking_tokenizer(choices.model)
    model = AutoModelForMaskedLM.from_pretrained(choices.model, dtype="float32")
    model.accepts_loss_kwargs = False  # its loss is a mean, which Trainer divides by the accumulation steps
    rows = [dict(tokenizer(text, truncation=True, max_length=length)) for text in texts]
    trainer = Trainer(model, arguments, DataCollatorForLanguageModeling(tokenizer), rows, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    output = Path(arguments.output_dir)
    trainer.save_model(str(output / "trained"))  # all ranks take part in gathering

    if trainer.is_world_process_zero():
        checkpoint = get_last_checkpoint(arguments.output_dir)
        if checkpoint is None:
            raise SystemExit("no checkpoint was saved: choose a smaller --save_steps")
        (step,) = Path(checkpoint).glob("global_step*")
        done = bsa_export.convert(step, output / "converted", overwrite=True)
        loaded = bsa_export.load(output / "trained")
        print(f"{output / 'trained'}: {type(loaded).__name__} in {loaded.dtype}")
        number = step.name.removeprefix("global_step")
        print(f"{done.folder}: {done.plan.max_length:,} tokens, fp32 weights of step {number}")


if __name__ == "__main__":
    main()
