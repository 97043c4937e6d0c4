"""Times every launch shape of the fused kernels on a GPU, to choose the tables in bsa_export/ops/triton_backend.py.

    python tests/benchmarks/tune_attention.py [--kernel forward|query|key ...] [--block 16 64 128] [--head-dim 64]

Prints, per kernel, block and launch, milliseconds and TFLOP/s on kept blocks for each pattern, and the best launch by
the geometric mean over patterns. `--compile-only I/N` compiles every N-th candidate, so that N processes can fill the
cache.
"""

import argparse
import itertools
import math

import torch
import triton

from bsa_export.ops import triton_backend as backend
from bsa_export.ops.triton_backend import Launch
from bsa_export.sparsity.configs import MODES

SHAPES = {
    "forward": [
        Launch(64, 4, 2),
        Launch(64, 4, 2, 96),
        Launch(64, 4, 2, 128),
        Launch(64, 4, 3, 96),
        Launch(64, 4, 3),
        Launch(128, 8, 2),
        Launch(128, 8, 2, 128),
    ],
    "query": [
        Launch(64, 4, 2),
        Launch(64, 4, 2, 128),
        Launch(64, 4, 3, 128),
        Launch(64, 4, 2, 168),
        Launch(64, 4, 3, 168),
        Launch(128, 8, 2),
    ],
    "key": [
        Launch(64, 4, 2),
        Launch(64, 4, 2, 168),
        Launch(64, 4, 3, 168),
        Launch(64, 4, 3, 200),
        Launch(64, 8, 3, 128),
        Launch(128, 8, 2),
    ],
}
PATTERNS = [("windowed", 4096), ("fixed", 4096), ("bigbird", 4096), ("bigbird", 16384)]
FLOPS = {"forward": 4, "query": 6, "key": 8}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--block", nargs="+", type=int, default=[64, 16, 128])
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=65536, help="tokens in the batch")
    parser.add_argument("--compile-only", metavar="I/N")
    return parser.parse_args()


def pattern(mode: str, block: int, seq: int, heads: int) -> torch.Tensor:
    """The layout of a mode, windowed with windows of 512 tokens."""
    wide = {"num_local_blocks": 512 // block, "num_sliding_window_blocks": 512 // block + 1}
    config = MODES[mode](heads, block=block, **(wide if mode == "windowed" else {}))
    return torch.from_numpy(config.make_layout(seq))


def runner(kernel: str, block: int, layout, batch: int, heads: int, seq: int, head_dim: int):
    """A function of no arguments that runs one kernel once."""
    q, k, v, g = (
        torch.randn(batch, seq, heads, head_dim, device="cuda", dtype=torch.float16).transpose(1, 2) for _ in range(4)
    )
    scale = head_dim**-0.5
    if kernel == "forward":
        return lambda: backend._forward(q, k, v, layout, None, None, seq, block, scale)
    out, lse = backend._forward(q, k, v, layout, None, None, seq, block, scale)
    delta = (out.float() * g.float()).sum(-1).contiguous()
    call = backend._Call(kernel, q, layout, None, None, seq, block, None, "")
    read_mask = backend._read_mask(None, lse)
    if kernel == "query":
        d_q = torch.empty_like(q)
        return lambda: backend._query_gradient(call, q, k, v, out, g, read_mask, lse, delta, scale, d_q)
    d_k, d_v = torch.empty_like(k), torch.empty_like(v)
    return lambda: backend._key_gradient(call, q, k, v, g, read_mask, lse, delta, scale, d_k, d_v)


def main():
    args = arguments()
    chosen = {}
    table = backend.launch
    backend.launch = lambda kernel, *rest: chosen.get(kernel) or table(kernel, *rest)
    candidates = [
        (kernel, block, shape)
        for kernel, block in itertools.product(args.kernel, args.block)
        for shape in SHAPES[kernel]
        if (shape.size // min(block, shape.size)) <= 4
    ]
    if args.compile_only:
        index, of = map(int, args.compile_only.split("/"))
        for kernel, block, shape in candidates[index::of]:
            chosen.clear()
            layout = pattern("windowed", block, 1024, args.heads)
            run = runner(kernel, block, layout, 1, args.heads, 1024, args.head_dim)
            chosen[kernel] = shape
            try:
                run()
                torch.cuda.synchronize()
            except Exception as error:
                print(kernel, block, shape, type(error).__name__, str(error)[:80])
        return
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)
    for kernel, block in itertools.product(args.kernel, args.block):
        means = {}
        for shape in (s for k, b, s in candidates if (k, b) == (kernel, block)):
            row = []
            for mode, seq in PATTERNS:
                layout = pattern(mode, block, seq, args.heads)
                chosen.clear()
                run = runner(kernel, block, layout, args.tokens // seq, args.heads, seq, args.head_dim)
                chosen[kernel] = shape
                try:
                    milliseconds = triton.testing.do_bench(run, warmup=10, rep=40, return_mode="median")
                except Exception as error:
                    row = [type(error).__name__]
                    break
                work = FLOPS[kernel] * args.heads * args.tokens * seq * args.head_dim * layout.float().mean().item()
                row.append((milliseconds, work / milliseconds / 1e9))
            text = "  ".join(r if isinstance(r, str) else f"{r[0]:6.3f} {r[1]:4.0f}" for r in row)
            print(f"{kernel:8s} {block:4d} {str(shape)[6:]:56s} {text}", flush=True)
            if len(row) == len(PATTERNS):
                means[shape] = math.exp(sum(math.log(r[1]) for r in row) / len(row))
        for shape, mean in sorted(means.items(), key=lambda item: -item[1])[:3]:
            print(f"best {kernel} {block}: {shape} {mean:.0f} TFLOP/s", flush=True)


if __name__ == "__main__":
    main()
