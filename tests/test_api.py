"""merge_avg.api: the functions for files take what the command takes, and say what is wrong."""

import inspect
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import merge_avg
from merge_avg import (
    MergeError,
    MergeWarning,
    UsageError,
    inspect_checkpoints,
    merge_checkpoints,
    select_checkpoints,
)
from tests.helpers import noise


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of four checkpoints, whose weight is their step, in the current directory."""
    monkeypatch.chdir(tmp_path)
    for step in (5, 10, 20, 100):
        state = {"w": torch.full((2,), float(step)), "one": torch.ones(1)}
        (tmp_path / "run").mkdir(exist_ok=True)
        torch.save({"model": state, "global_step": step}, f"run/step={step}-loss={step / 8}.ckpt")
    return tmp_path / "run"


def test_doubts_are_warnings_at_the_callers_line(tmp_path):
    """What the result says of a mean that may not work is raised as well."""
    for seed in (1, 2):
        state = {f"w{n}": noise(10 * seed + n, 64, 64) for n in range(3)}
        torch.save(state, tmp_path / f"{seed}.pt")
    with pytest.warns(MergeWarning, match="strangers: ") as caught:
        result = merge_checkpoints([tmp_path / "1.pt", tmp_path / "2.pt"], tmp_path / "o.pt")
    assert [str(one.message) for one in caught] == list(result.warnings)
    assert caught[0].filename == __file__


def merged(paths, **options):
    """Merge and return the weight, which is the mean of the steps."""
    merge_checkpoints(paths, "out.pt", overwrite=True, **options)
    return torch.load("out.pt")["model"]["w"][0].item()


@pytest.mark.parametrize(
    "paths", ["run", Path("run"), "run/*.ckpt", ["run"], ["run/step=*"], "glob"], ids=str
)
def test_a_run_a_pattern_and_an_iterator_are_taken(run, paths):
    """One path, one pattern, a list of one and what `Path.glob` yields are the same checkpoints."""
    assert merged(Path("run").glob("*.ckpt") if paths == "glob" else paths) == 33.75


def test_a_file_alone_is_one_checkpoint(run):
    """A string is a path, never a list of letters; and its mean is not worth a merge."""
    assert merged("run/step=5-loss=0.625.ckpt", allow_trivial=True) == 5
    with pytest.raises(MergeError, match="it is the only checkpoint"):
        merged("run/step=5-loss=0.625.ckpt")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"last": 2}, "--last 2"),
        ({"best": 2, "metric": "loss"}, "--best 2 --metric loss"),
        ({"best": 1, "metric": "loss", "mode": "max"}, "--best 1 --metric loss --mode max"),
        ({"steps": (10, 20)}, "--steps 10:20"),
        ({"steps": (None, 20, 10)}, "--steps :20:10"),
        ({"steps": "10:"}, "--steps 10:"),
        ({"steps": 20}, "--steps 20"),
        ({"min_interval": 50}, "--min-interval 50"),
        ({"last": 2, "weighting": "linear"}, "--last 2 --weighting linear"),
        ({"last": 2, "weights": [3, 1]}, "--last 2 -w 3,1"),
        ({"last": 2, "weights": "3,1"}, "--last 2 --weights 3,1"),
        ({"last": 9}, "--last 9"),
        ({"last": 2, "best": 2}, "--last 2 --best 2"),
        ({"weighting": "steep"}, "--weighting steep"),
        ({"weights": [1]}, "-w 1"),
    ],
    ids=str,
)
def test_keywords_mean_what_the_options_of_their_names_mean(run, options, words, command):
    """A selection makes the same file as the command, or fails for the same reason."""
    code, _, err = command("run", "-o", "theirs.pt", *words.split())
    if code:
        with pytest.raises(MergeError) as caught:
            merged("run", **options)
        assert f"error: {caught.value.message}\n" in err
    else:
        merged("run", **options)
        assert Path("out.pt").read_bytes() == Path("theirs.pt").read_bytes()


@pytest.mark.parametrize(
    "paths",
    [{"w": torch.ones(1)}, 3, None, b"a.pt", {"a.pt"}, frozenset(["a.pt"]), [3], [["a"]]],
    ids=repr,
)
def test_what_is_no_path_is_refused(tmp_path, paths):
    """A state dict, a number, None and the like: the error says what is expected."""
    for call in (select_checkpoints, inspect_checkpoints):
        with pytest.raises(TypeError, match="paths must be a path or several"):
            call(paths)
    with pytest.raises(TypeError, match="paths must be a path or several"):
        merge_checkpoints(paths, tmp_path / "out.pt")


def test_models_are_sent_to_their_own_function(tmp_path):
    """Whoever passes models hears of the class that averages them."""
    model = nn.Linear(1, 1)
    for paths in (model, [model]):
        with pytest.raises(TypeError, match=r"not Linear; AverageModelMerger averages models"):
            merge_checkpoints(paths, tmp_path / "out.pt")


@pytest.mark.parametrize("output", [None, 3, ["a.pt", "b.pt"], ["a.pt"], {3: [1]}])
def test_an_output_is_a_path(run, output):
    """An output that is nothing of the kind is refused before anything is read."""
    with pytest.raises(TypeError, match="output must be a path"):
        merge_checkpoints("missing.pt", output)


def test_an_empty_path_is_not_the_current_directory(run):
    """A variable that is not set does not average what lies around."""
    for paths, output in (("", "o.pt"), ("run", "")):
        with pytest.raises(UsageError, match="a path is empty"):
            merge_checkpoints(paths, output)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"leave_one_out": True}, "--leave-one-out"),
        ({"prefixes": True}, "--prefixes"),
        ({"sliding": 2}, "--sliding 2"),
        ({"sliding": (2, 2)}, "--sliding 2:2"),
        ({"sliding": "3"}, "--sliding 3"),
        ({"sliding": 9}, "--sliding 9"),
        ({"sliding": 2, "prefixes": True}, "--sliding 2 --prefixes"),
        ({"last": [2, 3]}, "--last 2 --last 3"),
        ({"last": (2,)}, "--last 2"),
        ({"last": [2, 3], "weighting": "linear"}, "--last 2 --last 3 --weighting linear"),
        ({"leave_one_out": True, "weights": [1, 2, 3, 4]}, "--leave-one-out -w 1,2,3,4"),
        ({"last": [2, 9]}, "--last 2 --last 9"),
        ({"last": 2, "prefixes": True}, "--last 2 --prefixes"),
        ({"last": [2, 3], "prefixes": True}, "--last 2 --last 3 --prefixes"),
        ({"leave_one_out": True, "prefixes": True}, "--leave-one-out --prefixes"),
    ],
    ids=str,
)
def test_series_of_averages_are_those_of_the_command(run, options, words, command):
    """An output with {name} makes as many files as the command does, with the same bytes."""
    output = "ours-{name}.pt" if words != "--last 2" else "ours.pt"
    code, _, err = command("run", "-o", output.replace("ours", "theirs"), *words.split())
    if code:
        with pytest.raises(MergeError) as caught:
            merge_checkpoints("run", output, **options)
        assert f"error: {caught.value.message}\n" in err
        return
    result = merge_checkpoints("run", output, **options)
    written = [spec.path.name for spec in result.job.outputs]
    assert sorted(written) == sorted(path.name for path in run.parent.glob("ours*"))
    assert len(written) == len([*run.parent.glob("theirs*")]) > 0
    for name in written:
        assert Path(name).read_bytes() == Path(name.replace("ours", "theirs")).read_bytes()


@pytest.mark.parametrize("last", [[], [2, "3"], [None], "2", [2.5], {2: 3}, True])
def test_last_is_a_number_or_several(run, last):
    """What is neither is refused before anything is read."""
    with pytest.raises(TypeError, match="last must be a number"):
        merge_checkpoints("missing", "out-{name}.pt", last=last)
    with pytest.raises(TypeError, match="last must be a whole number, not"):
        select_checkpoints("missing", last=[2, 3])


@pytest.mark.parametrize(
    "options", [{"last": [1, 2]}, {"leave_one_out": True}, {"weighting": "linear"}, {"phema": 0.1}]
)
def test_weights_of_outputs_are_all_there_is(run, options):
    """A mapping of outputs has their weights: what would make others is refused."""
    with pytest.raises(UsageError, match="each output has weights of its own\nhint: leave out"):
        merge_checkpoints("run", {"a.pt": [1] * 4, "b.pt": [2] * 4}, **options)


def test_several_averages_need_several_names(run):
    """The hint is in the words of the library."""
    with pytest.raises(UsageError, match=r"put \{name\} into it, as in avg-\{name\}.pt"):
        merge_checkpoints("run", "out.pt", prefixes=True)


@pytest.mark.parametrize("dtype", ["bf16", "torch.bfloat16", torch.bfloat16])
def test_a_dtype_may_be_short_or_torchs_own(run, dtype):
    """It is converted as by its name, and recorded so."""
    merge_checkpoints("run", "out.pt", dtype=dtype)
    merge_checkpoints("run", "named.pt", dtype="bfloat16")
    assert torch.load("out.pt")["model"]["w"].dtype == torch.bfloat16
    assert Path("out.pt").read_bytes() == Path("named.pt").read_bytes()


@pytest.mark.parametrize("dtype", ["int8", torch.int8, float, 16])
def test_what_is_no_dtype_to_write_is_refused(run, dtype):
    """The error names what was given, and those that there are."""
    with pytest.raises(UsageError, match="is not a dtype to write\nhint: "):
        merge_checkpoints("run", "out.pt", dtype=dtype)


def test_a_value_that_no_option_has_is_refused(run):
    """A typing error in a policy is an error, and so is a keyword that does not exist."""
    with pytest.raises(UsageError, match=r"missing is 'skp'\nhint: choose one of error, skip, av"):
        merge_checkpoints("run", "out.pt", missing="skp")
    with pytest.raises(TypeError, match="no keyword 'misssing'; did you mean missing"):
        merge_checkpoints("run", "out.pt", misssing="skip")
    with pytest.raises(TypeError, match=r"no keyword 'dtype'; see help\(\)"):
        select_checkpoints("run", dtype="float32")


@pytest.mark.parametrize("name", ["last", "best", "phema", "threads", "min_agreement"])
def test_a_text_is_no_number(run, name):
    """Where a number is meant, the error names the keyword and what stands there."""
    with pytest.raises(TypeError, match=rf"{name} must be a( whole)? number\b.*, not '2'"):
        merge_checkpoints("run", "out.pt", **{name: "2"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overwrite": "no"}, "overwrite must be True or False, not 'no'"),
        ({"agreement": None}, "agreement must be True or False, not None"),
        ({"best": True}, "best must be a whole number, not True"),
        ({"threads": 2.5}, "threads must be a whole number, not 2.5"),
        ({"min_agreement": True}, "min_agreement must be a number, not True"),
        ({"key": ["model"]}, "key must be a text, not ['model']"),
        ({"key": Path("model")}, "key must be a text, not PosixPath('model')"),
        ({"weighting": 1}, "weighting must be a text, not 1"),
        ({"metric": 1, "best": 2}, "metric must be a text, not 1"),
        ({"metrics_file": 1}, "metrics_file must be a path, not 1"),
        ({"template": 1.5}, "template must be a path or a number, not 1.5"),
        ({"template": True}, "template must be a path or a number, not True"),
        ({"base": 2}, "base must be a path, not 2"),
        ({"steps": range(9)}, "steps must be a range, such as (1000, 5000), not range(0, 9)"),
        ({"epochs": slice(9)}, "epochs must be a range, such as (1000, 5000), not slice(None, 9, "),
        ({"include": None}, "include must be a text, or several, not None"),
        ({"weights": 0.5}, "weights must be a list of numbers, not float"),
        ({"weights": {5: 0.5}}, "weights must be a list of numbers, not dict"),
        ({"weights": {1, 2, 3, 4}}, "weights must be a list of numbers, not set"),
    ],
    ids=str,
)
def test_a_value_of_another_kind_is_refused(run, options, message):
    """Before anything is read, by its keyword; a state dict in its place does not fill a page."""
    with pytest.raises(TypeError) as caught:
        merge_checkpoints("missing", "out.pt", **options)
    assert str(caught.value).startswith(message)
    with pytest.raises(TypeError, match="base must be a path") as caught:
        merge_checkpoints(
            "missing", "out.pt", base={"w": torch.ones(99, 99)} | dict.fromkeys("abc")
        )
    assert len(str(caught.value)) < 200


def test_a_mode_is_min_or_max(run):
    """Any other word would choose the lowest in silence."""
    with pytest.raises(UsageError, match="mode is 'maximum'\nhint: choose one of min, max"):
        merge_checkpoints("run", "out.pt", best=2, metric="loss", mode="maximum")


@pytest.mark.parametrize(
    "weights",
    [
        (1, 0, 0, 3),
        (weight for weight in (1, 0, 0, 3)),
        torch.tensor([1, 0, 0, 3]),
        [torch.tensor(0.25), 0, 0, torch.tensor(0.75)],
        "1,0,0,3",
        {1: 1, 2: 0, 3: 0, 4: 3}.values(),
    ],
    ids=lambda weights: type(weights).__name__,
)
def test_weights_may_be_anything_with_an_order(run, weights):
    """A generator, a tensor, a list of tensors, the command's text: also for several outputs."""
    weights = [*weights] if isinstance(weights, types.GeneratorType) else weights
    assert merged("run", weights=weights) == 76.25
    merge_checkpoints("run", {"a.pt": weights, "b.pt": [1] * 4})
    assert torch.load("a.pt")["model"]["w"][0] == 76.25


def test_numbers_and_devices_of_other_libraries_are_taken(run):
    """Two billion bytes as 2e9, and torch's own device."""
    assert merged("run", max_memory=2e9, device=torch.device("cpu")) == 33.75


def test_a_path_that_leads_nowhere_has_the_commands_hint(run, command):
    """A typing error, an address and a home are told as by the command."""
    for path in (
        "run/step=5-loss=0.65.ckpt",
        "https://example.org/a.pt",
        "~/no-such.pt",
        "someone/some-model",
    ):
        _, _, err = command(path, "-o", "out.pt")
        assert "hint: " in err
        for call in (select_checkpoints, inspect_checkpoints):
            with pytest.raises(MergeError) as caught:
                call(path)
            assert f"hint: {caught.value.hint}\n" in err


def test_notes_of_a_merge_are_in_the_result(run, command):
    """They are those of the command: what was left out, and which one is the template."""
    merge_checkpoints("run/*", "run/mean.pt")
    result = merge_checkpoints("run/*", "out.pt")
    _, out, _ = command("run/*", "-o", "theirs.pt", "--json")
    assert list(result.notes) == json.loads(out)["notes"]
    assert any("run/mean.pt" in note for note in result.notes)
    assert "\n  note: left out 'run/mean.pt'" in repr(result)
    assert "\n  note: left out 'run/mean.pt'" in repr(select_checkpoints("run/*"))


def test_keywords_of_the_command_are_led_to_the_librarys(run):
    """Options that have another name here, or a function of their own."""
    for name, right in (("metrics", "metrics_file"), ("dry_run", "select_checkpoints")):
        with pytest.raises(TypeError, match=f"no keyword '{name}'; did you mean {right}"):
            merge_checkpoints("run", "out.pt", **{name: "log.csv"})


def test_texts_of_the_command_are_understood(run):
    """A size with its unit, and one pattern where several may stand."""
    assert merged("run", max_memory="64MiB", exclude="one") == 33.75
    assert torch.load("out.pt")["model"]["one"] == 1
    with pytest.raises(UsageError, match="'lots' is not a size"):
        merged("run", max_memory="lots")


def test_several_outputs_of_a_selection(run):
    """A mapping has the weights of the chosen checkpoints for each output."""
    merge_checkpoints("run", {"a.pt": [1, 0], "b.pt": [1, 3]}, last=2)
    assert torch.load("a.pt")["model"]["w"][0] == 20
    assert torch.load("b.pt")["model"]["w"][0] == 80


def test_the_earlier_output_does_not_count(run):
    """An output that a pattern finds is no input of the next merge, by its content or name."""
    for _ in range(2):
        merge_checkpoints("run/*", "run/mean.pt", overwrite=True)
        assert torch.load("run/mean.pt")["model"]["w"][0] == 33.75


def test_a_log_is_not_written_over(run):
    """The file of metrics is an input too."""
    Path("log.csv").write_text("step,acc\n5,1\n10,2\n20,3\n100,4\n")
    options = {"metric": "acc", "mode": "max", "metrics_file": "log.csv"}
    assert merged("run", best=2, **options) == 60
    with pytest.raises(MergeError, match="is the input"):
        merge_checkpoints("run", "log.csv", best=2, overwrite=True, **options)


def test_a_selection_is_told_without_a_merge(run):
    """The chosen ones with their weights, and why the others are not among them."""
    found = select_checkpoints("run", last=2, weighting="linear")
    assert [path.name for path in found.paths] == [
        "step=20-loss=2.5.ckpt",
        "step=100-loss=12.5.ckpt",
    ]
    assert found.weights == (1, 2)
    left = {one.path.name: one.why for one in found.candidates if not one.chosen}
    assert left.keys() == {"step=5-loss=0.625.ckpt", "step=10-loss=1.25.ckpt"}
    assert repr(found).startswith("Selection: 2 checkpoints\n  + run/step=20-")
    assert "step=20-loss=2.5.ckpt: weight 0.333, among the last 2\n" in repr(found)
    assert "\n  - run/step=5-" in repr(found)
    merge_checkpoints(found.paths, "out.pt", weights=found.weights)
    assert torch.load("out.pt")["model"]["w"][0] == pytest.approx(220 / 3)
    assert sorted(path.name for path in run.parent.iterdir()) == ["out.pt", "run"]


def test_checkpoints_are_inspected(run):
    """Each checkpoint of a run, or of a list, with the role of each tensor."""
    found = inspect_checkpoints("run")
    assert [one.step for one in found] == [5, 10, 20, 100]
    assert [(one.name, one.role) for one in found[0].tensors] == [
        ("model.w", "averaged"),
        ("model.one", "averaged"),
    ]
    assert "averaged: 2 tensors ('model.w', 'model.one')" in repr(found[0])
    assert inspect_checkpoints(["run/step=5-loss=0.625.ckpt"]) == found[:1]


def test_hints_are_in_the_librarys_words(run):
    """A hint of the command's is a keyword in the text, and stays the option in `hint`."""
    torch.save({"model": {"w": torch.ones(2)}}, "less.pt")
    with pytest.raises(MergeError) as caught:
        merge_checkpoints(["run/step=5-loss=0.625.ckpt", "less.pt"], "out.pt")
    assert "--missing skip" in caught.value.hint
    assert 'missing="skip"' in str(caught.value)
    assert "--" not in str(caught.value)


def test_progress_is_drawn_on_a_terminal_and_in_logs(run, capsys):
    """True draws a bar on stderr, which ends at all of it; False and None draw nothing."""
    merge_checkpoints("run", "out.pt", progress=True)
    assert "averaging" in (err := capsys.readouterr().err)
    assert "100%" in err
    for nothing in (False, None):
        merge_checkpoints("run", "out.pt", progress=nothing, overwrite=True)
    assert capsys.readouterr() == ("", "")


def test_progress_is_a_function_or_none(run):
    """Anything else is refused before a merge begins."""
    with pytest.raises(TypeError, match="progress must be True or a function, not 'yes'"):
        merge_checkpoints("run", "out.pt", progress="yes")
    assert not Path("out.pt").exists()


def test_progress_is_drawn_in_notebooks(run, monkeypatch):
    """In a notebook the bar is one cell of output, which changes in place, without ipywidgets."""
    seen = []
    handle = types.SimpleNamespace(update=lambda shown, raw: seen.append(shown))
    module = types.ModuleType("IPython.display")
    module.display = lambda first, display_id, raw: handle
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    result = merge_checkpoints("run", "out.pt", progress=True)
    assert seen[-1]["text/html"].count(str(result.nbytes)) == 2
    assert "<progress " in seen[-1]["text/html"]
    assert seen[-1]["text/plain"] == "averaging 100 %"


def test_the_api_is_what_dir_shows():
    """`dir` lists what is public and nothing else, and all of it exists."""
    assert dir(merge_avg) == sorted(merge_avg.__all__)
    assert {"inspect_checkpoints", "merge_checkpoints", "select_checkpoints"} <= set(dir(merge_avg))
    assert all(getattr(merge_avg, name) is not None for name in dir(merge_avg))


def test_the_package_imports_as_little_as_before():
    """Neither torch nor the engine is loaded before it is asked for, nor by `dir`."""
    code = (
        "import sys, merge_avg\ndir(merge_avg)\n"
        "print({'torch', 'rich', 'merge_avg.engine', 'merge_avg.options'} & set(sys.modules))\n"
        "merge_avg.merge_checkpoints\nprint({'torch', 'rich', 'typer'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\nset()\n"


def test_help_has_every_keyword():
    """`help` and editors see each keyword with its meaning."""
    text = inspect.getdoc(merge_checkpoints)
    for name in ("last", "best", "weighting", "missing", "progress", "metrics_file"):
        assert f"\n    {name}: " in text


def test_python_without_docstrings(run):
    """`python -OO`, which strips docstrings and assertions, merges and verifies all the same."""
    code = (
        "from merge_avg import merge_checkpoints, verify_output;"
        "merge_checkpoints('run', 'out.pt', last=2); verify_output('out.pt', inputs='run')"
    )
    subprocess.run([sys.executable, "-OO", "-c", code], check=True)
    command = [sys.executable, "-OO", "-m", "merge_avg", "run", "-o", "again.pt", "--last", "2"]
    subprocess.run([*command, "-q"], check=True, stdout=subprocess.DEVNULL)
    assert Path("out.pt").read_bytes() == Path("again.pt").read_bytes()


@pytest.mark.large  # mypy takes its time
def test_types_are_those_of_the_keywords(tmp_path):
    """A strict type checker accepts the keywords, and refuses others and other types."""
    good = (
        "from pathlib import Path\n"
        "from merge_avg import Result, Selection, merge_checkpoints, select_checkpoints\n"
        "r: Result = merge_checkpoints('run', 'o.pt', last=3, missing='skip', progress=True)\n"
        "merge_checkpoints([Path('a'), 'b'], {'o': [1, 2]}, weights=[1, 2], steps=(1, 2, None))\n"
        "merge_checkpoints('run', 'o-{name}.pt', last=[2, 3], leave_one_out=False)\n"
        "s: Selection = select_checkpoints(Path('run').glob('*'), best=2, metric='loss')\n"
    )
    (tmp_path / "good.py").write_text(good)
    (tmp_path / "bad.py").write_text(
        "from merge_avg import merge_checkpoints\n"
        "merge_checkpoints('run', 'o.pt', misssing='skip')\nmerge_checkpoints(3, 'o.pt')\n"
    )
    command = [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "--config-file="]
    for name, errors in (("good.py", 0), ("bad.py", 2)):
        done = subprocess.run([*command, name], cwd=tmp_path, capture_output=True, text=True)  # noqa: PLW1510
        assert done.stdout.count("error:") == errors, done.stdout
