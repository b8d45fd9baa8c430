"""The page in a browser: Chromium shows it, finds what is in it, and axe has no fault with it."""

import json
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from merge_avg.report import html
from tests.helpers import noise
from tests.report.helpers import Elements, relatives, report_of, save

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
AXE = find_spec("axe_core_python")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH"),
]


def browsed(path, folder, fragment="", *, dark=False):
    """The page's elements as a browser made them, its console, and what the page asked for.

    The browser has requests of its own, which no page initiates; none reaches a network here.
    """
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    flags += " --disable-background-networking --disable-component-update --dump-dom"
    flags += " --disable-dev-shm-usage --disable-extensions --enable-logging=stderr --v=0"
    flags += " --proxy-server=http://127.0.0.1:9 --proxy-bypass-list=<-loopback>"
    log = folder / "network.json"
    flags += f" --window-size=1280,900 --blink-settings=preferredColorScheme={0 if dark else 1}"
    flags += " --virtual-time-budget=30000"  # what is to happen later happens before it ends
    command = [CHROMIUM, *flags.split(), f"--log-net-log={log}", f"--user-data-dir={folder / 'p'}"]
    command.append(path.as_uri() + fragment)
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=90)
    events = [event.get("params") or {} for event in json.loads(log.read_text())["events"]]
    own = "not an origin"
    requests = {event["url"] for event in events if event.get("initiator", own) != own}
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Elements(done.stdout), console, requests


def scripted(report, *scripts):
    """A page with scripts of the test, which may tell a value; so without the page's policy."""
    text = re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", html.page(report))
    every = ('tell = value => console.log("TOLD " + JSON.stringify(value))', *scripts)
    return text.replace("</body>", "".join(f"<script>{one}</script>" for one in every) + "</body>")


def told(found):
    """The value that a script told the console."""
    _, console, _ = found
    (said,) = (line for line in console if '"TOLD ' in line)
    return json.loads(said.partition('"TOLD ')[2].rpartition('", source')[0])


def test_a_browser_shows_it(tmp_path):
    """In Chromium: heat maps, chart and tables, a clean console, and nothing from the network."""
    paths = relatives(tmp_path)
    report = report_of(paths, tmp_path / "o.pt", base=tmp_path / "base.pt")
    html.write(tmp_path / "r.html", report, overwrite=False)
    elements, console, requests = browsed(tmp_path / "r.html", tmp_path)
    ids = {attributes.get("id") for _, attributes in elements.found}
    assert {"heat-map", "heat-map-centred", "distances", "checkpoints", "least", "what"} <= ids
    assert sum(tag == "svg" for tag, _ in elements.found) == 3
    assert sum(tag == "image" for tag, _ in elements.found) >= 2
    assert sum(tag == "table" for tag, _ in elements.found) == 6
    assert sum(tag == "tr" for tag, _ in elements.found) > 5 + 5 + 6
    text = " ".join(elements.text)
    assert f"{report.agreement.mean:.3f}" in text
    assert str(paths[0]) in text
    assert console == []
    assert requests == set()


def test_a_browser_finds_tensors_in_closed_parts(tmp_path, monkeypatch):
    """A search for a tensor's name opens the part of the table that it is in, and no other."""
    monkeypatch.setattr(html, "_PART", 3)
    report = report_of(relatives(tmp_path), tmp_path / "o.pt", agreement=False)
    tell = "setTimeout(() => tell(parts.map(one => one.open)), 2000)"
    scripts = 'parts = [...document.querySelectorAll("#tensors details")]', tell
    (tmp_path / "r.html").write_text(scripted(report, *scripts))
    # By a text fragment, which searches as a reader does.
    found = browsed(tmp_path / "r.html", tmp_path, "#:~:text=model.layers.4.weight")
    assert told(found) == [False, True]


@pytest.mark.skipif(AXE is None, reason="there is no axe: pip install --group browser")
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_axe_finds_nothing(tmp_path, width, dark):
    """On narrow and wide screens, in light and dark, axe has no fault and nothing sticks out."""
    axe = (Path(AXE.origin).parent / "axe.min.js").read_text()
    paths = relatives(tmp_path)
    strangers = [{f"{i}.w": noise(9 * n + i, 40, 40) for i in range(3)} for n in range(3)]
    endless = [f"{n}{'x' * 200}.pt" for n in range(2)]
    for number, report in enumerate(
        [
            report_of(paths, tmp_path / "o.pt", base=tmp_path / "base.pt"),
            report_of(save(tmp_path, *strangers), tmp_path / "o.pt"),
            report_of(
                relatives(tmp_path, 2, endless), tmp_path / "o.pt", base=tmp_path / endless[0]
            ),
        ]
    ):
        text = scripted(
            report,
            axe,
            """axe.run().then(found => tell([innerWidth, found.passes.length > 20,
                document.documentElement.scrollWidth <= innerWidth,
                matchMedia("(prefers-color-scheme: dark)").matches,
                found.violations.map(one => [one.id, one.nodes[0].html])]))""",
        )
        (tmp_path / "r.html").write_text(text.replace("<details>", "<details open>"))
        # A window has a least width, a frame has none.
        frame = f'<iframe src="r.html" width="{width}" height="900" style="border: 0"></iframe>'
        (tmp_path / "frame.html").write_text(f'<!DOCTYPE html><html lang="en">{frame}</html>')
        path = tmp_path / ("frame.html" if width < 1000 else "r.html")
        assert told(browsed(path, tmp_path, dark=dark)) == [width, True, True, dark, []], number


def test_the_browser_would_tell(tmp_path):
    """A page that loads something, or whose script fails, is caught by the same check."""
    path = tmp_path / "bad.html"
    path.write_text('<img src="http://example.com/x.png"><script>throw Error("oh")</script>')
    _, console, requests = browsed(path, tmp_path)
    assert requests == {"http://example.com/x.png"}
    assert any("oh" in line for line in console)
    # The page's own policy forbids both.
    policy = f'<meta http-equiv="Content-Security-Policy" content="{html._POLICY}">'
    path.write_text(policy + path.read_text())
    _, console, requests = browsed(path, tmp_path)
    assert requests == set()
    assert len(console) == 2
