"""Fits and calibrates the classifier alone: the first stage of train_ctrl.py, with the same config and options.

    python training/train_classifier.py [--config training/configs/NAME.yaml] [--ANY_FIELD VALUE …]

Writes OUTPUT_DIR/classifier, with its accuracy, NLL and calibration error in calibration.json.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline


sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from diffusers_ctrl import processes  # noqa: E402
from likelihood import fit_classifier_into, labelled_images, write_datasets  # noqa: E402
from task import load_base, parse_arguments  # noqa: E402


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    task, config = parse_arguments(arguments)
    pipe: DiffusionPipeline = load_base(task)
    processes.make_state()  # under a launcher they share out the drawing of a base's own samples
    folders, folder = write_datasets(task, config, pipe), Path(config.output_dir) / "classifier"

    def fit() -> dict[str, Any]:
        _, saved = fit_classifier_into(folder, task, config, *labelled_images(task, pipe, folders, config.seed))
        print(
            f"{saved['seconds']:.0f} s. Written to {folder}/. Next: accelerate launch training/train_ctrl.py with the same options."
        )
        return saved["report"]

    return processes.on_main(fit)


if __name__ == "__main__":
    main()
    processes.leave()
