"""A report's formats and page: hostile text has no effect, and a browser opens the page without a message."""

import csv
import functools
import html.parser
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softprompt import DPT
from softprompt.analysis.report import Report, formats, report, tables
from softprompt.analysis.report.read import printable

Write = Callable[..., Path]


def make_report(tmp_path: Path, **options: Any) -> Report:
    return report([tmp_path / "runs"], out=tmp_path / "out", **options)


# Formats

HOSTILE = "a|b & $x^{y$_#~<img src=x onerror=alert(1)>\\end{table}%`[l](javascript:x)"


@pytest.fixture(scope="module")
def hostile(write_run: Write, tmp_path_factory: pytest.TempPathFactory) -> Report:
    root = tmp_path_factory.mktemp("hostile")
    write = functools.partial(write_run, root)
    write(HOSTILE.replace("/", ""), backbone={"base": HOSTILE}, metric=HOSTILE, extra_metrics={HOSTILE: 0.5})
    write(
        "=1+1",
        seed=1,
        fields={"init_prompt": '=cmd|"</script><script>alert(1)</script>'},
        selection_warning=f"\x1b[2J{HOSTILE}",
    )
    (write("unread-\u202e\x1b[31m<b>", seed=2) / "softprompt.safetensors").unlink()
    return make_report(root, title=HOSTILE)


def test_text_has_no_control_characters(hostile: Report) -> None:
    text = hostile.render("text")
    assert HOSTILE in text
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    assert all(printable(run.folder) == run.folder for run in hostile.skipped)


def test_markdown_text_stays_in_its_cell(hostile: Report) -> None:
    lines = [line for line in hostile.render("markdown").splitlines() if line.startswith("|")]
    table = lines[: next(index for index, line in enumerate(lines[2:], 2) if line.startswith("|:--")) - 1]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
    assert not re.search(r"<(?!br>)", hostile.render("markdown"))


def test_latex_text_is_no_command(hostile: Report) -> None:
    text = hostile.render("latex")
    assert text.count(r"\end{table}") == text.count(r"\begin{table}") == 2
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    depth = 0
    for sign in re.findall(r"(?<!\\)[{}]", body.replace(r"\\", "")):
        depth += 1 if sign == "{" else -1
        assert depth >= 0
    assert depth == 0
    assert not re.search(r"(?<!\\)[#%~]", body)


def test_csv_has_fractions_and_no_formula(hostile: Report) -> None:
    rows = list(csv.DictReader(io.StringIO(hostile.render("csv"))))
    cells = formats.cells(hostile.grid)
    assert [float(row["test"]) for row in rows] == [cell["test"] for cell in cells]
    assert [float(row["test_rows_interval_low"]) for row in rows] == [cell["test_rows_interval"][0] for cell in cells]
    assert all(value[:1] not in ("=", "+", "@") for row in rows for value in row.values())
    assert any(row["setting_init_prompt"].startswith("'=") for row in rows)


def test_json_is_complete_and_strict(hostile: Report) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    record = json.loads(hostile.files[0].with_name("results.json").read_text(), parse_constant=refuse)
    assert record["cells"] == json.loads(json.dumps(formats.cells(hostile.grid)))
    assert len(record["skipped"]) == 1
    assert {run["extra_metrics"].get(HOSTILE) for cell in record["cells"] for run in cell["runs"]} == {0.5, None}


class Elements(html.parser.HTMLParser):
    """The tags of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_page_loads_nothing_and_has_one_script(hostile: Report) -> None:
    tags = Elements(hostile.files[0].read_text()).tags
    assert [tag for tag, _ in tags].count("script") == 1
    assert not {"img", "iframe", "object", "embed", "base", "form", "audio", "video"} & {tag for tag, _ in tags}
    for tag, attributes in tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "xlink:href", "data", "action"):
            assert str(attributes.get(name, "#")).startswith(("#", "data:,")), (tag, attributes)
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids)) > 20
    [policy] = [attributes["content"] for _, attributes in tags if "http-equiv" in attributes]
    assert str(policy).startswith("default-src 'none'")


@given(st.text())
def test_printable_is_idempotent_and_keeps_plain_text(text: str) -> None:
    result = printable(text)
    assert result.isprintable()
    assert printable(result) == result
    assert result == text or not text.isprintable()


@given(
    st.lists(
        st.lists(st.text(st.characters(codec="ascii", categories=["L", "N"]), max_size=40), min_size=9, max_size=9),
        max_size=3,
    )
)
def test_text_tables_keep_every_cell_and_fit_the_width(rows: list[list[str]]) -> None:
    head = tuple(f"column{number}" for number in range(9))
    text = formats.text([tables.Table(title="T", head=head, rows=tuple(map(tuple, rows)), text_columns=1)])
    assert all(word in text for row in rows for word in row)
    assert all(len(line) <= 110 for line in text.splitlines())


def test_bytes_and_percent_texts() -> None:
    assert [tables.bytes_text(count) for count in (999.0, 24_040.0, 1_840_000.0, 5e9)] == [
        "999 B",
        "24 kB",
        "1.84 MB",
        "5 GB",
    ]
    assert (tables.percent(0.6666), tables.percent(-0.01), tables.signed(0.01)) == ("66.7", "−1.0", "+1.0")


# A browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("there is no Chromium on this machine")
    with playwright.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_browser_opens_the_page_without_messages(scheme: str, width: int, browser: Any, hostile: Report) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    messages: list[str] = []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("dialog", lambda dialog: (messages.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: messages.append(request.url) if "report.html" not in request.url else None)
    page.goto(hostile.files[0].as_uri())
    assert page.title() == HOSTILE
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator("figure svg").count() == 3
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    tick = page.evaluate("getComputedStyle(document.querySelector('figure svg text')).fill")
    assert tick == page.evaluate("getComputedStyle(document.body).color")
    assert messages == []
    page.close()


def test_click_on_a_head_sorts_by_number(browser: Any, write: Write, tmp_path: Path) -> None:
    for rank, test in ((1, 0.5), (2, 0.9), (3, 0.7), (4, 0.6)):
        write(prompt=DPT(length=6, rank=rank), test=test)
    make_report(tmp_path)
    page = browser.new_page()
    page.goto((tmp_path / "out" / "report.html").as_uri())
    names = "[...document.querySelectorAll('table')[0].tBodies[1].rows].map(row => row.cells[0].textContent.trim())"
    references = "document.querySelectorAll('table')[0].tBodies[0].rows[0].cells[0].textContent"
    page.get_by_role("button", name="rte").first.click()
    assert page.evaluate(names) == ["dpt rank=2", "dpt rank=3", "dpt rank=4", "dpt rank=1"]
    page.get_by_role("button", name="rte").first.click()
    assert page.evaluate(names) == ["dpt rank=1", "dpt rank=4", "dpt rank=3", "dpt rank=2"]
    assert page.locator("th[aria-sort=ascending]").count() == 1
    assert page.evaluate(references) == "majority answer"
    page.close()
