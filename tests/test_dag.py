"""The rooms of diffusers_ctrl are in a strict order: a file imports only from files above it, never from scripts around it."""

from __future__ import annotations

import ast
from importlib.util import resolve_name
from pathlib import Path

import pytest


PACKAGE = "diffusers_ctrl"
ORDER = (
    "assets",  # a leaf: any file may import it
    "processes",
    "randomness",
    "untrusted",
    "hub",
    "labels",
    "schedulers",
    "transitions",
    "heads",
    "label_encoder",
    "injection",
    "bases",
    "replay",
    "decoding",
    "conditions",
    "recording",
    "policy",
    "rollouts",
    "paths",
    "calls",
    "controls",
    "particles",
    "calibration",
    "classifiers",
    "rewards",
    "experience",
    "adjoints",
    "surrogates",
    "critics",
    "objectives",
    "adapters",
    "sampling",
    "export",
    "accuracy",
    "estimates",
    "evaluation",
    "baked",
    "cards",
    "sharing",
    "pipelines",
    "tracking",
    "checkpoints",
    "monitoring",
    "preemption",
    "config",
    "compiling",
    "trainer",
    "__init__",  # the package itself: may import all, so nothing in it may import it
)
ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path.relative_to(ROOT / PACKAGE).as_posix() for path in (ROOT / PACKAGE).rglob("*.py"))
OUTSIDE = ("training", "tests", "benchmarks")
# scripts are also found by bare name when their folder is on sys.path: `import digits_data`
OUTSIDERS = {*OUTSIDE, *(path.stem for folder in OUTSIDE for path in (ROOT / folder).glob("*.py"))}


def imported_modules(source: str, file: str) -> list[tuple[int, str]]:
    """(line, absolute dotted name) of every import in `source`, those inside functions and of single names included."""
    package = ".".join((PACKAGE, *Path(file).parent.parts))
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
    return found


def room_of(module: str) -> str:
    """`diffusers_ctrl.labels.LabelSpace` -> `labels`; `diffusers_ctrl` and `diffusers_ctrl.Policy` -> `__init__`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ORDER else "__init__"


def violations(source: str, file: str) -> list[str]:
    """What is wrong with the imports of `file`, a path inside the package: one line each, empty if all is well."""
    room = Path(file).parts[0].removesuffix(".py")
    if room not in ORDER:
        return [f"{file}: {room} is not in the order of rooms; put it into ORDER here and into the design"]
    wrong = []
    for line, module in imported_modules(source, file):
        top = module.split(".")[0]
        if top in OUTSIDERS:
            wrong.append(f"{file}:{line}: imports {module}, which is outside the package")
        elif top == PACKAGE:
            target = room_of(module)
            inside_a_folder = target == room and "/" in file
            if ORDER.index(target) >= ORDER.index(room) and not inside_a_folder:
                wrong.append(f"{file}:{line}: {room} imports {module}, but {target} is not above it")
    return wrong


@pytest.mark.parametrize("file", FILES)
def test_a_file_imports_only_from_files_above_it(file):
    assert violations((ROOT / PACKAGE / file).read_text(encoding="utf-8"), file) == []


def test_there_are_files_to_check():
    assert FILES


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("labels.py", "from .trainer import CTRLTrainer"),
        ("labels.py", "from . import trainer"),
        ("labels.py", "from diffusers_ctrl.trainer import CTRLTrainer"),
        ("labels.py", "from diffusers_ctrl import trainer"),
        ("labels.py", "import torch, diffusers_ctrl.trainer as t"),
        ("labels.py", "def f():\n    if True:\n        from .transitions import Transition"),
        ("trainer.py", "from diffusers_ctrl import Policy"),
        ("trainer.py", "import diffusers_ctrl"),
        ("trainer.py", "from . import *"),
        ("trainer.py", "from .helpers import f"),
        ("assets/__init__.py", "from ..labels import LabelSpace"),
        ("trainer.py", "import training.digits_data"),
        ("trainer.py", "from tests import problems"),
        ("__init__.py", "from benchmarks.run import main"),
        ("helpers.py", ""),
    ],
)
def test_the_checker_catches(file, source):
    assert len(violations(source, file)) == 1


def test_the_checker_lets_good_imports_pass():
    source = "import torch\nfrom . import assets\nfrom .labels import LabelSpace\ndef f():\n    import diffusers_ctrl.policy\n"
    assert violations(source, "trainer.py") == []
    assert violations("from .names import names", "assets/__init__.py") == []
    assert violations("from .trainer import CTRLTrainer\nfrom . import assets", "__init__.py") == []
