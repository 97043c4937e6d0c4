"""Whole models of BERT's shapes: tokens a second and peak memory of block-sparse attention and its competitors.

    python tests/benchmarks/model.py [--sizes base] [--lengths 4096 16384] [--minutes 7]
    python tests/benchmarks/model.py --sizes base gena --patterns bigbird-heads --lengths 4096 --peers --no-mixed
    python tests/benchmarks/model.py --sizes base --patterns windowed --lengths 512 2048 8192 32768 --no-mixed \
        --peers modernbert --peer-lengths 512 2048 8192 32768

Not a test. Rows run in the order of what the goals need, until `--minutes` are over; what did not run is said. Outputs
and gradients are compared with the dense class under the same mask first; a pattern that is wrong is not timed. A
figure is the median of `--repeat` calls with their range, after a call or two that do not count. `--smoke` takes tiny
shapes, to see anywhere that it runs.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import math
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch
import transformers
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface, AutoModel, BertConfig

import bsa_export
from bsa_export.hf.prenorm_config import BsaBertConfig
from bsa_export.hf.stored_layout import StoredLayout
from bsa_export.sparsity.sections import sparsity_config

SIZES = {
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    # GENA-LM: norms before each sublayer, no last norm, rotary positions.
    "gena": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "smoke": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128},
}
BLOCK = 64
PATTERNS = {
    "windowed": {"num_local_blocks": 8, "num_sliding_window_blocks": 9},
    "bigbird": {"num_random_blocks": 3, "num_sliding_window_blocks": 3, "num_global_blocks": 2},
    "fixed": {"num_local_blocks": 4, "num_global_blocks": 1},
    # GENA-LM's: every head has its own random blocks.
    "bigbird-heads": {
        "num_random_blocks": 3,
        "num_sliding_window_blocks": 3,
        "num_global_blocks": 2,
        "different_layout_per_head": True,
    },
}
GENA = {
    "pre_layer_norm": True,
    "last_layer_norm": False,
    "position_embedding_type": "rotary",
    "rotary_dim": 32,
    "rotary_base": 10000,
}
# ModernBERT's published shapes; in two of three layers a token attends to 64 tokens on each side.
MODERNBERT = {
    "base": {"hidden_size": 768, "num_hidden_layers": 22, "num_attention_heads": 12, "intermediate_size": 1152},
    "large": {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 2624},
    "smoke": {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 96},
}
MODELS = ("hf-bigbird", "hf-longformer", "modernbert")  # that attend in their own way
PEERS = (*MODELS, "flex")
FLEX_TILE = 128  # FlexAttention is several times slower with a mask of smaller blocks
MIXED = "mixed"
SHORTEST, LONGEST = 128, 16384  # of the mixed lengths
ROW_SECONDS = 3.0  # calls of a row end after this time, even if they are fewer than asked for
NO_DROPOUT = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["base", "large"], choices=SIZES)
    parser.add_argument("--lengths", nargs="+", type=int, default=[512 << i for i in range(8)])
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS)[:3], choices=PATTERNS)
    parser.add_argument("--steps", nargs="+", default=["forward", "train"], choices=["forward", "train"])
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS)
    parser.add_argument("--peer-lengths", nargs="*", type=int, default=[16384, 4096, 65536], help="of the peers, first")
    parser.add_argument("--tokens", type=int, default=65536, help="in a batch")
    parser.add_argument(
        "--mixed", action=argparse.BooleanOptionalAction, default=True, help="the rows of mixed lengths"
    )
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=7.0, help="start no new row after this time")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="also write the rows to this file")
    parser.add_argument("--compile", action="store_true", help="forward only, by torch.compile with CUDA graphs")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes")
    options = parser.parse_args(argv)
    if options.compile:
        options.steps = ["forward"]
    if options.smoke:
        options.sizes, options.lengths, options.peer_lengths, options.tokens = ["smoke"], [512, 1024], [1024], 2048
        options.repeat, options.dtype = 2, "float32"
    return options


@dataclass(frozen=True)
class Row:
    """What is timed: a forward pass or step, of a size, at a length or MIXED, under a pattern, by an engine."""

    step: str
    size: str
    length: int | str
    pattern: str
    engine: str

    def __str__(self) -> str:
        return f"{self.step:8} {self.size:6} {self.length!s:>6} {self.pattern:9} {self.engine:14}"


@dataclass(frozen=True)
class Figures:
    """What came out: density of the layout, seconds of each call, real tokens in the batch, peak of memory in bytes."""

    density: float | None
    seconds: list[float]
    tokens: int
    peak: int

    @property
    def rate(self) -> float:
        """Million tokens a second."""
        return self.tokens / statistics.median(self.seconds) / 1e6


def rows(options) -> Iterator[Row]:
    """All rows, what the goals need first."""
    own = [("dense", "sdpa"), *((pattern, "block_sparse") for pattern in options.patterns)]
    peers = [("own", peer) for peer in MODELS if peer in options.peers]
    peers += [(pattern, "flex") for pattern in options.patterns if "flex" in options.peers]
    (first, *others), lengths, some = options.sizes, options.lengths, options.peer_lengths
    mixed = [MIXED] if options.mixed else []
    tiers = [
        (["forward"], [first], [*lengths, *mixed], own),
        (["train"], [first], [*lengths, *mixed], own),
        (["forward"], [first], some[:1], peers),
        (["forward"], others, [*lengths, *mixed], own),
        (["train"], others, [512, *some], own),
        (["forward"], [first], some, peers),
        (["train"], [first], some, peers),
        (["train"], others, [*lengths, *mixed], own),
        (["forward", "train"], others, some[:1], peers),
        (["forward", "train"], [first], lengths, peers),
        (["forward", "train"], others, lengths, peers),
    ]
    seen = set()
    for steps, sizes, some_lengths, engines in tiers:
        for step, size, length, engine in itertools.product(steps, sizes, some_lengths, engines):
            row = Row(step, size, length, *engine)
            known = step in options.steps and (length == MIXED or length in lengths)
            # HF BigBird computes texts shorter than 1,024 tokens densely.
            absent = row.engine == "hf-bigbird" and length < 1024 or row.engine == "modernbert" and size == "gena"
            if known and row not in seen and not absent:
                seen.add(row)
                yield row


# Models


def bert(size: str, longest: int, device, dtype, layers: int | None = None):
    """BERT in `dtype`, its layouts still empty, without dropout, which block-sparse attention does not have."""
    make = partial(BsaBertConfig, **GENA) if size.startswith("gena") else BertConfig
    config = make(
        **SIZES[size] | ({"num_hidden_layers": layers} if layers else {}),
        max_position_embeddings=longest,
        sparse_attention={"block": BLOCK},
        **NO_DROPOUT,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModel.from_config(config, attn_implementation="block_sparse", add_pooling_layer=False).to(dtype)


def layout_for(size: str, length: int, pattern: str) -> torch.Tensor:
    """uint8 `[heads, n, n]`."""
    section = {"mode": pattern.partition("-")[0], "block": BLOCK, **PATTERNS[pattern]}
    config = sparsity_config(section, SIZES[size]["num_attention_heads"])
    return torch.from_numpy(config.make_layout(length, random.Random(0)))


def attend_by(model, engine: str, layout: torch.Tensor | None) -> None:
    """Makes a model attend by `sdpa`, or by `block_sparse` or `flex` under a layout; it holds no other one."""
    model.set_attn_implementation("flex_on_layout" if engine == "flex" else engine)
    if engine == "flex":
        model.config.block_mask = block_mask(layout.to(model.device))
    for module in model.modules():
        if isinstance(module, StoredLayout):
            held = layout if engine == "block_sparse" else module.master_layout[:, :1, :1].clone()
            module.master_layout = held.to(model.device)


def block_mask(layout: torch.Tensor) -> BlockMask:
    """FlexAttention's mask of a layout: tiles kept whole, and tiles where the layout is asked for each score."""
    times, n = FLEX_TILE // BLOCK, layout.shape[-1]
    n_tiles = -(-n // times)
    more = n_tiles * times - n
    kept = torch.nn.functional.pad(layout.bool(), (0, more, 0, more)).view(-1, n_tiles, times, n_tiles, times)
    whole, some = kept.all(4).all(2), kept.any(4).any(2)

    def lists(tiles):
        counts = tiles.sum(-1, dtype=torch.int32)
        columns = tiles.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
        return counts[None], columns[None]

    def asked(b, h, q, k):
        return layout[h, q // BLOCK, k // BLOCK] != 0

    length = n * BLOCK
    return BlockMask.from_kv_blocks(
        *lists(some & ~whole), *lists(whole), BLOCK_SIZE=FLEX_TILE, mask_mod=asked, seq_lengths=(length, length)
    )


_compiled = torch.compile(flex_attention, dynamic=False)
torch._dynamo.config.recompile_limit = 64  # one compilation a length and step; past the limit it would run uncompiled


def _flex_on_layout(module, query, key, value, attention_mask, scaling=None, **kwargs):
    context = _compiled(query, key, value, block_mask=module.config.block_mask, scale=scaling)
    return context.transpose(1, 2), None


AttentionInterface.register("flex_on_layout", _flex_on_layout)
AttentionMaskInterface.register("flex_on_layout", lambda **kwargs: None)


def peer(engine: str, size: str, length: int, device, dtype):
    """HF BigBird, HF Longformer or ModernBERT on SDPA, in the stock class."""
    torch.manual_seed(0)
    with torch.device(device):
        if engine == "hf-bigbird":
            config = transformers.BigBirdConfig(
                **SIZES[size], **NO_DROPOUT, max_position_embeddings=length, block_size=64, num_random_blocks=3
            )
            return transformers.BigBirdModel(config, add_pooling_layer=False).to(dtype)
        if engine == "modernbert":
            config = transformers.ModernBertConfig(**MODERNBERT[size], max_position_embeddings=length)
            return AutoModel.from_config(config, attn_implementation="sdpa").to(dtype)
        config = transformers.LongformerConfig(
            **SIZES[size], **NO_DROPOUT, max_position_embeddings=length + 2, attention_window=512
        )
        return transformers.LongformerModel(config, add_pooling_layer=False).to(dtype)


# Inputs


def ids(batch: int, length: int, device) -> dict:
    return {"input_ids": torch.randint(1000, 30000, (batch, length), device=device)}


def padded(lengths: list[int], device) -> dict:
    """A right-padded batch."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return ids(*mask.shape, device) | {"attention_mask": mask.long().to(device)}


def mixed_lengths(tokens: int) -> list[int]:
    """Lengths drawn from a log-uniform distribution, up to a number of tokens."""
    rng, lengths = random.Random(0), []
    while (rest := tokens - sum(lengths)) > 0:
        drawn = int(math.exp(rng.uniform(math.log(SHORTEST), math.log(min(LONGEST, tokens)))))
        lengths.append(min(drawn, rest))
    return lengths


# Running


class Bench:
    """One run: its model, and what was measured."""

    def __init__(self, options):
        self.options = options
        self.device = torch.device(options.device)
        self.dtype = getattr(torch, options.dtype)
        self.cuda = self.device.type == "cuda"
        self.start = time.monotonic()
        self.found: dict[Row, Figures] = {}
        self.wrong: set[tuple[str, str, str]] = set()
        self._model: tuple[str, torch.nn.Module] | None = None

    def say(self, text: str = "") -> None:
        print(text, flush=True)

    def machine(self) -> str:
        name = torch.cuda.get_device_name() if self.cuda else platform.processor() or platform.machine()
        try:
            import triton

            triton_version = triton.__version__
        except ImportError:
            triton_version = "absent"
        return (
            f"{name}; torch {torch.__version__}, triton {triton_version}, transformers {transformers.__version__}, "
            f"bsa_export {bsa_export.__version__}; {self.options.dtype}, {self.options.tokens} tokens a batch"
            f"{', compiled with CUDA graphs' if self.options.compile else ''}"
        )

    def model(self, size: str):
        """The BERT of that size, made once for all lengths as long as no other takes its place in memory."""
        if self._model is None or self._model[0] != size:
            self.free()
            longest = max([*self.options.lengths, LONGEST if self.options.mixed else 0])
            self._model = size, bert(size, longest, self.device, self.dtype)
        return self._model[1]

    def free(self) -> None:
        self._model = None
        self.sweep()

    def sweep(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def run(self, row: Row) -> None:
        """Times a row and prints it. Whatever goes wrong is the row's text."""
        if time.monotonic() - self.start > 60 * self.options.minutes:
            self.say(f"{row} not run: past {self.options.minutes:g} minutes")
            return
        if (row.size, row.pattern, row.engine) in self.wrong:
            self.say(f"{row} not timed: wrong")
            return
        try:
            figures = self.measure(row)
        except Exception as error:
            self.say(f"{row} did not run: {shown(error)}")
            self.free()
            return
        self.sweep()
        self.found[row] = figures
        ms = [1e3 * seconds for seconds in figures.seconds]
        density = "" if figures.density is None else f"{figures.density:.3f}"
        self.say(
            f"{row} {density:>5} {statistics.median(ms):9.2f} ms ({min(ms):.2f} to {max(ms):.2f})"
            f" {figures.rate:7.3f} Mtoken/s {figures.peak / 2**30:6.2f} GiB  {self.compared(row)}"
        )

    def measure(self, row: Row) -> Figures:
        tokens = self.options.tokens
        if row.length == MIXED:
            lengths = mixed_lengths(tokens)
            inputs, tokens = padded(lengths, self.device), sum(lengths)
            length = -(-max(lengths) // BLOCK) * BLOCK
        else:
            length = row.length
            inputs = ids(max(1, tokens // length), length, self.device)
            tokens = inputs["input_ids"].numel()
        layout = None
        if row.pattern == "own":
            self.free()
            model = peer(row.engine, row.size, length, self.device, self.dtype)
            if row.engine == "hf-longformer":
                inputs["global_attention_mask"] = torch.zeros_like(inputs["input_ids"]).index_fill(
                    1, torch.tensor([0], device=self.device), 1
                )
        else:
            layout = None if row.pattern == "dense" else layout_for(row.size, length, row.pattern)
            model = self.model(row.size)
            attend_by(model, row.engine, layout)
        if self.options.compile:
            torch.compiler.reset()
            model = torch.compile(model, mode="reduce-overhead")
        call = training_step(model, inputs) if row.step == "train" else forward(model, inputs)
        if self.timed(call) < 1:
            self.timed(call)
        if self.options.compile:  # compiled, recorded, from now on replayed
            self.timed(call)
            self.timed(call)
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        while len(seconds) < self.options.repeat and (len(seconds) < 2 or sum(seconds) < ROW_SECONDS):
            seconds.append(self.timed(call))
        peak = torch.cuda.max_memory_allocated() if self.cuda else 0
        return Figures(None if layout is None else layout.float().mean().item(), seconds, tokens, peak)

    def timed(self, call: Callable[[], None]) -> float:
        self.synchronize()
        begin = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - begin

    def compared(self, row: Row) -> str:
        """A row compared with SDPA's: its rate, its memory, and its rate as a part of SDPA's at 512 tokens."""
        told = []
        dense = self.found.get(Row(row.step, row.size, row.length, "dense", "sdpa"))
        short = self.found.get(Row(row.step, row.size, 512, "dense", "sdpa"))
        if dense and row.engine != "sdpa":
            told.append(f"{self.found[row].rate / dense.rate:.2f} x SDPA")
            if self.cuda:
                told.append(f"{self.found[row].peak / dense.peak:.2f} of its memory")
        base = self.found.get(Row(row.step, "base", row.length, row.pattern, row.engine))
        if base and row.size == "gena":
            told.append(f"{self.found[row].rate / base.rate:.2f} of base's rate")
        if short and row.engine != "sdpa":
            told.append(f"{self.found[row].rate / short.rate:.2f} of its rate at 512")
        return ", ".join(told)

    def goals(self) -> None:
        """What was asked, and what was found, for each pattern."""
        self.say("\ngoals")
        dense, bigbird = ("dense", "sdpa"), ("own", "hf-bigbird")
        for step, length, goal, other in (
            ("forward", 16384, 3.5, dense),
            ("forward", 16384, 10.0, bigbird),
            ("forward", 65536, 10.0, dense),
            ("train", 16384, 3.0, dense),
        ):
            self.goal(
                f"{step} at {length}: at least {goal:g} x {other[1]}",
                lambda row, at=length, of=step: row.length == at and row.step == of,
                lambda row, than=other: self.ratio(row, row.length, than),
                lambda ratio, least=goal: ratio >= least,
            )
        self.goal(
            "forward at every length: at least 0.9 of SDPA's rate at 512",
            lambda row: row.step == "forward" and row.length != MIXED,
            lambda row: self.ratio(row, 512, dense),
            lambda ratio: ratio >= 0.9,
        )
        if self.cuda:
            self.goal(
                "memory: at most SDPA's",
                lambda row: True,
                lambda row: self.ratio(row, row.length, dense, lambda figures: figures.peak),
                lambda ratio: ratio <= 1,
            )
        self.goal(
            "mixed lengths: real tokens at the rate of equal lengths of 4096",
            lambda row: row.length == MIXED,
            lambda row: self.ratio(row, 4096, (row.pattern, row.engine)),
            lambda ratio: ratio >= 0.9,
        )

    def goal(self, title: str, chosen, value, met) -> None:
        self.say(title)
        for row in self.found:
            if row.engine == "block_sparse" and chosen(row) and (ratio := value(row)) is not None:
                verdict = "yes" if met(ratio) else "NO"
                self.say(f"  {row.step:8} {row.size:6} {row.length!s:>6} {row.pattern:9} {ratio:6.2f}  {verdict}")

    def ratio(self, row: Row, length, than: tuple[str, str], figure=lambda figures: figures.rate) -> float | None:
        other = self.found.get(Row(row.step, row.size, length, *than))
        return figure(self.found[row]) / figure(other) if other else None

    def check(self, size: str, pattern: str) -> None:
        """Says whether two layers agree with the dense class under the same mask, forward and backward.

        Right is what errs at most twice as much as plain PyTorch in the same dtype, both against float64. What is
        wrong is not timed.
        """
        length = 1024
        lengths = [length, length, length // 3, length // 7 + 1]
        layout = layout_for(size, length, pattern)
        model = bert(size, length, self.device, self.dtype, layers=2).eval()
        attend_by(model, "block_sparse", layout)
        keep = layout.bool().repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)[None].to(self.device)

        def run(model, inputs, real, mask=None):
            model.zero_grad()
            out = model(**inputs if mask is None else inputs | {"attention_mask": mask}).last_hidden_state[real]
            weight = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            (out * weight.to(self.device, out.dtype)).sum().backward()
            return out.detach().double(), model.encoder.layer[0].attention.self.query.weight.grad.double()

        def dense(dtype, *arguments):
            other = AutoModel.from_config(
                copy.deepcopy(model.config), attn_implementation="sdpa", add_pooling_layer=False
            )
            other.load_state_dict(model.state_dict(), strict=False)
            return run(other.to(self.device, dtype).eval(), *arguments)

        for kind, inputs in (
            ("equal lengths", ids(2, length, self.device)),
            ("mixed lengths", padded(lengths, self.device)),
        ):
            real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
            mask = keep & real[:, None, None, :]
            exact, plain = (dense(dtype, inputs, real, mask) for dtype in (torch.float64, self.dtype))
            engines = {"block_sparse": model}
            if "flex" in self.options.peers and kind == "equal lengths":
                engines["flex"] = copy.deepcopy(model)
                attend_by(engines["flex"], "flex", layout)
            for engine, each in engines.items():
                try:
                    found = run(each, inputs, real)
                except Exception as error:
                    self.say(f"not compared: {size} {pattern} {engine}: {shown(error)}")
                    continue
                errors = [
                    [((a - b).norm() / b.norm()).item() for a, b in zip(some, exact, strict=True)]
                    for some in (found, plain)
                ]
                right = all(ours <= 2 * theirs for ours, theirs in zip(*errors, strict=True))
                if not right:
                    self.wrong.add((size, pattern, engine))
                told = ", ".join(f"{ours:.1e} ({theirs:.1e})" for ours, theirs in zip(*errors, strict=True))
                self.say(f"{'right' if right else 'WRONG'}: {size} {pattern} {engine}, {kind}: {told}")


def shown(error: Exception) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:150]}"


def forward(model, inputs) -> Callable[[], None]:
    model.eval()

    def call():
        with torch.no_grad():
            model(**inputs)

    return call


def training_step(model, inputs) -> Callable[[], None]:
    """Forward, backward and an AdamW step, which leaves the weights as they are: all rows have the same."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    # A gradient of the outputs that neither vanishes nor overflows in fp16.
    weight = torch.randn(model.config.hidden_size, device=model.device) / inputs["input_ids"].numel() ** 0.5

    def call():
        (model(**inputs).last_hidden_state * weight.to(model.dtype)).sum(dtype=torch.float32).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return call


def main(argv=None) -> int:
    bench = Bench(parse(argv))
    options = bench.options
    bench.say(bench.machine())
    bench.say("errors against float64: output, gradient of the first query weights (plain PyTorch's)")
    for size, pattern in itertools.product(options.sizes, options.patterns):
        bench.check(size, pattern)
        bench.sweep()
    if options.mixed:
        lengths = mixed_lengths(options.tokens)
        share = sum(lengths) / (len(lengths) * max(lengths))
        bench.say(
            f"mixed lengths: {len(lengths)} texts of {min(lengths)} to {max(lengths)} tokens, {sum(lengths)} in all, "
            f"{share:.0%} of the padded batch"
        )
    bench.say()
    try:
        for row in rows(options):
            bench.run(row)
    finally:
        bench.goals()
        if options.json:
            content = {
                "machine": bench.machine(),
                "rows": [asdict(row) | asdict(figures) for row, figures in bench.found.items()],
            }
            with open(options.json, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=1)
    bench.say(f"\n{(time.monotonic() - bench.start) / 60:.1f} minutes")
    return 1 if any(engine == "block_sparse" for *_, engine in bench.wrong) else 0


if __name__ == "__main__":
    sys.exit(main())
