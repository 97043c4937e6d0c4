"""What another library did to the tensors is recognised by what that library writes."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from bsa_export.checkpoint.foreign import recognise
from bsa_export.checkpoint.open import open_checkpoint
from bsa_export.checkpoint.table import Computed, Tensor


class Bert(nn.Module):
    """The names of a BERT of one layer."""

    def __init__(self):
        super().__init__()
        self.embeddings = nn.ModuleDict({"word_embeddings": nn.Embedding(5, 4)})
        self.encoder = nn.ModuleDict({"dense": nn.Linear(4, 4)})


def pruned(model):
    prune.random_unstructured(model.encoder["dense"], "weight", 0.5)


def weight_normed(model):
    nn.utils.parametrizations.weight_norm(model.encoder["dense"])


def spectral_normed(model):
    nn.utils.spectral_norm(model.encoder["dense"])


def zero_3(model):
    for parameter in model.parameters():
        parameter.data = torch.empty(0)


@pytest.mark.parametrize(
    ("change", "command"),
    [
        (pruned, "prune.remove"),
        (weight_normed, "remove_parametrizations"),
        (spectral_normed, "remove_spectral_norm"),
        (zero_3, "zero_to_fp32.py"),
    ],
)
def test_what_torch_does_to_a_model_is_named_with_what_undoes_it(tmp_path, change, command):
    model = Bert()
    change(model)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    found = recognise(open_checkpoint(tmp_path).tensors)
    assert found is not None
    assert command in found.hint


NAMES = {
    "merge_and_unload": [
        "base_model.model.bert.embeddings.word_embeddings.weight",
        "base_model.model.bert.encoder.layer.0.attention.self.query.base_layer.weight",
        "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.default.weight",
    ],
    "PeftModel.from_pretrained": ["base_model.model.encoder.layer.0.attention.self.query.lora_A.weight"],
    "dequantize": ["encoder.layer.0.attention.self.query.weight", "encoder.layer.0.attention.self.query.SCB"],
    "before the quantization": ["encoder.layer.0.output.dense.qweight", "encoder.layer.0.output.dense.qzeros"],
    "FULL_STATE_DICT": ["_flat_param"],
    "from_flax": ["encoder.layer.0.output.dense.kernel"],
}


@pytest.mark.parametrize("command", NAMES)
def test_names_of_other_libraries_are_recognised(command):
    row = Tensor("F32", (2,), Computed(lambda: iter(())))
    found = recognise(dict.fromkeys(NAMES[command], row))
    assert found is not None
    assert command in found.hint
    assert NAMES[command][-1] in found.what or NAMES[command][0] in found.what


def test_a_plain_model_is_not_foreign(tmp_path):
    torch.save(Bert().state_dict(), tmp_path / "pytorch_model.bin")
    assert recognise(open_checkpoint(tmp_path).tensors) is None
