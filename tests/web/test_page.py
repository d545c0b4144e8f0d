"""The status page in a real browser, and what of it needs none."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
from selenium.webdriver.support.ui import WebDriverWait

from tests.patience import PATIENCE
from tests.programs import ROOT, needs
from tests.web.chromium import chromium, emulate
from tests.web.scene import picture, scene
from tests.web.site import Site, fill

SECOND = 1.0

pytestmark = [pytest.mark.e2e, needs("chromium"), needs("chromedriver")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as driver:
        yield driver


@pytest.fixture(autouse=True)
def clean(browser: Any) -> None:
    """Nothing of the test before is left on the page or the console."""
    browser.get("about:blank")
    complaints(browser)


@pytest.fixture(scope="module")
def shared() -> Iterator[Site]:
    with Site(tcp=True) as made:
        yield made


@pytest.fixture
def site(shared: Site) -> Iterator[Site]:
    """A daemon without objects."""
    yield shared
    with shared.client() as client:
        for found in client.execute("query-memdev"):
            client.execute("object-del", {"id": found["id"]})


@pytest.fixture(scope="module")
def busy() -> Iterator[Site]:
    """A daemon with much to show."""
    with scene() as made:
        yield made


def wait_until(browser: Any, script: str, *arguments: Any) -> float:
    """Wait until a script's value is true; return how long that took."""
    began = time.monotonic()
    while not browser.execute_script(script, *arguments):
        assert time.monotonic() < began + PATIENCE, browser.page_source
        time.sleep(0.02)
    return time.monotonic() - began


def shows(browser: Any, right: Callable[[Any], bool]) -> None:
    """Wait until the page that was asked for is there."""
    WebDriverWait(browser, PATIENCE, ignored_exceptions=(NoSuchElementException, StaleElementReferenceException)) \
        .until(right)


def open_live(browser: Any, url: str) -> None:
    emulate(browser)
    browser.get(url)
    wait_until(browser, "return document.getElementById('live').className === 'on'")


def complaints(browser: Any) -> list[str]:
    """What the browser has written to its console: refused by the policy, failed requests, errors of scripts."""
    return [entry["message"] for entry in browser.get_log("browser")]


def add(client: Any, name: str, kind: str = "memfd", size: int = 64 << 12, **more: Any) -> None:
    client.execute("object-add", {"qom-type": f"memory-backend-{kind}", "id": name, "size": size, **more})


def test_an_object_appears_within_a_second(site: Site, browser: Any, record_property: Any) -> None:
    """object-add shows on an open page without reloading, and so does object-del."""
    with site.client() as client:
        open_live(browser, site.url)
        assert "No objects" in browser.find_element("css selector", "#objects").text
        appeared, gone = [], []
        for name in ("ram0", "ram1", "ram2"):  # the quickest counts: others use the machine, too
            add(client, name)
            appeared.append(wait_until(browser, f"return !!document.getElementById('o-{name}')"))
        wait_until(browser, "return document.querySelector('#summary div:nth-child(2) dd').textContent === '3'")
        for name in ("ram0", "ram1", "ram2"):
            client.execute("object-del", {"id": name})
            gone.append(wait_until(browser, f"return !document.getElementById('o-{name}')"))
    record_property("figure", f"an object appears on the page after {min(appeared):.2f} to {max(appeared):.2f} s")
    assert min(appeared) < SECOND
    assert min(gone) < SECOND
    assert complaints(browser) == []


def test_a_conversion_recolours_the_strip(site: Site, browser: Any) -> None:
    """What becomes private is drawn private, in its place; the words say the same."""
    with site.client() as client:
        add(client, "cvm0", "guest-memfd", prealloc=True)
        open_live(browser, site.url)
        strip = "return document.querySelector('#o-cvm0 .strip .%s')?.getAttribute('d') || ''"
        wait_until(browser, "return document.querySelector('#o-cvm0 .strip .shared')")
        client.execute("memdev-convert", {"id": "cvm0", "offset": 16 << 12, "size": 16 << 12, "to": "private"})
        assert wait_until(browser, strip % "private-absent") < 3 * SECOND
        assert browser.execute_script(strip % "private-absent") == "M16 0h16v16h-16z"
        wait_until(browser, "return document.querySelector('#o-cvm0 .strip .shared').getAttribute('d')"
                            " === 'M0 0h16v16h-16zM32 0h32v16h-32z'")
        label = browser.find_element("css selector", "#o-cvm0 .strip").get_attribute("aria-label")
        assert label == "Pages: 75 % shared in memory, 25 % private and absent"
        client.execute("memdev-convert", {"id": "cvm0", "offset": 0, "size": 64 << 12, "to": "shared"})
        wait_until(browser, "return !document.querySelector('#o-cvm0 .strip .private-absent')")
    assert complaints(browser) == []


def test_what_is_open_or_has_the_focus_stays_so(site: Site, browser: Any) -> None:
    """An update of a row neither closes its details nor takes the keyboard away."""
    with site.client() as client:
        add(client, "cvm0", "guest-memfd")
        open_live(browser, site.url)
        summary = "document.querySelector('#o-cvm0 details[data-key=survives] summary')"
        wait_until(browser, f"return !!{summary}")
        browser.execute_script(f"window.old = {summary}; old.click(); old.focus()")
        client.execute("memdev-convert", {"id": "cvm0", "offset": 0, "size": 4096, "to": "private"})
        wait_until(browser, "return !window.old.isConnected")
        is_open, text, has_focus = browser.execute_script(
            f"const fresh = {summary}; return [fresh.parentElement.open, fresh.parentElement.textContent,"
            " document.activeElement === fresh]")
        assert (is_open, has_focus) == (True, True)
        assert "power loss" in text


def test_the_page_works_without_javascript(site: Site, browser: Any) -> None:
    """Everything is in the document: the search and the pages are a form and links."""
    fill(site, 120)
    emulate(browser, scripts=False)
    try:
        browser.get(site.url)
        assert len(browser.find_elements("css selector", "#rows tr")) == 50
        browser.find_element("link text", "Next").click()
        shows(browser, lambda page: page.find_element("css selector", "#rows th").text.split()[0] == "o50")
        browser.find_element("css selector", "input[name=q]").send_keys("o11")
        browser.find_element("css selector", "form button").click()
        shows(browser, lambda page: "1 to 11 of 11" in page.find_element("id", "paging").text)
        assert len(browser.find_elements("css selector", "#rows tr")) == 11
    finally:
        emulate(browser)


def test_nothing_is_fetched(site: Site, browser: Any) -> None:
    """The document, its stream, and nothing else; not from elsewhere either."""
    open_live(browser, site.url)
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in loaded if name != site.url + "live"] == []
    assert complaints(browser) == []


def test_strange_names_are_only_text(site: Site, browser: Any) -> None:
    """What a client can put into the page is shown, not run."""
    with site.client() as client:
        add(client, "ram0")
        for path in ("?q=%3Cscript%3Ealert(1)%3C/script%3E", "?q=%22%20onfocus=alert(1)%20autofocus=%22"):
            browser.get(site.url + path)
            assert browser.execute_script("return document.scripts.length") == 1
            assert not browser.find_element("css selector", "input[name=q]").get_attribute("onfocus")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(site: Site, browser: Any, scheme: str) -> None:
    """Ordinary and dim text have the contrast that WCAG asks for (4.5 to 1)."""
    open_live(browser, site.url)
    emulate(browser, scheme=scheme)
    colours = browser.execute_script("""
        const style = getComputedStyle(document.documentElement);
        return Object.fromEntries(["ink", "dim", "link", "good", "bad", "card", "back"].map(
            name => [name, style.getPropertyValue("--" + name).trim()]));""")
    for text in ("ink", "dim", "link", "good", "bad"):
        for ground in ("card", "back"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    emulate(browser)


def contrast(one: str, other: str) -> float:
    """The contrast of two colours (#rgb or #rrggbb) by WCAG 2.2."""
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    digits = colour.lstrip("#")
    digits = "".join(digit * 2 for digit in digits) if len(digits) == 3 else digits
    parts = [int(digits[place:place + 2], 16) / 255 for place in (0, 2, 4)]
    red, green, blue = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_it_fits_a_phone(site: Site, browser: Any) -> None:
    """At 360 pixels nothing has to be scrolled sideways."""
    with site.client() as client:
        add(client, "an-object-with-quite-a-long-name.of-a-virtual-machine.example.org", "guest-memfd")
        emulate(browser, width=360, height=780)
        try:
            browser.get(site.url)
            wait_until(browser, "return document.getElementById('live').className === 'on'")
            assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        finally:
            browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_it_makes_sense_to_a_screen_reader(site: Site, browser: Any) -> None:
    """Landmarks, headings, a table with headers and a name for every picture and control."""
    with site.client() as client:
        add(client, "ram0")
        open_live(browser, site.url)
        wait_until(browser, "return !!document.getElementById('o-ram0')")
    nodes = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    found = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]]
    roles = {role for role, _ in found}
    assert {"banner", "main", "contentinfo", "navigation", "search", "table", "columnheader", "rowheader"} <= roles
    to_be_named = ("image", "link", "button", "searchbox", "combobox")
    unnamed = [role for role, name in found if role in to_be_named and not name]
    assert unnamed == []
    assert ("image", "Pages: 100 % shared and absent") in found


@pytest.mark.parametrize(("name", "how"), [
    ("light", {}), ("dark", {"scheme": "dark"}), ("phone", {"width": 390, "height": 844})])
def test_pictures_for_people_to_look_at(busy: Site, browser: Any, name: str, how: dict[str, Any]) -> None:
    """The page of a busy host, as artifacts/status-page-*.png; nothing is complained about meanwhile."""
    file = ROOT / "artifacts" / f"status-page-{name}.png"
    file.parent.mkdir(exist_ok=True)
    emulate(browser, **how)
    try:
        picture(browser, busy.url, file)
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert file.read_bytes().startswith(b"\x89PNG")
    assert browser.execute_script("return document.querySelectorAll('#rows .strip .private').length") == 3
    assert complaints(browser) == []


def test_many_objects_stay_usable_by_paging(crowd: tuple[Site, int], browser: Any, record_property: Any) -> None:
    """With 10,000 objects the page shows 50, quickly, and each of them can be reached."""
    site, number = crowd
    began = time.monotonic()
    open_live(browser, site.url)
    record_property("figure", f"the page with {number} objects is live after {time.monotonic() - began:.2f} s, "
                              f"{len(site.get('/').body) >> 10} KiB")
    assert len(browser.find_elements("css selector", "#rows tr")) == 50
    assert f"1 to 50 of {number:,}" in browser.find_element("id", "paging").text
    browser.execute_script("document.getElementById('last').click()")
    wait_until(browser, "return !!document.getElementById(arguments[0])", f"o-o{number - 1}")
    browser.find_element("css selector", "input[name=q]").send_keys(f"o{number - 2}")
    browser.find_element("css selector", "form button").click()
    wait_until(browser, "return document.querySelectorAll('#rows tr').length === 1")
    with site.client() as client:
        add(client, f"o{number - 2}x")
        wait_until(browser, "return document.querySelectorAll('#rows tr').length === 2")
        client.execute("object-del", {"id": f"o{number - 2}x"})
