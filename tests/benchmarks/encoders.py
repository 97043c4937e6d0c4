"""Whole encoders with rotary positions and local layers on one GPU: tokens a second and peak memory, by attention.

    python tests/benchmarks/encoders.py [--models modernbert esm2] [--minutes 5]

Random weights in the published shapes, bf16, the same batch of random tokens without padding for every row of a length.
`sdpa` and `flex_attention` are the stock class on transformers' own attention; `default` and `window 1024` are what
bsa-convert makes of it. Where the default keeps every block, its outputs are first compared with SDPA's. A row is the
median of 5 runs, each timed with CUDA events; training is forward, the mean of the hidden states' squares, backward.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch
import transformers

import bsa_export
from bsa_export.conversion.convert import convert

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# Shapes of ModernBERT-base, ESM-2 150M and BERT-base; all else is the config class's default.
MODELS = {
    "modernbert": ("ModernBert", {}),
    "esm2": (
        "Esm",
        {
            "vocab_size": 33, "hidden_size": 640, "num_hidden_layers": 30, "num_attention_heads": 20,
            "intermediate_size": 2560, "max_position_embeddings": 1026, "position_embedding_type": "rotary",
            "mask_token_id": 32, "pad_token_id": 1, "token_dropout": False, **NO_DROPOUT,
        },
    ),
    "bert": ("Bert", NO_DROPOUT),
}  # fmt: skip
LENGTHS = {"modernbert": (8192, 32768, 512, 2048), "esm2": (4096,), "bert": (512, 2048, 8192, 32768)}
ENGINES = ("sdpa", "default", "window 1024", "flex_attention")
TOKENS = 65536  # in a batch


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--lengths", type=int, nargs="+", help="instead of each model's own")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--minutes", type=float, default=5.0, help="rows that do not fit are left out, and said")
    return parser.parse_args()


def build(name: str, folder: Path) -> Path:
    """A dense model with random weights, saved once."""
    start, fields = MODELS[name]
    if not folder.exists():
        torch.manual_seed(0)
        config = getattr(transformers, f"{start}Config")(**fields)
        getattr(transformers, f"{start}Model")(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def load(name: str, engine: str, length: int, work: Path) -> torch.nn.Module | None:
    """The model on an attention; None where that is the default of another row."""
    dense = build(name, work / name)
    if engine in ("sdpa", "flex_attention"):
        config = transformers.AutoConfig.from_pretrained(dense)
        config.max_position_embeddings = max(config.max_position_embeddings, length)  # rotary: no row for a position
        reads_less = name == "bert" and length > 512
        return None if reads_less else transformers.AutoModel.from_pretrained(
            dense, config=config, attn_implementation=engine, dtype=torch.bfloat16
        ).cuda()  # fmt: skip
    shortened = engine == "window 1024"
    if shortened and name != "modernbert":
        return None
    out = work / f"{name}-{length}-{shortened}"
    convert(dense, out, max_length=length, **({"window": 1024} if shortened else {}))
    return bsa_export.load(out, device="cuda", dtype=torch.bfloat16)


def steps(model: torch.nn.Module, ids: torch.Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is timed: forward, and a training step without the optimizer."""

    @torch.no_grad()
    def forward() -> object:
        return model(input_ids=ids)

    def training() -> None:
        model(input_ids=ids).last_hidden_state.float().square().mean().backward()
        model.zero_grad()

    yield "forward", forward
    yield "training", training


def milliseconds(step: Callable[[], object], runs: int = 5) -> float:
    step()
    times = []
    for _ in range(runs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return median(times)


def main() -> None:
    options = parse()
    if not torch.cuda.is_available():
        raise SystemExit("expected a CUDA GPU, found none")
    ends = time.monotonic() + 60 * options.minutes
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {transformers.__version__}, bf16,")
    print(f"{options.tokens:,} tokens in a batch\n")
    print("| model | tokens | attention | step | million tokens a second | x SDPA | peak memory, GiB |\n|" + "---|" * 7)
    with tempfile.TemporaryDirectory() as work:
        for name in options.models:
            for length in options.lengths or LENGTHS[name]:
                vocabulary = MODELS[name][1].get("vocab_size", 30000)
                ids = torch.randint(5, vocabulary, (max(1, options.tokens // length), length), device="cuda")
                dense: dict[str, float] = {}  # tokens a second of SDPA
                expected = None
                for engine in options.engines:
                    if time.monotonic() > ends:
                        print(f"| {name} | {length:,} | {engine} | not run: the time was over | | | |", flush=True)
                        continue
                    try:
                        model = load(name, engine, length, Path(work))
                        if model is None:
                            continue
                        expected = compared(model, engine, ids, expected)
                        for kind, step in steps(model, ids):
                            model.train(kind == "training")
                            torch.cuda.reset_peak_memory_stats()
                            rate = ids.numel() / milliseconds(step) / 1e3
                            if engine == "sdpa":
                                dense[kind] = rate
                            peak = torch.cuda.max_memory_allocated() / 2**30
                            ratio = f"{rate / dense[kind]:.2f}" if kind in dense else ""
                            line = f"{rate:.3f} | {ratio} | {peak:.1f}"
                            print(f"| {name} | {length:,} | {engine} | {kind} | {line} |", flush=True)
                    except Exception as error:
                        words = json.dumps(" ".join(str(error).split())[:150])
                        print(f"| {name} | {length:,} | {engine} | {type(error).__name__} {words} | | | |", flush=True)
                    model = step = None  # both hold the weights
                    gc.collect()
                    torch.cuda.empty_cache()


@torch.no_grad()
def compared(model: torch.nn.Module, engine: str, ids: torch.Tensor, expected: torch.Tensor | None) -> torch.Tensor:
    """The outputs of SDPA for one text, which those of a layout that keeps every block must be near."""
    found = model.eval()(input_ids=ids[:1]).last_hidden_state.float()
    layouts = [module.master_layout for module in model.modules() if hasattr(module, "master_layout")]
    if engine != "default" or expected is None or not any(layout.all() for layout in layouts):
        return found if expected is None else expected
    error = float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    if error > 0.05:
        raise RuntimeError(f"outputs differ from SDPA's: {error:.3f} of their root mean square")
    return expected


if __name__ == "__main__":
    main()
