"""What arguments stand for: files, directories, runs and patterns."""

import errno
import os

import pytest
import torch
from safetensors.torch import save_file

from merge_avg.errors import MergeError
from merge_avg.options import Criteria
from merge_avg.selection._criteria import natural
from merge_avg.selection._places import Place, expand
from tests.selection.helpers import bare, lightning, names, select, trainer


def test_patterns(tmp_path):
    """A quoted pattern stands for what it matches, as in a shell; nothing matched is an error."""
    for fold in (2, 10):
        bare(tmp_path / f"fold{fold}.pt", fold)
    assert names(select([tmp_path / "fold*.pt"], Criteria())) == ["fold10.pt", "fold2.pt"]
    with pytest.raises(MergeError, match="no file matches the pattern"):
        select([tmp_path / "*.ckpt"], Criteria())


def test_a_file_whose_name_is_a_pattern_is_that_file(tmp_path):
    """What exists is not a pattern, whatever characters its name has."""
    path = bare(tmp_path / "a[1].pt")
    bare(tmp_path / "a1.pt")
    assert expand([path]) == [Place(path, (path,), "name")]


def test_numbers_in_names_sort_as_numbers():
    """Digits compare by value, and come before letters."""
    assert sorted(["b10", "b9", "a", "10"], key=natural) == ["10", "a", "b9", "b10"]


@pytest.mark.parametrize(
    "name", [".hidden.pt", "optimizer.pt", "random_states_0.pkl", "training_args.bin"]
)
def test_files_beside_the_checkpoints_of_a_run_are_passed_over(tmp_path, name):
    """Hidden files and the states of a training are not even candidates."""
    path = lightning(tmp_path, 0, 10)
    bare(tmp_path / name)
    assert expand([tmp_path]) == [Place(tmp_path, (path,), "run")]


def test_names_without_numbers_of_steps_sort_naturally(tmp_path):
    """In a run without steps, fold 10 comes after fold 9."""
    for fold in (1, 9, 10):
        bare(tmp_path / f"fold{fold}.pt", fold)
    assert names(select([tmp_path], Criteria())) == ["fold1.pt", "fold9.pt", "fold10.pt"]


def test_folders_of_a_lightning_run(tmp_path):
    """Lightning's version_0/checkpoints/ belongs to the run above it."""
    folder = tmp_path / "version_0" / "checkpoints"
    folder.mkdir(parents=True)
    lightning(folder, 0, 10)
    (tmp_path / "version_0" / "hparams.yaml").write_text("a: 1")
    assert names(select([tmp_path], Criteria())) == ["epoch=0-step=10.ckpt"]


def test_folders_of_a_trainer(tmp_path):
    """Folders checkpoint-N/ are the candidates of a run, also beside a final model."""
    for step in (1000, 200, 30):
        trainer(tmp_path, step)
    found = ["checkpoint-30", "checkpoint-200", "checkpoint-1000"]
    assert names(select([tmp_path], Criteria())) == found
    (tmp_path / "config.json").write_text("{}")
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert names(select([tmp_path], Criteria(last=2))) == found[1:]
    one = tmp_path / "checkpoint-30"
    assert select([one, tmp_path / "checkpoint-200"], Criteria()).paths[0] == one
    assert names(select([one], Criteria(last=1))) == ["checkpoint-30"]


def test_directories_that_are_named_are_checkpoints(tmp_path):
    """Several directories are one checkpoint each, where nothing else is asked for."""
    for name in "ab":
        (tmp_path / name).mkdir()
        for part in ("encoder", "decoder"):
            bare(tmp_path / name / f"{part}.pt", ord(name))
    paths = [tmp_path / "a", tmp_path / "b"]
    assert select(paths, Criteria()).paths == tuple(paths)


@pytest.mark.parametrize("pattern", ["fold*/*.pt", "**/*.pt", "fold?/best.pt", "fold2/*.pt"])
def test_a_pattern_leads_through_no_closed_folder(tmp_path, monkeypatch, pattern):
    """A folder that a pattern would look into, and cannot, may hold a match: an error."""
    for number in (1, 2):
        (tmp_path / f"fold{number}").mkdir()
        (tmp_path / f"fold{number}" / "best.pt").touch()
    closed = str(tmp_path / "fold2")

    def scandir(path, real=os.scandir):
        if os.fspath(path) == closed:
            raise PermissionError(errno.EACCES, "Permission denied", closed)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    if pattern == "fold?/best.pt":  # whose folders are never listed
        assert len(expand([tmp_path / pattern])) == 2
        return
    with pytest.raises(MergeError, match=r"cannot be listed \(Permission denied\)") as caught:
        expand([tmp_path / pattern])
    assert caught.value.where == closed


@pytest.mark.parametrize("name", ["latest", "latest_checkpointed_iteration.txt"])
def test_a_run_with_a_file_that_names_the_newest(tmp_path, name):
    """Folders of DeepSpeed, Megatron and verl are candidates with their steps, and nothing else."""
    for step in (80, 90, 100):
        folder = tmp_path / f"global_step{step}"
        folder.mkdir()
        torch.save({"module": {"w": torch.zeros(2)}}, folder / "mp_rank_00_model_states.pt")
    (tmp_path / name).write_text("global_step100" if name == "latest" else "100")
    choice = select([tmp_path], Criteria(last=2))
    assert names(choice) == ["global_step90", "global_step100"]
    assert sorted(one.step for one in choice.candidates) == [80, 90, 100]
    assert not [note for note in choice.notes if "final model" in note]
