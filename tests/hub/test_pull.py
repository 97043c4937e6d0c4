"""What bsa-pull takes from a repository, what it leaves, and that only what the repository lists becomes a folder."""

import json
import shutil
import subprocess
import sys

import pytest
from commands import Commands
from hub_faults import Corrupt, Cut
from hub_folders import converted, digests, mark_verified
from hub_server import WRITER
from safetensors.numpy import load_file, save_file
from support.tiny import dense_bert


def pull(bsa, folder, repo="alice/model", *options, **kwargs):
    return bsa.run("pull", repo, folder, *options, **kwargs)


@pytest.fixture
def published(bsa, hub, model, hub_home):
    """The model, as it is stored on the Hub."""
    assert bsa.run("push", model, "alice/model", "--yes").code == 0
    shutil.rmtree(hub_home, ignore_errors=True)
    return model


@pytest.fixture
def uploaded(hub, finished):
    """The model on the Hub without a push, and a function that changes its files there."""

    def change(**changes: bytes | None):
        files = {name: (finished / name).read_bytes() for name in digests(finished)} | changes
        return hub.make_repo("alice/model", {name: content for name, content in files.items() if content is not None})

    change()
    return change


def downloads(hub) -> list[str]:
    """The large files that storage was asked for."""
    return [request for origin, request, *_ in hub.log if origin == "storage" and request.startswith("GET")]


def test_the_folder_is_the_one_that_was_pushed(bsa, hub, published, tmp_path):
    ended = pull(bsa, tmp_path / "out")
    assert (ended.code, ended.err) == (0, "")
    commit = hub.repos["alice/model"].head.id
    expected = digests(published)
    record = json.loads((tmp_path / "out" / "pulled.json").read_text())
    assert record == {"repo": "alice/model", "revision": "main", "commit": commit, "files": expected}
    (tmp_path / "out" / "pulled.json").unlink()
    assert digests(tmp_path / "out") == expected
    assert f"commit  {commit}\n" in ended.out
    assert ended.out.endswith(f'load    bsa_export.load("{tmp_path / "out"}")\n')
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_a_pre_norm_model_with_rotary_positions_goes_up_and_comes_down(bsa, hub, tmp_path):
    source = dense_bert(tmp_path / "source")
    tensors, config = load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text())
    del tensors["bert.embeddings.position_embeddings.weight"]
    norms = {"attention.output.LayerNorm": "pre_attention_ln", "output.LayerNorm": "post_attention_ln"}
    for name in list(tensors):
        for found, renamed in norms.items():
            if f".{found}." in name and ".layer." in name:
                tensors[name.replace(found, renamed)] = tensors.pop(name)
                break
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    config |= {"pre_layer_norm": True, "last_layer_norm": False, "position_embedding_type": "rotary", "rotary_dim": 4}
    (source / "config.json").write_text(json.dumps(config))
    model = mark_verified(converted(source, tmp_path / "model"))
    assert bsa.run("push", model, "alice/model", "--yes").code == 0
    assert pull(bsa, tmp_path / "out").code == 0
    (tmp_path / "out" / "pulled.json").unlink()
    assert digests(tmp_path / "out") == digests(model)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "bsa_bert"


@pytest.mark.parametrize("kind", ["modernbert", "jina_embeddings_v3", "esm-rotary"])
def test_models_that_are_not_built_as_bert_go_up_and_come_down(bsa_lfs, hub, tmp_path, kind):
    pytest.importorskip("transformers")
    from support.more_families import random_model

    import bsa_export

    random_model(kind).save_pretrained(tmp_path / "source")
    model = mark_verified(converted(tmp_path / "source", tmp_path / "model"))
    assert bsa_lfs.run("push", model, "alice/model", "--yes").code == 0
    assert pull(bsa_lfs, tmp_path / "out").code == 0
    loaded, expected = bsa_export.load(tmp_path / "out").state_dict(), bsa_export.load(model).state_dict()
    assert loaded.keys() == expected.keys() and all(loaded[name].equal(expected[name]) for name in expected)
    (tmp_path / "out" / "pulled.json").unlink()
    assert digests(tmp_path / "out") == digests(model)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- block-sparse-attention\n" in card


def test_what_came_by_xet_arrives_without_it(_with_xet, _without_xet, hub, model, tmp_path):
    assert _with_xet.run("push", model, "alice/model", "--yes").code == 0
    assert pull(_without_xet, tmp_path / "out").code == 0
    (tmp_path / "out" / "pulled.json").unlink()
    assert digests(tmp_path / "out") == digests(model)


@pytest.mark.parametrize("revision", ["dev", "v1", "commit"])
def test_branch_tag_and_commit(bsa_lfs, hub, uploaded, tmp_path, revision):
    repo = hub.repos["alice/model"]
    older = repo.head.id
    repo.refs |= {"refs/heads/dev": older, "refs/tags/v1": older}
    repo.commit("refs/heads/main", repo.head.files | {"vocab.txt": hub.stored(b"new\n")}, "newer")
    revision = older if revision == "commit" else revision
    assert pull(bsa_lfs, tmp_path / "out", f"alice/model@{revision}").code == 0
    record = json.loads((tmp_path / "out" / "pulled.json").read_text())
    assert (record["revision"], record["commit"]) == (revision, older)
    assert (tmp_path / "out" / "vocab.txt").read_bytes() != b"new\n"


def test_only_files_of_a_model_are_taken(bsa_lfs, hub, uploaded, tmp_path):
    strange = [
        "modeling.py",
        "pytorch_model.bin",
        ".env",
        "run.sh",
        "../up.json",
        "a/b/config.json",
        "1_Pooling/run.py",
    ]
    strange += [
        "optimizer.pt",
        "*.json",
        "..\\config.json",
        "tokenizer.pkl",
        "/etc/vocab.txt",
        "1_Pooling/../vocab.txt",
    ]
    uploaded(**{name: b"x" for name in strange}, LICENSE=b"mit")
    assert pull(bsa_lfs, tmp_path / "out").code == 0
    assert sorted(digests(tmp_path / "out")) == sorted(
        ["LICENSE", "README.md", "config.json", "conversion.json", "layout.png", "model.safetensors", "pulled.json"]
        + ["verification.json", "vocab.txt"]
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_dense_model_gets_a_sentence(bsa_lfs, hub, tmp_path):
    dense = dense_bert(tmp_path / "dense")
    hub.make_repo("alice/dense", {name: (dense / name).read_bytes() for name in digests(dense)})
    ended = pull(bsa_lfs, tmp_path / "out", "alice/dense")
    assert ended.code == 1
    message = "alice/dense: expected a converted model, with a conversion.json, found none; "
    message += "if it is a dense BERT, bsa-convert"
    assert f"Error: {message} alice/dense {tmp_path / 'out'} converts it; if it was trained" in ended.err
    assert f"bsa-convert alice/dense {tmp_path / 'out'} --trained-from CONVERSION makes it whole\n" in ended.err
    assert not downloads(hub) and not (tmp_path / "out").exists()


def test_a_folder_that_is_there(bsa_lfs, hub, uploaded, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    ended = pull(bsa_lfs, tmp_path / "out")
    assert ended.code == 1 and "not empty; choose another folder or --overwrite" in ended.err
    assert (
        "only an earlier conversion may be overwritten"
        in pull(bsa_lfs, tmp_path / "out", "alice/model", "--overwrite").err
    )
    assert list(digests(tmp_path / "out")) == ["mine.txt"]
    assert not hub.log


def test_an_earlier_conversion_is_replaced_if_asked(bsa_lfs, hub, uploaded, tmp_path, model):
    (model / "old.txt").write_text("old")
    assert pull(bsa_lfs, model, "alice/model", "--overwrite").code == 0
    assert "old.txt" not in digests(model) and "pulled.json" in digests(model)


# --- what arrives is what the repository lists


def _with_a_seven(weights: bytes) -> bytes:
    """A layout that holds a 7."""
    size = int.from_bytes(weights[:8], "little")
    entries = json.loads(weights[8 : 8 + size])
    start = (
        8 + size + next(entry["data_offsets"][0] for name, entry in entries.items() if name.endswith("master_layout"))
    )
    return weights[:start] + b"\7" + weights[start + 1 :]


@pytest.mark.parametrize("name", ["model.safetensors", "vocab.txt"])
def test_one_wrong_bit_is_downloaded_again(bsa_lfs, hub, uploaded, tmp_path, name, finished):
    hub.fault("GET /lfs/" if name == "model.safetensors" else f"GET .*/{name}", Corrupt(1000))
    assert pull(bsa_lfs, tmp_path / "out").code == 0
    assert digests(tmp_path / "out")[name] == digests(finished)[name]


@pytest.mark.parametrize("name", ["model.safetensors", "vocab.txt"])
def test_wrong_bits_every_time(bsa_lfs, hub, uploaded, tmp_path, name):
    hub.fault("GET /lfs/" if name == "model.safetensors" else f"GET .*/{name}", Corrupt(1000), times=99)
    ended = pull(bsa_lfs, tmp_path / "out")
    assert ended.code == 1
    assert f"alice/model: {name}: expected" in ended.err and "in two downloads" in ended.err
    assert not (tmp_path / "out").exists()
    hub.come_up()
    assert pull(bsa_lfs, tmp_path / "out").code == 0


def test_wrong_bits_by_xet(_with_xet, hub, hub_home, model, tmp_path):
    shutil.rmtree(hub_home, ignore_errors=True)
    assert _with_xet.run("push", model, "alice/model", "--yes").code == 0
    shutil.rmtree(hub_home, ignore_errors=True)
    hub.fault("GET /xorbs/", Corrupt(1000), times=99)
    ended = pull(_with_xet, tmp_path / "out")
    assert ended.code == 1 and "Traceback" not in ended.err
    assert not (tmp_path / "out").exists()
    hub.come_up()
    assert pull(_with_xet, tmp_path / "out").code == 0
    (tmp_path / "out" / "pulled.json").unlink()
    assert digests(tmp_path / "out") == digests(model)


def test_a_damaged_cache_is_mended(bsa_lfs, hub, hub_home, uploaded, tmp_path, finished):
    assert pull(bsa_lfs, tmp_path / "out").code == 0
    blob = (
        hub_home / "hub/models--alice--model/snapshots" / hub.repos["alice/model"].head.id / "model.safetensors"
    ).resolve()
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    assert pull(bsa_lfs, tmp_path / "again").code == 0
    assert digests(tmp_path / "again")["model.safetensors"] == digests(finished)["model.safetensors"]


def test_a_repository_that_differs_from_its_own_record(bsa_lfs, hub, uploaded, tmp_path):
    uploaded(**{"vocab.txt": b"another\n"})
    ended = pull(bsa_lfs, tmp_path / "out")
    assert ended.code == 1 and "expected vocab.txt with 2,290 bytes" in ended.err and "found 8 bytes" in ended.err
    uploaded(**{"vocab.txt": None})
    assert "expected vocab.txt" in pull(bsa_lfs, tmp_path / "out").err
    assert not [request for _, request, *_ in hub.log if "model.safetensors" in request], "weights were downloaded"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-1], "expected model.safetensors with 151,536 bytes"),
        (lambda data: data.replace(b"master_layout", b"master_layoux"), "master_layout: missing"),
        (_with_a_seven, "file check: model.safetensors: its checksum is not the one in conversion.json"),
        (lambda data: b"<html>" + data[6:], "expected the weights of torch.save or safetensors"),
    ],
    ids=["short", "no layouts", "a layout with a 7", "a page"],
)
def test_damaged_weights_do_not_become_a_folder(bsa_lfs, hub, uploaded, tmp_path, finished, change, message):
    uploaded(**{"model.safetensors": change((finished / "model.safetensors").read_bytes())})
    ended = pull(bsa_lfs, tmp_path / "out")
    assert ended.code == 1 and message in ended.err and "Traceback" not in ended.err
    assert str(tmp_path) not in ended.err
    assert not (tmp_path / "out").exists()


def test_a_damaged_layout_that_no_digest_covers(bsa_lfs, hub, uploaded, tmp_path, finished):
    record = json.loads((finished / "conversion.json").read_text())
    record["files"]["model.safetensors"] = {"bytes": (finished / "model.safetensors").stat().st_size}
    data = _with_a_seven((finished / "model.safetensors").read_bytes())
    uploaded(**{"model.safetensors": data, "conversion.json": json.dumps(record).encode()})
    ended = pull(bsa_lfs, tmp_path / "out")
    assert ended.code == 1 and "alice/model: it fails the layout check: " in ended.err
    assert not (tmp_path / "out").exists()


# --- the cache


def test_a_pull_goes_on_where_it_stopped(bsa_lfs, hub, hub_home, sharded, tmp_path):
    model = shutil.copytree(sharded, tmp_path / "model")
    assert bsa_lfs.run("push", model, "alice/model", "--yes").code == 0
    shutil.rmtree(hub_home, ignore_errors=True)
    hub.log.clear()
    hub.fault("GET /lfs/", Cut(100), skip=2, times=99)
    assert pull(bsa_lfs, tmp_path / "out").code == 1
    hub.come_up()
    hub.log.clear()
    assert pull(bsa_lfs, tmp_path / "out").code == 0
    assert 1 <= len(downloads(hub)) < sum(name.endswith(".safetensors") for name in digests(model))


def test_a_second_pull_downloads_nothing(bsa, hub, published, tmp_path):
    assert pull(bsa, tmp_path / "out").code == 0
    hub.log.clear()
    assert pull(bsa, tmp_path / "again").code == 0
    assert not downloads(hub)
    assert not [request for _, request, *_ in hub.log if "/resolve/" in request]


def test_offline_the_cache_answers(hub, uploaded, tmp_path, finished):
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    with Commands(**env) as bsa:
        assert pull(bsa, tmp_path / "out").code == 0
    hub.log.clear()
    with Commands(**env, HF_HUB_OFFLINE="1") as bsa:
        assert pull(bsa, tmp_path / "again").code == 0
        (tmp_path / "again" / "pulled.json").unlink()
        assert digests(tmp_path / "again") == digests(finished)
        snapshots = tmp_path / "home/hub/models--alice--model/snapshots"
        next(snapshots.glob("*/vocab.txt")).unlink()
        assert "expected vocab.txt" in pull(bsa, tmp_path / "third").err
    assert not hub.log


# --- by name


def _python(hub, home, program: str) -> str:
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": WRITER, "PATH": "/usr/bin:/bin"}
    ended = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


def test_what_others_put_into_the_cache_is_no_fault_of_the_model(hub, uploaded, tmp_path):
    program = (
        "from bsa_export import hub; folder = hub.fetch('alice/model').folder;"
        "(folder / 'pytorch_model.bin').write_bytes(b'x'); print(hub.fetch('alice/model').folder == folder)"
    )
    assert _python(hub, tmp_path / "home", program) == "True"


def test_convert_takes_the_name(hub, tmp_path):
    dense = dense_bert(tmp_path / "dense")
    others = {"onnx/model.onnx": b"o" * 200_000, "tf_model.h5": b"t" * 200_000, "pytorch_model.bin": b"p" * 200_000}
    others |= {"optimizer.pt": b"q" * 200_000, "training_args.bin": b"r" * 200_000, "openvino/openvino_model.bin": b"s"}
    repo = hub.make_repo("alice/dense", {name: (dense / name).read_bytes() for name in digests(dense)} | others)
    arguments = ["alice/dense@main", str(tmp_path / "out"), "--max-length", "256"]
    program = f"from bsa_export.cli.convert import main; main({arguments})"
    _python(hub, tmp_path / "home", program)
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    source = record["source"]
    assert (source["repo"], source["revision"], source["license"]) == ("alice/dense", repo.head.id, "mit")
    assert len(downloads(hub)) == 1
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: alice/dense\n" in card and "base_model_relation: finetune\n" in card
