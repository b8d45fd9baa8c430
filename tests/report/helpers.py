"""Checkpoints, reports and pages that several tests of the report share."""

from dataclasses import dataclass, field
from html.parser import HTMLParser

import torch

from merge_avg.engine import run
from merge_avg.options import Options
from merge_avg.plan import prepare
from merge_avg.report import html
from merge_avg.report.values import describe
from tests.helpers import noise


def report_of(paths, output, *, dry_run=False, choice=None, **options):
    """Merge checkpoints, or only plan to, and return the report."""
    job = prepare(paths, output, Options(overwrite=True, **options))
    return describe(job, None if dry_run else run(job), choice)


def save(folder, *states, names=None):
    """Save states as 0.pt, 1.pt, ... or under other names, and return the paths."""
    paths = [folder / name for name in names or (f"{n}.pt" for n in range(len(states)))]
    for path, state in zip(paths, states, strict=True):
        torch.save(state, path)
    return paths


def relatives(folder, count=4, names=None, layers=5):
    """Save base.pt and fine-tunes of it, the last of which strays in one layer."""
    base = {f"layers.{i}.weight": noise(i, 40, 50) for i in range(layers)} | {"norm": torch.ones(9)}
    torch.save({"model": base}, folder / "base.pt")
    states = []
    for number in range(count):
        content = {
            key: value + noise(99 * number + 70 + place, 40, 50) / 9 if value.dim() > 1 else value
            for place, (key, value) in enumerate(base.items())
        }
        if number == count - 1:
            content["layers.2.weight"] = noise(5000, 40, 50)
        states.append({"model": content, "epoch": number})
    return save(folder, *states, names=names or [f"fold{n}.pt" for n in range(count)])


class Elements(HTMLParser):
    """Every element of a page with its attributes, and all text that is shown."""

    def __init__(self, text):
        super().__init__()
        self.found, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)


@dataclass
class Node:
    """An element of a page, with what is in it."""

    tag: str
    attributes: dict[str, str | None] = field(default_factory=dict)
    children: "list[Node | str]" = field(default_factory=list)
    parent: "Node | None" = None

    def all(self, *tags):
        """Yield the elements below with one of some tags, in the page's order."""
        for child in self.children:
            if isinstance(child, Node):
                if child.tag in tags:
                    yield child
                yield from child.all(*tags)

    @property
    def text(self):
        """All text in it, with single blanks."""
        parts = (one if isinstance(one, str) else one.text for one in self.children)
        return " ".join("".join(parts).split()) if self.tag != "tr" else " | ".join(parts)

    @property
    def above(self):
        """The elements that it is in."""
        return [self.parent, *self.parent.above] if self.parent else []


class Tree(HTMLParser):
    """A page as elements within elements; one that is not closed in its turn is an error."""

    def __init__(self, text):
        super().__init__()
        self.root = self.here = Node("")
        self.feed(text)
        assert self.here is self.root

    def handle_starttag(self, tag, attributes):
        node = Node(tag, dict(attributes), parent=self.here)
        self.here.children.append(node)
        if tag != "meta":
            self.here = node

    def handle_startendtag(self, tag, attributes):
        self.here.children.append(Node(tag, dict(attributes), parent=self.here))

    def handle_endtag(self, tag):
        assert tag == self.here.tag
        self.here = self.here.parent

    def handle_data(self, data):
        self.here.children.append(data)


def sections(report):
    """The sections of a page by their ids."""
    root = Tree(html.page(report)).root
    return {one.attributes["id"]: one for one in root.all("section")}


def rows_of(section):
    """The rows of the tables in a section, without their heads."""
    return [row.text for body in section.all("tbody") for row in body.all("tr")]


def contrast(one, other):
    """The ratio of two colours' luminances as WCAG 2 has it, from 1 to 21."""

    def luminance(colour):
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return sum(a * b for a, b in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
