"""Kernels are run, or compiled beside each other."""

from threading import Barrier

import pytest
import torch

from bsa_export.ops.warmup import start, warmup


class Kernel:
    """Has the two faces of a Triton kernel that are used, and tells what was done to it."""

    def __init__(self, together=None, error=None):
        self.ran, self.compiled, self.together, self.error = [], [], together, error

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self.ran.append((grid, arguments, constants))

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


@pytest.fixture(autouse=True)
def devices(monkeypatch):
    """The devices that threads made their own."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


def test_runs_a_kernel():
    kernel = Kernel()
    start(kernel, 3, "x", SIZE=64)
    assert kernel.ran == [((3,), ("x",), {"SIZE": 64})] and not kernel.compiled


def test_compiles_kernels_beside_each_other_on_their_device_and_runs_none(devices):
    kernel = Kernel(Barrier(2, timeout=30))
    with warmup("cuda:1"):
        start(kernel, 3, "x", SIZE=64)
        start(kernel, 3, "x", SIZE=32)
    assert sorted(constants["SIZE"] for _, _, constants in kernel.compiled) == [32, 64]
    assert not kernel.ran and set(devices) == {"cuda:1"}


def test_compiles_a_kernel_once():
    kernel = Kernel()
    with warmup("cuda:0"):
        start(kernel, 3, "x", SIZE=64)
        start(kernel, 5, "y", SIZE=64)
    assert len(kernel.compiled) == 1


def test_kernels_run_again_afterwards_and_after_an_error():
    kernel = Kernel()
    with pytest.raises(KeyError), warmup("cuda:0"):
        raise KeyError
    start(kernel, 3)
    assert kernel.ran


def test_an_error_of_the_compiler_is_raised():
    with pytest.raises(RuntimeError, match="no registers"), warmup("cuda:0"):
        start(Kernel(error=RuntimeError("no registers")), 3)
