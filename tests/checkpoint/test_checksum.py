"""The checksum of weights: any damage changes it."""

import random

import pytest

from bsa_export.checkpoint.checksum import PIECE_BYTES, SIDE, Checksum, file_checksum
from bsa_export.errors import CheckpointError

SIZE = 2 * PIECE_BYTES + 12_345


@pytest.fixture(scope="module")
def data() -> bytes:
    return random.Random(0).randbytes(SIZE)


def checksum(data: bytes) -> str:
    total = Checksum()
    for start in range(0, len(data), PIECE_BYTES):
        total.update(data[start : start + PIECE_BYTES])
    return total.hexdigest()


def test_a_file_has_the_checksum_of_its_bytes(tmp_path, data):
    for size in (0, 1, 8, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, SIZE):
        (tmp_path / "file").write_bytes(data[:size])
        assert file_checksum(tmp_path / "file") == checksum(data[:size])


def test_every_damaged_bit_changes_it(data):
    good, draw = checksum(data), random.Random(1)
    for _ in range(100):
        damaged = bytearray(data)
        damaged[draw.randrange(SIZE)] ^= 1 << draw.randrange(8)
        assert checksum(bytes(damaged)) != good


@pytest.mark.parametrize("size", [4, 8, 64, 8 * SIDE, 64 * SIDE, PIECE_BYTES])
def test_what_changes_places_changes_it(data, size):
    good, draw = checksum(data), random.Random(size)
    for _ in range(20):
        damaged = bytearray(data)
        one, other = draw.sample(range(SIZE // size), 2)
        one, other = slice(one * size, (one + 1) * size), slice(other * size, (other + 1) * size)
        damaged[one], damaged[other] = damaged[other], damaged[one]
        assert checksum(bytes(damaged)) != good


def test_padding_and_truncation_change_it(data):
    assert len({checksum(content) for content in (data, data + b"\\0", data[:-1], data + bytes(9), b"", b"\\0")}) == 6


def test_a_piece_after_a_short_one_is_refused():
    total = Checksum()
    total.update(b"short")
    with pytest.raises(ValueError, match="only the last piece may be short"):
        total.update(b"more")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="nothing: it cannot be read"):
        file_checksum(tmp_path / "nothing")
