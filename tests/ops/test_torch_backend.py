"""The backend `torch`: work and memory that follow the kept blocks."""

import subprocess
import sys
import textwrap
from functools import partial

import pytest
import torch
from attention_cases import Case, make_inputs

from bsa_export.ops import block_sparse_attention, torch_backend
from bsa_export.verify.tolerance import judge

PATTERNS = ["windowed", "bigbird", "fixed", "random", "all"]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("window", [None, (20, 9)])
def test_how_the_work_is_cut_does_not_show(pattern, window, monkeypatch):
    monkeypatch.setattr(torch_backend, "CPU_PART_BYTES", {"forward": 1, "backward": 1})
    monkeypatch.setattr(torch_backend, "MAX_ROW_TOKENS", 40)
    inputs = make_inputs(
        Case(pattern=pattern, padding="bool", short=3, dtype="fp32", head_dim=16), seed=0, device="cpu"
    )
    errors = judge(partial(block_sparse_attention, backend="torch"), inputs | {"window": window})
    assert all(e.passed for e in errors.values()), errors


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_kept_block_is_in_one_part(pattern):
    case = Case(pattern=pattern, heads=3, blocks=12)
    inputs = make_inputs(case, seed=0, device="cpu")
    layout = inputs["layout"].expand(3, -1, -1)
    visits = torch.zeros(2, 3, 12, 12)
    for part in torch_backend._parts(inputs["query"], inputs["layout"], 16, "forward"):
        if isinstance(part, torch_backend._Windows):
            for i in range(part.count):
                row, column = part.row + i * part.step, part.column + i * part.step
                rows, columns = (
                    slice(row // 16, (row + part.rows) // 16),
                    slice(column // 16, (column + part.columns) // 16),
                )
                visits[part.sequences, part.heads, rows, columns] += 1
        else:
            for row, columns in zip(part.rows, part.columns, strict=True):
                for r in row.tolist():
                    visits[:, r // 12, r % 12, columns % 12] += 1
    assert torch.equal(visits, layout.ne(0).float().expand(2, -1, -1, -1))


def test_sixteen_thousand_tokens_of_bert_base_fit_in_two_gibibytes():
    """Forward and backward of a layer's attention, in a process of its own."""
    code = """
    import re
    import torch
    from bsa_export.ops import block_sparse_attention
    from bsa_export.sparsity.configs import windowed_for
    torch.set_num_threads(1)
    config = windowed_for(512, 12)
    layout = torch.from_numpy(config.make_layout(16384))
    q, k, v = (torch.randn(1, 12, 16384, 64, requires_grad=True) for _ in range(3))
    block_sparse_attention(q, k, v, layout, config.block, backend="torch").sum().backward()
    print(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2 << 20  # KiB
