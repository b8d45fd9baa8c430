"""Documents name files that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = ["README.md", *(f".github/{name}.md" for name in ("AGREEMENT", "CONTRIBUTING"))]
DOCUMENTS += [f".github/{name}.md" for name in ("SECURITY", "JSON", "PYTHON")]
HOSTED = [
    "https://github.com/merge-avg/merge-avg/blob/main/",
    "https://raw.githubusercontent.com/merge-avg/merge-avg/main/",
]
FILES = [
    path.relative_to(ROOT).as_posix()
    for folder in ("src", "tests", "scripts")
    for path in (ROOT / folder).rglob("*")
    if "__pycache__" not in path.parts
]
PATH = re.compile(r"\b(?:src|tests|scripts)/[\w/.-]*\w|\b[\w/]+\.(?:py|c|h)\b")


def links(text):
    """Return where the links of a document lead, except for those to the web or within it.

    The README is shown by the package index too, where only whole addresses lead anywhere.
    """
    found = re.findall(r"\]\(([^)#]+)", text)
    found = [re.sub(f"^({'|'.join(map(re.escape, HOSTED))})", "", link) for link in found]
    return [link for link in found if "://" not in link]


def quoted(text):
    """Return the paths that a document has in backquotes."""
    return [path for words in re.findall(r"`([^`\n]+)`", text) for path in PATH.findall(words)]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files(document):
    """Every link of a document to a file leads to one."""
    place = (ROOT / document).parent
    found = links((ROOT / document).read_text())
    assert [link for link in found if not (place / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_quoted_paths_exist(document):
    """Every path in backquotes is that of a file; folders that a table shares may be left out."""
    found = quoted((ROOT / document).read_text())
    assert found or document in (".github/JSON.md", ".github/PYTHON.md")
    lost = [p for p in found if not any(f"/{file}".endswith(f"/{p}") for file in FILES)]
    assert lost == []


def test_links_of_the_readme_are_whole():
    """On the package index nothing lies beside the README: its links are whole addresses."""
    found = re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    assert [link for link in found if not link.startswith(("https://", "#"))] == []
    assert any(link.startswith(HOSTED[1]) for link in found)  # pictures
