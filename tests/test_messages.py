"""The messages that people meet first, whole: this file is their contract. Other tests hold a message's facts only.

`python tests/test_messages.py` prints them as they are today.
"""

from __future__ import annotations

import json
import pickle
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file
from support.tiny import dense_bert

from bsa_export.cli.convert import main as convert
from bsa_export.cli.verify import main as verify


class Surprise:
    def __reduce__(self):
        return exec, ("print('hello')",)


def edited(folder: Path, **fields: object) -> None:
    """Changes fields of config.json; None takes one out."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def renamed(folder: Path, **names: str) -> None:
    """Gives tensors whose names end so other ends."""
    tensors = load_file(folder / "model.safetensors")
    for old, new in names.items():
        tensors = {name.replace(old.replace("__", "."), new): value for name, value in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def added(folder: Path, name: str, shape: tuple[int, ...]) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: np.zeros(shape, np.float32)}, folder / "model.safetensors", {"format": "pt"})


def written(path: Path, content: bytes) -> None:
    path.write_bytes(content)


# Name -> what is done to a folder `model` with a small BERT, and the arguments of bsa-convert.
CASES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "nothing there": (lambda work: None, ["modl", "out"]),
    "no config.json": (lambda work: (work / "model/config.json").unlink(), ["model", "out"]),
    "config.json without heads": (lambda work: edited(work / "model", num_attention_heads=None), ["model", "out"]),
    "config.json of another model": (lambda work: edited(work / "model", hidden_size=48), ["model", "out"]),
    "another family": (lambda work: edited(work / "model", model_type="gpt2"), ["model", "out"]),
    "a decoder": (lambda work: edited(work / "model", is_decoder=True), ["model", "out"]),
    "a tensor that BERT does not use": (
        lambda work: added(work / "model", "bert.embeddings.rank_embeddings.weight", (4, 32)),
        ["model", "out"],
    ),
    "an adapter": (
        lambda work: renamed(work / "model", query__weight="query.base_layer.weight"),
        ["model", "out"],
    ),
    "a Git LFS pointer": (
        lambda work: written(work / "model/model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"),
        ["model", "out"],
    ),
    "a truncated file": (
        lambda work: written(work / "model/model.safetensors", (work / "model/model.safetensors").read_bytes()[:-100]),
        ["model", "out"],
    ),
    "a pickle with code": (
        lambda work: written(work / "model.bin", pickle.dumps({"a": Surprise()})),
        ["model.bin", "out", "--config", "model/config.json"],
    ),
    "Keras weights only": (
        lambda work: (work / "model/model.safetensors").rename(work / "model/tf_model.h5"),
        ["model", "out"],
    ),
    "a folder in the way": (
        lambda work: ((work / "out").mkdir(), (work / "out/mine.txt").write_text("x")),
        ["model", "out"],
    ),
    "overwriting what is not ours": (
        lambda work: ((work / "out").mkdir(), (work / "out/mine.txt").write_text("x")),
        ["model", "out", "--overwrite"],
    ),
    "a length between blocks": (lambda work: None, ["model", "out", "--max-length", "1000", "--block", "64"]),
    "a length beyond reason": (lambda work: None, ["model", "out", "--max-length", "100000000"]),
    "a bad sparsity file": (
        lambda work: written(work / "sparsity.json", b'{"sparse_attention": {"mode": "big_bird"}}'),
        ["model", "out", "--sparsity", "sparsity.json"],
    ),
}
MESSAGES = {
    "nothing there": "modl: no such file or folder; did you mean model?",
    "no config.json": (
        "model/config.json: expected the model's config.json (the number of attention heads cannot be read "
        "from weights), found none; name it with --config"
    ),
    "config.json without heads": "config.json: num_attention_heads: expected a positive integer, found none",
    "config.json of another model": (
        "model: bert.embeddings.LayerNorm.bias: expected [48] from config.json, found [32], and 34 more do "
        "not fit; config.json has hidden_size 48 but the tensors 32: is this config.json from the same model?"
    ),
    "another family": (
        "config.json: expected a model_type of a BERT family (bert, roberta, xlm-roberta, camembert, electra,"
        " ernie, data2vec-text, distilbert, esm, albert, "
        "roberta-prelayernorm, xlm-roberta-xl, gte, nomic_bert, jina_embeddings_v3, modernbert, "
        "eurobert, bsa_bert), found 'gpt2'"
    ),
    "a decoder": (
        "config.json: expected the computation of BERT: an encoder with absolute positions and a layer norm "
        "after each sublayer, found is_decoder: a decoder"
    ),
    "a tensor that BERT does not use": (
        "model: expected only tensors that a model of a BERT family (bert, roberta, xlm-roberta, camembert, "
        "electra, ernie, data2vec-text, distilbert, esm, albert, "
        "roberta-prelayernorm, xlm-roberta-xl, gte, nomic_bert, jina_embeddings_v3, modernbert, "
        "eurobert, bsa_bert) computes with, found "
        "bert.embeddings.rank_embeddings.weight, which look like embeddings that BERT lacks; --ignore-tensors"
        " PATTERN leaves tensors out, and outputs then differ from the source's"
    ),
    "an adapter": (
        "model: expected the plain weights of a BERT family (bert, roberta, xlm-roberta, camembert, electra, "
        "ernie, data2vec-text, distilbert, esm, albert, "
        "roberta-prelayernorm, xlm-roberta-xl, gte, nomic_bert, jina_embeddings_v3, modernbert, "
        "eurobert, bsa_bert), found layers that PEFT wrapped "
        "(bert.encoder.layer.0.attention.self.query.base_layer.weight); merge the adapter into the model: "
        "model.merge_and_unload().save_pretrained(FOLDER), and convert FOLDER"
    ),
    "a Git LFS pointer": (
        "model/model.safetensors: expected the weights of torch.save or safetensors, found a Git LFS pointer;"
        " fetch the weights with git lfs pull"
    ),
    "a truncated file": ("model/model.safetensors: expected 125,624 bytes, found 125,524; is the download complete?"),
    "a pickle with code": (
        "model.bin: expected a pickle of tensors, plain values and objects of classes, found builtins.exec, "
        "which could run code; nothing was executed; if the file is your own, save its state_dict alone"
    ),
    "Keras weights only": (
        "model: expected a folder with weights (model.safetensors.index.json, model.safetensors, "
        "pytorch_model.bin.index.json, pytorch_model.bin), found TensorFlow weights (README.md, config.json, "
        "tf_model.h5, vocab.txt); load them with from_tf=True in transformers 4, and save the model from "
        "PyTorch"
    ),
    "a folder in the way": "out: it exists and is not empty; choose another folder or --overwrite",
    "overwriting what is not ours": (
        "out: only an earlier conversion may be overwritten, and it has no conversion.json of one; choose "
        "another folder"
    ),
    "a length between blocks": (
        "--max-length: expected a length in whole blocks of 64 tokens, found 1,000; choose 960 or 1,024"
    ),
    "a length beyond reason": (
        "windowed: expected at most 1,048,576 tokens in blocks of 64, found 100000000; choose larger blocks"
    ),
    "a bad sparsity file": (
        "sparse_attention: mode: expected one of windowed, dense, fixed, variable, bigbird, bslongformer, "
        "local, custom, found 'big_bird'"
    ),
    "verify": (
        "model/config.json: expected a converted folder, whose config.json has a sparse_attention section, "
        "found none; bsa-convert makes one"
    ),
}


def said(name: str, work: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What bsa-convert says in a case, with the working folder as `.`."""
    change, arguments = CASES[name]
    dense_bert(work / "model")
    change(work)
    monkeypatch.chdir(work)
    result = CliRunner().invoke(convert, arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == "" and result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    return result.stderr.removeprefix("Error: ").rstrip("\n").replace(f"{work.resolve()}/", "")


@pytest.mark.parametrize("name", CASES)
def test_it_says(name, tmp_path, monkeypatch):
    assert said(name, tmp_path, monkeypatch) == MESSAGES[name]


def test_a_folder_that_is_not_converted_is_not_verified(tmp_path, monkeypatch):
    dense_bert(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(verify, ["model", "--device", "cpu"])
    assert result.exit_code == 1
    first = result.stdout.splitlines()[1].strip()
    assert first == MESSAGES["verify"]


if __name__ == "__main__":
    for case in CASES:
        folder = Path(tempfile.mkdtemp())
        with pytest.MonkeyPatch.context() as patch:
            print(f"    {case!r}: {said(case, folder, patch)!r},")
        shutil.rmtree(folder)
    sys.exit()
