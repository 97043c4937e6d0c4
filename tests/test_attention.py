"""`SparseSelfAttention` and `BertSparseSelfAttention` and the installed DeepSpeed's classes of those names."""

import copy
import pickle
import random
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from bsa_export import BertSparseSelfAttention, SparseSelfAttention
from bsa_export.deepspeed_compat import sparsity_config as configs
from bsa_export.errors import AttentionError, SparsityError
from bsa_export.ops import block_sparse_attention, deepspeed_kernels, deepspeed_source
from bsa_export.sparsity.configs import (
    BigBirdSparsityConfig,
    CustomSparsityConfig,
    DenseSparsityConfig,
    FixedSparsityConfig,
)

BLOCK, HEADS, LONGEST = 16, 2, 128
BERT = SimpleNamespace(hidden_size=32, num_attention_heads=HEADS)


@pytest.fixture(scope="module")
def deepspeed():
    """DeepSpeed's module of sparse attention."""
    reason = deepspeed_source.find()
    if isinstance(reason, str):
        pytest.skip(reason)
    return pytest.importorskip("deepspeed.ops.sparse_attention")


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make(config=None, **options) -> SparseSelfAttention:
    return SparseSelfAttention(config or FixedSparsityConfig(HEADS, BLOCK), max_seq_length=LONGEST, **options)


def make_bert(config=None) -> BertSparseSelfAttention:
    torch.manual_seed(0)
    return BertSparseSelfAttention(BERT, config, max_seq_length=LONGEST)


def expected(layout, query, key, value, **masks):
    return block_sparse_attention(query, key, value, layout, BLOCK, backend="reference", **masks)


def test_bert_state_dicts_interchange_with_deepspeeds(deepspeed):
    config = deepspeed.FixedSparsityConfig(num_heads=HEADS, block=BLOCK)
    torch.manual_seed(1)
    theirs = deepspeed.BertSparseSelfAttention(BERT, config)
    ours = BertSparseSelfAttention(BERT, BigBirdSparsityConfig(HEADS, BLOCK))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for source, target in ((theirs, ours), (ours, theirs)):
        nn.init.normal_(source.query.weight)
        source.sparse_self_attention.master_layout[:, -1] = 1 - source.sparse_self_attention.master_layout[:, -1]
        target.load_state_dict(source.state_dict(), strict=True)
        for name, tensor in target.state_dict().items():
            assert tensor.dtype == source.state_dict()[name].dtype, name
            assert torch.equal(tensor, source.state_dict()[name]), name


def test_longer_state_dicts_interchange_with_deepspeeds(deepspeed):
    theirs = deepspeed.SparseSelfAttention(deepspeed.BigBirdSparsityConfig(12, 64), max_seq_length=4096)
    ours = SparseSelfAttention(FixedSparsityConfig(12, 64), max_seq_length=4096)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert ours.master_layout.dtype == torch.int64
    assert torch.equal(ours.master_layout, theirs.master_layout)


@pytest.mark.parametrize("name", ["Dense", "Fixed", "Variable", "BigBird", "BSLongformer", "LocalSlidingWindow"])
def test_deepspeeds_sparsity_configs_are_taken(deepspeed, name):
    import random

    config = getattr(deepspeed, f"{name}SparsityConfig")(num_heads=HEADS, block=BLOCK)
    random.seed(0)
    ours = make(config)
    random.seed(0)
    theirs = deepspeed.SparseSelfAttention(config, max_seq_length=LONGEST)
    assert torch.equal(ours.master_layout, theirs.master_layout)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int64], ids=str)
def test_a_layout_from_a_file_is_the_one_that_counts(tmp_path, dtype):
    stored = make(BigBirdSparsityConfig(HEADS, BLOCK)).master_layout
    save_file({"sparse_self_attention.master_layout": stored.to(dtype)}, tmp_path / "layout.safetensors")
    bert, x = make_bert(), normal(1, LONGEST, 32)
    before = bert(x)
    missing = bert.load_state_dict(load_file(tmp_path / "layout.safetensors"), strict=False)
    assert not missing.unexpected_keys
    layout = bert.sparse_self_attention.master_layout
    assert layout.dtype == torch.int64 and torch.equal(layout, stored)
    after = bert(x)
    assert (after - before).abs().max() > 0.01
    q, k, v = (bert.transpose_for_scores(linear(x)) for linear in (bert.query, bert.key, bert.value))
    torch.testing.assert_close(after, expected(stored, q, k, v).permute(0, 2, 1, 3).flatten(2))


def test_loading_leaves_what_kernels_know_of_the_old_layout_alone():
    """A new tensor: what was derived from the old one belongs to its address and version (not of inference tensors)."""
    with torch.inference_mode():
        attention = make()
        old = attention.master_layout
        attention.load_state_dict(make(DenseSparsityConfig(HEADS, BLOCK)).state_dict())
        assert attention.master_layout.data_ptr() != old.data_ptr()
        assert attention.master_layout.all()


def test_modules_of_one_length_are_not_mixed_up():
    q, k, v = normal(3, 1, HEADS, LONGEST, 16)
    modules = [
        make(config(HEADS, BLOCK)) for config in (FixedSparsityConfig, BigBirdSparsityConfig, DenseSparsityConfig)
    ]
    modules += [SparseSelfAttention(FixedSparsityConfig(HEADS, 2 * BLOCK), max_seq_length=LONGEST)]
    wanted = [
        block_sparse_attention(q, k, v, m.master_layout, m.sparsity_config.block, backend="reference") for m in modules
    ]
    for _ in range(2):
        for module, output in zip(modules, wanted, strict=True):
            torch.testing.assert_close(module(q, k, v), output)
    modules[0].load_state_dict(modules[2].state_dict())
    torch.testing.assert_close(modules[0](q, k, v), wanted[2])


def test_copies_and_casts_keep_the_layout():
    attention = make()
    for other in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention)), make().half(), make().bfloat16()):
        assert other.master_layout.dtype == torch.int64
        assert torch.equal(other.master_layout, attention.master_layout)


def test_the_layout_of_a_custom_config_is_copied():
    layout = torch.eye(LONGEST // BLOCK, dtype=torch.int64).expand(HEADS, -1, -1).clone()
    module = make(SimpleNamespace(block=BLOCK, make_layout=lambda seq_len: layout))
    layout.zero_()
    assert module.master_layout.any()


MODES = [(None, None), ("add", None), ("mul", None), (None, "add"), (None, "mul"), ("mul", "add"), ("add", "mul")]


@pytest.mark.parametrize("shape", ["flat", "extended"])
@pytest.mark.parametrize(("padding", "pairs"), MODES, ids=str)
def test_masks_mean_what_they_mean_in_deepspeed(deepspeed, monkeypatch, padding, pairs, shape):
    """DeepSpeed's module, on its own kernels."""
    operators = deepspeed_kernels.operators()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seq = 2 * BLOCK
    options = {"key_padding_mask_mode": padding or "add", "attn_mask_mode": pairs or "mul", "max_seq_length": LONGEST}
    config = deepspeed.FixedSparsityConfig(num_heads=1, block=BLOCK, num_local_blocks=2)
    theirs, ours = deepspeed.SparseSelfAttention(config, **options), SparseSelfAttention(config, **options).to(device)
    layout = theirs.get_layout(seq)
    own = (
        operators.MatMul(layout, BLOCK, "sdd", trans_a=False, trans_b=True),
        operators.MatMul(layout, BLOCK, "dsd", trans_a=False, trans_b=False),
        operators.Softmax(layout, BLOCK),
    )
    monkeypatch.setattr(deepspeed.SparseSelfAttention, "ops", {seq: own})
    q, k, v = normal(3, 2, 1, seq, 16, dtype=torch.float16).to(device)
    masks = {}
    if padding:
        kept = (torch.arange(seq) < torch.tensor([[seq], [20]])).half()
        masks["key_padding_mask"] = kept * 3 if padding == "mul" else (1 - kept) * -10000 + normal(2, seq).half()
    if pairs:
        kept = (normal(seq, seq, seed=1) < 1).half() + torch.eye(seq).half()
        masks["attn_mask"] = kept if pairs == "mul" else (1 - kept) * 4
    if shape == "extended":
        masks = {name: mask[:, None, None] if "key" in name else mask[None, None] for name, mask in masks.items()}
    masks = {name: mask.to(device) for name, mask in masks.items()}
    rpe = normal(2, 1, seq, seq, seed=2, dtype=torch.float16).to(device)
    found = ours(q, k, v, rpe=rpe, **masks)
    torch.testing.assert_close(
        found, theirs(q, k.mT if shape == "extended" else k, v, rpe=rpe, **masks), atol=2e-3, rtol=0
    )
    if masks:
        assert (found - ours(q, k, v, rpe=rpe)).abs().max() > 0.1


def test_a_bool_mask_says_who_takes_part_in_mode_mul():
    attention = make(key_padding_mask_mode="mul", attn_mask_mode="mul")
    q, k, v = normal(3, 2, HEADS, 40, 16)
    keys, pairs = normal(2, 40) < 1, normal(40, 40, seed=1) < 1
    output = attention(q, k, v, key_padding_mask=keys[:, None, None], attn_mask=pairs)
    layout = attention.get_layout(40)
    torch.testing.assert_close(output, expected(layout, q, k, v, key_padding_mask=keys, attn_mask=pairs))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8], ids=str)
@pytest.mark.parametrize("name", ["key_padding_mask", "attn_mask"])
def test_a_mask_of_who_takes_part_is_refused_in_mode_add_where_deepspeed_would_add_1(name, dtype):
    attention = make(key_padding_mask_mode="add", attn_mask_mode="add")
    said = f'{name}.* in mode add, found .*{name}_mode="mul"'
    mask = torch.ones(2 if "key" in name else 32, 32, dtype=dtype)
    mask[1, 20:] = 0
    with pytest.raises(AttentionError, match=said):
        attention(*normal(3, 2, HEADS, 32, 16), **{name: mask})


def test_bert_takes_a_bool_mask_as_transformers_means_it():
    bert, x = make_bert(), normal(2, 40, 32)
    keys = torch.arange(40) < torch.tensor([[40], [25]])
    added = torch.where(keys, 0.0, float("-inf"))
    assert torch.equal(bert(x, keys[:, None, None]), bert(x, added[:, None, None]))
    assert not torch.equal(bert(x, keys[:, None, None]), bert(x))


def test_masks_of_integers_are_numbers():
    q, k, v = normal(3, 1, HEADS, 32, 16)
    kept = torch.arange(32)[None] < 20
    for mode, mask in (("add", ~kept * -10000), ("mul", kept.int())):
        output = make(key_padding_mask_mode=mode)(q, k, v, key_padding_mask=mask)
        torch.testing.assert_close(output, expected(make().get_layout(32), q, k, v, key_padding_mask=kept))


def test_a_sequence_without_keys_gives_zeros():
    q, k, v = normal(3, 2, HEADS, 32, 16)
    output = make(key_padding_mask_mode="mul")(q, k, v, key_padding_mask=torch.tensor([[1.0], [0.0]]).expand(2, 32))
    assert output[0].all() and not output[1].any()


def test_one_token_is_a_sequence():
    q, k, v = normal(3, 2, HEADS, 1, 16)
    torch.testing.assert_close(make()(q, k, v, key_padding_mask=torch.zeros(2, 1, 1, 1)), v)


def _one_of_two(rank: int, folder: str) -> None:
    """A process of its own, with random blocks of its own: each writes its layouts before and after they are used."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    random.seed(rank)
    attention = make(configs.BigBirdSparsityConfig(HEADS, BLOCK, different_layout_per_head=True))
    drawn = attention.master_layout
    q, k, v = normal(3, 1, HEADS, LONGEST, 16)
    output = attention(q, k, v)
    layout = attention.master_layout.clone()
    attention.load_state_dict({"master_layout": torch.full_like(layout, rank)})
    assert (attention.get_layout(LONGEST) == rank).all()  # once: what is loaded later counts
    torch.save((drawn, layout, output), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="a torch without torch.distributed")
def test_random_layouts_are_those_of_rank_0_everywhere(tmp_path):
    torch.multiprocessing.spawn(_one_of_two, (str(tmp_path),), nprocs=2)
    (drawn, layout, output), (other_drawn, other_layout, other_output) = (
        torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)
    )
    assert not torch.equal(drawn, other_drawn)
    assert torch.equal(layout, drawn) and torch.equal(other_layout, drawn)
    assert torch.equal(output, other_output)


@pytest.mark.parametrize("seq", [1, 16, 77, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dense_layout_is_dense_attention(dtype, seq):
    bert = make_bert(DenseSparsityConfig(HEADS, BLOCK)).to(dtype)
    x = normal(2, seq, 32, dtype=dtype).requires_grad_()
    mask = torch.zeros(2, 1, 1, seq, dtype=dtype)
    mask[1, ..., seq // 2 + 1 :] = torch.finfo(dtype).min
    output = bert(x, mask)
    assert output.shape == (2, seq, 32) and output.dtype == dtype
    q, k, v = (bert.transpose_for_scores(linear(x)) for linear in (bert.query, bert.key, bert.value))
    dense = scaled_dot_product_attention(q, k, v, attn_mask=mask).permute(0, 2, 1, 3).reshape(2, seq, 32)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(output, dense, atol=tolerance, rtol=tolerance)
    grads = [torch.autograd.grad(y.float().square().sum(), x, retain_graph=True)[0] for y in (output, dense)]
    torch.testing.assert_close(*grads, atol=16 * tolerance, rtol=16 * tolerance)


def test_without_a_config_it_is_fixed_with_the_models_heads():
    bert = BertSparseSelfAttention(SimpleNamespace(hidden_size=48, num_attention_heads=12))
    layout = bert.sparse_self_attention.master_layout
    assert layout.shape == (12, 128, 128) and layout.dtype == torch.int64
    assert torch.equal(layout, torch.from_numpy(FixedSparsityConfig(12).make_layout(2048)).long())


def test_a_shorter_sequence_uses_the_stored_layouts_slice():
    """Not the layout made for that length, which differs."""
    attention = make(FixedSparsityConfig(HEADS, BLOCK, num_local_blocks=3))
    made = torch.from_numpy(attention.sparsity_config.make_layout(4 * BLOCK))
    assert not torch.equal(attention.get_layout(4 * BLOCK), made)
    q, k, v = normal(3, 1, HEADS, 4 * BLOCK, 16)
    torch.testing.assert_close(attention(q, k, v), expected(attention.master_layout[:, :4, :4], q, k, v))


REFUSED = {
    "config": (lambda: SparseSelfAttention(), "sparsity_config: expected one, such as FixedSparsityConfig"),
    "key mode": (lambda: make(key_padding_mask_mode="bool"), "key_padding_mask_mode: expected add or mul, found 'bool'"),  # noqa: E501
    "pair mode": (lambda: make(attn_mask_mode=None), "attn_mask_mode: expected add or mul, found None"),
    "length": (
        lambda: make()(*normal(3, 1, HEADS, LONGEST + 1, 16)),
        "sequence: expected at most the 128 tokens of the master layout, found 129; make the module with a larger",
    ),
    "master length": (lambda: SparseSelfAttention(FixedSparsityConfig(HEADS), max_seq_length=100), "multiple of block"),
    "empty row": (
        lambda: make(SimpleNamespace(block=BLOCK, make_layout=lambda n: torch.zeros(HEADS, n // BLOCK, n // BLOCK).long())),  # noqa: E501
        "sparsity_config: head 0, row 0: keeps no block",
    ),
    "custom": (lambda: make(CustomSparsityConfig(HEADS, BLOCK)), "a custom layout comes from a file"),
    "hidden": (
        lambda: BertSparseSelfAttention(SimpleNamespace(hidden_size=100, num_attention_heads=12)),
        "hidden_size: expected a multiple of num_attention_heads 12, found 100",
    ),
    "heads": (
        lambda: BertSparseSelfAttention(BERT, FixedSparsityConfig(4)),
        "sparsity_config: expected a layout of 2 heads, as num_attention_heads, found 4",
    ),
    "key": (lambda: make()(normal(1, 2, 32, 16), normal(1, 2, 48, 16), normal(1, 2, 32, 16)), r"key: expected the query's"),  # noqa: E501
    "query heads": (lambda: make()(*normal(3, 1, 3, 32, 16)), "layout: expected .* as the query has 3 heads"),
    "padding": (
        lambda: make()(*normal(3, 2, HEADS, 32, 16), key_padding_mask=torch.zeros(2, 1, 32, 32)),
        r"key_padding_mask: expected \[batch, seq\] or \[batch, 1, 1, seq\], found .*; a mask of pairs is an attn_mask",
    ),
    "padding length": (
        lambda: make()(*normal(3, 2, HEADS, 32, 16), key_padding_mask=torch.zeros(2, 1, 1, 31)),
        r"key_padding_mask: expected \[2, 32\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "said"), REFUSED.values(), ids=REFUSED)
def test_refused_in_a_sentence(call, said):
    with pytest.raises((AttentionError, SparsityError), match=f"^.*{said}") as error:
        call()
    assert isinstance(error.value, ValueError)


def test_a_layout_of_another_length_is_refused_by_name():
    with pytest.raises(RuntimeError, match="size mismatch for master_layout"):
        make().load_state_dict(SparseSelfAttention(FixedSparsityConfig(HEADS, BLOCK)).state_dict())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu_it_is_what_it_is_on_a_cpu(dtype):
    bert, x = make_bert(), normal(2, 77, 32)
    with torch.no_grad():
        on_cpu = bert(x, torch.zeros(2, 1, 1, 77))
        on_gpu = bert.to("cuda", dtype)(x.to("cuda", dtype), torch.zeros(2, 1, 1, 77, device="cuda"))
    assert bert.sparse_self_attention.master_layout.is_cuda
    torch.testing.assert_close(on_gpu.float().cpu(), on_cpu, atol=8 * torch.finfo(dtype).eps, rtol=0.02)
