"""Random damage to small real files: exactly the tensors that the format's own library reads, or one sentence."""

import resource
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from checkpoint_files import same, save_as, small_state
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from bsa_export.checkpoint.open import open_checkpoint
from bsa_export.checkpoint.table import Tensor
from bsa_export.checkpoint.torch_file import MAX_EXPANDED_BYTES
from bsa_export.errors import BsaError, CheckpointError

KINDS = ("zip", "legacy", "safetensors", "wrapped")


@dataclass
class Original:
    kind: str
    whole: bytes
    tensors: dict[str, torch.Tensor]
    damaged: Path

    def __repr__(self):  # the bytes would fill a failed test's report
        return self.kind


@pytest.fixture(scope="module", params=KINDS)
def original(request, tmp_path_factory) -> Original:
    folder = tmp_path_factory.mktemp(request.param)
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    state = {name: tensor for name, tensor in small_state().items() if name.startswith("encoder")} | {
        "word.weight": base
    }
    if request.param != "safetensors":
        state |= {"transposed": base.t(), "decoder.weight": base, "row": base[1]}
    path = save_as(request.param, folder, state)
    return Original(request.param, path.read_bytes(), state, folder / "damaged")


def judged(kind: str, path: Path) -> dict[str, torch.Tensor] | None:
    """What torch or safetensors reads; None where it refuses."""
    try:
        if kind == "safetensors":
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
        saved = torch.load(path, weights_only=True)
    except Exception:
        return None
    while isinstance(saved, dict) and not any(isinstance(value, torch.Tensor) for value in saved.values()):
        saved = saved.get("module")
    if not isinstance(saved, dict):
        return None
    return {name: value for name, value in saved.items() if isinstance(value, torch.Tensor) and isinstance(name, str)}


def equal(table: dict[str, Tensor], judge: dict[str, torch.Tensor] | None) -> bool:
    if judge is None:
        return False
    prefix = "module." if judge and all(name.startswith("module.") for name in judge) else ""
    judge = {name.removeprefix(prefix): tensor for name, tensor in judge.items()}
    return set(table) == set(judge) and all(same(table[name], tensor) for name, tensor in judge.items())


def check(original: Original, data: bytes) -> str:
    """Open `data`: refused in one sentence, or read as the undamaged file, or as the library reads the damaged one."""
    original.damaged.write_bytes(data)
    try:
        table = open_checkpoint(original.damaged).tensors
    except BsaError as error:
        assert "\n" not in str(error)
        return "refused"
    for row in table.values():
        assert 0 <= row.data.offset <= len(data)
        assert row.nbytes <= MAX_EXPANDED_BYTES
    try:
        assert equal(table, original.tensors) or equal(table, judged(original.kind, original.damaged))
    except CheckpointError as error:
        assert "CRC-32" in str(error)
        return "refused"
    return "read"


FUZZ = settings(
    max_examples=150,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@FUZZ
@given(data=st.data())
def test_truncated_files_are_refused(original, data):
    whole = original.whole
    length = data.draw(st.integers(0, len(whole) - 1))
    assert check(original, whole[:length]) == "refused"


@FUZZ
@given(data=st.data())
def test_changed_bytes_give_the_tensors_of_the_judge_or_a_sentence(original, data):
    whole = original.whole
    changed = bytearray(whole)
    start = data.draw(st.sampled_from([0, max(0, len(whole) - 1500)]))  # headers and the zip directory
    place = data.draw(st.integers(start, min(len(whole), start + 2500) - 1))
    changed[place] = data.draw(st.sampled_from([0, 1, 0x2E, 0x7F, 0xFF, changed[place] ^ 1, changed[place] ^ 0x80]))
    check(original, bytes(changed))


@FUZZ
@given(data=st.data())
def test_cut_out_and_repeated_bytes_give_the_tensors_of_the_judge_or_a_sentence(original, data):
    whole = original.whole
    start = data.draw(st.integers(0, len(whole) - 1))
    length = data.draw(st.integers(1, 64))
    repeat = data.draw(st.sampled_from([0, 2]))
    check(original, whole[:start] + whole[start : start + length] * repeat + whole[start + length :])


@pytest.mark.parametrize("seed", range(3))
def test_noise_behind_every_kind_of_beginning_is_refused(tmp_path, seed):
    noise = (
        torch.randint(0, 256, (4096,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        .numpy()
        .tobytes()
    )
    for head in (
        b"",
        b"PK\x03\x04",
        b"\x80\x02",
        b"\x80\x04\x95",
        b"{",
        b"\x40" + bytes(7) + b"{",
        b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",
    ):
        (tmp_path / "a").write_bytes(head + noise)
        with pytest.raises(BsaError):
            open_checkpoint(tmp_path / "a")


def test_no_damage_took_much_memory():
    """After the tests above: the whole process, torch included, stayed small."""
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 3 << 20
