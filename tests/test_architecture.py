"""The graph of imports: one way, and no torch where none is needed."""

import ast
from pathlib import Path

import merge_avg

ROOT = Path(merge_avg.__file__).parent


def imports():
    """Module to the modules that it imports at its top level, and those only for types."""
    graph = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                module = node.module or ""
                whole = {f"{module}.{alias.name}" for alias in node.names}
                found |= {module} | {
                    one
                    for one in whole
                    if (ROOT.parent / one.replace(".", "/")).with_suffix(".py").exists()
                }
        graph[name] = found
    return graph


GRAPH = imports()


def reached(name, seen=None):
    seen = set() if seen is None else seen
    for other in GRAPH.get(name, ()):
        if other not in seen:
            seen.add(other)
            reached(other, seen)
    return seen


def test_imports_go_one_way():
    """No module reaches itself through what it imports, but for the package's own name."""
    for name in GRAPH:
        if name not in ("merge_avg", "merge_avg.formats"):
            assert name not in reached(name), name


def test_what_is_planned_needs_no_torch():
    """The command, the scans and the plan import neither torch nor numpy."""
    for name in ("merge_avg.cli", "merge_avg.prepare", "merge_avg.plan", "merge_avg.formats"):
        assert not {"torch", "numpy"} & {one.partition(".")[0] for one in reached(name)}, name


def test_torch_is_imported_only_where_it_is_needed():
    """What a merge is made of does not import torch at its top: the compiled loops need none."""
    for name in ("merge", "verify", "work", "agreement", "compiled", "lanes", "soup"):
        found = {one.partition(".")[0] for one in reached(f"merge_avg.{name}")}
        assert "torch" not in found, name


def test_help_waits_for_nothing():
    """What the command imports at its top does not reach the scanners, the plan or the report."""
    heavy = {"merge_avg.prepare", "merge_avg.report", "merge_avg.plan", "merge_avg.merge"}
    assert not heavy & reached("merge_avg.cli")


def test_the_rooms_do_not_know_each_other():
    """Plan, average, output and the formats do not import each other."""
    rooms = {"merge_avg.plan", "merge_avg.average", "merge_avg.output", "merge_avg.formats"}
    rooms |= {"merge_avg.compiled"}
    for room in rooms:
        found = reached(room)
        others = rooms - {room}
        assert not others & found, (room, others & found)


def test_a_format_waits_for_its_first_file():
    """What a merge is made of imports no module of a format that its files are not of."""
    some = {"dcp", "inert", "safetensors", "torch_legacy", "torch_objects", "torch_zip"}
    assert not {f"merge_avg.formats.{name}" for name in some} & reached("merge_avg.merge")
