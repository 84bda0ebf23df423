"""The status page in a browser: filled, in both schemes, on a phone, no error, no guest."""

import json
import re
import struct

import pytest

from serve.own_routes import PAGE, PAGE_HEADERS
from tests.serve.browser import browsing, find_browser
from tests.serve.front_process import running_front, wait_until
from tests.serve.test_demotion import DEAD, EXPIRED, PROBE

needs_browser = pytest.mark.skipif(find_browser() is None, reason="no Chromium on this machine")
KEY = "page-0123456789abcdef"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with browsing(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture(scope="module")
def front(tmp_path_factory):
    folder = tmp_path_factory.mktemp("f")
    record = folder / "load.json"
    record.write_text(
        json.dumps(
            {
                "schema_version": 1,
                "target": {"all_reduce": ["Cuda<b>x", "OneShot (host-pinned)"]},
                "draft": {},
            }
        )
    )
    config = {"monitor_interval_s": 0.1, "load_record": str(record)}
    with running_front(folder, [{}], **config) as front:
        front.wait_until_ready()
        front.post(events=5, gap_s=0.1, drafts=10, accepted=8)
        yield front


def test_the_page_names_nothing_outside_itself():
    text = PAGE.read_text(encoding="utf-8")
    assert not re.search(r"<link(?! rel=\"icon\" href=\"data:,\")|<img|@import|\bsrc=|url\(", text)
    assert set(re.findall(r"https?://[^\"'\s<]+", text)) == {"http://www.w3.org/2000/svg"}


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("size", [(1200, 900), (390, 844)])
def test_it_shows_the_service_without_an_error(front, page, size, dark):
    page.errors.clear()
    page.urls.clear()
    page.look(*size, dark=dark)
    url = f"http://127.0.0.1:{front.port}"
    page.open(f"{url}/status")
    page.wait_until("document.querySelector('#plot-gen path') !== null")
    assert page.evaluate("document.getElementById('stage').textContent") == "ready"
    assert page.evaluate("document.getElementById('mtp').textContent").startswith("80.0 %")
    shown = page.evaluate("document.getElementById('engine').innerText")
    assert "Cuda<b>x" in shown  # as text
    assert "host-pinned" in shown
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    _, height = struct.unpack(">II", page.picture()[16:24])
    assert height >= 400
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(16, 19, 23)" if dark else "rgb(246, 247, 249)")
    assert page.errors == []
    asked = {address.partition("?")[0] for address in page.urls}
    assert asked <= {f"{url}/status", f"{url}/status.json", "data:,"}


@needs_browser
def test_it_shows_the_tier_of_two_cards_and_what_it_was_demoted_from(tmp_path, page):
    with running_front(tmp_path, [{}], probe=PROBE) as front:
        front.wait_until_ready()
        front.post(fails=EXPIRED, status=500, message=DEAD)
        wait_until(lambda: len(front.lives) == 2, "the second life")
        front.wait_until_ready()
        page.open(f"http://127.0.0.1:{front.port}/status")
        page.wait_until("!document.getElementById('main').hidden")
        shown = page.evaluate("document.getElementById('engine').innerText")
        assert re.search(r"tier\s+host-pinned\b", shown)
        assert re.search(rf"demoted from\s+peer-push: {re.escape(EXPIRED)}", shown)


@needs_browser
def test_it_asks_for_a_key_where_one_is_needed(tmp_path, page):
    (tmp_path / "keys").write_text(f"page {KEY}\n")
    config = {"keys": str(tmp_path / "keys"), "status_access": "key"}
    with running_front(tmp_path, [{}], **config) as front:
        front.wait_until_ready()
        page.open(f"http://127.0.0.1:{front.port}/status")
        page.wait_until("!document.getElementById('ask').hidden")
        assert page.evaluate("document.getElementById('main').hidden")
        page.evaluate(
            f"document.getElementById('key').value = '{KEY}';"
            "document.querySelector('#ask button').click()"
        )
        page.wait_until("!document.getElementById('main').hidden")
        assert KEY not in front.log()


def test_what_the_page_may_do_is_bounded(front):
    status, headers, body = front.ask("GET", "/status")
    assert (status, body) == (200, PAGE.read_bytes())
    for name, value in PAGE_HEADERS.items():
        assert headers[name] == value
