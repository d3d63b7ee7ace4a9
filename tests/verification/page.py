"""`python -m tests.verification.page soak.json docs/guarantees.md` puts what a soak has done into the page about it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- soak: begin -->", "<!-- soak: end -->"


def summary(report: dict[str, Any]) -> str:
    """The report as Markdown: a paragraph and a table."""
    held = "no invariant was violated" if not report["broken_rounds"] else f"{report['broken_rounds']} rounds failed"
    text = (
        f"The last soak ran for {report['seconds'] / 60:.0f} minutes with seed {report['seed']}: "
        f"{report['injected_total']:,} faults in {report['rounds']} rounds, with {report['tasks']:,} tasks; {held}. "
        f"After the last fault of a round, everything had come to its end within {report['heal_seconds_most']:.0f} s "
        "at most."
    )
    lines = [
        text,
        "",
        "| Fault | Injected |",
        "| --- | ---: |",
        *(f"| {name} | {count:,} |" for name, count in report["injected"].items()),
    ]
    lines += [f"\nNot injected: {name}, as {reason}." for name, reason in report["skipped"].items()]
    return "\n".join(lines)


def main() -> None:
    """Replace what is between the two marks."""
    report = json.loads(Path(sys.argv[1]).read_text())
    page = Path(sys.argv[2])
    replaced, count = re.subn(
        f"{re.escape(BEGIN)}.*{re.escape(END)}",
        lambda _: f"{BEGIN}\n\n{summary(report)}\n\n{END}",
        page.read_text(),
        flags=re.DOTALL,
    )
    if count != 1:
        sys.exit(f"{page} does not have {BEGIN} and {END}, once each")
    page.write_text(replaced)


if __name__ == "__main__":
    main()
