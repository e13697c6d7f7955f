"""How MLflow's pages lead from one run to another: what a run belongs to, as tags and as links in its description."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote

from pipeline.runs.layout import CELL_FIGURES

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PARENT = "mlflow.parentRunId"
DESCRIPTION = "mlflow.note.content"
LENGTH = 5000  # characters: the model registry's columns are no wider
# As SVG, because MLflow's pages show a picture in its own size, and a PNG's pixels are many.
PICTURES = {CELL_FIGURES[0]: "normal cell", CELL_FIGURES[2]: "reduction cell"}


@dataclass(frozen=True)
class Kin:
    """A run as another one's page links to it.

    Args:
        kind: "search", "retrain" or "sweep".
        name: of the run.
        experiment_id, run_id: MLflow's.
    """

    kind: str
    name: str
    experiment_id: str
    run_id: str

    @property
    def link(self) -> str:
        """A Markdown link that MLflow's pages follow, wherever they are served.

        Example:
            >>> Kin("search", "digits-search", "1", "ab").link
            '[search digits-search](#/experiments/1/runs/ab)'
        """
        kind = {"retrain": "retraining"}.get(self.kind, self.kind)
        name = "".join(f"\\{c}" if c in r"\[]*_`<>" else c for c in self.name)
        return f"[{kind} {name}](#/experiments/{self.experiment_id}/runs/{self.run_id})"


def kin_of(run: "Run") -> Kin:
    """A run of this store, for links to it."""
    info, tags = run.info, run.data.tags
    return Kin(tags.get("istanas.kind", "run"), info.run_name or "", info.experiment_id, info.run_id)


def ancestors(client: "MlflowClient", parent_id: str | None) -> tuple[Kin, ...]:
    """The runs that a run belongs to, the nearest first: of a retraining its search, and the sweep of that.

    Args:
        client: of the store.
        parent_id: the run's parent, or None.
    """
    from mlflow.exceptions import MlflowException

    line: list[Kin] = []
    while parent_id is not None and parent_id not in {kin.run_id for kin in line}:  # tags can be edited
        try:
            run = client.get_run(parent_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            break  # it was deleted for good
        line.append(kin_of(run))
        parent_id = run.data.tags.get(PARENT)
    return tuple(line)


def lineage_tags(kin: Sequence[Kin]) -> dict[str, str]:
    """Tags to find a run by, from what it belongs to.

    Example:
        >>> lineage_tags([Kin("search", "a", "1", "ab"), Kin("sweep", "b", "1", "cd")])
        {'istanas.search_run': 'ab', 'istanas.sweep_run': 'cd'}
    """
    return {f"istanas.{k.kind}_run": k.run_id for k in kin}


def with_links(
    description: str, kin: Sequence[Kin], run_id: str, artifacts: Sequence[str], *, limit: int = LENGTH
) -> str:
    """A description with the runs that a run belongs to and the pictures of its cells, fit for MLflow's columns.

    Args:
        description: as the functions above give it.
        kin: what the run belongs to, the nearest first; on a model's page the run itself first.
        run_id: the MLflow run that holds the artifacts.
        artifacts: names of the run's artifacts.
        limit: characters; what is above is cut off the description.

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
    pictures = "\n\n".join(
        f"![{PICTURES[name]}](get-artifact?path={quote(name)}&run_uuid={run_id})"
        for name in artifacts
        if name in PICTURES
    )
    # The first paragraph stays first: tables show no more of a description.
    title, _, rest = description.rstrip().partition("\n\n")
    room = limit - len(title) - len(links) - len(pictures) - 20
    if len(rest) > room:
        rest = rest[:room].rpartition("\n")[0] + "\n..."
        if rest.count("```") % 2:
            rest += "\n```"
    return "\n\n".join(part for part in (title, links, rest, pictures) if part)
