"""What a person sees of a run while it goes on: trackers, pictures in them, the progress bar's format, and log lines with their process."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType
from PIL import Image


PACKAGES = {"comet_ml": "comet-ml"}  # where pip has another name than accelerate
BAR = "{desc} {n_fmt}/{total_fmt} |{bar:10}| {elapsed}<{remaining}{postfix}"  # {remaining} is the time to the end


def tracker_names(report_to: str) -> list[str]:
    """The trackers of a `report_to` setting: 'none', one, or several with commas between them.

    Raises:
        ValueError: for a name that accelerate does not know, or a tracker whose package is not installed (accelerate itself would go on
            without it).
    """
    if report_to == "none":
        return []
    names = [name.strip() for name in report_to.split(",")]
    known = sorted(set(LOGGER_TYPE_TO_CLASS) | {str(kind) for kind in LoggerType if str(kind) != "all"})
    available = {str(kind) for kind in get_available_trackers()} | (set(LOGGER_TYPE_TO_CLASS) - {str(kind) for kind in LoggerType})
    for name in names:
        if name not in known:
            raise ValueError(f"report_to has no tracker {name!r}: use none, or one or more of {', '.join(known)}.")
        if name not in available:
            raise ValueError(
                f"report_to is {report_to!r}, and {name} is not installed: pip install {PACKAGES.get(name, name)}, or choose another "
                "tracker, or none."
            )
    return list(dict.fromkeys(names))


def log_picture(accelerator: Accelerator, name: str, path: Path, step: int) -> None:
    """Gives an image file to every tracker that takes pictures (tensorboard and W&B do)."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))[None]
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            tracker.log_images({name: pixels}, step=step, **({"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}))


def finish_trackers(accelerator: Accelerator) -> None:
    """Ends what is written to trackers. `Accelerator.end_training` would also end the group of processes, which have the evaluation to share."""
    for tracker in accelerator.trackers:
        tracker.finish()


def number_log_lines(accelerator: Accelerator) -> None:
    """Where there are several processes, makes each line of the log and each warning say which it is from: `[process 2 of 4]`."""
    if accelerator.num_processes > 1:
        place = f"[process {accelerator.process_index + 1} of {accelerator.num_processes}]"
        logging.basicConfig(format=f"%(asctime)s {place} %(levelname)s %(name)s: %(message)s", level=logging.WARNING, force=True)
        logging.captureWarnings(True)
