"""Files beside weights: notes on what differs, and on rows of embeddings that mean other tokens."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers import merge_checkpoints


@pytest.fixture
def notes(tmp_path):
    """Merge directories with one tensor and some files each; return the notes."""

    def merged(*folders):
        paths = []
        for number, files in enumerate(folders):
            paths.append(tmp_path / f"c{number}")
            paths[-1].mkdir()
            save_file({"w": torch.full((4, 4), float(number))}, paths[-1] / "model.safetensors")
            for name, content in files.items():
                text = content if isinstance(content, str | bytes) else json.dumps(content)
                data = text if isinstance(text, bytes) else text.encode()
                (paths[-1] / name).parent.mkdir(exist_ok=True)
                (paths[-1] / name).write_bytes(data)
        result = merge_checkpoints(paths, tmp_path / "out", template=1)
        for name, content in folders[0].items():
            kept = (tmp_path / "out" / name).read_bytes()
            assert kept == (tmp_path / "c0" / name).read_bytes(), content
        return result.job.notes

    return merged


VOCAB = {"<s>": 0, "a": 1, "b": 2, "global": 3}


@pytest.mark.parametrize(
    ("name", "ours", "theirs"),
    [
        ("config.json", {"a": 1}, {"a": 2}),
        ("vae/config.json", {"a": 1}, {"a": 2}),
        ("generation_config.json", {"a": 1}, {"a": 2}),
        ("preprocessor_config.json", {"size": 224}, {"size": 384}),
        ("special_tokens_map.json", {"pad": "<a>"}, {"pad": "<b>"}),
        ("merges.txt", "a b", "b a"),
        ("chat_template.jinja", "a", "b"),
        ("hparams.yaml", "lr: 1", "lr: 2"),
        ("spiece.model", b"\x0a\x00\x01", b"\x0a\x00\x02"),
    ],
)
def test_files_that_say_what_weights_mean_are_noted(notes, name, ours, theirs):
    """What differs is named; the output has the template's."""
    assert notes({name: ours}, {name: ours}, {name: theirs}) == (
        f"{name} differs between the checkpoints; the template's is kept",
    )


@pytest.mark.parametrize(
    ("name", "ours", "theirs"),
    [
        ("trainer_state.json", {"global_step": 1}, {"global_step": 2}),
        ("CKPT.yaml", "unixtime: 1", "unixtime: 2"),
        ("history.json", [{"train_loss": 1}], [{"train_loss": 2}]),
        ("README.md", "one", "two"),
        ("latest", "one", "two"),
        ("events.out.0", b"\0\1", b"\0\2"),
        ("tokenizer.json", {"model": {"vocab": VOCAB}}, {"model": {"vocab": VOCAB}}),
    ],
)
def test_the_progress_of_a_run_and_prose_are_not(notes, name, ours, theirs):
    """What every checkpoint of a run has otherwise, and what is the same, needs no note."""
    assert notes({name: ours}, {name: theirs}) == ()


def test_several_are_one_note_and_absent_files_differ_from_none(notes):
    """Files that some checkpoint lacks are compared where they are."""
    first = {"config.json": {"a": 1}, "vocab.bpe": "a", "only.json": {}}
    second = {"config.json": {"a": 2}, "vocab.bpe": "b", "other.json": {}}
    what = "'config.json', 'vocab.bpe' differ between the checkpoints; the template's are kept"
    assert notes(first, second, {}) == (what,)


@pytest.mark.parametrize(
    ("name", "ours", "theirs", "said"),
    [
        ("vocab.json", VOCAB, {"<s>": 0, "b": 1, "a": 2, "global": 3}, "token ids 1 to 2 mean"),
        ("added_tokens.json", {"<a>": 7}, {"<b>": 7}, "token id 7 means"),
        ("added_tokens.json", {"<a>": 7}, {"<b>": 7, "<a>": 9}, "2 token ids from 7 to 9 mean"),
        ("vocab.txt", "[PAD]\na\nb\n", "[PAD]\nb\na\n", "token ids 1 to 2 mean"),
        (
            "tokenizer.json",
            {"model": {"vocab": VOCAB}, "added_tokens": [{"id": 4, "content": "<a>"}]},
            {"model": {"vocab": VOCAB}, "added_tokens": [{"id": 4, "content": "<b>"}]},
            "token id 4 means",
        ),
        (
            "tokenizer.json",
            {"model": {"vocab": [["<s>", 0.0], ["a", -1.0]]}},
            {"model": {"vocab": [["<s>", 0.0], ["b", -1.0]]}},
            "token id 1 means",
        ),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"4": {"content": "<a>"}}},
            {"added_tokens_decoder": {"4": {"content": "<b>"}}},
            "token id 4 means",
        ),
        ("tokenizer.json", {"model": {"vocab": VOCAB}, "x": 1}, {"model": {"vocab": VOCAB}}, None),
        ("classes.json", {"cat": 0, "dog": 1}, {"dog": 0, "cat": 1}, None),
        (
            "tokenizer.json",
            {"model": "x", "added_tokens": "y"},
            {"model": [], "added_tokens": [1]},
            None,
        ),
        ("vocab.json", "[" * 99_999, "{", None),
        ("vocab.json", '{"a": 1, "a": 2}', {"a": 1}, None),
        ("added_tokens.json", {"added_tokens_decoder": {"9" * 99: {}, "x": 1}}, {"a": [1]}, None),
    ],
)
def test_ids_of_other_tokens_are_told(notes, name, ours, theirs, said):
    """Where files tell the tokens by id, the rows that mean different ones are named."""
    found = notes({name: ours}, {name: theirs})
    assert f"{name} differs" in found[0]
    rows = "different tokens: these rows of embeddings are means of unrelated vectors"
    assert list(found[1:]) == ([f"{said} {rows}"] if said else [])


def test_several_files_tell_of_one_set_of_rows(notes):
    """Ids that more than one file tells are counted once."""
    both = [
        {
            "vocab.json": {"a": 0, token: 1},
            "tokenizer.json": {"model": {"vocab": {"a": 0, token: 1}}},
        }
        for token in ("b", "c")
    ]
    assert [note for note in notes(*both) if "token id 1 means" in note]


def test_lines_without_end_tell_nothing(notes):
    """A vocabulary of millions of empty lines is named, and not held in memory."""
    found = notes({"vocab.txt": "\n" * (1 << 20)}, {"vocab.txt": "a" + "\n" * (1 << 20)})
    assert not any("token id" in note for note in found)
    assert any("vocab.txt differs" in note for note in found)


TOLD = {
    "megatron": ("latest_checkpointed_iteration.txt", "300", "iter_0000300", "iter_0000400", "400"),
    "verl": ("latest_checkpointed_iteration.txt", "300", "global_step_300", "global_step_9", "9"),
    "deepspeed": ("latest", "global_step300", "global_step300", "mean", "mean"),
}


@pytest.mark.parametrize(("name", "newest", "folder", "output", "told"), TOLD.values(), ids=TOLD)
def test_a_file_beside_an_output_that_loaders_go_by(tmp_path, name, newest, folder, output, told):
    """A note says what to write where a loader looks, or that it will take another checkpoint."""
    paths = [tmp_path / f"run{fold}" / folder for fold in range(2)]
    for fold, path in enumerate(paths):
        path.mkdir(parents=True)
        (path.parent / name).write_text(f"{newest}\n")
        torch.save({"w": torch.full((4, 4), float(fold))}, path / "model.pt")

    def notes(place):
        return [note for note in merge_checkpoints(paths, place).job.notes if "loaders" in note]

    (tmp_path / "new").mkdir()
    place = tmp_path / "new" / name
    found = notes(tmp_path / "new" / output)
    assert found == [
        f"loaders find {tmp_path / 'new' / output} by a file beside it: echo {told} > {place}"
    ]
    assert not place.exists()
    place.write_text(f"{told}\n")
    (tmp_path / "new" / output).rename(tmp_path / "elsewhere")
    assert notes(tmp_path / "new" / output) == []
    assert [note for note in notes(paths[0].parent / output) if f"names {newest!r}" in note]
    if told.isdecimal():
        (note,) = notes(tmp_path / "new" / "mean")
        assert f"a name such as {folder} only" in note
