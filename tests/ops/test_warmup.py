"""Kernels are run, at once where they are compiled, or compiled beside each other."""

from threading import Barrier

import pytest
import torch

from bsa_export.ops import launch as module
from bsa_export.ops.launch import start, warmup

X = torch.zeros(4)


class Kernel:
    """Has the faces of a Triton kernel that are used, and tells what was done to it."""

    arg_names = ["x", "n", "scale", "SIZE"]

    def __init__(self, together=None, error=None):
        self.ran, self.compiled, self.together, self.error = [], [], together, error
        self.ran_at_once = []

    def __getitem__(self, grid):
        def run(*arguments, **constants):
            self.ran.append((grid, arguments, constants))
            return Compiled(self)

        return run

    def warmup(self, *arguments, grid, **constants):
        if self.together:
            self.together.wait()  # raises unless another kernel is being compiled
        if self.error:
            raise self.error
        self.compiled.append((grid, arguments, constants))
        return self

    @property
    def run(self):
        return None


class Compiled:
    """What running a kernel for the first time returns."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel.ran_at_once.append((grid, arguments))


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    monkeypatch.setattr(module, "_compiled", {})


@pytest.fixture(autouse=True)
def devices(monkeypatch):
    """The devices that threads made their own."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


def test_runs_a_kernel():
    kernel = Kernel()
    start(kernel, 3, X, SIZE=64)
    assert kernel.ran == [((3,), (X,), {"SIZE": 64})] and not kernel.compiled


def test_runs_at_once_what_was_compiled_for_a_launch_of_its_kind():
    kernel, y = Kernel(), torch.ones(8)
    start(kernel, 3, X, 2, 0.5, SIZE=64, num_warps=4)
    start(kernel, 5, y, 2, 0.25, SIZE=64, num_warps=4)
    assert len(kernel.ran) == 1
    assert kernel.ran_at_once == [((5, 1, 1), (y, 2, 0.25, 64))]


@pytest.mark.parametrize(
    ("arguments", "constants"),
    [
        ((X.half(), 2, 0.5), {"SIZE": 64, "num_warps": 4}),
        ((torch.zeros(5)[1:], 2, 0.5), {"SIZE": 64, "num_warps": 4}),
        ((X, 16, 0.5), {"SIZE": 64, "num_warps": 4}),
        ((X, 2, 1), {"SIZE": 64, "num_warps": 4}),
        ((X, 2, 0.5), {"SIZE": 32, "num_warps": 4}),
        ((X, 2, 0.5), {"SIZE": 64, "num_warps": 8}),
    ],
    ids=["dtype", "alignment", "integer", "integer for a number", "constant", "warps"],
)
def test_a_launch_of_another_kind_is_left_to_triton(arguments, constants):
    kernel = Kernel()
    start(kernel, 3, X, 2, 0.5, SIZE=64, num_warps=4)
    start(kernel, 3, *arguments, **constants)
    assert len(kernel.ran) == 2 and not kernel.ran_at_once


def test_another_kernel_is_another_kind():
    one, other = Kernel(), Kernel()
    start(one, 3, X)
    start(other, 3, X)
    assert one.ran and other.ran


def test_so_many_kinds_are_remembered(monkeypatch):
    monkeypatch.setattr(module, "MOST_KINDS", 2)
    for n in range(5):
        start(Kernel(), 3, X, n)
        assert len(module._compiled) <= 2


def test_what_an_interpreter_runs_is_run_again():
    ran = []

    class Interpreted(Kernel):
        def __getitem__(self, grid):
            return lambda *arguments, **constants: ran.append(grid)

    kernel = Interpreted()
    start(kernel, 3, X)
    start(kernel, 3, X)
    assert len(ran) == 2


def test_compiles_kernels_beside_each_other_on_their_device_and_runs_none(devices):
    kernel = Kernel(Barrier(2, timeout=30))
    with warmup("cuda:1"):
        start(kernel, 3, X, SIZE=64)
        start(kernel, 3, X, SIZE=32)
    assert sorted(constants["SIZE"] for _, _, constants in kernel.compiled) == [32, 64]
    assert not kernel.ran and set(devices) == {"cuda:1"}


def test_compiles_a_kernel_once():
    kernel = Kernel()
    with warmup("cuda:0"):
        start(kernel, 3, X, SIZE=64)
        start(kernel, 5, torch.ones(8), SIZE=64)
    assert len(kernel.compiled) == 1


def test_kernels_run_again_afterwards_and_after_an_error():
    kernel = Kernel()
    with pytest.raises(KeyError), warmup("cuda:0"):
        raise KeyError
    start(kernel, 3, X)
    assert kernel.ran


def test_an_error_of_the_compiler_is_raised():
    with pytest.raises(RuntimeError, match="no registers"), warmup("cuda:0"):
        start(Kernel(error=RuntimeError("no registers")), 3, X)
