"""A converted model on several processes: gradients of a shared batch are those of one process."""

import pytest
import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("transformers", minversion="5.0")

from sparse_folder import LONGEST, sparse_folder  # noqa: E402

import bsa_export  # noqa: E402

pytestmark = pytest.mark.slow

RANKS = 2


def gradients(model, ids):
    model(ids).logits.square().mean().backward()
    return {name.removeprefix("module."): parameter.grad for name, parameter in model.named_parameters()}


def fully_sharded(model):
    for layer in model.bert.encoder.layer:
        fully_shard(layer)
    return fully_shard(model)


def work(rank, folder, file):
    """One process: its part of the batch, compared with the whole of it."""
    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=RANKS)
    torch.set_num_threads(1)
    ids = torch.randint(4, 100, (2 * RANKS, LONGEST - 5), generator=torch.Generator().manual_seed(0))
    expected = gradients(bsa_export.load(folder), ids)
    assert any(gradient is not None and gradient.norm() > 1e-3 for gradient in expected.values())
    for wrap in (lambda model: DistributedDataParallel(model, find_unused_parameters=True), fully_sharded):
        for name, gradient in gradients(wrap(bsa_export.load(folder)), ids.chunk(RANKS)[rank]).items():
            if expected[name] is None:
                assert gradient is None, name
            else:
                found = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
                torch.testing.assert_close(found, expected[name], atol=1e-5, rtol=1e-4, msg=(name + ": {}").format)
    distributed.destroy_process_group()


def test_gradients_of_a_shared_batch_are_those_of_one_process(tmp_path):
    folder = sparse_folder(tmp_path)
    torch.multiprocessing.spawn(work, (folder, tmp_path / "ranks"), nprocs=RANKS)
