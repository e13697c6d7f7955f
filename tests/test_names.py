"""Names of tests, which must be short enough for a report; a docstring adds what does not fit."""

import ast
from pathlib import Path

LONGEST = 70


def test_names_of_tests_have_at_most_70_characters(repo_root: Path) -> None:
    files = sorted((repo_root / "tests").rglob("*.py"))
    assert len(files) > 100
    names = [
        f"{file.relative_to(repo_root)}: {node.name}"
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if node.name.startswith("test_") and len(node.name) > LONGEST
    ]
    assert names == [], f"shorten to {LONGEST} characters, and say the rest in a docstring"
