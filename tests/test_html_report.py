"""The report page is one file that shows what was measured."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from tiny_pipelines import built

import accel
from accel import html_report, svg
from accel.recipe import Recipe

FRONT = [{"entries": [{"name": "PlainCycle"}], "speedup": 2.5, "psnr": 36}]


class Page(HTMLParser):
    """Every address a page asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag, attributes) -> None:
        self.addresses += [value for name, value in attributes if name in ("src", "href")]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    tiny, _ = built("wan21")
    call = {name: value for name, value in tiny.call.items() if name != "output_type"}
    method = accel.PlainCycle(interval=2, warmup=1)
    runs = html_report.measure(tiny.pipe, call, ["a <cat>", "a dog"], Recipe.of((method,)))
    recipe = Recipe.read({"entries": [{"name": "PlainCycle"}], "front": FRONT})
    bench = tmp_path_factory.mktemp("report") / "bench.json"
    row = {"name": "TeaCache()", "kind": "peer", "speedup": 3.0, "psnr": {"median": 33.0}}
    bench.write_text(json.dumps({"rows": [row, {"name": "x", "kind": "peer", "failed": "no"}]}))
    file = html_report.write(
        bench.with_name("r.html"), "tiny", recipe, runs, [bench], "accel report"
    )
    return file.read_text(), runs


def test_nothing_is_fetched(page) -> None:
    parser = Page()
    parser.feed(page[0])
    assert parser.addresses
    assert all(address.startswith("data:image/png;base64,") for address in parser.addresses)


def test_prompts_are_escaped(page) -> None:
    assert "a &lt;cat&gt;" in page[0]
    assert "a <cat>" not in page[0]


def test_plots_are_sound_and_hold_every_row(page) -> None:
    plots = re.findall(r"<svg.*?</svg>", page[0], re.DOTALL)
    assert len(plots) == 3
    for plot in plots:
        ElementTree.fromstring(plot)
    assert "TeaCache(): 3.00, 33.0" in plots[0]
    assert "PlainCycle: 2.50, 36.0" in plots[0]


def test_errors_begin_at_the_first_reuse(page) -> None:
    for run in page[1]:
        letters = next(iter(run.report.verdicts.values()))
        first = letters.index("R")
        assert all(error == 0 for error in run.error[:first])
        assert all(error > 0 for error in run.error[first:])


@pytest.mark.parametrize(
    "content",
    [
        *(
            "",
            "{}",
            "[1]",
            '{"rows": 3}',
            '{"rows": [{"kind": "accel", "speedup": 2, "name": "x"}]}',
        ),
        '{"rows": [{"kind": "accel", "speedup": 2, "name": "x", "psnr": {"median": Infinity}}]}',
    ],
)
def test_a_wrong_bench_file_is_named(tmp_path, content) -> None:
    file = tmp_path / "wrong.json"
    file.write_text(content)
    with pytest.raises(accel.AccelError, match=r"wrong\.json: not a result of accel bench"):
        html_report.write(tmp_path / "r.html", "x", Recipe.read({"entries": []}), [], [file])
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize("values", [[0.5], [1.0, 1.0], [0.0, 1e-9], [-3.0, 1e6]])
def test_any_numbers_can_be_plotted(values) -> None:
    for drawn in (
        svg.lines({"a & b": values}, "x", "y"),
        svg.scatter({"a": [(value, value, "<p>") for value in values]}, "x", "y"),
    ):
        ElementTree.fromstring(drawn.partition("<p class")[0])
        assert "nan" not in drawn
