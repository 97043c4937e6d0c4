"""Folders of DeepSpeed ZeRO, judged by DeepSpeed's own function that joins them."""

import pytest
import torch
from checkpoint_files import ZERO_STEP, same, save_zero

from bsa_export.checkpoint.open import open_checkpoint
from bsa_export.checkpoint.table import tied
from bsa_export.checkpoint.writer import write_safetensors
from bsa_export.errors import CheckpointError


@pytest.mark.parametrize("prefix", ["", "bf16_"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_weights_are_those_that_deepspeed_joins(tmp_path, stage, ranks, prefix):
    join = pytest.importorskip("deepspeed.utils.zero_to_fp32").get_fp32_state_dict_from_zero_checkpoint
    run = save_zero(tmp_path / "run", stage, ranks, prefix)
    judge = join(str(run))
    checkpoint = open_checkpoint(run)
    position_ids = judge.pop("bert.position_ids")
    assert same(checkpoint.tensors["bert.position_ids"], position_ids.long())
    assert checkpoint.tensors.keys() - {"bert.position_ids"} == judge.keys()
    assert all(same(checkpoint.tensors[name], tensor) for name, tensor in judge.items())
    assert "cls.decoder.weight" in tied(checkpoint.tensors).keys() | tied(checkpoint.tensors).values()
    write_safetensors(tmp_path / "out.safetensors", checkpoint.tensors)
    checkpoint.check_unchanged()


def test_the_folder_may_be_named_and_config_json_is_found_next_to_it(tmp_path):
    run = save_zero(tmp_path / "run", 3, 2)
    (run / "config.json").write_text("{}")
    assert open_checkpoint(run / ZERO_STEP).folder == open_checkpoint(run).folder == run


@pytest.mark.parametrize("stage", [2, 3])
def test_a_missing_rank_is_named(tmp_path, stage):
    run = save_zero(tmp_path / "run", stage, 4)
    (run / ZERO_STEP / "zero_pp_rank_2_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(CheckpointError, match="optimizer states of 4 ranks, found 3; missing: rank 2"):
        open_checkpoint(run)


def test_missing_model_states_are_named(tmp_path):
    run = save_zero(tmp_path / "run", 3, 2)
    (run / ZERO_STEP / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()
    with pytest.raises(CheckpointError, match="model states of 2 ranks, found 1; missing: rank 1"):
        open_checkpoint(run)


@pytest.mark.parametrize("stage", [2, 3])
def test_parts_that_do_not_add_up_are_refused(tmp_path, stage):
    run = save_zero(tmp_path / "run", stage, 2)
    path = run / ZERO_STEP / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    saved = torch.load(path)
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    state = saved["optimizer_state_dict"]
    state[key][0] = state[key][0][:-8].clone()
    torch.save(saved, path)
    with pytest.raises(CheckpointError, match="its parts do not hold|elements and their parts"):
        open_checkpoint(run)


def test_several_steps_without_latest_are_listed(tmp_path):
    run = save_zero(tmp_path / "run", 2, 1)
    (run / ZERO_STEP).rename(run / "global_step8")
    (run / "latest").unlink()
    save_zero(run, 2, 1)
    (run / "latest").unlink()
    with pytest.raises(CheckpointError, match="found global_step7, global_step8; name the folder"):
        open_checkpoint(run)
