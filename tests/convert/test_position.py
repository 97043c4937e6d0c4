"""Position embeddings for other lengths: reserved rows, tiling, interpolation, and what follows from them."""

import numpy as np
import pytest
import torch
import transformers
from tiny_models import config, converted, record, refused, same_bits, save, save_tensors, tensors, tiny

import bsa_export
from bsa_export.bert.positions import extend
from bsa_export.checkpoint.dtypes import read
from bsa_export.checkpoint.table import Computed, Tensor

RESERVED = {"bert": 0, "electra": 0, "distilbert": 0, "roberta": 2, "xlm-roberta": 2, "data2vec-text": 2}


def table_of(folder_or_model):
    state = folder_or_model.state_dict() if hasattr(folder_or_model, "state_dict") else tensors(folder_or_model)
    return next(tensor for name, tensor in state.items() if name.endswith("position_embeddings.weight"))


@pytest.mark.parametrize("length", [256, 240, 208, 64, 48, 16])
@pytest.mark.parametrize("family", RESERVED)
def test_tiled_rows_are_the_sources_bit_for_bit(tmp_path, family, length):
    model, reserved = tiny(family), RESERVED[family]
    out = converted(save(model, tmp_path / "source"), "--max-length", length, "--block", 16)
    before, after = table_of(model), table_of(out)
    assert after.shape[0] == reserved + length == config(out)["max_position_embeddings"]
    assert same_bits(after[:reserved], before[:reserved])
    places = torch.arange(length) % 64 + reserved
    assert same_bits(after[reserved:], before[places])
    positions = {"method": "tile", "reserved": reserved, "source_rows": 64 + reserved, "rows": length + reserved}
    assert record(out)["positions"] == (None if length == 64 else positions)


@pytest.mark.parametrize("length", [256, 240, 80])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_interpolated_rows_lie_between_the_sources(tmp_path, family, length):
    model, reserved = tiny(family), RESERVED[family]
    out = converted(
        save(model, tmp_path / "source"), "--max-length", length, "--block", 16, "--positions", "interpolate"
    )
    before, after = table_of(model).detach(), table_of(out)
    assert same_bits(after[:reserved], before[:reserved])
    places = np.arange(length) * 64 / length
    judge = np.stack([np.interp(places, np.arange(64), column) for column in before[reserved:].double().numpy().T], 1)
    torch.testing.assert_close(after[reserved:].double(), torch.from_numpy(judge), atol=1e-6, rtol=1e-6)
    whole = places % 1 == 0
    assert same_bits(after[reserved:][whole], before[reserved:][places[whole].astype(int)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_interpolation_is_rounded_once(tmp_path, dtype):
    model = tiny("bert").to(dtype)
    out = converted(save(model, tmp_path / "source"), "--max-length", 256, "--positions", "interpolate")
    before = table_of(model).detach().double()
    upper = before[torch.arange(1, 65).clamp(max=63)]
    judge = torch.stack([before + (upper - before) * step / 4 for step in range(4)], 1).flatten(0, 1).to(dtype)
    assert table_of(out).dtype == dtype
    torch.testing.assert_close(table_of(out), judge, atol=0, rtol=1e-2 if dtype != torch.float64 else 1e-12)
    assert same_bits(table_of(out)[::4], table_of(model).detach())


@pytest.mark.parametrize("family", ["roberta", "xlm-roberta", "camembert", "data2vec-text"])
def test_the_row_of_padding_stays_what_it_was(tmp_path, family):
    model = tiny(family)
    out = converted(save(model, tmp_path / "source"), "--max-length", 512)
    loaded = bsa_export.load(out)
    table = loaded.base_model.embeddings.position_embeddings
    assert table.padding_idx == 1 and same_bits(table.weight[1].detach(), table_of(model)[1].detach())
    assert table.num_embeddings == 514
    with torch.no_grad():
        assert loaded(torch.randint(4, 99, (1, 512)))[0].isfinite().all()


def test_a_pad_token_elsewhere_reserves_other_rows(tmp_path):
    model = tiny("roberta", pad_token_id=4, max_position_embeddings=69)
    out = converted(save(model, tmp_path / "source"), "--max-length", 256)
    assert record(out)["positions"]["reserved"] == 5 and record(out)["source_length"] == 64
    assert same_bits(table_of(out)[5:], table_of(model).detach()[5:].repeat(4, 1))
    with torch.no_grad():
        assert bsa_export.load(out)(torch.randint(5, 99, (1, 256)))[0].isfinite().all()


def test_buffers_of_positions_are_left_to_the_model(tmp_path):
    model = tiny("bert")
    state = dict(model.state_dict()) | {"bert.embeddings.position_ids": torch.arange(64)[None]}
    out = converted(save_tensors(tmp_path / "source", state, model.config.to_dict()), "--max-length", 256)
    assert "bert.embeddings.position_ids" not in tensors(out)
    loaded = transformers.BertModel.from_pretrained(out)
    assert torch.equal(loaded.embeddings.position_ids, torch.arange(256)[None])


def test_unusual_position_ids_are_told(tmp_path):
    model = tiny("bert")
    state = dict(model.state_dict()) | {"bert.embeddings.position_ids": torch.arange(64).flip(0)[None]}
    out = converted(save_tensors(tmp_path / "source", state, model.config.to_dict()))
    assert "with other values" in record(out)["dropped"]["bert.embeddings.position_ids"]


def test_position_rows_that_the_config_does_not_have(tmp_path):
    model = tiny("roberta")
    source = save_tensors(
        tmp_path / "source", model.state_dict(), model.config.to_dict() | {"max_position_embeddings": 64}
    )
    text = refused(source, tmp_path / "out")
    assert "position_embeddings.weight: expected [64, 32] from config.json, found [66, 32]" in text


@pytest.mark.parametrize("method", ["tile", "interpolate"])
def test_infinite_and_signed_zero_rows_survive(method):
    values = np.array([[-0.0, 1.0], [np.inf, -2.0], [np.nan, 0.0]], np.float32)
    row = Tensor("F32", (3, 2), Computed(lambda: iter([values.tobytes()])))
    with np.errstate(invalid="ignore"):
        found = read(extend("positions", row, 6, 0, method))
    picked = found[:3] if method == "tile" else found[::2]
    assert picked.tobytes() == values.tobytes()
    assert extend("positions", row, 3, 0, method) is row
