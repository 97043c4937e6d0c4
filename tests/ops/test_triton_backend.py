"""What the fused kernel promises besides right numbers: torch.compile, CUDA graphs, the same bits twice, no waiting."""

from __future__ import annotations

import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from attention_cases import Case, make_inputs

from bsa_export.errors import AttentionError
from bsa_export.ops import backends, block_sparse_attention, launch, schedule, triton_backend
from bsa_export.ops.dispatch import block_sparse_attention_varlen
from bsa_export.ops.schedule import ScheduleCache
from bsa_export.sparsity.configs import MODES
from bsa_export.verify.tolerance import errors, judge, results

pytestmark = pytest.mark.skipif(backends()["triton"] is not None, reason=f"triton: {backends()['triton']}")
on_gpu = pytest.mark.gpu
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler for inductor"
)

NAMES = ("query", "key", "value", "grad_output")


@pytest.fixture
def nan_in_empty_memory():
    """`torch.empty` gives NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def reads(monkeypatch) -> list:
    """Grows when a layout is read back from its device."""
    done = []
    inside = schedule.sha256
    monkeypatch.setattr(schedule, "sha256", lambda data: done.append(1) or inside(data))
    monkeypatch.setattr(triton_backend, "_schedules", ScheduleCache())
    return done


def layout_of(mode: str, seq: int, heads: int = 2, block: int = 16, device: str = "cpu", **parameters) -> torch.Tensor:
    return torch.from_numpy(MODES[mode](heads, block=block, **parameters).make_layout(seq)).to(device)


def tensors(shape, device="cpu", dtype=torch.float32, seed=0, grad=True) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3)]
    return [x.requires_grad_(grad) for x in made]


def attend(*inputs, layout, block=16, **options):
    return block_sparse_attention(*inputs, layout, block, backend="triton", **options)


class TestOperator:
    """Through Triton's interpreter too: what torch.compile sees is the same."""

    @pytest.mark.parametrize(("biased", "window"), [(False, None), (True, None), (False, (20, 3))])
    def test_passes_the_checks_of_torch_library(self, biased, window):
        inputs = tensors((1, 2, 40, 16))
        bias = torch.zeros(1, 40) if biased else None
        arguments = (*inputs, layout_of("fixed", 64)[:, :3, :3], bias, None, 40, 16, 0.25, window, "here")
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

    @needs_compiler
    def test_layouts_that_a_compiled_function_computes_do_not_mix(self):
        """inductor puts the second into the memory of the first."""

        def step(query, key, value, first, second):
            out = attend(query, key, value, layout=(first > 0).to(torch.uint8), block=64)
            layout = (second + out.sum() * 0 > 0).to(torch.uint8)
            return out, attend(query, key, value, layout=layout, block=64)

        inputs = tensors((1, 1, 256, 16), grad=False)
        layouts = torch.ones(1, 4, 4), torch.eye(4)[None]
        for actual, expected in zip(
            torch.compile(step, fullgraph=True)(*inputs, *layouts), step(*inputs, *layouts), strict=True
        ):
            torch.testing.assert_close(actual, expected)

    @needs_compiler
    def test_a_compiled_function_reads_a_layout_once_for_each_length(self, reads):
        """Forward and back, the layout sliced."""
        layout = torch.ones(1, 8, 8, dtype=torch.uint8)
        compiled = torch.compile(lambda *inputs: attend(*inputs, layout=layout, block=64), fullgraph=True)
        inputs = tensors((1, 1, 100, 16))
        for _ in range(3):
            torch.autograd.grad(compiled(*inputs).sum(), inputs)
            assert len(reads) == 2, "as it is, and transposed"


@pytest.mark.slow
class TestCalls:
    """What a call may ask for, and where it runs."""

    # In float32 at -3.0 the gradient of `value` exceeds the bound: docs/kernel-notes.md, "Known limits".
    @pytest.mark.parametrize(
        ("dtype", "scale"),
        [(torch.float16, -3.0), (torch.float16, 0.0), (torch.float32, -0.3), (torch.float32, 0.0)],
    )
    @pytest.mark.parametrize("pattern", ["all", "windowed"])
    def test_a_scale_that_is_not_positive(self, dtype, scale, pattern):
        inputs = make_inputs(Case(pattern=pattern, heads=1, batch=1, blocks=6, short=5), 0, "cpu")
        inputs = {name: x.to(dtype) if name in NAMES else x for name, x in inputs.items()} | {"scale": scale}
        found = judge(partial(block_sparse_attention, backend="triton"), inputs)
        assert all(e.passed for e in found.values()), found

    @pytest.mark.parametrize("backend", ["triton", "torch"])
    def test_second_derivatives_are_refused(self, backend):
        inputs = tensors((1, 1, 32, 16))
        out = block_sparse_attention(*inputs, torch.ones(1, 2, 2, dtype=torch.uint8), 16, backend=backend)
        (gradient,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
        with pytest.raises(AttentionError, match="differentiable once"):
            torch.autograd.grad(out.sum() + gradient.square().sum(), inputs[0])

    def test_heads_that_lie_far_apart(self):
        """More than 2^31 elements from the first; the memory between is never touched."""
        step = 2**30 + 64
        try:
            room = torch.empty(2 * step + 48 * 16, dtype=torch.float16)
        except RuntimeError:
            pytest.skip("no 4 GiB of address space")
        x = room.as_strided((1, 3, 48, 16), (3 * step, step, 16, 1))
        x.copy_(torch.randn(1, 3, 48, 16, generator=torch.Generator().manual_seed(0)))
        layout = torch.ones(1, 3, 3, dtype=torch.uint8)
        near = x.contiguous()
        out, lse = triton_backend._forward(near, x, x, layout, None, None, 48, 16, 0.25)
        expected, _ = triton_backend._forward(near, near, near, layout, None, None, 48, 16, 0.25)
        assert torch.equal(out, expected)
        del room, x

    def test_a_gpu_that_is_too_old_is_refused(self, monkeypatch):
        monkeypatch.setattr(triton_backend, "_capability", lambda index: (7, 5) if index == 1 else (9, 0))
        said = [
            triton_backend.refuses(
                SimpleNamespace(dtype=torch.float16, shape=(1, 1, 64, 64), device=torch.device("cuda", index)),
                *[None] * 3, 64, scale=1.0,
            )
            for index in (0, 1)
        ]  # fmt: skip
        assert said == [None, "the fused kernel needs compute capability 8.0, this GPU has 7.5"]

    def test_kernels_are_launched_on_the_device_of_the_query(self, monkeypatch):
        seen = []
        inside = torch.cuda.device_of
        monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: seen.append(tensor.shape) or inside(tensor))
        inputs = tensors((1, 1, 32, 16))
        out = attend(*inputs, layout=torch.ones(1, 2, 2, dtype=torch.uint8))
        torch.autograd.grad(out.sum(), inputs)
        assert seen == [(1, 1, 32, 16)] * 2

    @pytest.mark.parametrize("padding", ["none", "bool"])
    @pytest.mark.parametrize("block", [16, 64])
    def test_rows_that_are_shared_out(self, block, padding, monkeypatch):
        """Every row of five steps and more is, so that the parts' results have to be put together."""
        monkeypatch.setattr(schedule, "MIN_STEPS_TO_SPLIT", 2)
        monkeypatch.setattr(schedule, "SPLIT_ABOVE_MEAN", 0)
        monkeypatch.setattr(triton_backend, "_schedules", ScheduleCache())
        case = Case(
            pattern="all", block=block, blocks=320 // block, heads=1, batch=2, head_dim=16, alike=True, padding=padding
        )
        found = judge(partial(block_sparse_attention, backend="triton"), make_inputs(case, 0, "cpu"))
        assert all(e.passed for e in found.values()), found

    @pytest.mark.parametrize("dtype", ["fp16", "fp32"])
    @pytest.mark.parametrize("block", [16, 128])
    def test_tiles_of_gpus_that_multiply_from_registers(self, block, dtype, monkeypatch):
        monkeypatch.setattr(triton_backend, "_multiplies_from_shared", lambda _: False)
        sizes, start = set(), triton_backend.start

        def recorded(kernel, programs, *options, **arguments):
            sizes.add(arguments.get("SIZE"))
            start(kernel, programs, *options, **arguments)

        monkeypatch.setattr(triton_backend, "start", recorded)
        case = Case(
            pattern="random", block=block, blocks=256 // block, head_dim=16, short=3, padding="bool", dtype=dtype
        )
        found = judge(partial(block_sparse_attention, backend="triton"), make_inputs(case, 0, "cpu"))
        assert all(e.passed for e in found.values()), found
        assert sizes - {None} == {16 if dtype == "fp32" else 32}


@pytest.mark.slow
class TestTexts:
    """Texts one after another, without padding."""

    lengths = (5, 64, 33, 1, 80)

    def bounds(self, device="cpu", lengths=None):
        return torch.tensor([0, *(lengths or self.lengths)], device=device).cumsum(0).to(torch.int32)

    def check(self, inputs, layout, block, bounds, longest, backend="triton", atol=2e-5):
        out = block_sparse_attention_varlen(*inputs, layout, block, bounds, longest, backend=backend)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        gradients = torch.autograd.grad(out, inputs, grad)
        for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            alone = [x[:, :, begin:end].detach().double().requires_grad_() for x in inputs]
            expected = block_sparse_attention(*alone, layout, block, backend="reference")
            torch.testing.assert_close(out[:, :, begin:end].double(), expected, atol=atol, rtol=0)
            wanted = torch.autograd.grad(expected, alone, grad[:, :, begin:end].double())
            for a, b in zip(gradients, wanted, strict=True):
                torch.testing.assert_close(a[:, :, begin:end].double(), b, atol=atol, rtol=0)

    @pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
    @pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
    @pytest.mark.parametrize(("mode", "block"), [("bigbird", 16), ("fixed", 32), ("variable", 16)])
    def test_each_gets_what_it_gets_alone(self, backend, mode, block, device):
        layout = layout_of(mode, 96, block=block, device=device)
        inputs = tensors((1, 2, sum(self.lengths), 16), device)
        self.check(inputs, layout, block, self.bounds(device), max(self.lengths), backend)

    @pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
    @pytest.mark.parametrize(
        ("pattern", "transposed", "dtype"),
        [
            ("bigbird", False, "float16"),
            ("bigbird", True, "float16"),
            ("bslongformer", False, "float16"),
            ("bslongformer", True, "float16"),
            ("bslongformer", False, "float32"),
        ],
    )
    def test_a_short_text_whose_first_steps_lie_beyond_it(self, pattern, transposed, dtype, device):
        """Whole columns, or rows, in the middle of the layout come first in a tile of several blocks."""
        parameters = {
            "bigbird": {"num_random_blocks": 6, "different_layout_per_head": True},
            "bslongformer": {"global_block_indices": [8], "global_block_end_indices": [12]},
        }[pattern]
        layout = layout_of(pattern, 208, block=16, device=device, num_sliding_window_blocks=3, **parameters)
        if transposed:
            layout = layout.transpose(1, 2).contiguous()
        lengths = (100, 17, 208)
        inputs = tensors((1, 2, sum(lengths), 16), device, getattr(torch, dtype))
        self.check(inputs, layout, 16, self.bounds(device, lengths), 208, atol=2e-5 if dtype == "float32" else 1e-2)

    def test_shared_rows_of_texts_in_groups(self, monkeypatch):
        """Each as large as the memory for partial results allows: one text here."""
        monkeypatch.setattr(schedule, "MIN_STEPS_TO_SPLIT", 2)
        monkeypatch.setattr(schedule, "SPLIT_ABOVE_MEAN", 0)
        monkeypatch.setattr(triton_backend, "_schedules", ScheduleCache())
        monkeypatch.setattr(triton_backend, "PARTIAL_BYTES", 1)
        partial, at_once = triton_backend._Call.partial, []
        monkeypatch.setattr(
            triton_backend._Call, "partial", lambda *inputs: at_once.append(inputs[2]) or partial(*inputs)
        )
        lengths = (30, 150, 64, 160)
        inputs = tensors((1, 1, sum(lengths), 16))
        self.check(inputs, torch.ones(1, 10, 10, dtype=torch.uint8), 16, self.bounds(lengths=lengths), 160)
        assert max(at_once) <= 2  # the rests and the weights of one

    @pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
    @pytest.mark.parametrize("block", [16, 64])
    @pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1000.0])
    def test_nothing_of_a_text_reaches_another(self, poison, block, device):
        """Not even as zero times NaN, and by the rule where a neighbour's keys are large."""
        layout = torch.ones(1, 128 // block, 128 // block, dtype=torch.uint8, device=device)
        bounds = torch.tensor([0, 40, 110], dtype=torch.int32, device=device)
        inputs = make_inputs(Case(pattern="all", block=110, blocks=1, heads=1, batch=1, alike=True), 0, device)
        inputs |= {"layout": layout, "block": block}
        for name in NAMES:
            inputs[name][:, :, 40:] = poison

        def first_text(query, key, value, layout, block, backend="triton"):
            attention = partial(block_sparse_attention_varlen, cu_seqlens=bounds, max_seqlen=70, backend=backend)
            return attention(query, key, value, layout, block)[:, :, :40]

        inputs["grad_output"] = inputs["grad_output"][:, :, :40]
        actual, plain = results(first_text, inputs), results(partial(first_text, backend="reference"), inputs)
        exact = results(partial(first_text, backend="reference"), inputs, torch.float64)
        for name in actual:
            found = errors(*(result[name][:, :, :40] for result in (actual, plain, exact)))
            assert found.passed, (name, found)

    @pytest.mark.parametrize("backend", ["triton", "torch"])
    def test_tokens_of_no_text_are_zeros(self, backend, nan_in_empty_memory):
        inputs = tensors((1, 1, 100, 16))
        bounds = torch.tensor([10, 40, 90], dtype=torch.int32)
        layout = torch.ones(1, 4, 4, dtype=torch.uint8)
        out = block_sparse_attention_varlen(*inputs, layout, 16, bounds, 50, backend=backend)
        gradients = torch.autograd.grad(out, inputs, torch.ones_like(out))
        for x in (out, *gradients):
            assert x.isfinite().all()
            assert not x[:, :, :10].any() and not x[:, :, 90:].any() and x[:, :, 10:90].any()

    @pytest.mark.parametrize("bounds", [[0], [0, 0]])
    def test_no_text_at_all(self, bounds):
        inputs = tensors((1, 1, 20, 16))
        layout = torch.ones(1, 2, 2, dtype=torch.uint8)
        bounds = torch.tensor(bounds, dtype=torch.int32)
        out = block_sparse_attention_varlen(*inputs, layout, 16, bounds, 0, backend="triton")
        assert not out.any() and not any(x.any() for x in torch.autograd.grad(out.sum(), inputs))

    @pytest.mark.parametrize(
        ("tokens", "longest", "said"),
        [
            (100, 33, "expected at most the 32 tokens of 2 blocks of 16, found 33"),
            (20, 21, "expected at most the 20 tokens of query, found 21"),
            (20, -1, "expected at most the 20 tokens of query, found -1"),
        ],
    )
    def test_a_longest_text_that_cannot_be_is_refused(self, tokens, longest, said):
        inputs = tensors((1, 1, tokens, 16))
        bounds = torch.tensor([0, 10, 20], dtype=torch.int32)
        layout = torch.ones(1, 2, 2, dtype=torch.uint8)
        with pytest.raises(AttentionError, match=f"max_seqlen: {said}"):
            block_sparse_attention_varlen(*inputs, layout, 16, bounds, longest, backend="triton")

    @pytest.mark.parametrize("bounds", [[0, 30, 20], [0, 10, 41], [-1, 10], [0, 21, 40]])
    def test_bounds_that_no_text_has_are_refused_where_they_are_read(self, bounds):
        inputs = tensors((1, 1, 40, 16))
        layout = torch.ones(1, 4, 4, dtype=torch.uint8)
        with pytest.raises(AttentionError, match="cu_seqlens: expected ascending bounds within 40 tokens"):
            bounds = torch.tensor(bounds, dtype=torch.int32)
            block_sparse_attention_varlen(*inputs, layout, 16, bounds, 20, backend="torch")


@on_gpu
class TestOnAGpu:
    shape = (2, 12, 1000, 64)

    def inputs(self, dtype=torch.float16, **options):
        return tensors(self.shape, "cuda", dtype, **options), layout_of("bigbird", 1024, 12, 64, "cuda")

    def step(self, inputs, layout, grad, **options):
        out = attend(*inputs, layout=layout, block=64, **options)
        return out, *torch.autograd.grad(out, inputs, grad)

    @pytest.mark.parametrize("window", [None, (100, 64)])
    def test_gives_the_same_bits_twice(self, window):
        inputs, layout = self.inputs()
        grad = torch.randn(self.shape, device="cuda", dtype=torch.float16)
        first = self.step(inputs, layout, grad, window=window)
        for _ in range(20):
            again = self.step(inputs, layout, grad, window=window)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

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

    def test_launches_of_one_kind_are_one_to_triton(self, monkeypatch):
        """Those that are remembered, whatever the lengths, strides and alignments of what they work on."""
        chosen, launches = {}, []

        class Forgetful(dict):
            """Remembers nothing, so that Triton is asked at each launch, and compares what it chooses."""

            def get(self, kind):
                launches.append(kind)

            def __setitem__(self, kind, compiled):
                assert chosen.setdefault(kind, compiled) is compiled

        monkeypatch.setattr(launch, "_compiled", Forgetful())
        monkeypatch.setattr(triton_backend, "PARTIAL_BYTES", 1)  # offsets of groups, which are aligned to 4 bytes
        layout = layout_of("bslongformer", 4096, 2, 64, "cuda")
        for seq in (1, 64, 100, 1024, 4000, 4096):
            inputs = tensors((2, 2, seq, 64), "cuda", torch.float16)
            grad = torch.randn(2, 2, seq, 64, device="cuda", dtype=torch.float16)
            padding = torch.rand(2, seq, device="cuda") < 0.9
            strided = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs]
            row = [x[:1].detach().requires_grad_() for x in inputs]
            offsets = torch.tensor([0, seq // 3, seq // 2, seq], dtype=torch.int32, device="cuda")
            for _ in range(2):
                self.step(inputs, layout, grad)
                self.step(inputs, layout, grad, key_padding_mask=padding, scale=1)
                for window in ((64, 64), (20, -1)):
                    self.step(inputs, layout, grad, window=window)
                self.step(strided, layout, grad)
                out = block_sparse_attention_varlen(*row, layout, 64, offsets, seq, backend="triton")
                torch.autograd.grad(out, row, grad[:1])
        assert len(chosen) < len(launches) / 2

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

    def test_runs_on_a_gpu_that_is_not_the_current_one(self):
        if torch.cuda.device_count() < 2:
            pytest.skip("one GPU")
        inputs, layout = self.inputs()
        grad = torch.randn(self.shape, device="cuda", dtype=torch.float16)
        expected = self.step(inputs, layout, grad)
        inputs = [x.detach().to("cuda:1").requires_grad_() for x in inputs]
        actual = self.step(inputs, layout.to("cuda:1"), grad.to("cuda:1"))
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(actual, expected, strict=True))

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
