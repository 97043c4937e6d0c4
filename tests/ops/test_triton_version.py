"""The true reason why the installed Triton cannot be used; and caches that are forgotten."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bsa_export.ops import block_sparse_attention, clear_caches, deepspeed_backend, triton_backend, triton_version

triton = pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.parametrize(
    ("version", "numpy", "descriptors", "facts"),
    [
        ("3.3.1", "2.3.5", True, ("3.3.1", "3.4")),
        ("3.3.1", "2.3.5", False, None),
        ("3.6.0", "2.4.0", True, ("3.6.0", "2.4.0", "interpreter")),
        ("3.6.0", "2.4.0", False, ("3.6.0", "2.4.0", "interpreter")),
        ("3.6.0", "2.3.5", True, None),
        ("3.7.0", "2.4.6", True, None),
        ("3.9.0+git", "2.10.1", True, None),
    ],
)
def test_a_triton_that_cannot_run_says_why(version, numpy, descriptors, facts, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(np, "__version__", numpy)
    reason = triton_version.unusable.__wrapped__(descriptors)
    if facts is None:
        assert reason is None
    else:
        assert all(fact in reason for fact in facts) and "not installed" not in reason


def test_caches_are_forgotten():
    if deepspeed_backend.unavailable() is None:
        x = torch.zeros(1, 1, 16, 16, dtype=torch.float16, device="cuda" if torch.cuda.is_available() else "cpu")
        block_sparse_attention(x, x, x, torch.ones(1, 1, 1, dtype=torch.uint8), 16, backend="deepspeed")
        assert deepspeed_backend._cache._by_content
    if triton_backend.unavailable() is None:
        x = torch.zeros(1, 1, 16, 16, device="cuda" if torch.cuda.is_available() else "cpu")
        block_sparse_attention(x, x, x, torch.ones(1, 1, 1, dtype=torch.uint8), 16, backend="triton")
        assert triton_backend._schedules._schedules
    clear_caches()
    assert not deepspeed_backend._cache._by_content and not triton_backend._schedules._schedules
