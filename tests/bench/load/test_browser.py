"""The report in a browser: whole, readable, and alone."""

import pytest

from bench.load import html, speculative
from tests.bench.load.results import make_result
from tests.serve.browser import browsing, find_browser

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no Chromium on this machine")

# Height in pixels of the smallest text of a drawing, as it is shown.
SMALLEST = """Math.min(...[...document.querySelectorAll('svg text')]
    .map(text => 12 * text.ownerSVGElement.getBoundingClientRect().width
                 / text.ownerSVGElement.viewBox.baseVal.width))"""
# Texts of a drawing that lie outside of it.
OUTSIDE = """[...document.querySelectorAll('svg text')].filter(text => {
    const [a, b] = [text, text.ownerSVGElement].map(e => e.getBoundingClientRect());
    return a.left < b.left - 1 || a.right > b.right + 1
        || a.top < b.top - 1 || a.bottom > b.bottom + 1;
}).map(text => text.textContent)"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with browsing(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture(scope="module", params=["run", "comparison"])
def report(request, tmp_path_factory):
    """The HTML of one run, and of a comparison of three arms."""
    text = html.render(make_result(mtp=True))
    if request.param == "comparison":
        arms = [make_result(), make_result(mtp=True, slower=1.1), make_result(mtp=True)]
        text = speculative.page("524k", arms)
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(text, encoding="utf-8")
    return path.as_uri()


@pytest.mark.parametrize("width", [1440, 1024, 390])
def test_it_is_readable_and_asks_for_nothing_else(page, report, width):
    page.errors.clear()
    page.urls.clear()
    page.look(width, 900)
    page.open(report)
    assert page.evaluate("document.querySelectorAll('svg polyline, svg circle').length") > 6
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(SMALLEST) >= 9
    assert page.evaluate(OUTSIDE) == []
    assert page.picture().startswith(b"\x89PNG")
    assert page.errors == []
    assert page.urls == [report]
