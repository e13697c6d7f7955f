"""Links to files in HTML pages."""

from __future__ import annotations

import re

# The template `links.html` writes links in this form. Other text in a page is escaped and cannot have it.
_FILE_LINK = re.compile(r'<a data-file href="[^"]*">(.*?)</a>', re.DOTALL)


def without_file_links(page: str) -> str:
    """Return a page whose links to files are plain text.

    Args:
        page: A page as `render` returns it.

    Example:
        >>> without_file_links('<td><a data-file href="trials.csv">all</a> <a href="#top">up</a></td>')
        '<td>all <a href="#top">up</a></td>'
    """
    return _FILE_LINK.sub(r"\1", page)
