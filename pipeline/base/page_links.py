"""Links to files in HTML pages."""

from __future__ import annotations

import re

# As the template `links.html` writes it: a text of a page is escaped, and cannot look like it.
_FILE_LINK = re.compile(r'<a data-file href="[^"]*">(.*?)</a>', re.DOTALL)


def without_file_links(page: str) -> str:
    """Return a page whose links to files are plain text.

    Args:
        page: as `render` gives it.

    Example:
        >>> without_file_links('<td><a data-file href="trials.csv">all</a> <a href="#top">up</a></td>')
        '<td>all <a href="#top">up</a></td>'
    """
    return _FILE_LINK.sub(r"\1", page)
