"""Generates the reference pages: configuration keys from the schema, commands from click, the API from docstrings."""

from __future__ import annotations

import re
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from pipeline.cli.commands import SECTIONS, cli
from pipeline.config.describe import Key, all_keys, sections

if TYPE_CHECKING:
    from sphinx.application import Sphinx


def configuration() -> str:
    """Return the reference of all configuration keys as Markdown."""
    return "\n\n".join(_configuration_blocks())


def commands() -> str:
    """Return the reference of all commands and options as Markdown."""
    return "\n\n".join(_command_blocks())


def _configuration_blocks() -> Iterator[str]:
    meanings = sections()
    current = None
    for key in all_keys():
        section = key.path.partition(".")[0]
        if section != current and section in meanings:
            yield f"## Section `{section}`"
            yield _escaped(meanings[section])
        elif section != current:
            yield f"## Key `{section}`"
        current = section
        if section in meanings:
            yield f"### `{key.path}`"
        yield from _key_blocks(key)


def _key_blocks(key: Key) -> Iterator[str]:
    if key.only:
        name = "space.name" if key.owner == "space" else "method"
        yield f"Only with `{name}`: {key.only}."
    for methods, meaning in key.fact("meaning"):
        yield _with_methods(methods, _escaped(meaning))
    facts = [
        f"- {label}: {_with_methods(methods, _escaped(value) if name == 'type' else f'`{value}`')}"
        for label, name in (("Type", "type"), ("Default", "shown_default"))
        for methods, value in key.fact(name)
    ]
    yield "\n".join(facts)


def _with_methods(methods: str, text: str) -> str:
    return f"(`{methods}`) {text}" if methods else text


def _command_blocks() -> Iterator[str]:
    above = click.Context(cli, info_name="istanas", **cli.context_settings)
    for heading, group in SECTIONS.items():
        yield f"## {heading}"
        for command in group:
            context = click.Context(command, info_name=command.name, parent=above, **command.context_settings)
            yield f"### istanas {command.name}"
            yield f"```text\n{context.command_path} {' '.join(command.collect_usage_pieces(context))}\n```"
            yield from (_escaped(" ".join(part.split())) for part in (command.help or "").split("\n\n"))
            records = [parameter.get_help_record(context) for parameter in command.get_params(context)]
            for record in records:
                if record is not None:
                    option, text = record
                    yield f"`{option}`\n: {_escaped(text)}"


def _escaped(text: str) -> str:
    """Return plain text as Markdown; text between backticks stays code.

    Example:
        >>> _escaped("train/CLASS/*, `a_b`, x_y")
        'train/CLASS/\\\\*, `a_b`, x\\\\_y'
    """
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if part.startswith("`") else re.sub(r"([\\*_<>\[\]#$|])", r"\\\1", part) for part in parts
    )


def _name_files(app: Sphinx, page: str, source: list[str]) -> None:
    """Replace links to files of the repository outside docs/ with the files' names: the site does not contain them.

    A link to a file that does not exist stays, and is a warning of the build.
    """
    docs = Path(app.srcdir).resolve()
    folder = docs.joinpath(page).parent

    def named(link: re.Match[str]) -> str:
        text, target = link["text"], (folder / link["target"]).resolve()
        if target.is_relative_to(docs) or not target.is_relative_to(docs.parent) or not target.exists():
            return link[0]
        name = target.relative_to(docs.parent).as_posix()
        return text if name in text else f"{text} (`{name}`)"

    source[0] = re.sub(
        r"(?<!!)\[(?P<text>[^\]\n]+)\]\((?P<target>\.\./[^)#\s]+)(#[^)\s]*)?\)", named, source[0]
    )


def _escape_norms(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Keep `|z|` in the text of docstrings, which would be a reference to a substitution; examples stay as they are."""
    in_example = False
    for number, line in enumerate(lines):
        in_example = bool(line.strip()) and (in_example or line.lstrip().startswith(">>> "))
        if not in_example:
            parts = re.split(r"(`[^`]*`)", line)
            lines[number] = "".join(p if p.startswith("`") else p.replace("|", r"\|") for p in parts)


def _skip_tuple_fields(
    app: Sphinx, what: str, name: str, obj: object, skip: bool, options: object
) -> bool | None:
    """Leave out a named tuple's fields, which have no docstring of their own: the class describes them."""
    return True if isinstance(obj, _TUPLE_FIELD) else None


_TUPLE_FIELD = type(namedtuple("_Example", "field").field)


def _directive(generate: Callable[[], str]) -> type[SphinxDirective]:
    class Generated(SphinxDirective):
        """Replaces itself with what a function generates."""

        def run(self) -> list[nodes.Node]:
            return self.parse_text_to_nodes(generate(), allow_section_headings=True)

    return Generated


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directives, and the preparation of pages and docstrings."""
    app.connect("source-read", _name_files)
    app.connect("autodoc-process-docstring", _escape_norms)
    app.connect("autodoc-skip-member", _skip_tuple_fields)
    app.add_directive("configuration-reference", _directive(configuration))
    app.add_directive("command-reference", _directive(commands))
    return {"parallel_read_safe": True}
