"""Kernels are run by the names of their parameters, at once where they are compiled, or compiled in threads."""

from threading import Barrier

import pytest
import torch

from bsa_export.ops import launch as module
from bsa_export.ops.launch import start, warmup

X = torch.zeros(4)


class Kernel:
    """Has the parts of a Triton kernel that are used, and records what was done with it."""

    def __init__(self, *parameters, together=None, error=None):
        self.arg_names = parameters or ["x", "n", "scale", "SIZE"]
        self.ran, self.compiled, self.together, self.error = [], [], together, error
        self.ran_at_once = []

    def __getitem__(self, grid):
        def run(*values, **options):
            self.ran.append((grid, values, options))
            return Compiled(self)

        return run

    def warmup(self, *values, grid, **options):
        if self.together:
            self.together.wait()  # raises unless another kernel is being compiled
        if self.error:
            raise self.error
        self.compiled.append((grid, values, options))
        return self

    @property
    def run(self):
        return None


class Compiled:
    """What running a kernel for the first time returns."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *values: self.kernel.ran_at_once.append((grid, values))


WARPS = {"num_warps": 4}
VALUES = {"x": X, "n": 2, "scale": 0.5, "SIZE": 64}


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    monkeypatch.setattr(module, "_compiled", {})


@pytest.fixture(autouse=True)
def devices(monkeypatch):
    """The devices that threads chose."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


def test_a_kernel_runs_with_its_parameters_in_order():
    kernel = Kernel()
    start(kernel, 3, WARPS, SIZE=64, scale=0.5, x=X, n=2)
    assert kernel.ran == [((3,), (X, 2, 0.5, 64), WARPS)] and not kernel.compiled


def test_names_are_those_of_the_kernel():
    with pytest.raises(KeyError, match="scale"):
        start(Kernel(), 3, x=X, n=2, SIZE=64)
    with pytest.raises(TypeError, match="no parameter scael"):
        start(Kernel(), 3, **VALUES, scael=1)


def test_runs_at_once_what_was_compiled_for_a_launch_of_its_kind():
    kernel, y = Kernel(), torch.ones(8)
    start(kernel, 3, WARPS, **VALUES)
    start(kernel, 5, WARPS, **VALUES | {"x": y, "scale": 0.25})
    assert len(kernel.ran) == 1
    assert kernel.ran_at_once == [((5, 1, 1), (y, 2, 0.25, 64))]


@pytest.mark.parametrize(
    ("changed", "options"),
    [
        ({"x": X.half()}, WARPS),
        ({"x": torch.zeros(5)[1:]}, WARPS),
        ({"n": 16}, WARPS),
        ({"scale": 1}, WARPS),
        ({"SIZE": 32}, WARPS),
        ({"WINDOW": (64, 0)}, WARPS),
        ({}, {"num_warps": 8}),
    ],
    ids=["dtype", "alignment", "integer", "integer for a number", "constant", "tuple", "warps"],
)
def test_a_launch_of_another_kind_is_left_to_triton(changed, options):
    kernel = Kernel("x", "n", "scale", "SIZE", "WINDOW")
    values = VALUES | {"WINDOW": (64, 64)}
    start(kernel, 3, WARPS, **values)
    start(kernel, 3, options, **values | changed)
    assert len(kernel.ran) == 2 and not kernel.ran_at_once


def test_another_kernel_is_another_kind():
    one, other = Kernel(), Kernel()
    start(one, 3, **VALUES)
    start(other, 3, **VALUES)
    assert one.ran and other.ran


def test_so_many_kinds_are_remembered(monkeypatch):
    monkeypatch.setattr(module, "MOST_KINDS", 2)
    for n in range(5):
        start(Kernel(), 3, **VALUES | {"n": n})
        assert len(module._compiled) <= 2


def test_what_an_interpreter_runs_is_run_again():
    ran = []

    class Interpreted(Kernel):
        def __getitem__(self, grid):
            return lambda *values, **options: ran.append(grid)

    kernel = Interpreted()
    start(kernel, 3, **VALUES)
    start(kernel, 3, **VALUES)
    assert len(ran) == 2


def test_cleared_kernels_are_left_to_triton_again():
    kernel = Kernel()
    start(kernel, 3, **VALUES)
    module.clear_compiled()
    start(kernel, 3, **VALUES)
    assert len(kernel.ran) == 2


def test_compiles_kernels_in_threads_on_their_device_and_runs_none(devices):
    kernel = Kernel(together=Barrier(2, timeout=30))
    with warmup("cuda:1"):
        start(kernel, 3, **VALUES)
        start(kernel, 3, **VALUES | {"SIZE": 32})
    assert sorted(values[3] for _, values, _ in kernel.compiled) == [32, 64]
    assert not kernel.ran and set(devices) == {"cuda:1"}


def test_compiles_a_kernel_once():
    kernel = Kernel()
    with warmup("cuda:0"):
        start(kernel, 3, **VALUES)
        start(kernel, 5, **VALUES | {"x": torch.ones(8)})
    assert len(kernel.compiled) == 1


def test_kernels_run_again_afterwards_and_after_an_error():
    kernel = Kernel()
    with pytest.raises(KeyError, match="an error"), warmup("cuda:0"):
        raise KeyError("an error")
    start(kernel, 3, **VALUES)
    assert kernel.ran


def test_an_error_of_the_compiler_is_raised():
    with pytest.raises(RuntimeError, match="no registers"), warmup("cuda:0"):
        start(Kernel(error=RuntimeError("no registers")), 3, **VALUES)
