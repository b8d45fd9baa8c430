"""Parts and resumption: the same bytes as of one process, or an error that says what is wrong."""

import json
import os
import random
import shutil
import threading
from pathlib import Path

import pytest
import torch
from xxhash import xxh3_128_hexdigest

from merge_avg import MergeError, UsageError, load_average, merge_checkpoints, verify_output
from merge_avg.engine import _run as engine
from merge_avg.parts import Crew, Part
from tests.helpers import quick, run_command
from tests.parts.helpers import MAKERS, checkpoints, left, made, site, state, tree

pytestmark = pytest.mark.filterwarnings("ignore", "ignore:torch.distributed is disabled")


class Killed(BaseException):
    """Stands for the end of a process."""


def stopped_after(monkeypatch, count, paths, output, **options):
    """Merge until so many ledgers are left, and stop there."""
    leave, done = Crew.leave, []

    def killed(self, stretch, ledger):
        if len(done) == count:
            raise Killed
        done.append(stretch)
        leave(self, stretch, ledger)

    with monkeypatch.context() as patch:
        patch.setattr(Crew, "leave", killed)
        with pytest.raises(Killed):
            merge_checkpoints(paths, output, **options)
    return len(done)


@pytest.mark.parametrize(
    ("kind", "count"),
    quick(
        [(k, n) for k in MAKERS for n in (1, 2, 3, 5)],
        ("zip", 3),
        ("strided", 2),
        ("sharded", 5),
        ("dcp", 2),
    ),
)
def test_parts_make_the_same_bytes(tmp_path, kind, count):
    """Parts in any order give what one process gives, verified, and leave nothing beside it."""
    paths, suffix = checkpoints(tmp_path, kind), MAKERS[kind][1]
    one = made(paths, tmp_path / f"one{suffix}", weights=[3, 1, 1])
    output = tmp_path / f"parts{suffix}"
    for number in range(count, 0, -1):
        result = made(paths, output, weights=[3, 1, 1], part=f"{number}/{count}")
        assert (result.part is None) == (number == 1)
        assert output.exists() == (number == 1)
    assert tree(output) == tree(tmp_path / f"one{suffix}")
    assert left(tmp_path) == []
    assert (result.nbytes, result.hashes) == (one.nbytes, one.hashes)
    assert result.agreement.mean == pytest.approx(one.agreement.mean, abs=1e-9)
    if kind != "legacy":  # which has no record
        verify_output(output)


@pytest.mark.parametrize(
    "options",
    [
        {"leave_one_out": True},
        {"prefixes": True, "dtype": "float32"},
        {"base": "in2.pt", "weights_only": True},
        {"agreement": False, "hashes": False},
        {"max_shard_size": 1 << 20},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_work_in_parts(tmp_path, monkeypatch, options):
    """Several averages, other dtypes, a base and shards are made in parts as in one process."""
    monkeypatch.chdir(tmp_path)
    paths = [path.name for path in checkpoints(tmp_path)]
    paths = paths[: 2 if "base" in options else 3]
    name = "avg-{name}.pt" if {"leave_one_out", "prefixes"} & options.keys() else "avg"
    name = "avg.pt" if "base" in options or "hashes" in options else name
    for folder, parts in (("one", [None]), ("parts", ["2/2", "1/2"])):
        Path(folder).mkdir()
        for part in parts:
            result = merge_checkpoints(paths, f"{folder}/{name}", part=part, **options)
    names = [str(one.path.relative_to("parts")) for one in result.job.outputs]
    assert {n: tree(Path("one") / n) for n in names} == {n: tree(Path("parts") / n) for n in names}
    assert left(tmp_path / "parts") == []


@pytest.mark.parametrize("seed", range(6))
def test_stretches_in_any_order_by_anyone_add_up(tmp_path, monkeypatch, seed):
    """Whoever works on which stretches, and when, the sums are the same."""
    chance = random.Random(seed)  # noqa: S311
    kind = ["zip", "strided", "dcp"][seed % 3]
    suffix = MAKERS[kind][1]
    paths = checkpoints(tmp_path, kind)
    whole = made(paths, tmp_path / f"one{suffix}", resume=True)
    mine = Crew.mine

    def some(self):
        left = list(mine(self))
        yield from chance.sample(left, chance.randint(0, len(left)))

    monkeypatch.setattr(Crew, "mine", some)
    output = tmp_path / f"out{suffix}"
    while (result := made(paths, output, resume=True, threads=chance.randint(1, 3))).part:
        assert not output.exists()
    assert tree(output) == tree(tmp_path / f"one{suffix}")
    assert result.hashes == whole.hashes
    for ours, theirs in zip(result.agreement.pairs, whole.agreement.pairs, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-12)


def test_a_stopped_run_goes_on(tmp_path, monkeypatch):
    """What was done before a kill is not done again, and the bytes are those of one run."""
    paths = checkpoints(tmp_path)
    made(paths, tmp_path / "one.pt")
    output = tmp_path / "out.pt"
    assert stopped_after(monkeypatch, 2, paths, output, resume=True) == 2
    assert not output.exists()
    assert len(list(site(output).glob("*.ledger"))) == 2
    worked = []
    work = engine._work
    monkeypatch.setattr(engine, "_work", lambda *a, **k: worked.append(work(*a, **k)))
    said = []
    result = made(
        paths, output, resume=True, progress=lambda done, total: said.append((done, total))
    )
    assert tree(output) == tree(tmp_path / "one.pt")
    assert len(worked) == len(result_stretches(result)) - 2
    assert said[-1][0] == said[-1][1] == result.nbytes
    assert left(tmp_path) == []


def result_stretches(result):
    crew = Crew(result.job.options)
    crew._prepare(result.job, engine.largest_chunk(result.job))
    return crew.work.stretches


def test_a_run_without_resume_begins_anew(tmp_path, monkeypatch):
    """A plain run needs nothing of what another left, and removes it in the end."""
    paths = checkpoints(tmp_path)
    output = tmp_path / "out.pt"
    stopped_after(monkeypatch, 1, paths, output, resume=True)
    made(paths, output)
    made(paths, tmp_path / "one.pt")
    assert tree(output) == tree(tmp_path / "one.pt")
    assert left(tmp_path) == []


def test_parts_that_are_done_are_not_done_again(tmp_path):
    """A part that runs a second time reads nothing."""
    paths = checkpoints(tmp_path)
    first = made(paths, tmp_path / "out.pt", part="1/2")
    again = made(paths, tmp_path / "out.pt", part="1/2")
    assert first.nbytes > 0
    assert again.nbytes == 0
    assert again.part.missing == (2,)


def test_other_numbers_of_parts_go_together(tmp_path):
    """Parts of two and of five count for the same merge, and so does `--resume`."""
    paths = checkpoints(tmp_path)
    made(paths, tmp_path / "one.pt")
    made(paths, tmp_path / "out.pt", part="1/2")
    assert made(paths, tmp_path / "out.pt", part="5/5").part.missing
    made(paths, tmp_path / "out.pt", resume=True)
    assert tree(tmp_path / "out.pt") == tree(tmp_path / "one.pt")


@pytest.mark.large
def test_one_part_at_once_in_several_threads(tmp_path, larger):
    """Runs that make the same parts at the same time give the same bytes, and one finishes."""
    paths = checkpoints(tmp_path)
    made(paths, tmp_path / "one.pt")
    ended = []

    def run(part):
        ended.append(run_command(*paths, "-o", tmp_path / "out.pt", "--part", part, "-q"))

    threads = [threading.Thread(target=run, args=[part]) for part in ("1/2", "2/2", "1/2", "2/2")]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    # A run that comes when all is done already finds the output.
    good = [one for one in ended if not one.returncode]
    assert {one.stderr.splitlines()[0] for one in ended if one.returncode} <= {
        f"error: {tmp_path / 'out.pt'}: the output exists already"
    }
    assert good
    assert tree(tmp_path / "out.pt") == tree(tmp_path / "one.pt")
    assert left(tmp_path) == []


def test_finish_waits_for_all_parts(tmp_path):
    """`--finish` names the parts that lack, and does none of the work."""
    paths = checkpoints(tmp_path)
    output = tmp_path / "out.pt"
    with pytest.raises(MergeError, match="no part of it is made"):
        made(paths, output, finish=True)
    made(paths, output, part="2/3")
    with pytest.raises(MergeError, match=r"it lacks parts 1, 3 of 3 \(\d of \d stretches"):
        made(paths, output, finish=True)
    assert not output.exists()


def test_a_finish_that_failed_is_done_by_finish(tmp_path):
    """Where the verdict refuses, the parts stay; what was asked for has to be asked for again."""
    paths = checkpoints(tmp_path)
    output = tmp_path / "out.pt"
    made(paths, output, part="1/2", min_agreement=1)
    with pytest.raises(MergeError, match="agree by"):
        made(paths, output, part="2/2", min_agreement=1)
    assert not output.exists()
    with pytest.raises(MergeError, match="agree by"):
        made(paths, output, finish=True, min_agreement=1)
    with pytest.raises(MergeError, match=r"--min-agreement was 1, is None|min_agreement"):
        made(paths, output, finish=True)


def changes():
    """Yield a name, and what changes a merge after its first part."""

    def touched(paths):
        os.utime(paths[1], (1, 1))
        return {}

    def longer(paths):
        torch.save({"state_dict": state(5) | {"z": torch.ones(3)}}, paths[1])
        return {}

    yield "time", touched, "the time of the last change of .*in1.pt was"
    yield "size", longer, "the size of .*in1.pt was"
    yield (
        "option",
        lambda _: {"allow_nonfinite": True},
        "allow_nonfinite was False, is True|allow-nonfinite",
    )
    yield "weights", lambda _: {"weights": [1, 2, 3]}, "the weights of"
    yield "template", lambda _: {"template": 2}, "one of the inputs"


@pytest.mark.parametrize(
    ("change", "said"), [one[1:] for one in changes()], ids=[one[0] for one in changes()]
)
@pytest.mark.parametrize("how", [{"resume": True}, {"part": "2/2"}, {"finish": True}])
def test_another_merge_is_refused_with_the_reason(tmp_path, change, said, how):
    """What changed since the first part is named, and the first part stays."""
    paths = checkpoints(tmp_path)
    output = tmp_path / "out.pt"
    made(paths, output, part="1/2")
    before = tree(site(output))
    options = change(paths)
    if "size" in said:
        options = options | {"missing": "skip"}
    with pytest.raises(MergeError, match="another merge was begun there") as raised:
        made(paths, output, **how, **options)
    if "size" not in said:
        with pytest.raises(MergeError, match=said):
            raise raised.value
    assert str(site(output)) in raised.value.hint
    assert tree(site(output)) == before


def test_another_version_is_refused(tmp_path, monkeypatch):
    """Parts of another version of merge-avg do not count."""
    paths = checkpoints(tmp_path)
    made(paths, tmp_path / "out.pt", part="1/2")
    monkeypatch.setattr("merge_avg.parts._plan.__version__", "99")
    with pytest.raises(MergeError, match=r"the version of merge-avg was .*, is 99"):
        made(paths, tmp_path / "out.pt", part="2/2")


def rewritten(path, **changed):
    """Change a ledger, and close it anew."""
    text = path.read_bytes().split(b"\n")[0]
    text = json.dumps(json.loads(text) | changed).encode()
    path.write_bytes(text + b"\n" + xxh3_128_hexdigest(text).encode() + b"\n")


def torn(path):
    path.write_bytes(path.read_bytes()[:-10])


def other_stretch(path):
    shutil.copy(path.with_name("0000.ledger"), path)


def lies(**changed):
    return lambda path: rewritten(path, **changed)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (torn, "torn"),
        (other_stretch, "another stretch"),
        (lies(plan="00"), "another merge"),
        (lies(merge_avg="0.0.1"), "merge-avg 0.0.1"),
        (lies(tokens=["1"]), "that is gone"),
        (lies(hashes=["0"]), "hashes of other checkpoints"),
        (lies(varying=[10_000]), "names what there is not"),
        (lies(products=[[["AQAAAAAAAAA=", "AAAAAAAAAAA="], ["", ""]]]), "products of other"),
        (lies(outputs=[[0, 0, "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="]]), "no record has"),
        (lies(inputs=[[0, "A" * 64]]), "names what there is not"),
    ],
)
def test_ledgers_that_lie_are_refused_by_name(tmp_path, change, said):
    """A ledger that is torn, of another merge or forged is named, and nothing is published."""
    paths = checkpoints(tmp_path)
    output = tmp_path / "out.pt"
    made(paths, output, part="1/2")
    ledger = max(site(output).glob("*.ledger"))
    change(ledger)
    with pytest.raises(MergeError, match=said) as raised:
        made(paths, output, resume=True)
    assert raised.value.where == str(ledger)
    assert not output.exists()
    ledger.unlink()
    made(paths, output, resume=True)
    made(paths, tmp_path / "one.pt")
    assert tree(output) == tree(tmp_path / "one.pt")


def test_ledgers_that_say_too_little_are_refused(tmp_path):
    """A ledger without the checksums of what it wrote ends in no output."""
    paths = checkpoints(tmp_path)
    output = tmp_path / "out.pt"
    made(paths, output, part="1/2")
    rewritten(site(output) / "0000.ledger", outputs=[])
    with pytest.raises(MergeError, match="the ledgers lack a part of record"):
        made(paths, output, resume=True)
    assert not output.exists()


def test_ledgers_do_not_count_for_a_new_file(tmp_path):
    """Ledgers of an output in the making that was removed are refused."""
    paths = checkpoints(tmp_path)
    output = tmp_path / "out.pt"
    made(paths, output, part="1/2")
    kept = tmp_path / "kept"
    site(output).rename(kept)
    made(paths, output, part="2/2")
    for ledger in kept.glob("*.ledger"):
        shutil.copy(ledger, site(output))
    with pytest.raises(MergeError, match="an output in the making that is gone"):
        made(paths, output, resume=True)


def test_one_that_is_still_at_work_finishes(tmp_path):
    """What does a stretch again would write to a published output: whoever ends last publishes."""
    paths = checkpoints(tmp_path)
    output = tmp_path / "out.pt"
    made(paths, tmp_path / "one.pt")
    found = []

    def meanwhile(done, total):
        if not found:
            found.append(made(paths, output, resume=True).part)
            assert not output.exists()

    assert made(paths, output, part="1/2", threads=1, progress=meanwhile).part is None
    assert found == [Part(1, 1, ())]
    assert tree(output) == tree(tmp_path / "one.pt")
    assert not site(output).exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_part_that_comes_late_has_nothing_to_do(tmp_path, overwrite):
    """Where the output is there, made of the same inputs, so are its parts; others are refused."""
    paths = checkpoints(tmp_path)
    output = tmp_path / "out.pt"
    for part in ("1/9", "2/9", "9/9", "4/9", "3/9", "5/9", "6/9", "7/9", "8/9"):
        made(paths, output, part=part, overwrite=overwrite)
    before = output.stat().st_mtime_ns, output.stat().st_ino
    assert made(paths, output, part="2/9", overwrite=overwrite).part == Part(2, 9, ())
    assert (output.stat().st_mtime_ns, output.stat().st_ino) == before
    assert left(tmp_path) == []
    os.utime(paths[0])
    if overwrite:
        assert made(paths, output, part="1/2", overwrite=True).part.missing == (2,)
    else:
        with pytest.raises(MergeError, match="the output exists already"):
            made(paths, output, part="1/2")


def test_an_output_in_the_making_that_is_removed_is_missed(tmp_path):
    """That what was shared is gone is only good news if the output is there."""
    paths = checkpoints(tmp_path)
    output = tmp_path / "out.pt"

    def gone(done, total):
        shutil.rmtree(site(output), ignore_errors=True)

    with pytest.raises(MergeError, match="what was made of it is gone"):
        made(paths, output, resume=True, progress=gone)
    assert not output.exists()


def test_parts_of_other_rules_are_refused(tmp_path):
    """Rules are compared as what they say of each checkpoint, not as they are written."""
    paths = checkpoints(tmp_path)
    options = {"template": paths[2], "weights_for": ["*=1,2,4"]}
    made(paths, tmp_path / "out.pt", part="1/2", **options)
    turned = [paths[0], paths[2], paths[1]]
    with pytest.raises(MergeError, match="what weights_for says was"):
        made(turned, tmp_path / "out.pt", part="2/2", **options)


def test_parts_are_made_from_any_directory(tmp_path, monkeypatch):
    """A path that is spelled in another way names the same files."""
    paths = checkpoints(tmp_path)
    monkeypatch.chdir(tmp_path)
    made([path.name for path in paths], tmp_path / "out.pt", part="1/2")
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    made([f"../{path.name}" for path in paths], tmp_path / "out.pt", part="2/2")
    assert (tmp_path / "out.pt").exists()


def test_a_published_output_is_only_cleaned_up(tmp_path, monkeypatch):
    """A run that died after the rename is resumed without a new reading, whatever it replaced."""
    paths = checkpoints(tmp_path)
    made(paths, tmp_path / "one.pt")
    for before in (None, b"old"):
        output = tmp_path / "out.pt"
        output.unlink(missing_ok=True)
        if before is not None:
            output.write_bytes(before)
        with monkeypatch.context() as patch:
            patch.setattr(Crew, "published", lambda _: (_ for _ in ()).throw(Killed))
            with pytest.raises(Killed):
                made(paths, output, resume=True, overwrite=True)
        assert tree(output) == tree(tmp_path / "one.pt")
        assert site(output).exists()
        made(paths, output, resume=True)
        assert tree(output) == tree(tmp_path / "one.pt")
        assert left(tmp_path) == []


def test_an_output_that_is_there_is_not_replaced(tmp_path):
    """Parts refuse an output that exists, at first and in the end, and keep what they did."""
    paths = checkpoints(tmp_path)
    output = tmp_path / "out.pt"
    output.write_bytes(b"mine")
    with pytest.raises(MergeError, match="the output exists already"):
        made(paths, output, part="1/2")
    output.unlink()
    made(paths, output, part="1/2")
    output.write_bytes(b"mine")
    with pytest.raises(MergeError, match="another output appeared there"):
        made(paths, output, part="2/2")
    assert output.read_bytes() == b"mine"
    made(paths, output, finish=True, overwrite=True)
    made(paths, tmp_path / "one.pt")
    assert tree(output) == tree(tmp_path / "one.pt")


def test_damage_is_found_across_parts(tmp_path):
    """A record that is damaged is found, though each part reads only a piece of it."""
    path = tmp_path / "in0.pt"
    big = torch.zeros(6 << 20, dtype=torch.uint8).view(torch.float32)
    torch.save({"w": big}, path)
    torch.save({"w": big}, tmp_path / "in1.pt")
    raw = bytearray(path.read_bytes())
    raw[3 << 20] ^= 1
    path.write_bytes(raw)
    paths = [path, tmp_path / "in1.pt"]
    made(paths, tmp_path / "out.pt", part="1/2")
    with pytest.raises(MergeError, match="its CRC-32 does not match"):
        made(paths, tmp_path / "out.pt", part="2/2")
    assert not (tmp_path / "out.pt").exists()


def test_an_input_that_changes_between_is_found(tmp_path, monkeypatch):
    """An input that only another process has read is compared once more before the end."""
    paths = checkpoints(tmp_path, "sharded")
    output = tmp_path / "out"
    made(paths, output, part="1/2")
    gathered = Crew.gathered

    def touched(self):
        os.utime(paths[2] / "config.json", (1, 1))
        return gathered(self)

    monkeypatch.setattr(Crew, "gathered", touched)
    with pytest.raises(MergeError, match="it changed while it was read"):
        made(paths, output, part="2/2")
    assert not output.exists()


@pytest.mark.parametrize(
    "part", ["0/2", "3/2", "1", "1/0", "a/b", "1/99999999", "-1/2", (0, 2), (1, 2, 3)]
)
def test_other_texts_are_not_parts(tmp_path, part):
    """A part is a number and how many there are; anything else is a usage error."""
    with pytest.raises(UsageError, match="is not a part"):
        made(checkpoints(tmp_path, "safetensors", 2), tmp_path / "out", part=part)


def test_options_that_exclude_each_other(tmp_path):
    """A part goes on by itself: with `--resume` or `--finish` it is a usage error."""
    paths = checkpoints(tmp_path, "safetensors", 2)
    for options in ({"resume": True}, {"finish": True}):
        with pytest.raises(UsageError, match="exclude each other"):
            made(paths, tmp_path / "out.safetensors", part="1/2", **options)


def test_the_command_makes_parts(tmp_path, command):
    """A part prints no path, says what lacks, and in JSON too; a dry run shows all shares."""
    paths = [path.name for path in checkpoints(tmp_path)]
    code, out, err = command(*paths, "-o", "out.pt", "--part", "1/3", "--dry-run")
    assert (code, out) == (0, "")
    assert err.count(" would read ") >= 4
    code, out, err = command(*paths, "-o", "out.pt", "--part", "1/3", "--dry-run", "--json")
    shares = json.loads(out)["shares"]
    assert [one["number"] for one in shares] == [1, 2, 3]
    assert sum(one["bytes"] for one in shares) == json.loads(out)["bytes_to_read"]
    code, out, err = command(*paths, "-o", "out.pt", "--part", "1/3")
    assert (code, out) == (0, "")
    assert "made part 1 of 3, averaging 3 checkpoints into out.pt" in err
    assert "missing part 2, 3" in err
    code, out, err = command(*paths, "-o", "out.pt", "--part", "2/3", "--json")
    assert json.loads(out)["part"] == {"number": 2, "of": 3, "missing": [3]}
    code, out, err = command(*paths, "-o", "out.pt", "--part", "3/3", "--report", "page.html")
    assert (code, out) == (0, "out.pt\n")


def test_a_model_is_filled_by_one_process(tmp_path):
    """There are no parts of a model in memory."""
    for options in ({"resume": True}, {"part": "1/2"}, {"finish": True}):
        with pytest.raises(UsageError, match="a model is filled by one process"):
            load_average(torch.nn.Linear(1, 1), checkpoints(tmp_path, "safetensors", 2), **options)


def test_weights_by_name_work_in_parts(tmp_path):
    """Tensors that have other weights get them whoever works on them."""
    paths = checkpoints(tmp_path)
    options = {"weights_for": ["a=1,2,3", "d=0,1,0"]}
    made(paths, tmp_path / "one.pt", **options)
    for part in ("2/2", "1/2"):
        made(paths, tmp_path / "out.pt", part=part, **options)
    assert tree(tmp_path / "out.pt") == tree(tmp_path / "one.pt")


def test_a_soup_is_made_by_one_process(tmp_path, command):
    """The command soup has no parts."""
    code, _, err = command("soup", "a.pt", "-o", "b.pt", "--eval", "x", "--mode", "max", "--resume")
    assert code == 2
    assert "no such option" in err.lower()
