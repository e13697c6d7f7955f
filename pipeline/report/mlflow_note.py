"""Descriptions of runs for MLflow, in Markdown: results, genotype, and the command that repeats the run."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from istanas.space import Genotype
from pipeline.base.text import count, duration, percent, shown_value
from pipeline.config.plugins import plugin_options
from pipeline.report.terminal import effects_lines, validation_note
from pipeline.runs.layout import CONFIG_FILE, GENOTYPE_FILE

_SPLITS = {"test": "test", "valid": "validation"}
_VALIDATION = {"valid": "validation"}


def of_search(method: str, dataset: str, epochs: int, result: Mapping[str, Any], genotype: Genotype) -> str:
    """Describe a search that does not train the network that it finds.

    Args:
        method: The search method.
        dataset: The name of the data set.
        epochs: The number of epochs.
        result: The result, see `pipeline.jobs.results`.
        genotype: The genotype that it found.
    """
    title, more = _headline(result, _VALIDATION), _note(result, "search", method)
    if "effects" in result:
        effects = result["effects"]
        title = f"{effects['certain']} of {count(effects['choices'], 'choice')} certain: "
        more = "\n".join(f"- {line}" for line in effects_lines(effects))
    return _page(
        f"{title}{_words(method)} search on {dataset}, {count(epochs, 'epoch')}.",
        [*_tops(result, _VALIDATION), *_common(result)],
        genotype,
        again=f"istanas search --config {CONFIG_FILE}",
        more=more,
    )


def of_trained_search(
    method: str, dataset: str, epochs: int, result: Mapping[str, Any], genotype: Genotype
) -> str:
    """Describe a search that also trained its network. If its nodes froze, a table has the epochs.

    Args:
        method, dataset, epochs, result, genotype: As in `of_search`.
    """
    length, figures, table = count(epochs, "epoch"), [*_tops(result), *_common(result)], ""
    if "frozen" in result:
        frozen = sorted(result["frozen"], key=lambda f: (f["cell"], f["node"]))
        nodes = [(f"{f['cell']} {f['node']}", str(f["epoch"]), f["reason"]) for f in frozen]
        table = _table(("node", "frozen after epoch", "reason"), nodes)
        figures.append(("architectures rejected by limits", str(result["rejected"])))
        length = f"{count(result['search_epochs'], 'epoch')} of search, {result['train_epochs']} of training"
    return _page(
        f"{_headline(result)}{_words(method)} search on {dataset}, {length}.",
        figures,
        genotype,
        again=f"istanas search --config {CONFIG_FILE}",
        more="\n\n".join(filter(None, [table, _note(result, "search", method)])),
    )


def of_retraining(
    dataset: str, epochs: int, result: Mapping[str, Any], genotype: Genotype, origin: str | None = None
) -> str:
    """Describe a retraining.

    Args:
        dataset, epochs, result, genotype: As in `of_search`.
        origin: The source of the genotype, if it is not the parent run.
    """
    return _page(
        f"{_headline(result)}retraining on {dataset}, {count(epochs, 'epoch')}.",
        [*_tops(result), *_common(result), *([("genotype from", f"`{origin}`")] if origin else [])],
        genotype,
        again=f"istanas retrain --genotype {GENOTYPE_FILE} --config {CONFIG_FILE}",
        more=_note(result, "retrain", ""),
    )


def of_sweep(
    dataset: str,
    space: Mapping[str, str],
    result: Mapping[str, Any],
    genotype: Genotype,
    files: Sequence[str],
) -> str:
    """Describe a sweep.

    Args:
        dataset: The name of the data set.
        space: Key -> its values, as text.
        result: The result, see `pipeline.jobs.results`.
        genotype: The genotype of the best trial.
        files: Files that show all trials.
    """
    rows = []
    if "valid_top1" in result:
        rows.append(("top-1 in search", percent(result["valid_top1"])))
    if "retrained_top1" in result:
        if rows:
            tau = result["kendall_tau"]
            shown = "not defined" if tau is None else f"{tau:.2f}"
            rows.append(("Kendall's tau between search and retraining", shown))
        rows.append(("top-1 on the hold-out after retraining", percent(result["retrained_top1"])))
    best = result["settings"]
    settings = [(key, text, shown_value(best[key]) if key in best else "") for key, text in space.items()]
    shown_in = ", ".join(f"`{file}`" for file in files)
    return _page(
        f"{rows[-1][1]} top-1 by trial {result['best_trial']}: sweep on {dataset}, {count(result['trials'], 'trial')}, "
        f"{result['complete']} finished, {result['pruned']} stopped early, {result['failed']} failed; "
        f"{count(result['epochs'], 'epoch')}.",
        [*rows, *_common(result, time="time of all searches")],
        genotype,
        again=f"istanas sweep --config {CONFIG_FILE}",
        more=f"{_table(('key', 'search space', 'best value'), settings)}\n\nAll trials: {shown_in}.",
    )


def of_benchmark(dataset: str, result: Mapping[str, Any]) -> str:
    """Describe a benchmark.

    Args:
        dataset: The name of the data set.
        result: The result, see `pipeline.jobs.benchmark`.
    """
    from pipeline.report.benchmark_page import methods_table, table_note

    searches = f"{len(result['runs'])} searches"
    return _of_methods(
        f"Benchmark on {dataset}: {searches} of {', '.join(m['method'] for m in result['methods'])}.",
        methods_table(result),
        [table_note(result)],
        result["sentences"],
    )


def of_rank(dataset: str, result: Mapping[str, Any]) -> str:
    """Describe a comparison of judges.

    Args:
        dataset: The name of the data set.
        result: The result, see `pipeline.jobs.rank`.
    """
    from pipeline.report.rank_page import judges_note, judges_table

    return "\n\n".join(
        [
            f"How well cheap measurements rank cells on {dataset}.",
            _table(*judges_table(result)),
            judges_note(result),
            *result["sentences"],
        ]
    )


def of_versus(dataset: str, result: Mapping[str, Any]) -> str:
    """Describe a comparison at equal cost.

    Args:
        dataset: The name of the data set.
        result: The result, see `pipeline.jobs.versus`.
    """
    from pipeline.report.versus_page import NOTE, methods_table

    first, *others = (method["method"] for method in result["methods"])
    return _of_methods(
        f"{first} against {', '.join(others)} on {dataset} at equal cost, "
        f"{count(result['methods'][0]['seeds'], 'seed')}.",
        methods_table(result),
        [NOTE, *result["cost_sentences"]],
        result["sentences"],
    )


def _of_methods(
    title: str,
    table: tuple[Sequence[str], Sequence[Sequence[str]]],
    notes: Sequence[str],
    sentences: Sequence[str],
) -> str:
    comparisons = "\n".join(f"- {sentence}" for sentence in sentences)
    return "\n\n".join([title, _table(*table), *notes, comparisons])


def _page(
    title: str, figures: Sequence[tuple[str, str]], genotype: Genotype, *, again: str, more: str = ""
) -> str:
    named = [("genotype", f"`{genotype.reference}`")] if genotype.reference is not None else []
    parts = [
        title,
        "\n".join(f"- {label}: {value}" for label, value in [*figures, *named]),
        f"```\n{genotype}\n```",
        more,
        f"To repeat this run with its files: `{' '.join([again, *map(shlex.quote, plugin_options())])}`",
    ]
    return "\n\n".join(part for part in parts if part)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _tops(result: Mapping[str, Any], splits: Mapping[str, str] = _SPLITS) -> list[tuple[str, str]]:
    keys = [(f"{split}_top{k}", f"{name} top-{k}") for split, name in splits.items() for k in (1, 5)]
    return [(label, percent(result[key])) for key, label in keys if key in result]


def _note(result: Mapping[str, Any], kind: str, method: str) -> str:
    return validation_note(kind, method) if "valid_top1" in result else ""


def _common(result: Mapping[str, Any], time: str = "time") -> list[tuple[str, str]]:
    return [
        ("parameters", f"{result['params']:,}"),
        ("multiply-adds", f"{result['macs']:,}"),
        (time, duration(result["seconds"])),
        ("digest", f"`{result['digest'][:12]}`"),
        *([("halvings of the learning rate", str(result["rollbacks"]))] if "rollbacks" in result else []),
    ]


def _words(method: str) -> str:
    """Return a method's name in running text."""
    return method.replace("_", "-")


def _headline(result: Mapping[str, Any], splits: Mapping[str, str] = _SPLITS) -> str:
    """Return the accuracies, which come first because MLflow's tables truncate descriptions."""
    measured = [
        (result[f"{split}_top1"], name) for split, name in splits.items() if f"{split}_top1" in result
    ]
    tops = ", ".join(f"{percent(top)} {name} top-1" for top, name in measured)
    return f"{tops}: " if tops else "Not measured: "
