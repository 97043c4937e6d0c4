"""Runs the fused kernels once over what they branch on, so that compute-sanitizer can watch: see test_sanitizer.py."""

import torch
from attention_cases import Case, make_inputs

from bsa_export.ops import block_sparse_attention, block_sparse_attention_varlen

CASES = [
    Case(pattern="random", short=5),
    Case(pattern="fixed", blocks=40, batch=1, padding="bool"),
    Case(pattern="windowed", strides="surrounded", short=7, padding="finite"),
    Case(block=32, blocks=6, dtype="bf16", head_dim=80, strides="packed"),
    Case(block=64, blocks=5, short=37),
    Case(block=64, blocks=36, pattern="bigbird", batch=1),
    Case(block=128, blocks=3, short=65, head_dim=128, padding="whole"),
    Case(block=32, blocks=20, short=9, pattern="random", padding="both"),
    Case(block=64, blocks=8, short=37, pattern="all", padding="left"),
    Case(dtype="fp32", blocks=5, short=3),
    Case(pattern="random", window=(20, 3), short=5, padding="bool"),
    Case(pattern="all", window=(64, 64), block=64, blocks=8, short=37),
    Case(pattern="bigbird", window=(64, -1), block=64, blocks=36, batch=1),
]
TEXTS_BLOCKS = (16, 64)


def run(case: Case) -> None:
    inputs = make_inputs(case, 0, "cuda")
    grad = inputs.pop("grad_output")
    leaves = {name: inputs[name].detach().requires_grad_() for name in ("query", "key", "value")}
    output = block_sparse_attention(**inputs | leaves, backend="triton")
    torch.autograd.grad(output, list(leaves.values()), grad)


def run_texts(block: int, window: tuple[int, int] | None) -> None:
    generator = torch.Generator().manual_seed(0)
    layout = (torch.rand(2, 10, 10, generator=generator) < 0.4).to(torch.uint8)
    layout[:, 0] = layout[:, :, 0] = 1
    lengths = [1, block - 1, block, 3 * block + 5, 10 * block]
    offsets = torch.tensor([0, *lengths]).cumsum(0).to("cuda", torch.int32)
    shape = (3, 1, 2, sum(lengths) + 9, 64)  # tokens of no text behind the last
    inputs = torch.randn(shape, generator=generator).to("cuda", torch.float16).requires_grad_()
    output = block_sparse_attention_varlen(*inputs, layout.cuda(), block, offsets, max(lengths), window=window)
    output.sum().backward()


def main() -> None:
    for case in CASES:
        run(case)
    for block in TEXTS_BLOCKS:
        for window in (None, (block, block)):
            run_texts(block, window)
    torch.cuda.synchronize()
    print(f"ran {len(CASES) + 2 * len(TEXTS_BLOCKS)} cases")


if __name__ == "__main__":
    main()
