"""The page in a real browser: Debian's chromium, headless. Skipped where there is none."""

from __future__ import annotations

import cProfile
import itertools
import json
import pstats
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from many_runs import write_many
from run_directories import HOSTILE, SCHEME, write_run, write_study

from hybridvit.report import find_runs, write_report

PHONE, DESK = 360, 1280  # px
FLAGS = (
    "headless",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
    "disable-dev-shm-usage",
    f"window-size={DESK},900",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium with chromedriver on the path")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(
        options=options, service=webdriver.ChromeService(executable_path=driver)
    )
    yield chrome
    chrome.quit()


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("study")
    write_study(root / "runs")
    return write_report(find_runs([root / "runs"]), root / "out", title="t")


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hostile")
    write_study(root / "runs", HOSTILE)
    write_run(root / "runs", seed=7, record={"arm": {"stem": SCHEME}, "name": SCHEME})
    return write_report(
        find_runs([root / "runs"]), root / "out", title=HOSTILE, question=SCHEME, longer=HOSTILE
    )


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, int]:
    """The page of a thousand runs, the function calls that it took, and those of a quarter."""
    calls = []
    for count in (250, 1000):
        root = tmp_path_factory.mktemp("many")
        write_many(root / "runs", count)
        with cProfile.Profile() as profile:
            page = write_report(find_runs([root / "runs"]), root / "out", title="t")
        calls.append(pstats.Stats(profile).total_calls)
    quarter, whole = calls
    return page, whole, quarter


def loaded(browser: Any, page: Path) -> None:
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(page.resolve().as_uri())


def until(browser: Any, script: str, *arguments: object) -> None:
    deadline = time.monotonic() + 30
    while not browser.execute_script(script, *arguments):
        assert time.monotonic() < deadline, (script, browser.get_log("browser"))
        time.sleep(0.05)


def opened(browser: Any, page: Path) -> None:
    """The page, with every plot looked at and hence drawn."""
    loaded(browser, page)
    boxes = browser.execute_script("return [...document.querySelectorAll('.plot')]")
    for box in boxes:
        browser.execute_script("arguments[0].scrollIntoView()", box)
        until(browser, "return arguments[0].querySelector('svg') !== null", box)


def requested(browser: Any) -> list[str]:
    """All addresses that were asked for since the log was last read."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]


def column(browser: Any, table: str, place: int) -> list[str]:
    """The texts of a table's column, of the rows that are shown."""
    texts: list[str] = browser.execute_script(
        "return [...document.querySelectorAll('#' + arguments[0] + ' tbody tr')]"
        ".filter(row => !row.hidden).map(row => row.cells[arguments[1]].textContent)",
        table,
        place,
    )
    return texts


def heading(browser: Any, table: str, place: int) -> Any:
    """The button that sorts by a column."""
    return browser.find_element("css selector", f"#{table} th:nth-child({place + 1}) button")


def test_the_page_is_drawn_and_hostile_names_do_nothing(browser: Any, hostile_page: Path) -> None:
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
    assert browser.execute_script("return document.querySelectorAll('b, iframe').length") == 0


def test_hostile_names_do_nothing_when_sorted_filtered_and_hovered(
    browser: Any, hostile_page: Path
) -> None:
    from selenium.webdriver import ActionChains

    opened(browser, hostile_page)
    for place in range(3):
        heading(browser, "provenance", place).click()
    browser.find_element("css selector", "#provenance input").send_keys("</script><img onerror")
    assert len(column(browser, "provenance", 0)) == 6
    point = browser.find_element("css selector", "#plot-results .point")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", point)
    ActionChains(browser).move_to_element(point).perform()
    until(browser, "return document.querySelector('#plot-results .hovertext') !== null")
    assert browser.title == HOSTILE
    assert browser.execute_script("return document.querySelectorAll('b').length") == 0
    assert browser.get_log("browser") == []


def test_no_request_leaves_the_page(browser: Any, hostile_page: Path) -> None:
    opened(browser, hostile_page)
    browser.find_element("css selector", "#results button").click()
    browser.find_element("css selector", "nav li:last-child a").click()
    asked = requested(browser)
    own = hostile_page.resolve().as_uri()
    assert asked
    assert all(url.startswith((own, "data:", "blob:null")) for url in asked), asked
    # The log would show one: the same page without its policy, asking for an image.
    text = hostile_page.read_text("utf-8")
    image = '<img src="http://127.0.0.1:9/x.png">'
    open_page = hostile_page.with_name("open.html")
    policy = text.index("<meta http-equiv")
    text = text[:policy] + text[text.index("\n", policy) :].replace("</main>", image + "</main>")
    open_page.write_text(text, "utf-8")
    loaded(browser, open_page)
    assert "http://127.0.0.1:9/x.png" in requested(browser)
    browser.get_log("browser")


def test_the_policy_stops_other_scripts(browser: Any, hostile_page: Path) -> None:
    tampered = hostile_page.with_name("tampered.html")
    text = hostile_page.read_text("utf-8")
    bad = "<img src=x onerror=\"document.title='pwned'\"><script>document.title='pwned'</script>"
    bad += "<a id=bad href=\"javascript:document.title='pwned'\">x</a>"
    tampered.write_text(text.replace("</main>", bad + "</main>"), "utf-8")
    opened(browser, tampered)
    browser.execute_script("document.getElementById('bad').click()")
    assert browser.title == HOSTILE
    assert any("Content Security Policy" in e["message"] for e in browser.get_log("browser"))


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_the_page_does_not_scroll_sideways(browser: Any, hostile_page: Path, width: int) -> None:
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 800}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    opened(browser, hostile_page)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    inside = "const s = document.querySelector('#provenance .scroll'); return s.scrollWidth"
    assert browser.execute_script(inside) > (PHONE if width == PHONE else 0)
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_heading_sorts_its_table(browser: Any, study: Path) -> None:
    loaded(browser, study)
    made = column(browser, "results", 3)
    results = heading(browser, "results", 3)
    sort = "return arguments[0].closest('th').getAttribute('aria-sort')"

    def number(text: str) -> float:
        return float(text.split()[0])

    results.click()
    assert browser.execute_script(sort, results) == "ascending"
    known = [text for text in made if text != "no result"]
    assert column(browser, "results", 3) == [*sorted(known, key=number), "no result"]
    results.click()
    assert browser.execute_script(sort, results) == "descending"
    found = column(browser, "results", 3)
    assert [*map(number, found[:-1])] == sorted(map(number, known), reverse=True)
    assert found[-1] == "no result"  # what is missing comes last either way
    results.click()
    assert browser.execute_script(sort, results) is None
    assert column(browser, "results", 3) == made


def test_texts_and_units_sort_as_they_read(browser: Any, study: Path) -> None:
    loaded(browser, study)
    browser.execute_script(
        "[...document.querySelectorAll('#results tbody tr')].forEach((row, i) => {"
        " row.cells[6].textContent = ['1.2 M', '950 k', '\u2013', '3 G', '12', '1,234'][i % 6];"
        " row.cells[1].textContent = ['b10', 'b9', 'a', 'Ä', 'b10', 'z'][i % 6]; })"
    )
    heading(browser, "results", 6).click()
    found = column(browser, "results", 6)
    order = ["12", "1,234", "950 k", "1.2 M", "3 G", "\u2013"]
    assert found == sorted(found, key=order.index)
    heading(browser, "results", 1).click()
    found = column(browser, "results", 1)
    assert found == sorted(found, key=["a", "Ä", "b9", "b10", "z"].index)
    buttons = "return document.querySelectorAll('#results [aria-sort]').length"
    assert browser.execute_script(buttons) == 1


def test_the_keyboard_sorts_and_filters(browser: Any, study: Path) -> None:
    from selenium.webdriver import ActionChains, Keys

    loaded(browser, study)
    keyboard = ActionChains(browser)
    keyboard.send_keys(Keys.TAB).perform()
    focused = "return document.activeElement.textContent"
    assert browser.execute_script(focused) == "Skip to the answer"
    place = "return document.activeElement.getBoundingClientRect().left"
    assert browser.execute_script(place) >= 0
    browser.execute_script("document.querySelector('#provenance input').focus()")
    keyboard.send_keys("  CONV  mae ").perform()
    assert column(browser, "provenance", 1) == ["conv / mae"] * 3
    keyboard.send_keys(Keys.TAB, Keys.TAB, Keys.ENTER).perform()  # the box that scrolls, a button
    sorts = "return document.activeElement.closest('th').getAttribute('aria-sort')"
    assert browser.execute_script(sorts) == "ascending"
    ring = "return getComputedStyle(document.activeElement).outlineStyle"
    assert browser.execute_script(ring) == "solid"


def test_a_filter_shows_the_rows_with_all_its_words(browser: Any, study: Path) -> None:
    from selenium.webdriver import Keys

    loaded(browser, study)
    everything = column(browser, "provenance", 0)
    field = browser.find_element("css selector", "#provenance input")
    label = "return arguments[0].labels[0].textContent.trim()"
    assert browser.execute_script(label, field) == "Filter runs"
    field.send_keys("MAE conv")
    arms = column(browser, "provenance", 1)
    assert arms == ["conv / mae"] * 3
    count = browser.find_element("css selector", "#provenance output")
    assert count.text == f"3 of {len(everything)}"
    heading(browser, "provenance", 2).click()
    heading(browser, "provenance", 2).click()
    assert column(browser, "provenance", 2) == ["2", "1", "0"]  # sorting keeps the filter
    field.send_keys(Keys.CONTROL, "a", Keys.NULL, Keys.BACKSPACE)
    assert len(column(browser, "provenance", 0)) == len(everything)
    assert count.text == ""
    assert browser.get_log("browser") == []


def test_the_cost_axis_can_be_chosen_and_colours_follow_the_scheme(
    browser: Any, study: Path
) -> None:
    opened(browser, study)
    title = "return document.querySelector('#plot-cost-test-accuracy .xtitle').textContent"
    assert browser.execute_script(title) == "forward GFLOPs per image"
    browser.execute_script(
        "const s = document.getElementById('plot-cost-test-accuracy-axis');"
        "s.value = '1'; s.dispatchEvent(new Event('change'));"
    )
    assert browser.execute_script(title) == "parameters"
    colour = "return document.querySelector('#plot-results .xtick text').style.fill"
    light = browser.execute_script(colour)
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    until(browser, f"{colour} !== arguments[0]", light)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert browser.get_log("browser") == []


def test_crossings_are_drawn_at_their_cost(browser: Any, tmp_path: Path) -> None:
    for size, (pure, hybrid) in enumerate([(0.80, 0.70), (0.84, 0.84), (0.88, 0.98)]):
        for stem, value in (("linear", pure), ("conv", hybrid)):
            for seed in range(3):
                flops = {"forward": int(1e9 * 10**size), "backward": int(2e9 * 10**size)}
                write_run(
                    tmp_path / "runs",
                    stem,
                    seed=seed,
                    results={"test/accuracy": value + 0.01 * seed * (stem == "conv")},
                    config={"encoder": {"args": {"depth": size + 1}}},
                    record={"model": {"flops": flops, "patch_local": stem == "linear"}},
                )
    page = write_report(find_runs([tmp_path / "runs"]), tmp_path / "out", title="t")
    opened(browser, page)
    plot = "document.getElementById('plot-cost-test-accuracy')"
    shapes = f"return {plot}.querySelectorAll('.shapelayer path').length"
    assert browser.execute_script(shapes) == 2
    # The line is where the axis puts its cost, and the text beside it.
    place = browser.execute_script(
        f"const p = {plot}, s = p._fullLayout.shapes[1], a = p._fullLayout.xaxis;"
        "const box = p.querySelectorAll('.shapelayer path')[1].getBBox();"
        "return [box.x - a._offset, a.c2p(s.x0), box.width]"
    )
    assert place[0] == pytest.approx(place[1], abs=1)
    assert place[2] < 1
    texts = f"return {plot}.querySelector('.annotation').getBoundingClientRect().left"
    line = f"return {plot}.querySelectorAll('.shapelayer path')[1].getBoundingClientRect().left"
    assert browser.execute_script(texts) == pytest.approx(browser.execute_script(line), abs=6)
    assert browser.get_log("browser") == []


def test_paper_shows_everything_in_light_colours(browser: Any, study: Path) -> None:
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    loaded(browser, study)
    browser.execute_script(
        "window.seen = {}; window.addEventListener('beforeprint', () => {"
        " seen.drawn = [...document.querySelectorAll('.plot')].every(p => p.querySelector('svg'));"
        " seen.open = [...document.querySelectorAll('details')].every(d => d.open);"
        " seen.text = document.querySelector('#plot-results text').style.fill; })"
    )
    paper = browser.execute_cdp_cmd("Page.printToPDF", {})
    assert len(paper["data"]) > 10_000
    seen = browser.execute_script("return seen")
    assert seen == {"drawn": True, "open": True, "text": "rgb(28, 36, 48)"}
    assert not browser.execute_script("return document.querySelector('details').open")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_a_screen_reader_finds_its_way(browser: Any, study: Path) -> None:
    opened(browser, study)
    tree = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    nodes = [
        (n["role"]["value"], n.get("name", {}).get("value", ""))
        for n in tree
        if not n.get("ignored")
    ]
    roles = [role for role, _ in nodes]
    for landmark in ("banner", "navigation", "main", "contentinfo"):
        assert roles.count(landmark) == 1, landmark
    named = ("region", "image", "table", "button", "searchbox", "combobox", "link")
    assert [node for node in nodes if node[0] in named and not node[1]] == []
    levels = browser.execute_script(
        "return [...document.querySelectorAll('h1, h2, h3, h4')].map(h => Number(h.tagName[1]))"
    )
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))


def test_a_thousand_runs(browser: Any, thousand: tuple[Path, int, int]) -> None:
    """Beside a quarter of them: 4 times the calls where they grow with the runs, 16 with their
    square; and the page is laid out a few times, not once a row. many_runs.py has a clock."""
    page, calls, quarter = thousand
    assert calls < 5 * quarter
    browser.execute_cdp_cmd("Performance.enable", {})
    loaded(browser, page)
    metrics = browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    browser.execute_cdp_cmd("Performance.disable", {})
    layouts = next(m["value"] for m in metrics if m["name"] == "LayoutCount")
    assert 0 < layouts < 30
    assert len(column(browser, "provenance", 0)) == 1000
    seeds = heading(browser, "provenance", 2)
    seeds.click()
    assert column(browser, "provenance", 2) == [str(seed) for seed in range(5) for _ in range(200)]
    browser.find_element("css selector", "#provenance input").send_keys("resnet depth")
    arms = column(browser, "provenance", 1)
    assert len(arms) == 250
    assert all("resnet" in arm for arm in arms)
    assert browser.get_log("browser") == []
