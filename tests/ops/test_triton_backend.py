"""What the fused kernel promises beside right numbers: an operator for torch.compile, CUDA graphs, the same bits twice, no waiting."""

from __future__ import annotations

import pytest
import torch

from bsa_export.ops import backends, block_sparse_attention, triton_backend
from bsa_export.ops.dispatch import block_sparse_attention_varlen
from bsa_export.sparsity import MODES

pytestmark = pytest.mark.skipif(backends()["triton"] is not None, reason=f"triton: {backends()['triton']}")
on_gpu = pytest.mark.gpu


def layout_of(mode: str, seq: int, heads: int = 2, block: int = 16, device: str = "cpu") -> torch.Tensor:
    return torch.from_numpy(MODES[mode](heads, block=block).make_layout(seq)).to(device)


def tensors(shape, device="cpu", dtype=torch.float32, seed=0, grad=True) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3)]
    return [x.requires_grad_(grad) for x in made]


def attend(*inputs, layout, block=16, **options):
    return block_sparse_attention(*inputs, layout, block, backend="triton", **options)


class TestOperator:
    """Through Triton's interpreter too: what torch.compile sees is the same."""

    @pytest.mark.parametrize("biased", [False, True])
    def test_passes_the_checks_of_torch_library(self, biased):
        inputs = tensors((1, 2, 40, 16))
        bias = torch.zeros(1, 40) if biased else None
        arguments = (*inputs, layout_of("fixed", 64)[:, :3, :3], bias, None, 40, 16, 0.25)
        checks = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(torch.ops.bsa_export.block_sparse_attention.default, arguments, test_utils=checks)

    @pytest.mark.parametrize("head_dim", [16, 20])
    def test_the_fake_has_the_strides_of_the_result(self, head_dim):
        """In BERT's order, packed, and where rows have to be padded to 16 bytes."""
        for x in (
            torch.randn(2, 32, 2, head_dim).transpose(1, 2),
            torch.randn(2, 32, 3, 2, head_dim)[:, :, 0].transpose(1, 2),
        ):
            real = triton_backend._forward(
                *[triton_backend._aligned(x)] * 3, layout_of("fixed", 32), None, None, 32, 16, 0.25
            )
            with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
                fake = triton_backend._empty_outputs(
                    triton_backend._aligned(torch.empty_strided(x.shape, x.stride())), None
                )
            for a, b in zip(real, fake, strict=True):
                assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)

    def test_compiles_without_a_break(self):
        layout = layout_of("bigbird", 64)

        def step(query, key, value, mask):
            return attend(query, key, value, layout=layout, key_padding_mask=mask) * 2

        inputs = tensors((2, 2, 64, 16))
        mask = torch.ones(2, 64, dtype=torch.bool)
        mask[1, 50:] = False
        grad = torch.randn(2, 2, 64, 16)
        expected = step(*inputs, mask)
        gradients = torch.autograd.grad(expected, inputs, grad)
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs, mask)
        torch.testing.assert_close(compiled, expected)
        for a, b in zip(torch.autograd.grad(compiled, inputs, grad), gradients, strict=True):
            torch.testing.assert_close(a, b)


class TestTexts:
    """Texts one after another, without padding."""

    lengths = (5, 64, 33, 1, 80)

    @pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
    @pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
    @pytest.mark.parametrize(("mode", "block"), [("bigbird", 16), ("fixed", 32), ("variable", 16)])
    def test_each_gets_what_it_gets_alone(self, backend, mode, block, device):
        layout = layout_of(mode, 96, block=block, device=device)
        inputs = tensors((1, 2, sum(self.lengths), 16), device)
        bounds = torch.tensor([0, *torch.tensor(self.lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
        out = block_sparse_attention_varlen(*inputs, layout, block, bounds, max(self.lengths), backend=backend)
        grad = torch.randn_like(out)
        gradients = torch.autograd.grad(out, inputs, grad)
        for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            alone = [x[:, :, begin:end].detach().double().requires_grad_() for x in inputs]
            expected = block_sparse_attention(*alone, layout, block, backend="reference")
            torch.testing.assert_close(out[:, :, begin:end].double(), expected, atol=2e-5, rtol=0)
            wanted = torch.autograd.grad(expected, alone, grad[:, :, begin:end].double())
            for a, b in zip(gradients, wanted, strict=True):
                torch.testing.assert_close(a[:, :, begin:end].double(), b, atol=2e-5, rtol=0)


@on_gpu
class TestOnAGpu:
    shape = (2, 12, 1000, 64)

    def inputs(self, dtype=torch.float16, **options):
        return tensors(self.shape, "cuda", dtype, **options), layout_of("bigbird", 1024, 12, 64, "cuda")

    def step(self, inputs, layout, grad, **options):
        out = attend(*inputs, layout=layout, block=64, **options)
        return out, *torch.autograd.grad(out, inputs, grad)

    def test_gives_the_same_bits_twice(self):
        inputs, layout = self.inputs()
        grad = torch.randn(self.shape, device="cuda", dtype=torch.float16)
        first = self.step(inputs, layout, grad)
        for _ in range(20):
            assert all(torch.equal(a, b) for a, b in zip(first, self.step(inputs, layout, grad), strict=True))

    @pytest.mark.parametrize("padded", [False, True])
    def test_never_waits_for_the_gpu_after_the_first_call(self, padded):
        inputs, layout = self.inputs()
        grad = torch.randn(self.shape, device="cuda", dtype=torch.float16)
        options = {"key_padding_mask": torch.rand(2, 1000, device="cuda") < 0.9} if padded else {}
        self.step(inputs, layout, grad, **options)
        torch.cuda.set_sync_debug_mode("error")
        try:
            self.step(inputs, layout, grad, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_runs_in_a_cuda_graph(self):
        inputs, layout = self.inputs()
        grad = torch.randn(self.shape, device="cuda", dtype=torch.float16)
        expected = self.step(inputs, layout, grad)
        inputs = [x.detach().requires_grad_() for x in inputs]  # whose gradients no other stream has met
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            self.step(inputs, layout, grad)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = self.step(inputs, layout, grad)
        for x in captured:
            x.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))

    def test_compiles_with_inductor_forward_and_backward(self):
        inputs, layout = self.inputs()
        grad = torch.randn(self.shape, device="cuda", dtype=torch.float16)

        def step(*inputs):
            return attend(*inputs, layout=layout, block=64).relu()

        expected = step(*inputs)
        compiled = torch.compile(step, fullgraph=True)(*inputs)
        assert torch.equal(compiled, expected)
        pairs = zip(*(torch.autograd.grad(out, inputs, grad) for out in (compiled, expected)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)

    def test_addresses_more_than_two_billion_elements(self):
        shape = (44, 12, 65536, 64)
        layout = layout_of("local", 65536, 12, 64, "cuda")
        big = [torch.randn(1, device="cuda", dtype=torch.float16).expand(shape).clone() for _ in range(3)]
        for x in big:
            x[-1].normal_()
        last = attend(*(x[-1:].clone() for x in big), layout=layout, block=64)
        assert torch.equal(attend(*big, layout=layout, block=64)[-1:], last)
        del big, last
        torch.cuda.empty_cache()

    def test_the_first_call_of_a_shape_takes_less_than_ten_seconds(self, tmp_path, monkeypatch):
        """Kernels compiled from nothing included: forward and backward, in a process of its own."""
        import os
        import subprocess
        import sys
        from pathlib import Path

        code = """
        import time, torch
        from bsa_export.ops import block_sparse_attention
        x = torch.randn(1, 12, 4096, 80, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        layout = torch.ones(12, 128, 128, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        started = time.perf_counter()
        block_sparse_attention(x, x, x, layout, 32, backend="triton").sum().backward()
        torch.cuda.synchronize()
        print(time.perf_counter() - started)
        """
        root = str(Path(__file__).parents[2])
        env = os.environ | {
            "TRITON_CACHE_DIR": str(tmp_path),
            "PYTHONPATH": root + os.pathsep + os.environ.get("PYTHONPATH", ""),
        }
        code = "\n".join(line.strip() for line in code.splitlines())
        ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert float(ran.stdout) < 10
