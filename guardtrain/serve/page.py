"""The page at `/`: one file without anything from elsewhere, under a policy that lets nothing else run."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import lru_cache
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

router = APIRouter()


@router.get("/", include_in_schema=False)
async def page() -> HTMLResponse:
    """A form to try a prompt with."""
    html, policy = _page()
    safe = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
    return HTMLResponse(html, headers=safe)


@lru_cache
def _page() -> tuple[str, str]:
    html = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    style, script = (_hash_of(html, tag) for tag in ("style", "script"))
    own = f"style-src '{style}'; script-src '{script}'; connect-src 'self'; img-src data:"
    return html, f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def _hash_of(html: str, tag: str) -> str:
    """Of the page's one element of this name, as a policy names what may run."""
    found = re.search(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    assert found is not None
    return "sha256-" + base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
