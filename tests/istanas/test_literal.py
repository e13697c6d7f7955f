"""The text form of a genotype is parsed as a literal and never evaluated. Errors are one line."""

from pathlib import Path

import pytest

from istanas.errors import GenotypeError
from istanas.limits import GENOTYPE_TEXT_BYTES
from istanas.space import PUBLISHED, Genotype, genotype_from_text

PICKS = "[('skip_connect', 0), ('sep_conv_3x3', 1)]"
GOOD = f"Genotype(normal={PICKS}, normal_concat=range(2, 3), reduce={PICKS}, reduce_concat=[2])"


def written(genotype: Genotype) -> str:
    """Return a genotype as the published code prints it."""
    cells = {cell: [pick for node in genotype.picks(cell) for pick in node] for cell in ("normal", "reduce")}
    parts = [f"{cell}={picks}, {cell}_concat=range(2, 6)" for cell, picks in cells.items()]
    return f"Genotype({', '.join(parts)})"


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_printed_form_of_a_published_cell_reads_back(name: str) -> None:
    assert genotype_from_text(written(PUBLISHED[name])) == PUBLISHED[name]


def test_positional_arguments_stand_in_the_order_of_darts() -> None:
    assert genotype_from_text(f"Genotype({PICKS}, range(2, 3), {PICKS}, [2])") == genotype_from_text(GOOD)


@pytest.mark.parametrize(
    "before", ["# found on CIFAR-10\n\n  # in 2019\n", "\ufeff", "DARTS_V2 = genotypes.", "\n# x\nbest = "]
)
def test_what_files_have_before_a_genotype_is_passed_over(before: str) -> None:
    assert genotype_from_text(before + GOOD) == genotype_from_text(GOOD)


def test_json_is_read_as_before() -> None:
    genotype = PUBLISHED["ISTA_twostage"]
    assert genotype_from_text(genotype.to_json()) == genotype
    with pytest.raises(GenotypeError, match="not JSON"):
        genotype_from_text("normal=[]")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            GOOD.replace("'skip_connect'", "__import__('os').system('touch {here}')"),
            "genotype.normal: not a list of",
        ),
        (GOOD.replace("[2]", "[2 for _ in open('{here}', 'w')]"), "reduce_concat"),
        (GOOD.replace("range(2, 3)", "range(open('{here}', 'w'))"), "genotype.normal_concat: not an integer"),
        (GOOD.replace("range(2, 3)", "list(open('{here}', 'w'))"), "neither a list of states nor a range"),
        (GOOD + "\nopen('{here}', 'w')", "more than one"),
        (GOOD + ".touch('{here}')", "more than one"),
        (GOOD.replace("range(2, 3)", "range(2, 10**9)"), "not an integer"),
        (GOOD.replace("range(2, 3)", "range(2, 1000000000)"), "more than 34 states"),
        (GOOD.replace("range(2, 3)", f"range({'9' * 4000})"), "more than 34 states"),
        (GOOD.replace("range(2, 3)", "range(3, 2)"), "genotype.normal_concat: no states"),
        (GOOD.replace("range(2, 3)", "range(True, 3)"), "not an integer"),
        (GOOD.replace("range(2, 3)", "range(2, 3, 0)"), "neither a list"),
        (GOOD.replace("[2]", "[-1]"), "not an integer"),
        (GOOD.replace("skip_connect", "none"), "'none' is not a registered operation"),
        (GOOD.replace("('skip_connect', 0), ", ""), "1 inputs are odd or too many; give 2 for each node"),
        (GOOD.replace("('skip_connect', 0)", "('skip_connect', 0.0)"), "not an integer"),
        (GOOD.replace("('skip_connect', 0)", "*[]"), "genotype.normal: not a list of"),
        (GOOD.replace("reduce_concat", "more"), "'more' is unknown"),
        (GOOD.replace("Genotype(", "Genotype(**{}, "), "None is unknown"),
        (GOOD.replace(", reduce_concat=[2]", ""), "genotype.reduce_concat: missing"),
        (f"Genotype({PICKS}, normal={PICKS})", "'normal' is unknown or given twice"),
        ("Genotype(1, 2, 3, 4, 5)", "5 values are too many"),
        ("Genotype(", "not a valid"),
        ("Genotype(" + "(" * 5000, "not a valid"),
        ("Genotype(" + "-" * 50_000 + "1)", "not a valid"),
        ("Genotype(" + "a." * 20_000 + "a)", ""),
        ("Genotype(" + "9" * 20_000 + ")", "not a valid"),
        ("Genotype(\0)", "not a valid"),
        (GOOD + " " * GENOTYPE_TEXT_BYTES, "larger than"),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else None,
)
def test_what_is_no_literal_is_refused_unevaluated(text: str, says: str, tmp_path: Path) -> None:
    here = tmp_path / "evaluated"
    with pytest.raises(GenotypeError) as caught:
        genotype_from_text(text.replace("{here}", str(here)))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not here.exists()
