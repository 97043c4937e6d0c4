"""What conversion costs a masked LM in loss, with no training: dense at the source's length, converted beyond.

Not a test: `BSA_ENGLISH_MLM=FOLDER python tests/benchmarks/quality.py`, where FOLDER holds a BERT with a masked-LM head
and `heldout.jsonl` (`{"name", "text"}` a line). The folder is converted by the bare command with `--max-length`. 15 %
of the tokens, chosen once, become [MASK]; every row is scored on the same ones. Documents are cut into windows of the
row's length, [CLS] and [SEP] included, remainders too. The judge is dense attention over all keys under a mask that is
expanded from the layouts stored in the converted file: plain torch, in float32; no code of this package runs.

`--layout='--mode local --num-sliding-window-blocks 9'` compares other layouts: options of bsa-convert, repeatable.
`--edges` prints what conversion adds to the loss by the distance from the edge of a window of the source's length.
tests/benchmarks/antibodies.py makes such a FOLDER for AntiBERTy.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForMaskedLM

MASKED = 0.15
QUERIES = 512  # at a time


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, default=os.environ.get("BSA_ENGLISH_MLM"), help="default: $BSA_ENGLISH_MLM"
    )
    parser.add_argument("--converted", type=Path, help="a conversion that is there already")
    parser.add_argument("--max-length", type=int, default=16384)
    parser.add_argument("--layout", action="append", help="options of bsa-convert; by default none")
    parser.add_argument("--edges", action="store_true", help="also the loss by distance from an aligned window's edge")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[512, 4096, 16384], help="of windows of the converted model"
    )
    parser.add_argument("--documents", type=int, help="only so many, drawn with the seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(argv)
    if options.model is None:
        parser.error("--model or $BSA_ENGLISH_MLM is needed")
    for name in ("tokenizer.json", "heldout.jsonl"):
        if not (Path(options.model) / name).is_file():
            parser.error(f"{options.model}: expected a folder with {name}")
    if options.converted and options.layout:
        parser.error("--layout makes conversions; it does not apply to --converted")
    return options


def convert(source: Path, target: Path, max_length: int, layout: str) -> None:
    command = ["bsa-convert", str(source), str(target), "--max-length", str(max_length), *shlex.split(layout)]
    print("$ " + " ".join([*command[:1], source.name, target.name, *command[3:]]), flush=True)
    subprocess.run(command, check=True)


def masked_documents(folder: Path, count: int | None, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each held-out document its tokens with some masked, and the targets, -100 elsewhere; int64 `[tokens]`."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if tokenizer.token_to_id("[MASK]") is None:
        sys.exit(f"{folder}: expected the tokenizer of a BERT, with [MASK]")
    generator = torch.Generator().manual_seed(seed)
    lines = (folder / "heldout.jsonl").read_text().splitlines()
    chosen = sorted(torch.randperm(len(lines), generator=generator)[:count].tolist())
    documents = []
    for index, line in enumerate(lines):
        tokens = torch.tensor(tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids)
        masked = torch.rand(len(tokens), generator=generator) < MASKED
        if index in chosen:
            inputs = tokens.masked_fill(masked, tokenizer.token_to_id("[MASK]"))
            documents.append((inputs, tokens.masked_fill(~masked, -100)))
    return documents


def windows(documents, length: int, first: int, last: int):
    """Windows of up to `length` tokens, `[CLS]` and `[SEP]` included: (inputs, targets), each `[tokens]`."""
    for inputs, targets in documents:
        for window, target in zip(inputs.split(length - 2), targets.split(length - 2), strict=True):
            ends = window.new_tensor([first]), window.new_tensor([last])
            none = window.new_tensor([-100])
            yield torch.cat([ends[0], window, ends[1]]), torch.cat([none, target, none])


@torch.inference_mode()
def losses(model, documents, length: int, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy in nats of each masked token, and its place in its window; both `[masked tokens]`."""
    nats, places = [], []
    for inputs, targets in windows(documents, length, first, last):
        hidden = model.base_model(inputs[None]).last_hidden_state[0]
        picked = targets != -100
        logits = model.get_output_embeddings()(model.cls.predictions.transform(hidden[picked]))
        nats.append(cross_entropy(logits.double(), targets[picked], reduction="none"))
        places.append(picked.nonzero()[:, 0])
    return torch.cat(nats), torch.cat(places)


def by_distance(nats: torch.Tensor, places: torch.Tensor, window: int, dense: torch.Tensor) -> str:
    """What the mean loss of `nats` adds to that of `dense` on the same tokens, `[masked tokens]` each.

    By the distance in tokens from the nearest edge of an aligned window of `window` tokens.
    """
    distance = torch.minimum(places % window, window - 1 - places % window)
    bounds = [0, *(window // 2 >> shift for shift in (3, 2, 1, 0))]
    shown = []
    for start, end in zip(bounds, bounds[1:], strict=False):
        chosen = (distance >= start) & (distance < end)
        shown.append(f"{start}-{end - 1}: {(nats - dense)[chosen].mean():+.4f} ({int(chosen.sum()):,})")
    return "    more than dense, by distance from an edge  " + ", ".join(shown)


def judge(module, query, key, value, attention_mask, scaling=None, **_):
    """Dense attention under the mask that `module.stored_layout` stands for, bool `[heads, n, n]`, or `[1, n, n]` where
    the heads are alike; query `[1, heads, seq, head_dim]`."""
    seq = query.shape[2]
    context = torch.empty_like(query)
    for start in range(0, seq, QUERIES):
        part = slice(start, start + QUERIES)
        rows = torch.arange(seq)[part] // module.block
        kept = module.stored_layout[:, rows].repeat_interleave(module.block, -1)[None, ..., :seq]
        context[:, :, part] = scaled_dot_product_attention(query[:, :, part], key, value, attn_mask=kept, scale=scaling)
    return context.transpose(1, 2), None


def load_judged(folder: Path):
    """The converted model in plain transformers, every layer under its stored layout."""
    AttentionInterface.register("judge", judge)
    AttentionMaskInterface.register("judge", lambda **_: None)
    model = AutoModelForMaskedLM.from_pretrained(folder, attn_implementation="judge", dtype=torch.float32).eval()
    block = json.loads((folder / "config.json").read_text())["sparse_attention"]["block"]
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        for layer, module in enumerate(model.base_model.encoder.layer):
            ending = f"layer.{layer}.attention.self.sparse_self_attention.master_layout"
            (name,) = (name for name in file.keys() if name.endswith(ending))  # noqa: SIM118
            layout = file.get_tensor(name).bool()
            module.attention.self.stored_layout = layout[:1] if (layout == layout[:1]).all() else layout
            module.attention.self.block = block
    return model


def kept_blocks(model, length: int) -> float:
    """The share of blocks that an input of `length` tokens keeps, over all layers and heads; 1 without layouts."""
    shares = []
    for module in model.modules():
        if (layout := getattr(module, "stored_layout", None)) is not None:
            blocks = -(-length // module.block)
            shares.append(float(layout[:, :blocks, :blocks].float().mean()))
    return sum(shares) / len(shares) if shares else 1.0


def main(argv=None) -> None:
    options = parse(argv)
    torch.set_num_threads(options.threads)
    print(
        f"{platform.processor() or platform.machine()}, {options.threads} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )
    documents = masked_documents(options.model, options.documents, options.seed)
    tokens = sum(len(inputs) for inputs, _ in documents)
    print(f"{len(documents)} documents, {tokens:,} tokens, seed {options.seed}", flush=True)
    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    ends = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    dense = AutoModelForMaskedLM.from_pretrained(options.model, dtype=torch.float32).eval()
    source_length = dense.config.max_position_embeddings
    longest = max(len(inputs) for inputs, _ in documents) + 2
    print(f"{'model':<10} {'window':>7} {'kept':>6} {'loss':>8} {'masked tokens':>14} {'seconds':>8}", flush=True)

    def row(name: str, model, length: int, compared: torch.Tensor | None = None) -> torch.Tensor:
        started = time.perf_counter()
        nats, places = losses(model, documents, length, *ends)
        seconds = time.perf_counter() - started
        kept = kept_blocks(model, min(length, longest))
        print(f"{name:<10} {length:>7,} {kept:>6.1%} {nats.mean():>8.4f} {len(nats):>14,} {seconds:>8.0f}", flush=True)
        if options.edges and compared is not None:
            print(by_distance(nats, places, source_length, compared), flush=True)
        return nats

    own = row("dense", dense, source_length)
    for layout in options.layout or [""]:
        with tempfile.TemporaryDirectory() as work:
            converted = options.converted
            if converted is None:
                converted = Path(work) / "out"
                convert(options.model, converted, options.max_length, layout)
            judged = load_judged(converted)
        for length in options.lengths:
            row("converted", judged, length, own)


if __name__ == "__main__":
    sys.exit(main())
