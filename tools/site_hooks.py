"""Hook of mkdocs.yml: a page of the site that would load something from another host is a warning, which `make docs` makes an error."""

from __future__ import annotations

import logging
import re
from typing import Any

#: What a browser fetches by itself: scripts, images, frames, styles and fonts. Links that a reader follows are no concern of this.
LOADED = re.compile(r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?(?:https?:)?//[^>]*>|<link\b[^>]*\bhref=["']?(?:https?:)?//[^>]*>""")

log = logging.getLogger("mkdocs.hooks.site")


def foreign(html: str) -> list[str]:
    """The elements of a page that load something from another host."""
    return [found for found in LOADED.findall(html) if 'rel="canonical"' not in found]


def on_post_page(output: str, page: Any, config: Any) -> str:
    for element in foreign(output):
        log.warning("%s loads from another host: %s", page.file.src_uri, element)
    return output
