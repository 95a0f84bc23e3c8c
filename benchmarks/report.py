"""Renders results/ into the tables and figures of benchmarks/README.md and of the README.

    python benchmarks/report.py [--check]

Between `<!-- NAME -->` and `<!-- /NAME -->` stands what `SECTIONS[NAME]` of report_tables.py makes of the JSON files; the rest is written by hand.
--check says whether the files are as they would be rendered, and writes nothing.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from diffusers_ctrl.checkpoints import write_file  # noqa: E402
from records import RESULTS  # noqa: E402
from report_figures import FIGURES  # noqa: E402
from report_tables import SECTIONS  # noqa: E402


PAGES = (ROOT / "benchmarks" / "README.md", ROOT / "README.md")


def rendered(page: str) -> str:
    """The page with its sections made anew."""

    def section(found: re.Match[str]) -> str:
        name = found.group(1)
        return f"<!-- {name} -->\n{SECTIONS[name]()}\n<!-- /{name} -->" if name in SECTIONS else found.group(0)

    return re.sub(r"<!-- ([\w-]+) -->\n.*?<!-- /\1 -->", section, page, flags=re.DOTALL)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(arguments)
    for path in PAGES:
        before = path.read_text(encoding="utf-8")
        after = rendered(before)
        if args.check and after != before:
            raise SystemExit(f"{path.relative_to(ROOT)} is not what its results say: run python benchmarks/report.py.")
        if not args.check:
            write_file(path, after)
            print(path.relative_to(ROOT))
    for name, plot in FIGURES.items() if not args.check else ():
        if (RESULTS / name).is_dir():
            plot(RESULTS / f"{name}.png")


if __name__ == "__main__":
    main()
