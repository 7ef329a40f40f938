"""The page, as a response: one file, with nothing from anywhere else."""

from __future__ import annotations

import secrets
from functools import cache
from importlib import resources

from persist_cache.server.answers import Response

_SCRIPTS = (
    "base",
    "rows",
    "state",
    "glance",
    "timeline",
    "requests",
    "disk",
    "prompts",
    "actions",
    "start",
)
"""Parts of the one script, in their order."""


@cache
def _page() -> str:
    parts = resources.files("persist_cache.server.page")

    def text(name: str) -> str:
        return parts.joinpath(name).read_text(encoding="utf-8")

    script = "\n".join(text(f"{name}.js") for name in _SCRIPTS)
    page = text("page.html")
    return page.replace("{{style}}", text("page.css")).replace("{{script}}", script)


def page_response() -> Response:
    """The page, with a nonce that only its own style and script know."""
    nonce = secrets.token_urlsafe(16)
    policy = (
        f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return Response(
        200,
        _page().replace("{{nonce}}", nonce).encode(),
        "text/html; charset=utf-8",
        {
            "Content-Security-Policy": policy,
            "X-Frame-Options": "DENY",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
        },
    )
