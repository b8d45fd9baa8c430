"""The graph of imports: one way between packages, and no torch where none is needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import merge_avg

ROOT = Path(merge_avg.__file__).parent
# Modules that may import torch at their top. Others import these late, when a merge needs them.
TORCH = {
    "merge_avg.adapters._mean",
    "merge_avg.agreement._torch_products",
    "merge_avg.engine._cuda",
    "merge_avg.engine._restride",
    "merge_avg.engine.model",
    "merge_avg.merger",
    "merge_avg.scaled._compute",
    "merge_avg.scaled._numbers",
}


def name_of(path, root=ROOT):
    """The dotted name of a module of the package."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(("merge_avg", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def targets(node, modules):
    """The modules that an import statement names; of `from a import b`, a.b where it is one."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    assert not node.level, "imports are absolute"
    whole = [f"{node.module}.{alias.name}" for alias in node.names]
    return {one if one in modules else str(node.module) for one in whole}


def imports(root=ROOT):
    """Of each module what it imports: at its top, and anywhere, lazily or for types only."""
    sources = {name_of(path, root): ast.parse(path.read_text()) for path in root.rglob("*.py")}
    early, all_ = {}, {}
    for name, tree in sources.items():
        kinds = (ast.Import, ast.ImportFrom)
        at_top = [node for node in tree.body if isinstance(node, kinds)]
        anywhere = [node for node in ast.walk(tree) if isinstance(node, kinds)]
        early[name] = set().union(*(targets(node, sources) for node in at_top))
        all_[name] = set().union(*(targets(node, sources) for node in anywhere))
    return early, all_


EARLY, ALL = imports()


def room(module):
    """The package that a module lies in, or the module itself at the top level."""
    parts = module.split(".")
    return parts[1] if parts[0] == "merge_avg" and len(parts) > 1 else None


def rooms(graph):
    """Of each package, and each module at the top level, which others it imports."""
    found = {}
    for name, others in graph.items():
        if room(name):
            inside = {room(other) for other in others} - {room(name), None}
            found.setdefault(room(name), set()).update(inside)
    return found


def circle(graph):
    """A way from some node back to it, if there is one."""

    def walk(node, path):
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        for other in sorted(graph.get(node, ())):
            found = walk(other, [*path, node])
            if found:
                return found
        done.add(node)
        return None

    done = set()
    return next((found for node in sorted(graph) if (found := walk(node, []))), None)


def reached(name, graph=EARLY):
    """All that importing a module imports: a module's own packages too."""
    seen, pending = set(), [name]
    while pending:
        one = pending.pop()
        parts = one.split(".")
        more = {".".join(parts[:depth]) for depth in range(1, len(parts))}
        new = (graph.get(one, set()) | more) - seen
        seen |= new
        pending += new
    return seen


def test_packages_import_one_way():
    """No package reaches itself through what its modules import, lazily or not."""
    assert circle(rooms(ALL)) is None


def test_modules_import_one_way():
    """No module imports itself through others at import time."""
    inner = {name: {o for o in others if o in EARLY} for name, others in EARLY.items()}
    assert circle(inner) is None


@pytest.mark.parametrize("where", ["top", "late"])
def test_a_forbidden_import_is_seen(tmp_path, where):
    """The check fails when a lower package imports a higher one, at its top or in a function."""
    for path in ROOT.rglob("*.py"):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    line = "from merge_avg.engine import run\n"
    forbidden = line if where == "top" else f"def late():\n    {line}"
    module = tmp_path / "checkpoint" / "_layout.py"
    module.write_text(f"{module.read_text()}\n{forbidden}")
    _, everywhere = imports(tmp_path)
    assert "checkpoint" in circle(rooms(everywhere))


def test_a_package_is_used_by_its_face():
    """No module imports a private module of another package."""
    for name, others in ALL.items():
        for other in others:
            private = any(part.startswith("_") for part in other.split(".")[2:])
            assert not private or room(other) == room(name) or room(name) is None, (name, other)


def test_only_a_few_modules_import_torch_at_their_top():
    """Torch takes seconds to import: what does is imported late itself."""
    found = {
        name for name, others in EARLY.items() if any(o.split(".")[0] == "torch" for o in others)
    }
    extra = {name for name in found if not name.startswith("merge_avg.arithmetic.")}
    assert extra == TORCH
    for name in ("cli", "engine", "verify", "soup", "plan", "formats", "selection", "report"):
        assert "torch" not in {one.partition(".")[0] for one in reached(f"merge_avg.{name}")}, name


def test_a_process_that_plans_imports_neither_torch_nor_numpy():
    """The graph above is what happens: importing the command and the engine loads neither."""
    code = (
        "import sys, merge_avg.cli, merge_avg.engine, merge_avg.verify, merge_avg.soup\n"
        "print({'torch', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_help_waits_for_nothing():
    """What the command imports at its top reaches no scanner, no plan and no engine."""
    heavy = {"merge_avg.engine", "merge_avg.plan", "merge_avg.formats", "merge_avg.selection"}
    assert not heavy & reached("merge_avg.cli._app")


def test_a_plain_run_waits_for_no_others():
    """Importing the command and the engine imports nothing of ranks and parts."""
    for name in ("cli._app", "cli._merge", "engine", "verify", "api"):
        assert "merge_avg.parts" not in reached(f"merge_avg.{name}"), name


def test_a_format_waits_for_its_first_file():
    """Importing the engine imports no module of a format."""
    some = ("distributed", "legacy", "pickle", "safetensors", "zip")
    found = reached("merge_avg.engine")
    assert not {
        name for name in found for one in some if name.startswith(f"merge_avg.formats.{one}")
    }


# Who may read a file or a text, beside `formats.bounded`: what is no text, what lies in the package
# or the system, and what the user's own command prints.
READERS = {
    ("cli._process", "open"): "the null device",
    ("engine._readahead", "open"): "payload",
    ("formats.__init__", "open"): "the file of a format, whose scanner bounds what it reads",
    ("formats.carried", "open"): "the same, of files that are not scanned",
    ("formats.distributed.__init__", "open"): "the same, of a set",
    ("formats.distributed.write", "open"): "the same, of objects that stay in it",
    ("io._output", "open"): "outputs",
    ("io._platform", "open"): "directories",
    ("io._platform", "read_bytes"): "a table and an identity that Linux tells",
    ("io._platform", "read_text"): "a number that Linux tells",
    ("io._reader", "open"): "payload",
    ("io._site", "open"): "outputs, and 20 bytes beside one",
    ("io._temporary", "open"): "outputs",
    ("report.text", "open"): "it adds to a file",
    ("selection._copies", "open"): "payload, to tell a copy",
    ("soup._evaluate", "loads"): "what the user's own command prints",
    ("soup._log", "open"): "it adds to the log",
    ("verify", "open"): "payload",
}


def calls(root=ROOT):
    """Where files are opened or read, or JSON is parsed: modules and the names that they call."""
    found = set()
    for path in root.rglob("*.py"):
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(node, "attr", getattr(node, "id", None))
            whole = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Name) else ""
            parses = whole in ("json.load", "json.loads", "json.JSONDecoder")
            if parses or name in ("open", "read_bytes", "read_text", "open_binary", "fdopen"):
                found.add((module, name))
    return {one for one in found if one[0] != "formats.bounded"}


def test_texts_are_read_in_one_way():
    """No module but `formats.bounded` reads a text that a checkpoint brings, or parses its JSON."""
    assert calls() == set(READERS)


@pytest.mark.parametrize(
    "line",
    ["json.loads(raw)", "path.read_text()", "path.read_bytes()", "open(path)", "json.load(f)"],
)
def test_another_way_to_read_is_seen(tmp_path, line):
    """The check fails where a module reads a text by itself."""
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan/_job.py").write_text(line)
    assert calls(tmp_path)


def test_json_that_is_shown_is_strict():
    """What is printed or logged has no NaN; records, indices and headers hold no floats of ours."""
    held = {
        "plan._provenance",
        "plan._targets",
        "formats.safetensors",
        "adapters._described",
        "scaled._find",
    }
    for path in ROOT.rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dump", "json.dumps"):
                strict = [one for one in node.keywords if one.arg == "allow_nan"]
                assert strict or module in held, module
                assert all(ast.unparse(one.value) == "False" for one in strict)
