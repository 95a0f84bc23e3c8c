"""A user's Python process: HF_ENDPOINT set, its own empty HF_HOME, everything imported once; it runs what the tests tell it, line by line.

A separate process because huggingface_hub reads HF_ENDPOINT and HF_HUB_OFFLINE when it is imported.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[1]
TOKEN, OTHER = "hf_ownersecret1234567890", "hf_othersecret0987654321"
BASE, ADAPTER = "user/tiny-sd", "user/tiny-stroke"
SNIPPET = """
import torch
from diffusers_ctrl import CTRLPipeline
def draw(pipe, label="bold", **kwargs):
    pipe.set_progress_bar_config(disable=True)
    images = pipe("seven", label=label, generator=torch.Generator().manual_seed(3), output_type="pt", **kwargs).images
    return images.numpy().tobytes().hex()
"""


@dataclass(frozen=True)
class Raised:
    """kinds: names of the exception's class and its bases. text: the whole traceback and whatever was printed or logged before it."""

    kinds: list[str]
    message: str
    text: str


def environment(url: str, home: Path, **extra: str) -> dict[str, str]:
    """A user's environment: of the Hub's variables only these, and no token that this machine happens to have."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE", "HUGGINGFACE", "PYTHONPATH"))}
    kept |= {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | extra


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


class Client:
    """`client("result = 1 + a", a=2)` -> 3. Names stay between calls, as in a notebook; what is raised comes back as `Raised`."""

    def __init__(self, url: str, home: Path, **extra: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(url, home, **extra),
        )

    def __call__(self, code: str, **names: Any) -> Any:
        self.process.stdin.write(json.dumps({"code": code, "names": names}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        self.text = answer["text"]
        return answer["result"] if "result" in answer else Raised(answer["kinds"], answer["message"], answer["text"])

    def ok(self, code: str, **names: Any) -> Any:
        """The same, for code that must not raise."""
        result = self(code, **names)
        assert not isinstance(result, Raised), result.text
        return result

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def _shorten_sleeps() -> None:
    """The Hub's client waits 1, 2, 4, 8, 8 seconds between its own attempts: the attempts stay, the waits do not."""
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(min(seconds, 0.01))


def main() -> None:
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        import torch

        torch.set_num_threads(1)
        _shorten_sleeps()
        names: dict[str, Any] = {}
        for line in sys.stdin:
            request = json.loads(line)
            said.seek(0)
            said.truncate()
            names.update(request["names"], result=None)
            try:
                exec(request["code"], names)
                answer = {"result": names["result"], "text": said.getvalue()}
            except Exception as error:
                kinds = [kind.__name__ for kind in type(error).__mro__]
                answer = {"kinds": kinds, "message": str(error), "text": said.getvalue() + traceback.format_exc()}
            print(json.dumps(answer), file=channel, flush=True)


if __name__ == "__main__":
    main()
