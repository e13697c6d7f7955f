"""HTML pages, parsed with the standard library: resources, sections and texts."""

import re
from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "link", "input", "img", "br"}


class Page(HTMLParser):
    """A parsed page."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.source = file.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self._open: list[str] = []
        self.feed(self.source)
        self.close()
        assert self._open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        (self.scripts if self._open[-1:] == ["script"] else self.texts).append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def files(self) -> list[str]:
        """The targets of its links."""
        return [link["href"] for link in self.all("a") if not link["href"].startswith("#")]

    @property
    def trials(self) -> list[list[str]]:
        """The rows of the table of trials, each a list of the HTML of its cells."""
        table = self.source.partition('id="trials"')[2].partition("</section>")[0]
        return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in table.split("<tr>")[2:]]

    @property
    def sections(self) -> list[str]:
        return [section["id"] for section in self.all("section")]

    def check_loads_nothing(self) -> None:
        """Check that the page loads no file, and links only to files in its folder."""
        for tag, attributes in self.tags:
            for name, value in attributes.items():
                if name in ("src", "href", "xlink:href", "data", "action", "srcset", "poster"):
                    beside = tag == "a" and re.fullmatch(r"([\w-]+/)?[\w-]+\.(html|csv)", value)
                    assert value.startswith(("data:", "#")) or beside, (tag, name, value[:80])
                assert not name.startswith("on"), (tag, name)
                for address in re.findall(r"url\(([^)]*)\)", value):
                    assert address.startswith("#"), address
        assert "@import" not in self.source
        assert "url(" not in self.source.partition("<style>")[2].partition("</style>")[0]
        assert not [tag for tag, _ in self.tags if tag in ("iframe", "object", "embed", "base", "form")]
        assert not re.search(r"fetch|XMLHttp|import\(|localStorage|cookie|WebSocket", "".join(self.scripts))

    def check_ids(self) -> None:
        """Check that ids are unique, and that all references exist."""
        ids = [attributes["id"] for _, attributes in self.tags if "id" in attributes]
        assert len(ids) == len(set(ids))
        wanted = {
            name.removeprefix("#")
            for _, attributes in self.tags
            for key, value in attributes.items()
            for name in (
                [value]
                if key in ("href", "xlink:href") and value.startswith("#")
                else re.findall(r"url\((#[^)]*)\)", value)
                + (value.split() if key in ("aria-labelledby", "aria-describedby", "for") else [])
            )
        }
        assert wanted <= set(ids)
