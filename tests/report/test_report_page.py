import base64
import csv
import hashlib
import html
import json
import math
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from run_directories import curve, png, write_run

from hybridvit.report import find_runs, write_report
from hybridvit.report.page import json_block

HOSTILE = "</script><img src=x onerror=\"document.title='pwned'\"><b>bold</b>"
SCHEME = "<a href=\"javascript:document.title='pwned'\">javascript:alert(1)</a>"


def write_study(root: Path, hostile: str = "conv") -> None:
    for stem, top in (("linear", 0.90), ("conv", 0.93)):
        label = hostile if stem == "conv" else stem
        for seed in range(3):
            write_run(
                root,
                stem,
                seed=seed,
                results={"test/accuracy": top + 0.004 * ((seed * 2) % 3), "val/accuracy": top},
                record={"arm": {"stem": label, "objective": "supervised"}, "name": label},
                metrics=curve(seed, top),
                config={"optim": {"note": "n"}},
                summary={"protocol": {"test/accuracy": "argmax of the head, <once>"}},
            )
            results = {"test/linear": top - 0.1 - 0.01 * seed, "test/knn": top - 0.2}
            results |= {"untrained/test/linear": 0.78, "untrained/test/knn": 0.70 + 0.01 * seed}
            write_run(
                root,
                stem,
                "mae",
                seed,
                results,
                record={"arm": {"stem": label, "objective": "mae"}, "name": label},
                metrics=curve(seed, top - 0.2, "mae"),
                figure=png(256, 96),
                config={"optim": {"note": "n"}},
            )
    results = {"test/logistic_regression": 0.80, "test/knn": 0.85}
    write_run(root, results=results, record={"kind": "pixels", "name": "pixels"})
    diverged = {"status": "diverged", "error": "loss is nan at step 30", "arm": {"stem": "resnet"}}
    write_run(root, "resnet", record=diverged)


class Page(HTMLParser):
    """Elements with their attributes, and the texts of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self._open: dict[str, str | None] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self._open = dict(attrs)
            self.scripts.append((self._open, ""))

    def handle_data(self, data: str) -> None:
        if self._open is not None:
            attrs, text = self.scripts[-1]
            self.scripts[-1] = (attrs, text + data)

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._open = None


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("study")
    write_study(root / "runs", HOSTILE)
    return write_report(
        find_runs([root / "runs"]), root / "out", title=HOSTILE, question=SCHEME, longer=HOSTILE
    )


def test_the_page_refers_to_nothing_outside(hostile_page: Path) -> None:
    page = Page(hostile_page.read_text("utf-8"))
    for tag, attrs in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form", "video", "audio")
        for name, value in attrs.items():
            assert not name.startswith("on"), (tag, attrs)
            if name in ("href", "src", "srcset", "action", "data", "poster", "style"):
                assert (value or "").startswith(("#", "data:image/png;base64,")), (tag, attrs)
    text = hostile_page.read_text("utf-8")
    markup = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"""(?:src|href)\s*=\s*["']?\s*(?:https?:|//)""", markup)
    assert "url(" not in markup
    assert "@import" not in markup


def test_policy_has_the_hash_of_each_script(hostile_page: Path) -> None:
    page = Page(hostile_page.read_text("utf-8"))
    policy = next(a["content"] for t, a in page.tags if "http-equiv" in a) or ""
    directives = dict(d.strip().split(" ", 1) for d in policy.split(";"))
    assert directives["default-src"] == "'none'"
    assert directives["img-src"] == "data:"
    run = [text for attrs, text in page.scripts if attrs.get("type") != "application/json"]
    assert len(run) == 2
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in run]
    assert directives["script-src"].split() == [f"'sha256-{h}'" for h in hashes]
    assert run[0].count("plotly.js v") >= 1


def test_hostile_names_are_text(hostile_page: Path) -> None:
    text = hostile_page.read_text("utf-8")
    page = Page(text)
    assert [t for t, _ in page.tags].count("script") == 3
    assert all((a["src"] or "").startswith("data:image/png") for t, a in page.tags if t == "img")
    assert HOSTILE not in text
    assert html.escape(HOSTILE, quote=False).split('"')[0] in text
    data = next(s for a, s in page.scripts if a.get("type") == "application/json")
    assert "<" not in data
    # Plotly reads HTML in its texts; there, too, the name is escaped.
    assert "&lt;/script&gt;" in json.dumps(json.loads(data))
    assert "<img" not in json.dumps(json.loads(data))


def test_json_block_round_trips() -> None:
    value = {"</script>": ["<!--", "&amp;", "\u2028\u2029", "\\u003c", 1.5, None, "é\ud800"]}
    block = json_block(value)
    assert not set("<>&\u2028\u2029") & set(block)
    assert json.loads(block) == value
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_block(float("nan"))


def test_every_seed_is_in_the_plots(hostile_page: Path) -> None:
    page = Page(hostile_page.read_text("utf-8"))
    plots = {p["id"]: p for p in json.loads(next(s for a, s in page.scripts if a.get("type")))}
    points = [x for trace in plots["plot-results"]["data"] for x in trace["x"]]
    for value in (90.0, 90.4, 90.8, 93.0, 93.4, 93.8, 78.0, 80.0, 85.0):
        assert any(x == pytest.approx(value) for x in points), value
    bars = [t["error_x"]["array"][0] for t in plots["plot-results"]["data"] if "error_x" in t]
    # 90.0, 90.8, 90.4: sd 0.4, half width 4.303 * 0.4 / sqrt(3)
    assert any(b == pytest.approx(0.9937, abs=1e-3) for b in bars)
    cost = plots["plot-cost-test-accuracy"]
    assert cost["axes"][0]["title"] == "forward GFLOPs per image"
    assert cost["axes"][0]["xs"] == [[2.345] * 3, [2.345] * 3]
    loss = plots["plot-training-loss--mae"]
    assert loss["layout"]["xaxis"]["title"]["text"] == "epoch"
    bands = [t for t in loss["data"] if t.get("fill")]
    lines = [t for t in loss["data"] if not t.get("fill")]
    assert [len(t["x"]) for t in lines] == [20] * 8  # 2 arms: 3 seeds and the entropy
    assert lines[0]["x"][-1] == 5.0
    assert [len(t["x"]) for t in bands] == [40] * 2
    # At the first step, seeds 0 to 2 log 2.3 + 0.02 * (1, -2, 0).
    assert bands[0]["y"][0] == pytest.approx(2.3 - 0.02 / 3 + 4.303 * 0.02 * math.sqrt(7 / 9),
                                             abs=1e-3)  # fmt: skip
    assert "Bands: 95 %" in loss["note"]
    assert "plot-training-accuracy--mae" in plots
    assert "plot-validation--val-accuracy" in plots


def test_provenance_names_every_run(hostile_page: Path) -> None:
    root = hostile_page.parent.parent
    text = html.unescape(hostile_page.read_text("utf-8"))
    for run in find_runs([root / "runs"]):
        assert f"../runs/{run.path.name}" in text
        assert run.hash in text
        if run.kind == "train":
            assert f"hybridvit train ../runs/{run.path.name}/config.yaml" in text
    for needed in ("f00d", "A CPU", "2.15.0", "c0ffeec0ffee", "argmax of the head, <once>"):
        assert needed in text


def test_structure(hostile_page: Path) -> None:
    page = Page(hostile_page.read_text("utf-8"))
    tags = [t for t, _ in page.tags]
    assert tags.count("h1") == 1
    assert tags.count("caption") == tags.count("table") == 5
    assert all("scope" in a for t, a in page.tags if t == "th")
    assert all(a.get("alt") for t, a in page.tags if t == "img")
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    targets = {(a["href"] or "")[1:] for t, a in page.tags if t == "a"}
    assert targets <= set(ids)


def test_results_csv_has_full_precision(tmp_path: Path) -> None:
    value = 0.1 + 0.2
    write_run(tmp_path, results={"test/accuracy": value}, record={"arm": {"stem": "=cmd|'x'!A1"}})
    write_run(tmp_path, "conv", record={"status": "failed"})
    write_report(find_runs([tmp_path]), tmp_path / "out", title="t")
    with (tmp_path / "out" / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    by_status = {line["status"]: line for line in lines}
    assert float(by_status["complete"]["value"]) == value
    assert by_status["complete"]["metric"] == "test/accuracy"
    assert by_status["complete"]["arm"] == "'=cmd|'x'!A1"
    assert (tmp_path / "out" / by_status["complete"]["run"] / "run.json").is_file()
    assert by_status["failed"]["value"] == ""


def test_markdown_and_latex_are_escaped(tmp_path: Path) -> None:
    name = r"a|b_c <img> 50% $x$ \input{y} #1 & [l](u)"
    write_run(tmp_path, results={"test/accuracy": 0.5}, record={"arm": {"stem": name}})
    write_report(find_runs([tmp_path]), tmp_path / "out", title=name)
    tex = (tmp_path / "out" / "table.tex").read_text()
    assert (
        r"a\textbar{}b\_c \textless{}img\textgreater{} 50\% \$x\$ "
        r"\textbackslash{}input\{y\} \#1 \& [l](u)" in tex
    )
    assert len({line.count(" & ") for line in tex.splitlines() if line.endswith("\\\\")}) == 1
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.startswith(r"# a\|b\_c \<img\>")
    assert r"\[l\](u)" in text
    assert "| 50.0 |" in text


def test_the_answer_is_in_words(tmp_path: Path) -> None:
    write_study(tmp_path / "runs")
    page = write_report(
        find_runs([tmp_path / "runs"]), tmp_path / "out", title="t", longer="hybridvit study x"
    )
    text = page.read_text("utf-8")
    assert "hybrid +3.0 points at every one of 3 seeds" in text
    assert "training does not beat the untrained encoder" in text
    assert "a longer run: <code>hybridvit study x</code>" in text
    assert "verdicts are Holm" in text
    assert text.index("Answer</h2>") < text.index("Results</h2>") < text.index("Plots</h2>")


def test_pages_of_the_same_runs_are_equal(tmp_path: Path) -> None:
    write_study(tmp_path / "runs")
    runs = find_runs([tmp_path / "runs"])
    first = write_report(runs, tmp_path / "out", title="t").read_bytes()
    assert write_report(runs, tmp_path / "out", title="t").read_bytes() == first


def test_nothing_but_the_four_files_is_written(tmp_path: Path) -> None:
    write_study(tmp_path / "runs", "../../evil")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    write_report(find_runs([tmp_path / "runs"]), tmp_path / "out", title="../x")
    new = {p for p in tmp_path.rglob("*") if p.stat().st_mtime_ns != before.get(p)}
    names = ("report.html", "report.md", "results.csv", "table.tex")
    assert new == {tmp_path / "out"} | {tmp_path / "out" / n for n in names}


def test_bad_calls(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no runs to report on"):
        write_report([], tmp_path, title="t")
    (tmp_path / "file").write_text("")
    runs = find_runs([write_run(tmp_path)])
    with pytest.raises(ValueError, match="is a file; give a folder"):
        write_report(runs, tmp_path / "file", title="t")


def test_only_unfinished_runs_make_a_page_too(tmp_path: Path) -> None:
    write_run(tmp_path, record={"status": "running"})
    text = write_report(find_runs([tmp_path]), tmp_path / "out", title="t").read_text("utf-8")
    assert "is not finished; it counts in no number" in text


def test_a_report_needs_no_torch(tmp_path: Path) -> None:
    write_study(tmp_path / "runs")
    code = """
import sys, pathlib
import hybridvit.report as report
early = {m for m in ("torch", "plotly", "jinja2", "scipy", "numpy") if m in sys.modules}
assert not early, early
root = pathlib.Path(sys.argv[1])
report.write_report(report.find_runs([root / "runs"]), root / "out", title="t")
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium with chromedriver on the path")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "disable-dev-shm-usage",
        "window-size=1280,900",
        f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(
        options=options, service=webdriver.ChromeService(executable_path=driver)
    )
    yield chrome
    chrome.quit()


def opened(browser: Any, page: Path) -> None:
    browser.get(page.resolve().as_uri())
    deadline = time.monotonic() + 60
    script = "return [...document.querySelectorAll('.plot')].every(p => p.querySelector('svg'))"
    while not browser.execute_script(script):
        assert time.monotonic() < deadline, browser.get_log("browser")
        time.sleep(0.1)


def test_a_browser_draws_the_page_and_hostile_names_do_nothing(
    browser: Any, hostile_page: Path
) -> None:
    opened(browser, hostile_page)
    assert browser.get_log("browser") == []
    count = browser.execute_script("return document.querySelectorAll('.plot').length")
    assert count == 10
    drawn = "return document.querySelectorAll('#plot-results .scatterlayer .point').length"
    assert browser.execute_script(drawn) >= 30
    assert browser.title == HOSTILE
    outside = "return [...document.querySelectorAll('a, image, img')].map(e => e.href || e.src)"
    allowed = ("data:", browser.current_url.split("#")[0])
    assert all(str(x).startswith(allowed) for x in browser.execute_script(outside))
    shown = browser.execute_script("return document.querySelector('#plot-results').textContent")
    assert "</script><img" in shown


def test_the_policy_stops_other_scripts(browser: Any, hostile_page: Path) -> None:
    tampered = hostile_page.with_name("tampered.html")
    text = hostile_page.read_text("utf-8")
    bad = "<img src=x onerror=\"document.title='pwned'\"><script>document.title='pwned'</script>"
    tampered.write_text(text.replace("</main>", bad + "</main>"), "utf-8")
    opened(browser, tampered)
    assert browser.title == HOSTILE
    assert any("Content Security Policy" in e["message"] for e in browser.get_log("browser"))


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_does_not_scroll_sideways(browser: Any, hostile_page: Path, width: int) -> None:
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 800}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    opened(browser, hostile_page)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_cost_axis_can_be_chosen_and_colours_follow_the_scheme(
    browser: Any, tmp_path: Path
) -> None:
    write_study(tmp_path / "runs")
    opened(browser, write_report(find_runs([tmp_path / "runs"]), tmp_path / "out", title="t"))
    title = "return document.querySelector('#plot-cost-test-accuracy .xtitle').textContent"
    assert browser.execute_script(title) == "forward GFLOPs per image"
    browser.execute_script(
        "const s = document.getElementById('plot-cost-test-accuracy-axis');"
        "s.value = '1'; s.dispatchEvent(new Event('change'));"
    )
    assert browser.execute_script(title) == "parameters"
    colour = "return document.querySelector('#plot-results .point').style.fill"
    light = browser.execute_script(colour)
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    deadline = time.monotonic() + 10
    while browser.execute_script(colour) == light:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert browser.get_log("browser") == []


def test_long_curves_are_thinned_and_keep_their_end(tmp_path: Path) -> None:
    lines = [{"step": k, "train/loss": 1 / k} for k in range(1, 5001)]
    write_run(tmp_path, results={"test/accuracy": 0.5}, metrics=lines)
    page = Page(write_report(find_runs([tmp_path]), tmp_path / "out", title="t").read_text("utf-8"))
    plots = {p["id"]: p for p in json.loads(next(s for a, s in page.scripts if a.get("type")))}
    loss = plots["plot-training-loss--supervised"]
    (trace,) = loss["data"]
    assert 200 < len(trace["x"]) <= 300
    assert (trace["x"][-1], trace["y"][-1]) == (5000, 1 / 5000)
    assert loss["layout"]["xaxis"]["title"]["text"] == "step"
