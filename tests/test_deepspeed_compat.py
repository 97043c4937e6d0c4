"""Old code that imports `deepspeed.ops.sparse_attention`, unchanged."""

import itertools
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from bsa_export.deepspeed_compat import sparsity_config as configs
from bsa_export.deepspeed_compat.matmul import MatMul
from bsa_export.deepspeed_compat.softmax import Softmax
from bsa_export.errors import AttentionError

BLOCK, HEADS, ROWS, COLUMNS = 16, 3, 4, 5


def layout_of(heads, rows, columns, seed=0):
    """A random layout; every row and column keeps a block, but one row only one."""
    layout = torch.rand(heads, rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.4
    for i in range(max(rows, columns)):
        layout[:, i % rows, i % columns] = True
    return layout.long()


def to_sparse(dense, layout, block=BLOCK):
    """The kept blocks of `[batch, heads, rows, columns]`, picked one by one in the order of a layout's rows."""
    kept = [
        dense[:, h, r * block : (r + 1) * block, c * block : (c + 1) * block] for h, r, c in layout.nonzero().tolist()
    ]
    return torch.stack(kept, dim=1)


def to_mask(layout, block=BLOCK):
    return layout.bool().repeat_interleave(block, -2).repeat_interleave(block, -1)


def random_tensor(*shape, dtype=torch.float64, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_as_good_as_dense(found, exact, dense):
    """At most twice the error of plain PyTorch in the same dtype, both against float64."""
    found_error, dense_error = ((x.double() - exact).abs().max() for x in (found, dense))
    assert found_error <= 2 * dense_error + 1e-12 * exact.abs().max()


@pytest.mark.parametrize("trans_b", [False, True], ids=["b", "bT"])
@pytest.mark.parametrize("trans_a", [False, True], ids=["a", "aT"])
@pytest.mark.parametrize("mode", ["sdd", "dsd", "dds"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_matmul_and_its_gradients_are_dense_math_on_kept_blocks(mode, trans_a, trans_b, dtype):
    layout = layout_of(HEADS, ROWS, COLUMNS)
    rows, columns, other = ROWS * BLOCK, COLUMNS * BLOCK, 48
    # The shapes of a, b as they are multiplied; a sparse one has the layout's shape before its transpose.
    if mode == "sdd":
        shape_a, shape_b = (rows, other), (other, columns)
    elif mode == "dsd":
        shape_a, shape_b = ((columns, rows) if trans_a else (rows, columns)), (rows if trans_a else columns, other)
    else:
        shape_a, shape_b = (other, columns if trans_b else rows), ((columns, rows) if trans_b else (rows, columns))
    a = random_tensor(2, HEADS, *(shape_a[::-1] if trans_a else shape_a), seed=1, dtype=dtype)
    b = random_tensor(2, HEADS, *(shape_b[::-1] if trans_b else shape_b), seed=2, dtype=dtype)

    def run(dtype, sparse):
        x, y = (t.to(dtype).requires_grad_() for t in (a, b))
        if sparse:
            operands = [to_sparse(t, layout) if mode[i + 1] == "s" else t for i, t in enumerate((x, y))]
            out = MatMul(layout, BLOCK, mode, trans_a=trans_a, trans_b=trans_b)(*operands)
        else:
            operands = [t * to_mask(layout).to(dtype) if mode[i + 1] == "s" else t for i, t in enumerate((x, y))]
            out = (operands[0].mT if trans_a else operands[0]) @ (operands[1].mT if trans_b else operands[1])
            out = to_sparse(out, layout) if mode == "sdd" else out
        weight = random_tensor(*out.shape, seed=3).to(dtype)
        return out, *torch.autograd.grad(
            (out * weight).float().sum() if dtype != torch.float64 else (out * weight).sum(), (x, y)
        )

    for found, exact, dense in zip(run(dtype, True), run(torch.float64, False), run(dtype, False), strict=True):
        assert found.dtype == dtype and found.shape == exact.shape
        assert_as_good_as_dense(found, exact, dense)


def test_matmul_takes_a_layout_without_heads_and_operands_without_a_batch():
    layout = layout_of(1, ROWS, COLUMNS)[0]
    a, b = random_tensor(HEADS, ROWS * BLOCK, 32), random_tensor(HEADS, 32, COLUMNS * BLOCK, seed=2)
    found = MatMul(layout, BLOCK, "sdd")(a, b)
    assert torch.allclose(found, to_sparse((a @ b)[None], layout.expand(HEADS, -1, -1))[0])
    assert MatMul(layout, BLOCK, "dsd")(found, b.mT).shape == (HEADS, ROWS * BLOCK, 32)
    single = MatMul(layout, BLOCK, "sdd")(a[0], b[0])
    assert torch.allclose(single, to_sparse((a @ b)[None, :1], layout[None])[0])


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda m: m(torch.zeros(1, 3, 64, 32), torch.zeros(1, 3, 32, 64)), "expected 80 columns of b, found 64"),
        (
            lambda m: m(torch.zeros(1, 2, 64, 32), torch.zeros(1, 2, 32, 80)),
            "expected 3 heads, as in the layout, found 2",
        ),
        (lambda m: m(torch.zeros(1, 3, 64, 32), torch.zeros(1, 3, 32, 80).half()), "one dtype"),
        (lambda m: m(torch.zeros(1, 3, 64, 16), torch.zeros(1, 3, 32, 80)), "rows of b, as a has columns"),
    ],
    ids=["shape", "heads", "dtype", "inner"],
)
def test_matmul_refuses_operands_that_do_not_fit(call, said):
    with pytest.raises(ValueError, match=said):
        call(MatMul(layout_of(HEADS, ROWS, COLUMNS), BLOCK, "sdd"))


def test_matmul_knows_three_modes():
    with pytest.raises(NotImplementedError, match="sdd, dsd or dds"):
        MatMul(layout_of(1, 2, 2), BLOCK, "ddd")


MASKS = list(itertools.product(["none", "rpe"], ["none", "add", "mul"], ["none", "add", "mul"]))


DTYPES = itertools.cycle([torch.float16, torch.float32, torch.float64])


@pytest.mark.parametrize("rpe, padding, pairs, dtype", [(*masks, next(DTYPES)) for masks in MASKS], ids=str)
def test_softmax_and_its_gradients_are_dense_math_on_kept_blocks(rpe, padding, pairs, dtype):
    layout, length = layout_of(HEADS, ROWS, ROWS), ROWS * BLOCK
    x = random_tensor(2, HEADS, length, length, dtype=dtype)
    bias = random_tensor(1, HEADS, length, length, seed=2, dtype=dtype) if rpe == "rpe" else None
    kept_keys = torch.ones(2, length)
    kept_keys[1, -20:] = 0
    kept_pairs = (torch.rand(length, length, generator=torch.Generator().manual_seed(3)) < 0.8) | torch.eye(
        length
    ).bool()

    def mask(kept, mode):
        if mode == "none":
            return None
        return kept.to(dtype) if mode == "mul" else torch.where(kept.bool(), 0.0, -30.0).to(dtype)

    key_mask, pair_mask = mask(kept_keys, padding), mask(kept_pairs, pairs)
    found_in, dense_in = x.clone().requires_grad_(), x.double().requires_grad_()
    found = Softmax(layout, BLOCK)(
        to_sparse(found_in, layout),
        scale=0.125,
        rpe=bias,
        key_padding_mask=key_mask,
        attn_mask=pair_mask,
        **({} if padding == "none" else {"key_padding_mask_mode": padding}),
        **({} if pairs == "none" else {"attn_mask_mode": pairs}),
    )
    scores = dense_in * 0.125
    scores = scores if bias is None else scores + bias.double()
    for added, mode in ((None if key_mask is None else key_mask[:, None, None], padding), (pair_mask, pairs)):
        if mode == "add":
            scores = scores + added.double()
        elif mode == "mul":
            scores = scores.masked_fill(added == 0, float("-inf"))
    dense = torch.softmax(scores.masked_fill(~to_mask(layout), float("-inf")), -1).nan_to_num(0.0)
    exact = to_sparse(dense, layout)
    tolerance = {torch.float16: 1e-3, torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, atol=tolerance, rtol=0)
    weight = random_tensor(*exact.shape, seed=4)
    (found_grad,) = torch.autograd.grad((found.double() * weight).sum(), found_in)
    (dense_grad,) = torch.autograd.grad((exact * weight).sum(), dense_in)
    torch.testing.assert_close(found_grad.double(), dense_grad, atol=tolerance, rtol=0)
    assert not torch.allclose(found.double(), exact.roll(1, dims=1), atol=tolerance)


def test_softmax_writes_into_its_input_and_returns_it_as_deepspeeds_does():
    layout = layout_of(HEADS, ROWS, ROWS)
    leaf = random_tensor(2, int(layout.sum()), BLOCK, BLOCK).requires_grad_()
    weight = random_tensor(*leaf.shape, seed=2)
    expected = Softmax(layout, BLOCK)(leaf, scale=0.5)  # autograd lets nobody write into a leaf
    assert expected is not leaf and not torch.equal(expected, leaf)
    (of_leaf,) = torch.autograd.grad((expected * weight).sum(), leaf)
    scores = leaf * 1
    scores.retain_grad()
    found = Softmax(layout, BLOCK)(scores, scale=0.5)
    assert found is scores and torch.equal(scores, expected)
    found.backward(weight)
    # DeepSpeed's unit tests read the gradient of the scores from the tensor that now holds the probabilities.
    torch.testing.assert_close(scores.grad, of_leaf)
    torch.testing.assert_close(leaf.grad, of_leaf)


@pytest.mark.parametrize(
    "make",
    [
        lambda leaf: leaf[:1].expand(2, -1, -1, -1),
        lambda leaf: torch.stack([leaf, leaf], 1).unbind(1)[0],
        lambda leaf: leaf.view_as(leaf),
    ],
    ids=["expanded", "unbound", "view of a leaf"],
)
def test_softmax_returns_a_new_tensor_where_autograd_does_not_allow_to_write(make):
    layout = layout_of(HEADS, ROWS, ROWS)
    leaf = random_tensor(2, int(layout.sum()), BLOCK, BLOCK).requires_grad_()
    found, expected = (Softmax(layout, BLOCK)(each) for each in (make(leaf), make(leaf).detach().clone()))
    assert torch.equal(found, expected)
    assert torch.autograd.grad(found.square().sum(), leaf)[0].any()


def test_softmax_over_nothing_is_zero_not_nan():
    layout = layout_of(1, 2, 2)
    x = random_tensor(1, int(layout.sum()), BLOCK, BLOCK, dtype=torch.float32).requires_grad_()
    out = Softmax(layout, BLOCK)(x, key_padding_mask=torch.zeros(1, 2 * BLOCK), key_padding_mask_mode="mul")
    assert not out.any()
    assert torch.autograd.grad(out.sum(), x)[0].isfinite().all()


def test_softmax_wants_masks_of_its_dtype():
    layout = layout_of(1, 2, 2)
    x = torch.zeros(1, int(layout.sum()), BLOCK, BLOCK)
    with pytest.raises(ValueError, match="key_padding_mask: expected torch.float32, as x, found torch.float16"):
        Softmax(layout, BLOCK)(x, key_padding_mask=torch.zeros(1, 32).half())


@pytest.mark.parametrize("batched", [True, False], ids=["batch", "no batch"])
def test_softmax_takes_a_layout_without_heads_as_matmul_does(batched):
    layout = layout_of(1, ROWS, ROWS)[0]
    a, b = (random_tensor(2, HEADS, ROWS * BLOCK, 32, seed=seed) for seed in (1, 2))
    a, b = (a, b) if batched else (a[0], b[0])
    of_all, of_each = layout, layout.expand(HEADS, -1, -1)
    found, expected = (
        Softmax(each, BLOCK)(MatMul(each, BLOCK, "sdd", trans_b=True)(a, b), scale=0.1) for each in (of_all, of_each)
    )
    assert torch.equal(found, expected)


def test_softmax_takes_masks_with_dimensions_of_1():
    layout, length = layout_of(HEADS, ROWS, ROWS), ROWS * BLOCK
    x = random_tensor(2, int(layout.sum()), BLOCK, BLOCK)
    keys, pairs = random_tensor(2, length, seed=2), random_tensor(length, length, seed=3)
    softmax = Softmax(layout, BLOCK)
    flat = softmax(x.clone(), key_padding_mask=keys, attn_mask=pairs)
    assert torch.equal(softmax(x.clone(), key_padding_mask=keys[:, None, None], attn_mask=pairs[None, None]), flat)
    one = softmax(x[0].clone(), rpe=pairs, key_padding_mask=keys[:1], attn_mask=pairs)
    both = softmax(x.clone(), rpe=pairs, key_padding_mask=keys[:1], attn_mask=pairs)
    assert torch.equal(one, both[0])


@pytest.mark.parametrize(
    "masks, said",
    [
        ({"key_padding_mask": torch.zeros(2, 80)}, r"key_padding_mask: expected \[2, 64\] or .*, found \[2, 80\]"),
        ({"key_padding_mask": torch.zeros(2, 60)}, r"key_padding_mask: expected \[2, 64\]"),
        ({"key_padding_mask": torch.zeros(3, 64)}, r"key_padding_mask: expected \[2, 64\]"),
        ({"key_padding_mask": torch.zeros(2, 1, 64, 64)}, "a mask of pairs is an attn_mask"),
        ({"attn_mask": torch.zeros(160, 160)}, r"attn_mask: expected \[2, 3, 64, 64\] or .*, found \[160, 160\]"),
        ({"attn_mask": torch.zeros(60, 60)}, "attn_mask: expected"),
        ({"attn_mask": torch.zeros(1, 1, 1, 64, 64)}, "attn_mask: expected"),
        ({"rpe": torch.zeros(3, 80, 80)}, r"rpe: expected \[2, 3, 64, 64\]"),
    ],
    ids=lambda value: "-".join(f"{k}{list(v.shape)}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_softmax_refuses_masks_of_another_length(masks, said):
    layout = layout_of(HEADS, ROWS, ROWS)
    x = torch.zeros(2, int(layout.sum()), BLOCK, BLOCK)
    with pytest.raises(AttentionError, match=said):
        Softmax(layout, BLOCK)(x, **masks)


def test_softmax_refuses_another_number_of_blocks():
    layout = layout_of(1, ROWS, ROWS)[0]
    with pytest.raises(AttentionError, match="expected x of"):
        Softmax(layout, BLOCK)(torch.zeros(1, 2 * int(layout.sum()) + 1, BLOCK, BLOCK))


def deepspeeds_own():
    """DeepSpeed's `MatMul` and `Softmax` as installed, on a GPU or Triton's interpreter."""
    pytest.importorskip("triton")
    from bsa_export.ops import deepspeed_kernels

    operators = deepspeed_kernels.operators()
    if isinstance(operators, str):
        pytest.skip(operators)
    if not (torch.cuda.is_available() or deepspeed_kernels.interpreted()):
        pytest.skip("neither a CUDA GPU nor Triton's interpreter")
    return operators


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("trans_b", [False, True], ids=["b", "bT"])
@pytest.mark.parametrize("trans_a", [False, True], ids=["a", "aT"])
@pytest.mark.parametrize("mode", ["sdd", "dsd", "dds"])
@torch.no_grad()
def test_matmul_gives_what_deepspeeds_own_gives(mode, trans_a, trans_b):
    """Results only: DeepSpeed writes the gradient of a transposed dense operand (sdd's a, dsd's b) out of bounds."""
    theirs, layout, size = deepspeeds_own(), layout_of(2, 3, 3).to(DEVICE), 3 * BLOCK
    shapes = {"sdd": ((size, 32), (32, size)), "dsd": ((size, size), (size, 32)), "dds": ((32, size), (size, size))}
    operands = []
    for i, (shape, kind, transposed) in enumerate(zip(shapes[mode], mode[1:], (trans_a, trans_b), strict=True)):
        x = random_tensor(2, 2, *(shape[::-1] if transposed else shape), seed=i, dtype=torch.float16).to(DEVICE)
        operands.append(to_sparse(x, layout) if kind == "s" else x)
    ours, own = (each(layout.cpu(), BLOCK, mode, trans_a, trans_b)(*operands) for each in (MatMul, theirs.MatMul))
    torch.testing.assert_close(ours, own, atol=2e-2, rtol=2e-3)


@pytest.mark.parametrize("mode", ["add", "mul"])
def test_softmax_gives_what_deepspeeds_own_gives(mode):
    theirs, layout, size = deepspeeds_own(), layout_of(2, 3, 3), 3 * BLOCK
    x = to_sparse(random_tensor(2, 2, size, size, dtype=torch.float16), layout).to(DEVICE)
    weight = random_tensor(*x.shape, seed=2, dtype=torch.float16).to(DEVICE)
    kept = (torch.arange(size) < torch.tensor([[size], [size - 10]])).to(DEVICE, torch.float16)
    pairs = torch.ones(size, size, dtype=torch.float16, device=DEVICE).tril(size // 2)
    masks = (kept, pairs) if mode == "mul" else ((kept - 1) * 100, (pairs - 1) * 100)
    rpe = random_tensor(2, 2, size, size, seed=3, dtype=torch.float16).to(DEVICE)
    found = []
    for each in (Softmax, theirs.Softmax):
        leaf = x.clone().requires_grad_()
        # DeepSpeed's works in place, so not on a leaf.
        out = each(layout, BLOCK)(
            leaf * 1,
            scale=0.5,
            rpe=rpe,
            key_padding_mask=masks[0],
            attn_mask=masks[1],
            key_padding_mask_mode=mode,
            attn_mask_mode=mode,
        )
        found.append((out, torch.autograd.grad((out * weight).sum(), leaf)[0]))
    for ours, own in zip(*found, strict=True):
        torch.testing.assert_close(ours, own, atol=2e-3, rtol=2e-3)


CONFIGS = {
    "dense": ("DenseSparsityConfig", {}),
    "fixed": ("FixedSparsityConfig", dict(num_local_blocks=4, num_global_blocks=1)),
    "variable": ("VariableSparsityConfig", dict(num_random_blocks=2, local_window_blocks=[2, 4])),
    "bigbird": ("BigBirdSparsityConfig", dict(num_random_blocks=2, different_layout_per_head=True)),
    "bslongformer": ("BSLongformerSparsityConfig", dict(global_block_indices=[0, 5])),
    "local": ("LocalSlidingWindowSparsityConfig", {}),
}


@pytest.mark.parametrize("name, parameters", CONFIGS.values(), ids=CONFIGS)
def test_a_config_makes_deepspeeds_layout_from_pythons_global_random(name, parameters):
    theirs = pytest.importorskip("deepspeed.ops.sparse_attention.sparsity_config")
    layouts = []
    for module in (theirs, configs):
        random.seed(7)
        layouts.append(getattr(module, name)(num_heads=4, block=16, **parameters).make_layout(256))
    assert layouts[1].dtype == torch.int64
    assert torch.equal(*layouts)


def test_a_config_of_ones_own_is_written_as_ever():
    class EveryOther(configs.SparsityConfig):
        def __init__(self, num_heads, step):
            super().__init__(num_heads, block=16)
            self.step = step

        def make_layout(self, seq_len):
            layout = self.setup_layout(seq_len)
            layout[0, :, :: self.step] = 1
            return self.check_and_propagate_first_head_layout(layout)

    layout = EveryOther(num_heads=2, step=2).make_layout(64)
    assert torch.equal(layout[1], torch.tensor([[1, 0, 1, 0]] * 4))


def run_python(code: str, *paths: Path) -> str:
    """Runs code in a process of its own, with `paths` in front of everything that is installed."""
    start = f"import sys; sys.path[:0] = {[str(path) for path in paths]!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", start + textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def fake_deepspeed(folder: Path, files: dict[str, str]) -> Path:
    for name, text in {
        "deepspeed/__init__.py": "__version__ = '0.19.7'",
        "deepspeed/ops/__init__.py": "",
        **files,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


EVERY_NAME = """
    import bsa_export.deepspeed_compat
    from deepspeed.ops.sparse_attention import (SparsityConfig, DenseSparsityConfig, FixedSparsityConfig,
        VariableSparsityConfig, BigBirdSparsityConfig, BSLongformerSparsityConfig, LocalSlidingWindowSparsityConfig,
        SparseSelfAttention, BertSparseSelfAttention, SparseAttentionUtils)
    from deepspeed.ops.sparse_attention.matmul import MatMul
    from deepspeed.ops.sparse_attention.softmax import Softmax
    from deepspeed.ops.sparse_attention.sparsity_config import FixedSparsityConfig as again
    from deepspeed.ops.sparse_attention.sparse_self_attention import SparseSelfAttention
    from deepspeed.ops.sparse_attention.bert_sparse_self_attention import BertSparseSelfAttention
    from deepspeed.ops.sparse_attention.sparse_attention_utils import SparseAttentionUtils
    import deepspeed.ops.sparse_attention as module
    assert module.FixedSparsityConfig is FixedSparsityConfig is again
    assert MatMul.__module__ == "bsa_export.deepspeed_compat.matmul"
"""

WITHOUT_DEEPSPEED = """
    import sys
    from importlib.machinery import PathFinder
    class Without(PathFinder):
        @classmethod
        def find_spec(cls, name, path=None, target=None):
            return None if name.partition(".")[0] == "deepspeed" else super().find_spec(name, path, target)
    sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""


def test_every_name_is_there_beside_a_deepspeed_that_dropped_them(tmp_path):
    code = EVERY_NAME + "    import deepspeed; print(deepspeed.__version__, deepspeed.ops.sparse_attention is module)"
    assert run_python(code, fake_deepspeed(tmp_path, {})) == "0.19.7 True"


def test_every_name_is_there_without_deepspeed():
    code = WITHOUT_DEEPSPEED + EVERY_NAME + "    from bsa_export.deepspeed_compat import uninstall; uninstall()\n"
    code += """
    try:
        import deepspeed
    except ModuleNotFoundError:
        print("gone")
    """
    assert run_python(code) == "gone"


def test_an_installed_module_stays_unless_force_is_asked(tmp_path):
    own = {"deepspeed/ops/sparse_attention/__init__.py": "MatMul = 'theirs'"}
    code = """
        from bsa_export import deepspeed_compat
        import deepspeed.ops.sparse_attention
        print(hasattr(deepspeed.ops.sparse_attention, "FixedSparsityConfig"), end=" ")
        deepspeed_compat.install(force=True)
        from deepspeed.ops.sparse_attention import FixedSparsityConfig
        print(FixedSparsityConfig.__module__)
    """
    assert run_python(code, fake_deepspeed(tmp_path, own)) == "False bsa_export.deepspeed_compat.sparsity_config"


def test_force_replaces_what_is_imported_already_and_uninstall_brings_it_back(tmp_path):
    own = {
        "deepspeed/ops/sparse_attention/__init__.py": "from .matmul import MatMul\nSparseSelfAttention = 'theirs'",
        "deepspeed/ops/sparse_attention/matmul.py": "MatMul = 'theirs'",
    }
    code = """
        import deepspeed.ops.sparse_attention
        from bsa_export import deepspeed_compat

        def homes():
            from deepspeed.ops import sparse_attention
            from deepspeed.ops.sparse_attention import SparseSelfAttention
            from deepspeed.ops.sparse_attention.matmul import MatMul
            found = (deepspeed.ops.sparse_attention.SparseSelfAttention, sparse_attention.SparseSelfAttention,
                SparseSelfAttention, MatMul, deepspeed.ops.sparse_attention.matmul.MatMul)
            return {getattr(each, "__module__", each).partition(".")[0] for each in found}

        for _ in range(2):
            print(*homes())
            deepspeed_compat.install(force=True)
            print(*homes())
            deepspeed_compat.uninstall()
        print(*homes())
    """
    shown = run_python(code, fake_deepspeed(tmp_path, own))
    assert shown.split() == ["theirs", "bsa_export", "theirs", "bsa_export", "theirs"]


def test_uninstall_leaves_nothing_in_a_deepspeed_that_has_none(tmp_path):
    code = """
        import deepspeed.ops
        from bsa_export import deepspeed_compat
        from deepspeed.ops import sparse_attention
        deepspeed_compat.uninstall()
        print(hasattr(deepspeed.ops, "sparse_attention"))
    """
    assert run_python(code, fake_deepspeed(tmp_path, {})) == "False"


def test_without_deepspeed_the_stand_in_is_there_by_its_name_alone():
    code = (
        WITHOUT_DEEPSPEED
        + """
    import bsa_export.deepspeed_compat
    import deepspeed
    print(deepspeed.ops.sparse_attention.matmul.MatMul is deepspeed.ops.sparse_attention.sparsity_config)
    print(deepspeed.ops.sparse_attention.FixedSparsityConfig.__module__)
    """
    )
    assert run_python(code).split() == ["False", "bsa_export.deepspeed_compat.sparsity_config"]
