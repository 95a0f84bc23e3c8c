"""Writes the shipped adapters' cards anew from their own figures: in the package, and in model_cards/ with the pictures there.

    python training/render_cards.py [--check]

With --check nothing is written; the command fails if a card is not what it would write. A test does the same.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path


sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from diffusers_ctrl import assets  # noqa: E402
from diffusers_ctrl.adapters import CONFIG_NAME, read_config  # noqa: E402
from diffusers_ctrl.cards import save_card  # noqa: E402
from diffusers_ctrl.checkpoints import write_file  # noqa: E402


CARDS = Path(__file__).resolve().parents[1] / "model_cards"
ADAPTERS = ("digits-stroke",)


def rendered() -> dict[Path, str]:
    """Path -> text of every card."""
    found = {}
    for name in ADAPTERS:
        folder = assets.find(name)
        config = read_config(folder)
        with tempfile.TemporaryDirectory() as temporary:
            found[folder / "README.md"] = save_card(temporary, config).read_text()
            pictures = {"samples.png": f"{name}.png", "confusion.png": f"{name}-confusion.png"}
            for picture, beside in pictures.items():
                if (CARDS / beside).is_file():
                    Path(temporary, picture).touch()
            text = save_card(temporary, config).read_text()
        for picture, beside in pictures.items():
            text = text.replace(f"({picture})", f"({beside})")
        found[CARDS / f"{name}.md"] = text
    return found


def stale() -> list[Path]:
    """The cards that are not what would be written."""
    return [path for path, text in rendered().items() if not path.is_file() or path.read_text() != text]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a card is not current")
    if parser.parse_args().check:
        if old := stale():
            sys.exit(
                f"Not current: {', '.join(map(str, old))}. Run python training/render_cards.py ({CONFIG_NAME} has changed, or the template)."
            )
        return
    for path, text in rendered().items():
        write_file(path, text)
        print(path)


if __name__ == "__main__":
    main()
