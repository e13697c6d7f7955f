"""Known vulnerabilities of the releases in constraints.txt (`make audit`); exit code 1 if one is not accepted.

pip-audit asks a public database. Where none can be reached, this says that nothing was audited, and is no failure.
What is accepted stands in audit_accepted.toml, with the reason and a day on which to look again.
"""

import argparse
import datetime
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
CONSTRAINTS = FOLDER.parent / "constraints.txt"
ACCEPTED = FOLDER / "audit_accepted.toml"
PROBE = "requests"  # asked first: where even it is unknown, there is no database

Report = list[dict[str, Any]]  # pip-audit's "dependencies"


def audit(pins: list[str], options: list[str]) -> Report | None:
    """pip-audit's report of some releases; None if the database can't be asked."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(pins) + "\n")
        file.flush()
        command = [
            sys.executable,
            "-m",
            "pip_audit",
            "--disable-pip",
            "--no-deps",
            "--progress-spinner",
            "off",
        ]
        command += ["--format", "json", "--desc", "off", "--requirement", file.name, *options]
        done = subprocess.run(command, capture_output=True, text=True)
    try:
        report: Report = json.loads(done.stdout)["dependencies"]
    except ValueError:
        return None
    return report


def database(pins: list[str], osv_url: str | None) -> list[str] | None:
    """The options for the first database that answers and knows `PROBE`; None if none does."""
    probe = [pin for pin in pins if pin.startswith(f"{PROBE}==")]
    osv = ["--vulnerability-service", "osv", *(["--osv-url", osv_url] if osv_url else [])]
    for options in [osv] if osv_url else [["--vulnerability-service", "pypi"], osv]:
        report = audit(probe, options)
        if report and "vulns" in report[0]:
            return options
    return None


def judged(
    report: Report, accepted: dict[str, dict[str, Any]], today: datetime.date
) -> tuple[list[str], bool]:
    """Lines for people, and whether something must be done.

    Args:
        report: of pip-audit.
        accepted: identifier -> {"reason": text, "until": date}.
        today: accepted findings count again from their day on.
    """
    lines, bad = [], False
    for package in report:
        for found in package.get("vulns", []):
            names = [found["id"], *found.get("aliases", [])]
            known = next((accepted[name] for name in names if name in accepted), None)
            fixed = ", ".join(found.get("fix_versions", [])) or "none"
            line = f"{package['name']} {package['version']}: {' '.join(names)}; fixed in: {fixed}"
            if known is not None and today < known["until"]:
                lines.append(f"accepted until {known['until']}: {line}: {known['reason']}")
            else:
                bad = True
                lines.append(f"found: {line}{'; was accepted until ' + str(known['until']) if known else ''}")
    skipped = [package["name"] for package in report if "vulns" not in package]
    if skipped:
        lines.append(f"not audited, unknown to the database: {', '.join(skipped)}")
    lines.append(f"{len(report) - len(skipped)} of {len(report)} releases audited")
    return lines, bad


def main() -> int:
    """Audit, say what was found; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--constraints", type=Path, default=CONSTRAINTS)
    parser.add_argument("--accepted", type=Path, default=ACCEPTED)
    parser.add_argument("--osv-url", help="of another database that speaks OSV's protocol")
    arguments = parser.parse_args()
    accepted = tomllib.loads(arguments.accepted.read_text())
    pins = re.findall(r"^[\w.-]+==\S+", arguments.constraints.read_text(), re.MULTILINE)
    if importlib.util.find_spec("pip_audit") is None:
        print("audit: pip-audit is not installed: make .venv")
        return 1
    options = database(pins, arguments.osv_url)
    report = None if options is None else audit(pins, options)
    if report is None:
        print(f"audit: NOT DONE: no vulnerability database answers; nothing is known of {len(pins)} releases")
        return 0
    lines, bad = judged(report, accepted, datetime.date.today())
    for line in lines:
        print(f"audit: {line}")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
