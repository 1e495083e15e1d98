import base64
import csv
import hashlib
import html
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from run_directories import HOSTILE, SCHEME, write_run, write_study

from hybridvit.report import find_runs, write_report
from hybridvit.report.files import COSTS
from hybridvit.report.page import Report, json_block, render
from hybridvit.report.provenance import command_notes, commands, differing, same
from hybridvit.report.runs import read_run


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
    *lines, ends = [t for t in loss["data"] if not t.get("fill")]
    assert [len(t["x"]) for t in lines] == [62, 20] * 2  # 2 arms: 3 seeds with gaps, the entropy
    assert [place for place, x in enumerate(lines[0]["x"]) if x is None] == [20, 41]
    assert lines[0]["x"][-1] == 5.0
    assert (ends["x"], ends["marker"]["c"]) == ([5.0] * 6, [0] * 3 + [2] * 3)
    assert [len(t["x"]) for t in bands] == [40] * 2
    # At the first step, seeds 0 to 2 log 2.3 + 0.02 * (1, -2, 0).
    assert bands[0]["y"][0] == pytest.approx(2.3 - 0.02 / 3 + 4.303 * 0.02 * math.sqrt(7 / 9),
                                             abs=1e-3)  # fmt: skip
    text = hostile_page.read_text("utf-8")
    assert "Bands: 95 % t interval of the mean at each step" in text
    assert re.search(
        r"linear / mae: from 2\.29 at epoch 0\.25 to 0\.\d+ at 5 \(mean of n = 3\)", text
    )
    assert "plot-training-accuracy--mae" in plots
    assert "plot-validation--val-accuracy" in plots


def test_a_curve_of_one_point_has_no_course(tmp_path: Path) -> None:
    metrics = [{"step": 10, "epoch": 6, "val/accuracy": 0.775}]
    for seed in range(2):
        write_run(tmp_path, "linear", seed=seed, results={"test/accuracy": 0.77}, metrics=metrics)
    page = write_report(find_runs([tmp_path]), tmp_path / "report", title="t")
    text = page.with_name("report.md").read_text("utf-8")
    assert "linear / supervised: 77.5 at epoch 6 (mean of n = 2)." in text


def test_provenance_names_every_run(hostile_page: Path) -> None:
    root = hostile_page.parent.parent
    text = html.unescape(hostile_page.read_text("utf-8"))
    for run in find_runs([root / "runs"]):
        assert f"../runs/{run.path.name}" in text
        assert run.hash in text
        if run.kind == "train":
            assert f"hybridvit train ../runs/{run.path.name}/config.yaml" in text
    assert f"# hybridvit 0.1.0, commit {'c0ffee' * 6}\nhybridvit train" in text
    for needed in ("f00d", "A CPU", "2.15.0", "c0ffeec0ffee", "argmax of the head, <once>"):
        assert needed in text


def test_commands_name_the_code_that_made_each_run(tmp_path: Path) -> None:
    for seed, code in enumerate(
        ({"commit": "aaa"}, {"commit": "bbb", "dirty": True}, {"commit": "aaa"})
    ):
        write_run(tmp_path, seed=seed, record={"code": code}, folder=f"it's {seed}")
    report = Report(find_runs([tmp_path]), tmp_path / "out")
    assert commands(report.labelled_runs, report.relative) == (
        "# hybridvit 0.1.0, commit aaa\n"
        """hybridvit train '../it'"'"'s 0/config.yaml'\n"""
        """hybridvit train '../it'"'"'s 2/config.yaml'\n"""
        "# hybridvit 0.1.0, commit bbb, with uncommitted changes\n"
        """hybridvit train '../it'"'"'s 1/config.yaml'"""
    )


def test_commands_say_where_they_run(tmp_path: Path) -> None:
    plain = read_run(write_run(tmp_path))
    started = read_run(write_run(tmp_path, "conv", config={"init": "runs/x/pre-seed0-01234567"}))
    pixels = read_run(write_run(tmp_path, record={"kind": "pixels"}))
    assert [len(command_notes([run])) for run in (plain, started, pixels)] == [1, 2, 2]
    assert "(init)" in command_notes([plain, started])[1]
    from_here = read_run(
        write_run(
            tmp_path / "mine",
            record={
                "plugins": {"mine:register": "1", "installed": "2"},
                "data": {"name": "cifar10"},
            },
        )
    )
    for note in ("add the one that holds them to PYTHONPATH", "in $HYBRIDVIT_DATA"):
        assert note in " ".join(command_notes([plain, from_here]))
        assert note not in " ".join(command_notes([plain]))


def test_what_differs_and_that_nothing_else_does(tmp_path: Path) -> None:
    for stem, lr in (("linear", 0.1), ("conv", 0.2)):
        for seed in range(2):
            args = {"root": f"/data/{stem}"}
            write_run(
                tmp_path, stem, seed=seed, config={"optim": {"lr": lr}, "data": {"args": args}}
            )
    arms = Report(find_runs([tmp_path]), tmp_path).arms
    assert differing(arms) == [
        ("config", "conv / supervised", "linear / supervised"),
        ("optim.lr", "0.2", "0.1"),
        ("stem.name", "conv", "linear"),
    ]
    flat = {"plugins", "data.name", "data.args.root", "data.augment.flip", "stem.name"}
    flat |= {"stem.args.patch_px", "stem.args.channels", "encoder.name", "encoder.args.dim"}
    flat |= {"encoder.args.depth", "objective.name", "objective.args", "optim.lr", "train.epochs"}
    flat |= {"eval.batch", "seed"}
    # Without the two that differ, the seed and the data's folder.
    assert same(arms).startswith(f"{len(flat) - 4} further config values are the same in all runs")


def test_of_many_verdicts_the_answer_shows_the_claims(tmp_path: Path) -> None:
    for k, objective in enumerate(("mae", "simmim", "masked_patch", "dino", "simclr")):
        for seed in range(3):
            results = {"test/knn": 0.5 + 0.001 * seed, "test/linear": 0.5}
            untrained = {"untrained/test/knn": 0.5 - 0.4 * (k == 0), "untrained/test/linear": 0.5}
            write_run(tmp_path, "linear", objective, seed, results | untrained)
    report = Report(find_runs([tmp_path]), tmp_path)
    assert len(report.verdicts) == 10
    assert [subject for subject, _ in report.claims] == [
        "linear / mae against its untrained encoder, test/knn"
    ]
    text = render(report)
    assert "<summary>All 10 comparisons in words</summary>" in text
    answer = text[text.index('<section id="answer"') : text.index("<details>")]
    assert answer.count("<li>") == 1


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
    costs = {key: by_status["complete"][key] for key in COSTS}
    assert costs == {"parameters": "1234567", "flops": "2345000000", "images": "5000",
                     "training_flops": "35175000000000.0", "train_seconds": "12.5"}  # fmt: skip
    assert by_status["failed"]["images"] == ""


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


def test_long_curves_are_thinned_and_keep_their_end(tmp_path: Path) -> None:
    lines = [{"step": k, "train/loss": 1 / k} for k in range(1, 5001)]
    write_run(tmp_path, results={"test/accuracy": 0.5}, metrics=lines)
    page = Page(write_report(find_runs([tmp_path]), tmp_path / "out", title="t").read_text("utf-8"))
    plots = {p["id"]: p for p in json.loads(next(s for a, s in page.scripts if a.get("type")))}
    loss = plots["plot-training-loss--supervised"]
    trace, end = loss["data"]
    assert (end["x"], end["y"]) == ([5000], [1 / 5000])
    assert 200 < len(trace["x"]) <= 300
    assert (trace["x"][-1], trace["y"][-1]) == (5000, 1 / 5000)
    assert loss["layout"]["xaxis"]["title"]["text"] == "step"
