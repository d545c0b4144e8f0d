"""The status page as one document: it fetches nothing but the stream of changes, and works without that."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from functools import cache
from hashlib import sha256
from html import escape
from pathlib import Path
from typing import Any, Final

from gmemd.web.picture import Painter
from gmemd.web.state import State
from gmemd.web.words import plural

_SORTS: Final = {"created": "oldest first", "id": "by name", "size": "largest first"}
_PATIENCE: Final = 0.5  # seconds; without JavaScript there is no later picture
_COLUMNS: Final = ("Object", "Memory", "In memory", "Pages", "Held by", "Survives", "Created (UTC)")


@cache
def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return b64encode(sha256(text.encode()).digest()).decode()


@cache
def security_policy() -> str:
    """The Content-Security-Policy: this page's own script and style, and its stream."""
    return (f"default-src 'none'; script-src 'sha256-{_digest(_asset('page.js'))}'; "
            f"style-src 'sha256-{_digest(_asset('page.css'))}'; connect-src 'self'; form-action 'self'; "
            "img-src data:; base-uri 'none'; frame-ancestors 'none'")


async def render_page(state: State, painter: Painter, given: dict[str, Any]) -> str:
    """The document for the parameters of the route."""
    picture = await painter.paint(given, _PATIENCE)
    await asyncio.sleep(0)  # others go first
    gmemd, parts = state.gmemd, picture.sections
    name = f" · {escape(gmemd.name)}" if gmemd.name else ""
    title = f"gmemd{name}: {plural(len(gmemd.seen()), 'object')}"
    columns = "".join(f'<th scope="col">{column}</th>' for column in _COLUMNS)
    sorts = "".join(f'<option value="{value}"{" selected" if value == given["sort"] else ""}>{text}</option>'
                    for value, text in _SORTS.items())
    key = "".join(f'<span><i class="{kind}"></i>{text}</span>' for kind, text in (
        ("private", "private"), ("shared", "shared"), ("private-absent", "private, absent"),
        ("shared-absent", "shared, absent")))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{_asset("page.css")}</style>
</head>
<body>
<a class="skip" href="#objects">Skip to the objects</a>
<header>
<h1>gmemd{name}</h1>
<span class="sub">{escape(gmemd.version["package"])}, guest memory of this host</span>
<span id="live" role="status">not live <noscript>(no JavaScript: <a href="">reload</a>)</noscript></span>
</header>
<main>
<div id="warnings" role="alert">{parts["warnings"]}</div>
<section aria-label="Summary"><dl id="summary">{parts["summary"]}</dl></section>
<section aria-labelledby="host-title"><h2 id="host-title">Host</h2><div id="host" class="meters">{parts["host"]}</div>
<div id="quotas" class="meters">{parts["quotas"]}</div>
</section>
<section id="objects" aria-labelledby="objects-title" tabindex="-1">
<div class="tools">
<h2 id="objects-title">Objects</h2>
<form method="get" action="" role="search">
<input type="search" name="q" maxlength="100" value="{escape(given["q"])}" placeholder="id contains …" \
aria-label="Only objects whose id contains">
<select name="sort" aria-label="Sort">{sorts}</select>
<button>Show</button>
</form>
<div class="key">{key}</div>
</div>
<div class="scroll cards"><table>
<caption class="unseen">Memory objects</caption>
<thead><tr>{columns}</tr></thead>
<tbody id="rows">{"".join(picture.rows.values())}</tbody>
</table><p class="empty">No objects. Create them with object-add over QMP, or with gmemctl create.</p></div>
<nav id="paging" aria-label="Pages of objects">{parts["paging"]}</nav>
</section>
<div class="pair">
<section class="cards" aria-labelledby="jobs-title"><h2 id="jobs-title">Jobs</h2>
<div id="jobs">{parts["jobs"]}</div></section>
<section class="cards" aria-labelledby="events-title"><h2 id="events-title">Recent events</h2>
<div id="events">{parts["events"]}</div></section>
</div>
<p id="news" class="unseen" role="status"></p>
</main>
<footer><a href="metrics">Metrics</a><a href="api/v1/objects">Objects as JSON</a><a href="openapi.json">OpenAPI</a>
<a href="readyz">Readiness</a>
Pages are drawn from offset 0 at the left; the height of a colour is its share.
</footer>
<script>{_asset("page.js")}</script>
</body>
</html>
"""
