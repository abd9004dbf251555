"""The report's page in a browser: one session, every check on the same page."""

import time

import pytest
from browser import browser, missing, requested, wait

from pipeline import figures
from pipeline.findings import Column, Figure, Table
from pipeline.report.page import render
from pipeline.report.sections import Section

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "there is one")


EVIL = "</script><script>alert(1)</script>"


def heads(n_seeds):
    """Rows of heads, six a seed."""
    return [
        {"fusion": fusion, "setting": f"layer={k}", "lr": lr, "seed": seed,
         "dev": 40.0 + 7 * k - 100 * lr + seed, "parameters": 1000 * (k + 1),
         "command": f"layerbank train bank --fusion {fusion}", "versions": "torch 2"}
        for k, fusion in enumerate(("single_layer", "attention", "linear"))
        for lr in (0.01, 0.001) for seed in range(n_seeds)
    ]  # fmt: skip


def section(rows):
    """One section: the sentence's heat map, points, and a table with commands."""
    cells = [{"word": word, "layer": k, "weight": k / 7} for word in ("wake", EVIL, "up") for k in range(3)]
    titles = {"fusion": "fusion", "setting": "setting", "lr": "learning rate", "seed": "seed",
              "dev": "dev accuracy, %", "parameters": "trained parameters of decoder and fusion",
              "command": "to reproduce", "versions": "versions"}  # fmt: skip
    digits = {"lr": 5, "dev": 2}
    columns = tuple(Column(name=n, title=title, digits=digits.get(n)) for n, title in titles.items())
    heat = figures.heat(
        cells, x="word", y="layer", value="weight", x_title="", y_title="layer", value_title="weight"
    )
    points = figures.points(
        rows, x="parameters", y="dev", series="fusion", x_title="parameters", y_title="dev", log_x=True
    )
    return Section(
        title="Runs", kind="runs", facts={"folder": "a/very/long/name/" * 12}, command="layerbank " * 30,
        tables=(Table(name="heads", title="Heads", columns=columns, rows=tuple(rows)),),
        figures=(
            Figure(name="heat", title="Layers of a sentence", about="Rows: layers.", chart=heat),
            Figure(name="cost", title="Cost", about="A point a head.", chart=points),
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page of a few heads."""
    out = tmp_path_factory.mktemp("page") / "report.html"
    out.write_text(render([section(heads(2))]), encoding="utf-8")
    return out


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("browser")) as driver:
        yield driver


@pytest.fixture
def shown(session, page):
    """The page, drawn, at the size of a desk; afterwards nothing may have gone wrong or gone out."""
    look(session, page, width=1200)
    yield session
    assert [entry for entry in session.get_log("browser") if entry["level"] != "INFO"] == []
    assert set(requested(session)) == {page.as_uri()}


def look(driver, path, *, width, dark=False):
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    requested(driver)
    driver.get(path.as_uri())
    wait(lambda: driver.execute_script("return document.documentElement.dataset.drawn"), "figures drawn")


def column(driver, table, title):
    """The header of a table's column, and the texts of its cells that are seen."""
    found = driver.execute_script(
        """
        const box = document.querySelector(`.table[data-name="${arguments[0]}"]`);
        const headers = [...box.querySelectorAll("thead th")];
        const header = headers.find((th) => th.textContent.startsWith(arguments[1]));
        const rows = [...box.querySelectorAll("tbody tr")].filter((row) => row.offsetHeight);
        return [header, rows.map((row) => row.cells[header.cellIndex].textContent)];
        """,
        table, title,
    )  # fmt: skip
    return found


def test_a_click_sorts_and_another_turns_it_round(shown):
    header, before = column(shown, "heads", "dev")
    button = header.find_element("tag name", "button")
    for direction, reverse in (("ascending", False), ("descending", True)):
        button.click()
        texts = column(shown, "heads", "dev")[1]
        assert [float(text) for text in texts] == sorted(map(float, before), reverse=reverse)
        assert header.get_attribute("aria-sort") == direction
        assert direction in shown.find_element("id", "said").text


def test_the_keyboard_sorts_text(shown):
    header, before = column(shown, "heads", "fusion")
    button = header.find_element("tag name", "button")
    button.send_keys("\ue007")  # Enter
    assert column(shown, "heads", "fusion")[1] == sorted(before)
    assert header.get_attribute("aria-sort") == "ascending"
    button.send_keys(" ")
    assert header.get_attribute("aria-sort") == "descending"
    outline = shown.execute_script("return getComputedStyle(arguments[0]).outlineStyle", button)
    assert outline == "solid"  # where the keyboard is can be seen


def test_a_filter_leaves_the_rows_with_all_its_words(shown):
    box = shown.find_element("css selector", '.table[data-name="heads"]')
    field = box.find_element("tag name", "input")
    assert shown.execute_script("return arguments[0].labels.length", field) == 1
    field.send_keys("single_layer 0.01")
    assert set(column(shown, "heads", "fusion")[1]) == {"single_layer"}
    assert set(column(shown, "heads", "learning")[1]) == {"0.01000"}
    said = box.find_element("tag name", "output")
    n = len(column(shown, "heads", "fusion")[1])
    assert said.text.startswith(f"{n} of ")
    assert said.get_attribute("aria-live") == "polite"
    field.clear()
    field.send_keys("nothing has this")
    assert column(shown, "heads", "fusion")[1] == []
    assert said.text.startswith("0 of ")


def test_a_point_under_the_pointer_tells_its_values(shown):
    from selenium.webdriver import ActionChains

    cell = shown.find_element("css selector", 'figure[data-name="heat"] .mark-rect path')
    shown.execute_script("arguments[0].scrollIntoView({block: 'center'})", cell)
    ActionChains(shown).move_to_element(cell).perform()
    tip = wait(lambda: shown.find_elements("css selector", "#vg-tooltip-element.visible"), "tooltip")[0]
    assert "layer" in tip.text
    assert "weight" in tip.text
    ActionChains(shown).move_to_element(shown.find_element("tag name", "figcaption")).perform()
    wait(lambda: not shown.find_elements("css selector", "#vg-tooltip-element.visible"), "tooltip gone")


def test_every_figure_is_drawn_and_has_a_text_and_its_data(shown):
    for figure in shown.find_elements("tag name", "figure"):
        drawn = figure.find_element("css selector", ".chart svg")
        assert drawn.size["width"] > 100
        assert figure.find_element("tag name", "figcaption").text
        summary = figure.find_element("tag name", "summary")
        shown.execute_script("arguments[0].click()", summary)
        wait(lambda one=figure: one.find_elements("css selector", "details td"), "data of a figure")
    heat = shown.find_element("css selector", 'figure[data-name="heat"]')
    described = heat.find_element("css selector", "[aria-roledescription=visualization]")
    assert "Layers of a sentence" in described.get_attribute("aria-label")
    assert EVIL in heat.find_element("tag name", "details").text


def paper_and_ink(driver):
    script = "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
    paper, ink = (sum(map(int, c[4:-1].split(","))) / 3 for c in driver.execute_script(script))
    return paper, ink


def test_dark_by_the_readers_wish_and_by_the_button(shown, page):
    assert paper_and_ink(shown)[0] > 240
    look(shown, page, width=1200, dark=True)
    paper, ink = paper_and_ink(shown)
    assert paper < 40 < 200 < ink
    label = shown.find_element("css selector", ".chart .role-axis-title text")
    assert label.value_of_css_property("fill") == shown.execute_script(
        "return getComputedStyle(document.body).color"
    )
    button = shown.find_element("id", "theme")
    assert button.get_attribute("aria-pressed") == "true"
    button.click()
    assert paper_and_ink(shown)[0] > 240
    assert button.get_attribute("aria-pressed") == "false"
    shown.execute_script("localStorage.clear()")


def test_print_is_dark_on_white(shown, page):
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    shown.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": features})
    paper, ink = paper_and_ink(shown)
    shown.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
    assert paper > 240 > 60 > ink


def test_a_telephone_scrolls_tables_but_not_the_page(shown, page):
    look(shown, page, width=390)
    wide, room = shown.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert wide <= room == 390
    boxes = "return [...document.querySelectorAll('.table .box')].map((b) => b.scrollWidth > b.clientWidth)"
    assert any(shown.execute_script(boxes))
    widths = (
        "return [...document.querySelectorAll('.chart svg')].map((c) => c.getBoundingClientRect().right)"
    )
    assert max(shown.execute_script(widths)) <= 390


def test_every_legend_is_whole_on_a_telephone(session, tmp_path):
    rows = [
        {"method": f"method_{k}", "kind": kind, "n": n, "minutes": 1.0 + n * k}
        for k, kind in ((0, "on the bank, extraction included"), (1, "through the encoder"))
        for n in (1, 2)
    ]
    chart = figures.lines(
        rows, x="n", y="minutes", series="method", dashed="kind", x_title="heads", y_title="minutes"
    )
    table = section(heads(1)).tables[0]
    made = Section(
        title="Cost", kind="experiment", facts={}, tables=(table,),
        figures=(Figure(name="cost", title="Cost", about="Lines.", chart=chart),),
    )  # fmt: skip
    (tmp_path / "report.html").write_text(render([made]), encoding="utf-8")
    look(session, tmp_path / "report.html", width=390)
    texts = "return [...document.querySelectorAll('.role-legend-label text')].map((t) => t.textContent)"
    assert set(session.execute_script(texts)) == {row[name] for row in rows for name in ("method", "kind")}
    ends = """
        const room = document.querySelector(".chart svg").getBoundingClientRect().right;
        return [...document.querySelectorAll(".role-legend-label text")].map(
            (t) => room - t.getBoundingClientRect().right);
    """
    assert min(session.execute_script(ends)) >= 0


def test_a_long_title_of_a_column_takes_lines(shown, page):
    button = "return arguments[0].querySelector('button').getBoundingClientRect().width"
    widths = {}
    for width in (700, 390):
        look(shown, page, width=width)
        widths[width] = shown.execute_script(button, column(shown, "heads", "trained parameters")[0])
    assert widths[700] < 200 < widths[390]  # where lines would be a word long, it scrolls


def test_files_are_saved(shown, page, tmp_path):
    behaviour = {"behavior": "allow", "downloadPath": str(tmp_path)}
    shown.execute_cdp_cmd("Browser.setDownloadBehavior", behaviour)
    table = shown.find_element("css selector", '.table[data-name="heads"]')
    figure = shown.find_element("css selector", 'figure[data-name="heat"]')
    clicks = [table.find_element("css selector", "a[download$=csv]")]
    clicks += figure.find_elements("css selector", "button.save")
    for click in clicks:
        shown.execute_script("arguments[0].click()", click)
        time.sleep(0.2)
    names = {"heads.csv", "heat.svg", "heat.png"}
    wait(lambda: names <= {file.name for file in tmp_path.iterdir()}, "downloads")
    assert (tmp_path / "heads.csv").read_text().startswith("fusion,setting,lr,seed,dev,parameters,command")
    drawn = (tmp_path / "heat.svg").read_text()
    assert "currentColor" not in drawn  # a file has no page to take it from
    assert "wake" in drawn
    assert (tmp_path / "heat.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_command_is_copied(shown):
    shown.execute_script("Object.defineProperty(navigator, 'clipboard', {value: {writeText: (t) => {"
                         "window.copied = t; return Promise.resolve(); }}})")  # fmt: skip
    button = shown.find_element("css selector", '.table[data-name="heads"] .copy')
    shown.execute_script("arguments[0].click()", button)
    copied = wait(lambda: shown.execute_script("return window.copied"), "copy")
    assert copied.startswith("layerbank train ")


def test_a_page_of_thousands_of_heads_is_below_5_mb_and_drawn(session, page):
    large = page.with_name("large.html")
    rows = heads(500)
    large.write_text(render([section(rows)]), encoding="utf-8")
    assert page.stat().st_size < large.stat().st_size < 5e6
    look(session, large, width=1200)
    assert 0 < len(column(session, "heads", "dev")[1]) < len(rows)  # the best ones; the file has all
    assert set(requested(session)) == {large.as_uri()}


def test_landmarks_and_headings(shown):
    for selector in ("header", "nav[aria-label]", "main", "footer", "a.skip", "html[lang]"):
        assert len(shown.find_elements("css selector", selector)) == 1, selector
    for table in shown.find_elements("css selector", ".table table"):
        assert table.find_elements("css selector", "caption")
        assert not table.find_elements("css selector", "thead th:not([scope])")
    ids = [one.get_attribute("id") for one in shown.find_elements("css selector", "[id]")]
    assert len(ids) == len(set(ids))
