"""Attention of BERT-base on a CPU, fp32: the backend `torch` on 16,384 tokens, dense SDPA on 4,096, and whole models.

    python tests/benchmarks/attention_cpu.py [--rounds 5] [--threads 2] [--no-models]

Not a test: for an idle machine. A layer's attention is timed in turn, each way once a round; a figure is the median of
    the rounds
with their range, a ratio the median of the rounds' ratios. Every result is judged by float64 first, on its last rows:
if one is wrong, nothing is reported. Peak memory is the largest resident set of a process that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bsa_export.ops import block_sparse_attention
from bsa_export.sparsity.configs import BigBirdSparsityConfig, SparsityConfig, windowed_for

HEADS, HEAD_DIM = 12, 64
DENSE_LENGTH, LONG = 4096, 16384
GOALS = {"GiB": 2.0, "ratio": 1.0}
CHECKED_ROWS = 64

CONFIGS = {
    "windowed 512, block 64 (the default)": windowed_for(512, HEADS),
    "bigbird 3 + 3 + 2, block 64": BigBirdSparsityConfig(HEADS, 64, num_random_blocks=3, num_global_blocks=2),
}


def inputs(seq: int) -> list[Tensor]:
    """Query, key and value as BERT's projections leave them: views of `[batch, seq, heads, head_dim]`."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, seq, HEADS, HEAD_DIM, generator=generator).transpose(1, 2) for _ in range(3)]


def sparse(config: SparsityConfig, seq: int) -> tuple[Callable[[], Tensor], float]:
    """A call of the backend, and the layout's density."""
    layout = torch.from_numpy(config.make_layout(seq))
    call = partial(block_sparse_attention, *inputs(seq), layout, config.block, backend="torch")
    return call, layout.float().mean().item()


def check(config: SparsityConfig, seq: int) -> None:
    """Exits unless the last rows are right."""
    call, _ = sparse(config, seq)
    query, key, value = (x.double() for x in inputs(seq))
    rows = torch.from_numpy(config.make_layout(seq))[:, -1:].bool().repeat_interleave(config.block, 2)
    exact = scaled_dot_product_attention(
        query[:, :, -CHECKED_ROWS:], key, value, attn_mask=rows[:, :, None].flatten(1, 2)
    )
    error = (call()[:, :, -CHECKED_ROWS:].double() - exact).abs().max().item()
    if not error < 1e-5:
        sys.exit(f"{config.mode} at {seq} tokens is off by {error:.1e}: nothing is reported")


def timed(call: Callable) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def figure(values: list[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


LAYER = """
import sys
sys.path.insert(0, {folder!r})
import attention_cpu as benchmark
call, _ = benchmark.sparse(benchmark.CONFIGS[{name!r}], {seq})
"""
MODEL = """
from transformers import BertConfig, BertModel
import bsa_export
section = {{"mode": "windowed", "block": 64, "num_local_blocks": 8, "num_sliding_window_blocks": 9}}
config = BertConfig(max_position_embeddings={seq}, sparse_attention=section, attn_implementation={attention!r})
model = BertModel(config, add_pooling_layer=False).eval()
if {attention!r} == "block_sparse":
    import torch
    from bsa_export.sparsity.configs import windowed_for
    layout = torch.from_numpy(windowed_for(512, 12).make_layout({seq}))
    for layer in model.encoder.layer:
        layer.attention.self.sparse_self_attention.master_layout = layout
call = lambda: model(torch.ones(1, {seq}, dtype=torch.long))
"""
CHILD = """
import json, re, time, torch
torch.set_num_threads({threads})
with torch.no_grad():
{body}
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
# VmHWM, since ru_maxrss is at least what the process had that started this one.
kib = int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
print(json.dumps([seconds, kib / 2**20]))
"""


def in_a_process(body: str, threads: int, **values) -> tuple[float, float]:
    """Seconds of one call, the first, and the peak memory of its process in GiB."""
    body = "\n".join(f"    {line}" for line in body.format(**values).splitlines())
    code = CHILD.format(threads=threads, body=body)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return tuple(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-models", action="store_true", help="leave the whole models out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = f"{platform.processor() or platform.machine()}, {options.threads} threads, torch {torch.__version__}"
    print(f"{machine}; one sequence, {HEADS} heads x {HEAD_DIM}, fp32, forward; {options.rounds} rounds\n", flush=True)

    with torch.no_grad():
        calls = {f"dense SDPA, {DENSE_LENGTH:,} tokens": partial(scaled_dot_product_attention, *inputs(DENSE_LENGTH))}
        for name, config in CONFIGS.items():
            for seq in (DENSE_LENGTH, LONG):
                check(config, seq)
                call, density = sparse(config, seq)
                calls[f"{name}, {seq:,} tokens, density {density:.3f}"] = call
        results: dict[str, list[float]] = {name: [] for name in calls}
        for call in calls.values():
            call()
        for _ in range(options.rounds):
            for name, call in calls.items():
                results[name].append(timed(call))
    dense = next(iter(results.values()))
    print("| a layer's attention | seconds: median (range) | x dense SDPA |\n|---|---|---|")
    for name, seconds in results.items():
        print(f"| {name} | {figure(seconds)} | {figure([s / d for s, d in zip(seconds, dense, strict=True)])} |")

    print("\n| a process | seconds | peak GiB |\n|---|---|---|")
    for name in CONFIGS:
        folder = __file__.rpartition("/")[0]
        seconds, gib = in_a_process(LAYER, options.threads, folder=folder, name=name, seq=LONG)
        print(f"| a layer's attention, {name}, {LONG:,} tokens | {seconds:.2f} | {gib:.2f} |", flush=True)
    if not options.no_models:
        for attention, seq in (("sdpa", DENSE_LENGTH), ("block_sparse", DENSE_LENGTH), ("block_sparse", LONG)):
            seconds, gib = in_a_process(MODEL, options.threads, attention=attention, seq=seq)
            print(f"| BERT-base, {attention}, {seq:,} tokens | {seconds:.1f} | {gib:.2f} |", flush=True)
    print(
        f"\ngoals: {LONG:,} tokens in at most {GOALS['GiB']} GiB, and in less time than dense SDPA takes for "
        f"{DENSE_LENGTH:,}"
    )


if __name__ == "__main__":
    main()
