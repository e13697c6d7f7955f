"""Links between related runs on MLflow's pages: as tags, and in the descriptions of runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import quote

from istanas.space import kind_title
from pipeline.runs.layout import CELLS_FOLDER
from pipeline.runs.tags import Tag

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PARENT = "mlflow.parentRunId"
DESCRIPTION = "mlflow.note.content"
LENGTH = 5000  # characters, the width of the model registry's columns


@dataclass(frozen=True)
class Kin:
    """A related run, to which the page of another run links.

    Args:
        kind: "search", "retrain" or "sweep".
        name: The name of the run.
        experiment_id, run_id: The ids in MLflow.
    """

    kind: str
    name: str
    experiment_id: str
    run_id: str

    @property
    def link(self) -> str:
        """A Markdown link that works wherever MLflow's pages are served.

        Example:
            >>> Kin("search", "digits-search", "1", "ab").link
            '[search digits-search](#/experiments/1/runs/ab)'
        """
        kind = {"retrain": "retraining"}.get(self.kind, self.kind)
        name = "".join(f"\\{c}" if c in r"\[]*_`<>" else c for c in self.name)
        return f"[{kind} {name}](#/experiments/{self.experiment_id}/runs/{self.run_id})"


def kin_of(run: "Run") -> Kin:
    """Return the `Kin` of a run in the store."""
    info, tags = run.info, run.data.tags
    return Kin(tags.get(Tag.KIND, "run"), info.run_name or "", info.experiment_id, info.run_id)


def ancestors(client: "MlflowClient", parent_id: str | None) -> tuple[Kin, ...]:
    """Return the ancestors of a run, the nearest first: for a retraining its search, and that search's sweep.

    Args:
        client: A client of the store.
        parent_id: The run's parent, or None.
    """
    from mlflow.exceptions import MlflowException

    line: list[Kin] = []
    while parent_id is not None and parent_id not in {
        kin.run_id for kin in line
    }:  # edited tags may have a cycle
        try:
            run = client.get_run(parent_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            break  # it was deleted permanently
        line.append(kin_of(run))
        parent_id = run.data.tags.get(PARENT)
    return tuple(line)


def lineage_tags(kin: Sequence[Kin]) -> dict[str, str]:
    """Return tags with the ids of a run's ancestors, by which MLflow finds the run.

    Example:
        >>> lineage_tags([Kin("search", "a", "1", "ab"), Kin("sweep", "b", "1", "cd")])
        {'istanas.search_run': 'ab', 'istanas.sweep_run': 'cd'}
    """
    return {f"istanas.{k.kind}_run": k.run_id for k in kin}


def with_links(
    description: str, kin: Sequence[Kin], run_id: str, artifacts: Sequence[str], *, limit: int = LENGTH
) -> str:
    """Add links to the ancestors of a run and the drawings of its cells to its description.

    Args:
        description: The description in Markdown.
        kin: The ancestors of the run, the nearest first; on the page of a model, the run itself comes first.
        run_id: The MLflow run that has the artifacts.
        artifacts: Names of the run's artifacts.
        limit: Maximum length in characters; a longer description is truncated.

    Example:
        >>> print(with_links("A run.\\n\\nMore.", [Kin("sweep", "s", "1", "ab")], "cd", ["cells/normal.svg"]))
        A run.
        <BLANKLINE>
        Of [sweep s](#/experiments/1/runs/ab).
        <BLANKLINE>
        More.
        <BLANKLINE>
        ![normal cell](get-artifact?path=cells/normal.svg&run_uuid=cd)
    """
    links = f"Of {', '.join(k.link for k in kin)}." if kin else ""
    # SVG files, because MLflow shows pictures in their original size, and the PNG files are too large.
    drawings = [name for name in artifacts if name.startswith(f"{CELLS_FOLDER}/") and name.endswith(".svg")]
    pictures = "\n\n".join(
        f"![{kind_title(PurePosixPath(name).stem)}](get-artifact?path={quote(name)}&run_uuid={run_id})"
        for name in drawings
    )
    # The first paragraph stays first, because tables show only the first paragraph of a description.
    title, _, rest = description.rstrip().partition("\n\n")
    room = limit - len(title) - len(links) - len(pictures) - 20
    if len(rest) > room:
        rest = rest[:room].rpartition("\n")[0] + "\n..."
        if rest.count("```") % 2:
            rest += "\n```"
    return "\n\n".join(part for part in (title, links, rest, pictures) if part)
