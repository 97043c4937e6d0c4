"""Key masks of the fused kernel: what of a sequence they leave as it is, and which of its steps are computed, how."""

import pytest
import torch

from bsa_export.ops import backends, triton_backend

if backends()["triton"] is not None:
    pytest.skip(f"triton: {backends()['triton']}", allow_module_level=True)

import triton
import triton.language as tl

from bsa_export.ops.triton_masks import masked_step, span_of_rows, split_steps

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
INF = float("inf")
# Of a key: nothing, removed, and a number that is added.
VALUES = {".": 0.0, "-": -INF, "f": -1e4, "b": 0.5}
MASKS = [
    "..........",
    ".......---",
    "........ff",
    "--........",
    "-.......--",
    "......-...",
    "..-.......",
    "....b....-",
    "fffff.ffff",
    "----------",
]


def read(mask: torch.Tensor) -> torch.Tensor:
    """The spans of a mask, whose bias is looked at."""
    bias, spans, row = (triton_backend._read_mask(mask, mask)[name] for name in ("bias", "spans", "stride_bias"))
    assert torch.equal(bias[:, : mask.shape[1]], mask * triton_backend.LOG2_E)
    assert bias.shape == (len(mask), row)
    assert (bias[:, mask.shape[1] :] == -INF).all()
    return spans


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("further", [0, 4090], ids=["short", "longer than what is read at once"])
def test_spans(device, further):
    masks = [mask[:5] + "." * further + mask[5:] for mask in MASKS]
    spans = read(torch.tensor([[VALUES[key] for key in mask] for mask in masks], device=device)).tolist()
    for mask, found in zip(masks, spans, strict=True):
        plain, plain_behind = len(mask) - len(mask.lstrip(".")), len(mask.rstrip("."))
        span = [0, plain] if plain >= len(mask) - plain_behind else [plain_behind, len(mask)]
        live = [i for i, key in enumerate(mask) if key != "-"]
        assert found == span + ([live[0], live[-1] + 1] if live else [len(mask), 0]), mask


@triton.jit
def visit_kernel(columns, spans, visits, begin, end, masked, behind, seq, SIZE: tl.constexpr, UNIT: tl.constexpr):
    """Adds 1 for each step that is computed as plain, 100 for each that is computed with the mask."""
    first, last, live, start = split_steps(columns, spans, 0, begin, end, masked, seq, SIZE, UNIT, True)
    for i_step in range(first, last):
        tl.store(visits + i_step, tl.load(visits + i_step) + 1)
    for i_masked in range(start, behind):
        i_step = masked_step(i_masked, first, last, live, masked, True)
        tl.store(visits + i_step, tl.load(visits + i_step) + 100)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("unit", [16, 64])
@pytest.mark.parametrize("seed", range(12))
def test_every_step_with_a_live_key_is_computed_once(device, unit, seed):
    """Steps `[2, 2 + n)` ascend, of which some are plain, some need the mask, some are all removed; five further ones
    need it anyway, next to two that are none of this program's."""
    size, seq = 64, 64 * 40 - 7
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(1, seq)
    begin, end = sorted(torch.randint(0, seq + 1, (2,), generator=generator).tolist())
    fill = -INF if seed % 3 else -1e4
    mask[:, end:] = fill
    if seed % 2:
        mask[:, :begin] = fill
    if seed % 4 == 3:
        mask[:, (begin + end) // 2] = -INF
    spans = read(mask.to(device))
    across, n = size // unit, 36
    units = torch.randperm(seq // unit, generator=generator)[: n * across].sort().values
    columns = torch.zeros(n + 9, across, dtype=torch.int32)
    columns[2 : 2 + n] = units.reshape(n, across)
    visits = torch.zeros(n + 9, dtype=torch.int32, device=device)
    visit_kernel[(1,)](columns.to(device), spans, visits, 2, 2 + n, 2 + n + 1, n + 8, seq, SIZE=size, UNIT=unit)
    first, last, first_live, last_live = spans[0].tolist()
    found = visits.tolist()
    assert found[:2] == [0, 0] and found[2 + n] == 0 and found[-1] == 0
    assert found[2 + n + 1 : n + 8] == [100] * 5
    for step in range(2, 2 + n):
        tokens = [u * unit + i for u in columns[step].tolist() for i in range(unit)]
        plain = all(first <= t < last for t in tokens)
        dead = tokens[-1] < first_live or tokens[0] >= last_live
        assert found[step] == (1 if plain else 0 if dead else 100), (step, tokens[0], tokens[-1], spans)


@triton.jit
def rows_kernel(spans, answers, first, length, SIZE: tl.constexpr):
    plain, live = span_of_rows(spans, 0, first + tl.arange(0, SIZE), length)
    tl.store(answers, plain.to(tl.int32))
    tl.store(answers + 1, live.to(tl.int32))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("first", "expected"),
    [(0, (1, 1)), (64, (0, 1)), (128, (0, 0)), (192, (0, 0))],
    ids=["plain", "mixed", "removed", "end"],
)
def test_rows_of_keys(device, first, expected):
    mask = torch.zeros(1, 200, device=device)
    mask[:, 100:] = -INF
    answers = torch.full((2,), -1, dtype=torch.int32, device=device)
    rows_kernel[(1,)](read(mask), answers, first, 200, SIZE=64)
    assert tuple(answers.tolist()) == expected
