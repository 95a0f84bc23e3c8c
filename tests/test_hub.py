"""Adapters over HTTP: the unmodified huggingface_hub client in a process of its own against the loopback Hub."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from hub_client import ADAPTER, BASE, OTHER, SNIPPET, TOKEN, Raised, contents, environment

from diffusers_ctrl import CTRLPipeline
from diffusers_ctrl.adapters import ADAPTER_FILES, load_adapter, save_adapter
from diffusers_ctrl.cards import save_card
from diffusers_ctrl.sharing import push_adapter


def draw(pipe, label="bold"):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    return pipe("seven", label=label, generator=generator, output_type="pt").images.numpy().tobytes().hex()


@pytest.fixture(scope="module")
def expected(sd_folder, sd_adapter):
    return draw(CTRLPipeline.from_pretrained(sd_folder, adapter=sd_adapter))


# -- the loopback Hub itself, with the plain client --


def test_the_plain_client_creates_uploads_lists_and_downloads(hub, client, tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "deep" / "b.safetensors").write_bytes(os.urandom(10_000))  # LFS, in three parts
    (tmp_path / "c.safetensors").write_bytes(os.urandom(1_000))  # LFS, in one
    before = len(hub.requests)
    result = client.ok(
        """
from huggingface_hub import HfApi, snapshot_download, hf_hub_download
api = HfApi(token=token)
api.create_repo("user/plain"); api.create_repo("user/plain", exist_ok=True)
api.upload_folder(repo_id="user/plain", folder_path=folder)
first = api.model_info("user/plain").sha
again = api.upload_file(repo_id="user/plain", path_or_fileobj=b"{}", path_in_repo="a.json").oid
api.create_branch("user/plain", branch="dev"); api.create_tag("user/plain", tag="v1")
api.upload_file(repo_id="user/plain", path_or_fileobj=b"[]", path_in_repo="a.json", revision="dev")
pr = api.upload_file(repo_id="user/plain", path_or_fileobj=b"pr", path_in_repo="a.json", create_pr=True).pr_url
api.delete_file("c.safetensors", "user/plain", revision="dev")
here = snapshot_download("user/plain")
result = {
    "user": api.whoami()["name"], "noop": first == again, "pr": pr,
    "main": sorted(api.list_repo_files("user/plain")), "dev": sorted(api.list_repo_files("user/plain", revision="dev")),
    "snapshot": here, "dev a": open(hf_hub_download("user/plain", "a.json", revision="dev")).read(),
    "v1 a": open(hf_hub_download("user/plain", "a.json", revision="v1")).read(),
}
""",
        token=TOKEN,
        folder=str(tmp_path),
    )
    assert result["user"] == "user" and result["noop"] and result["pr"].endswith("/user/plain/discussions/1")
    assert result["main"] == [".gitattributes", "a.json", "c.safetensors", "deep/b.safetensors"]
    assert result["dev"] == [".gitattributes", "a.json", "deep/b.safetensors"]
    assert (result["dev a"], result["v1 a"]) == ("[]", "{}")
    snapshot = contents(result["snapshot"])
    snapshot.pop(".gitattributes")
    assert snapshot == contents(tmp_path) and hub.repos["user/plain"].at("main").files["c.safetensors"].lfs
    log = hub.requests[before:]
    assert sum("/part/" in line for line in log) == 3 and any(line.endswith("/complete") for line in log)


def test_etags_ranges_and_not_modified(hub, sd_folder):
    url = f"{hub.url}/{BASE}/resolve/main/model_index.json"

    def get(**headers):
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
                return answer.status, dict(answer.headers), answer.read()
        except urllib.error.HTTPError as error:
            return error.code, dict(error.headers), error.read()

    data = (sd_folder / "model_index.json").read_bytes()
    status, headers, body = get()
    assert (status, body) == (200, data) and headers["X-Repo-Commit"] == hub.repos[BASE].refs["main"]
    status, again, body = get(**{"If-None-Match": headers["ETag"]})
    assert (status, body, again["ETag"]) == (304, b"", headers["ETag"])
    status, part, body = get(Range="bytes=5-9")
    assert (status, body, part["Content-Range"]) == (206, data[5:10], f"bytes 5-9/{len(data)}")
    assert get(Range="bytes=999999-")[0] == 416


def test_the_server_alone_as_a_user_starts_it(tmp_path):
    command = [sys.executable, str(Path(__file__).with_name("hub_server.py")), "--token", "hf_x=me"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = server.stdout.readline().strip()
            request = urllib.request.Request(f"{url}/api/whoami-v2", headers={"Authorization": "Bearer hf_x"})
            with urllib.request.urlopen(request) as answer:
                assert json.load(answer)["name"] == "me"
        finally:
            server.terminate()


# -- the round trip --


def test_what_is_pushed(hub, pushed, trained):
    files = hub.files(pushed)
    assert set(files) == {*ADAPTER_FILES, "README.md", "metrics.json", "samples.png", ".gitattributes"}
    assert {name: (trained / name).read_bytes() for name in files if name != ".gitattributes"} == {
        name: data for name, data in files.items() if name != ".gitattributes"
    }
    assert len(hub.repos[pushed].commits) == 2  # the Hub's own first one, and one for the adapter


def test_a_new_users_first_image(hub, pushed, expected, tmp_path):
    """From an empty cache, in a new process, with nothing but the adapter's name; and how long that takes."""
    code = SNIPPET + f"import sys; sys.stdout.write(draw(CTRLPipeline.from_pretrained({ADAPTER!r})))"
    used = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], env=environment(hub.url, tmp_path / "home"), capture_output=True, text=True)
    seconds, used = time.monotonic() - started, sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - used
    assert done.returncode == 0, done.stderr[-2000:]
    print(f"a new user's first image: {seconds:.1f} s, of which {used:.1f} s of processor time")
    assert done.stdout == expected
    assert used < 30  # 15 s of two processors, whatever else the machine does meanwhile


def test_only_the_adapters_files_are_fetched(hub, client, pushed):
    hub.write(pushed, {"pytorch_model.bin": b"\x80a pickle", "run.py": b"raise SystemExit", "extra/x.safetensors": b"x"}, "main")
    before = len(hub.requests)
    client.ok("result = draw(CTRLPipeline.from_pretrained(repo))", repo=pushed)
    fetched = " ".join(line for line in hub.requests[before:] if "/resolve/" in line and ADAPTER in line)
    assert "ctrl_config.json" in fetched
    assert not [name for name in ("/pytorch_model.bin", "run.py", "extra/", "README", ".png") if name in fetched], fetched


def test_ways_to_name_it(hub, client, pushed, expected, sd_folder):
    for code in (
        "CTRLPipeline.from_pretrained(repo)",
        "CTRLPipeline.from_pretrained(base, adapter=repo)",
        "CTRLPipeline.from_pretrained(folder, adapter=repo)",
        "CTRLPipeline.from_pretrained(base); pipe.load_ctrl_adapter(repo)",
    ):
        assert client.ok(f"pipe = {code}; result = draw(pipe)", repo=pushed, base=BASE, folder=str(sd_folder)) == expected, code


def test_the_base_comes_at_the_revision_that_the_adapter_names(hub, client, pushed, expected, sd_folder):
    unet = bytearray((sd_folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes())
    unet[-400:] = bytes(400)
    hub.write(BASE, {"unet/diffusion_pytorch_model.safetensors": bytes(unet)})  # main moves on, with other weights
    code = "result = draw(CTRLPipeline.from_pretrained(name, adapter=adapter))"
    assert client.ok(code, name=pushed, adapter=None) == expected
    assert client.ok(code, name=BASE, adapter=pushed) != expected


def test_revision_subfolder_and_cache_dir(hub, client, pushed, expected, trained, tmp_path):
    weaker = load_adapter(trained)
    save_adapter(tmp_path / "weak", replace(weaker, lora={key: value * 0 for key, value in weaker.lora.items()}))
    push = "from diffusers_ctrl.sharing import push_adapter; result = push_adapter(folder, repo, token=token, **more)"
    for more in ({"revision": "weak"}, {"subfolder": "sets/weak"}):
        client.ok(push, folder=str(tmp_path / "weak"), repo=pushed, token=TOKEN, more=more)
    load = "result = draw(CTRLPipeline.from_pretrained(repo, cache_dir=cache, **more))"
    cache = str(tmp_path / "cache")
    weak = client.ok(load, repo=pushed, cache=cache, more={"revision": "weak"})
    assert weak != expected
    assert client.ok(load, repo=pushed, cache=cache, more={"subfolder": "sets/weak"}) == weak
    assert client.ok(load, repo=pushed, cache=cache, more={}) == expected
    sha = hub.repos[pushed].refs["weak"]
    assert client.ok(load, repo=pushed, cache=cache, more={"revision": sha}) == weak
    code = (
        "pipe = CTRLPipeline.from_pretrained(base, revision=at); pipe.load_ctrl_adapter(repo, revision='weak'); result = draw(pipe)"
    )
    assert client.ok(code, repo=pushed, base=BASE, at=load_adapter(trained).config.base["revision"]) == weak
    assert {path.name for path in (tmp_path / "cache").glob("models--*")} == {"models--user--tiny-sd", "models--user--tiny-stroke"}
    missing = client(load, repo=pushed, cache=cache, more={"revision": "nowhere"})
    assert "ValueError" in missing.kinds and "revision" in missing.message


def test_offline_from_the_cache(hub, client, pushed, expected, tmp_path):
    cache = str(tmp_path / "cache")
    code = "result = draw(CTRLPipeline.from_pretrained(name, cache_dir=cache, local_files_only=only, **more))"
    empty = client(code, name=pushed, cache=cache, only=True, more={})
    assert "ValueError" in empty.kinds and "not in the cache" in empty.message
    assert client.ok(code, name=pushed, cache=cache, only=False, more={}) == expected
    before = len(hub.requests)
    assert client.ok(code, name=pushed, cache=cache, only=True, more={}) == expected
    client.ok("import huggingface_hub.constants as c; c.HF_HUB_OFFLINE = True")
    try:
        assert client.ok(code, name=pushed, cache=cache, only=False, more={}) == expected
    finally:
        client.ok("c.HF_HUB_OFFLINE = False")
    assert len(hub.requests) == before
    # a base that came with an adapter can be used offline by its own name as well
    sha = hub.repos[pushed].at("main").files["ctrl_config.json"].data
    more = {"revision": json.loads(sha)["base"]["revision"]}
    load = "result = CTRLPipeline.from_pretrained(name, cache_dir=cache, local_files_only=True, **more).label_space is None"
    assert client.ok(load, name=BASE, cache=cache, more=more)


def test_plain_diffusers_loads_the_lora(hub, client, pushed, sd_folder, sd_adapter):
    code = """
from diffusers import StableDiffusionPipeline
plain = StableDiffusionPipeline.from_pretrained(base, revision=at); plain.set_progress_bar_config(disable=True)
plain.load_lora_weights(lora)
images = plain("seven", num_inference_steps=4, generator=torch.Generator().manual_seed(3), output_type="pt").images
result = images.numpy().tobytes().hex()
"""
    at = json.loads(hub.files(pushed)["ctrl_config.json"])["base"]["revision"]
    here = client.ok(code, base=str(sd_folder), at=None, lora=str(sd_adapter))  # the same process: threads change bits
    assert client.ok(code, base=BASE, at=at, lora=pushed) == here
    assert client.ok(code.replace("plain.load_lora_weights(lora)", ""), base=BASE, at=at) != here


def test_push_from_the_pipeline(hub, client, pushed, expected):
    push = "pipe = CTRLPipeline.from_pretrained(repo); result = pipe.push_ctrl_adapter_to_hub(to, token=token, private=True)"
    client.ok(push, repo=pushed, to="user/copy", token=TOKEN)
    assert {k: v for k, v in hub.files("user/copy").items() if k.endswith("safetensors")} == {
        k: v for k, v in hub.files(pushed).items() if k in ADAPTER_FILES and k.endswith("safetensors")
    }
    commits = len(hub.repos["user/copy"].commits)
    again = client.ok("result = pipe.push_ctrl_adapter_to_hub(to, token=token)", to="user/copy", token=TOKEN)
    assert len(hub.repos["user/copy"].commits) == commits  # nothing new: no commit
    assert again.endswith(hub.repos["user/copy"].refs["main"])
    assert client.ok("result = draw(CTRLPipeline.from_pretrained(repo, token=token))", repo="user/copy", token=TOKEN) == expected


def test_a_second_push_takes_away_what_the_first_one_had(hub, client, trained, tmp_path):
    adapter = load_adapter(trained)
    push = "from diffusers_ctrl.sharing import push_adapter; result = push_adapter(folder, 'user/twice', token=token)"
    client.ok(push, folder=str(save_adapter(tmp_path / "with", adapter)), token=TOKEN)
    hub.write("user/twice", {"my-notes.md": b"mine"})
    client.ok(push, folder=str(save_adapter(tmp_path / "without", replace(adapter, classifier=None))), token=TOKEN)
    assert set(hub.files("user/twice")) == {*ADAPTER_FILES[:4], "my-notes.md", ".gitattributes"}


def test_a_whole_pipeline_with_its_adapter_in_one_repository(hub, client, pushed, expected, tmp_path):
    client.ok("CTRLPipeline.from_pretrained(repo).save_pretrained(folder)", repo=pushed, folder=str(tmp_path / "whole"))
    hub.create("user/whole", contents(tmp_path / "whole"))
    assert client.ok("result = draw(CTRLPipeline.from_pretrained('user/whole'))") == expected


@pytest.mark.parametrize("how", ["save_pretrained", "push_to_hub"])
def test_a_whole_pipeline_is_pushed_with_its_adapter(hub, client, sd_adapter, expected, tmp_path, how):
    """Not before the adapter is in the folder, nor under the class's name here, which plain diffusers does not know."""
    repo = f"user/pushed-by-{how.replace('_', '-')}"
    push = {
        "save_pretrained": "pipe.save_pretrained(folder, push_to_hub=True, repo_id=repo, token=token, private=True, commit_message='All of it')",
        "push_to_hub": "pipe.push_to_hub(repo, token=token, private=True, commit_message='All of it')",
    }[how]
    folder = tmp_path / "whole"
    client.ok(
        f"pipe = CTRLPipeline.from_pretrained(adapter); {push}", adapter=str(sd_adapter), folder=str(folder), repo=repo, token=TOKEN
    )
    files = hub.files(repo)
    assert hub.repos[repo].private and {*ADAPTER_FILES, "model_index.json", "README.md"} <= set(files)
    assert json.loads(files["model_index.json"])["_class_name"] == "StableDiffusionPipeline"
    assert hub.repos[repo].commits[hub.repos[repo].refs["main"]].message == "All of it"
    assert client.ok("result = draw(CTRLPipeline.from_pretrained(repo, token=token))") == expected
    code = "from diffusers import DiffusionPipeline; result = type(DiffusionPipeline.from_pretrained(repo, token=token)).__name__"
    assert client.ok(code) == "StableDiffusionPipeline"
    if how == "save_pretrained":
        assert {name: value for name, value in files.items() if name != ".gitattributes"} == contents(folder)
        refused = client("pipe.save_pretrained(folder, push_to_hub=True, repo_id='other/not-mine', token=token)")
        assert "ValueError" in refused.kinds and "'other/not-mine' could not be completed" in refused.message


# -- private, gated, missing, refused --


def test_private_repositories(hub, client, pushed, trained, expected):
    push = "from diffusers_ctrl.sharing import push_adapter; result = push_adapter(folder, repo, token=token, private=private)"
    client.ok(push, folder=str(trained), repo="user/secret", token=TOKEN, private=True)
    assert hub.repos["user/secret"].private and not hub.repos[pushed].private
    load = "result = draw(CTRLPipeline.from_pretrained('user/secret', token=token))"
    assert client.ok(load, token=TOKEN) == expected
    client.ok("import shutil, os; shutil.rmtree(os.environ['HF_HOME'] + '/hub/models--user--secret')")
    for token in (None, OTHER, False):
        raised = client(load, token=token)
        assert "ValueError" in raised.kinds and "private" in raised.message and "hf auth login" in raised.message
    bad = client(load, token="hf_wrong")
    assert "ValueError" in bad.kinds and "hf_wrong" not in bad.text
    hub.create("user/gated", hub.files(pushed), gated=True)
    gated = client("CTRLPipeline.from_pretrained('user/gated')")
    assert "ValueError" in gated.kinds and "accept its conditions" in gated.message
    # a private adapter is not slipped into a public repository
    commits = len(hub.repos[pushed].commits)
    public = client(push, folder=str(trained), repo=pushed, token=TOKEN, private=True)
    assert "ValueError" in public.kinds and "is public" in public.message and len(hub.repos[pushed].commits) == commits


@pytest.mark.parametrize(
    ("repo", "token", "message"),
    [
        ("user/new", None, "token"),
        ("user/new", "hf_wrong", "did not accept the token"),
        ("user/new", OTHER, "write access"),
        ("a/b/c", TOKEN, "USER/NAME"),
        ("user/na me", TOKEN, "USER/NAME"),
    ],
)
def test_pushes_that_are_refused(hub, client, trained, repo, token, message):
    push = "from diffusers_ctrl.sharing import push_adapter; result = push_adapter(folder, repo, token=token)"
    raised = client(push, folder=str(trained), repo=repo, token=token)
    assert isinstance(raised, Raised) and "ValueError" in raised.kinds and message in raised.message
    assert repo not in hub.repos and (token is None or token not in raised.text)


def test_nothing_is_sent_of_a_broken_adapter(hub, client, trained, tmp_path):
    broken = save_adapter(tmp_path / "broken", load_adapter(trained))
    path = broken / "label_encoder" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    before = len(hub.requests)
    with pytest.raises(ValueError, match="truncated"):
        push_adapter(broken, "user/broken", token=TOKEN)
    assert len(hub.requests) == before


def test_a_base_that_nobody_else_has(hub, client, sd_adapter, expected, tmp_path):
    push = "from diffusers_ctrl.sharing import push_adapter; result = push_adapter(folder, repo, token=token, **more)"
    raised = client(push, folder=str(sd_adapter), repo="user/local-base", token=TOKEN, more={})
    assert "ValueError" in raised.kinds and "base=" in raised.message and "user/local-base" not in hub.repos
    at = next(sha for sha, commit in hub.repos[BASE].commits.items() if "model_index.json" in commit.files)
    client.ok(push, folder=str(sd_adapter), repo="user/local-base", token=TOKEN, more={"base": BASE, "base_revision": at})
    assert client.ok("result = draw(CTRLPipeline.from_pretrained('user/local-base'))") == expected
    assert str(tmp_path.parent) not in hub.files("user/local-base")["ctrl_config.json"].decode()


PUSHES = {
    "a folder with its card": "from diffusers_ctrl.sharing import push_adapter; result = push_adapter(folder, repo, **more)",
    "a pipeline": "result = CTRLPipeline.from_pretrained(folder).push_ctrl_adapter_to_hub(repo, **more)",
}


@pytest.mark.parametrize("how", PUSHES)
def test_what_is_pushed_names_the_hubs_base_only(hub, client, sd_adapter, sd_folder, expected, tmp_path, how):
    """Trained on a folder of this machine: card, config and metadata then name the Hub's copy of it, and the snippet runs."""
    repo, folder = f"user/named-{len(how)}", tmp_path / "run"
    shutil.copytree(sd_adapter, folder)
    save_card(folder, load_adapter(folder).config)
    before = contents(folder)
    assert str(sd_folder).encode() in before["README.md"]
    at = next(sha for sha, commit in hub.repos[BASE].commits.items() if "model_index.json" in commit.files)
    more = {"base": BASE, "base_revision": at, "token": TOKEN}
    client.ok(PUSHES[how], folder=str(folder), repo=repo, more=more)
    assert contents(folder) == before  # the folder keeps its own
    files = hub.files(repo)
    for local in (str(sd_folder), str(tmp_path), str(Path.home())):
        assert not [name for name, data in files.items() if local.encode() in data], local
    card = files["README.md"].decode()
    data = yaml.safe_load(card.split("---\n")[1])
    assert (data["base_model"], data["base_model_relation"]) == (BASE, "adapter") and BASE in data["model-index"][0]["name"]
    snippet = re.search(r"```python\n(.*?)```", card, re.S).group(1)
    assert f'from_pretrained("{repo}")' in snippet and f'"{BASE}"' in snippet
    assert f'base: "{BASE}"\nbase_revision: "{at}"\n' in card
    assert client.ok(snippet + "\nresult = list(image.size)") == [16, 16]
    assert client.ok("result = draw(CTRLPipeline.from_pretrained(repo))", repo=repo) == expected
    revision_alone = client(PUSHES[how], folder=str(folder), repo=repo, more={"base_revision": at, "token": TOKEN})
    assert "ValueError" in revision_alone.kinds and "base_revision" in revision_alone.message


# -- trust --


@pytest.mark.parametrize("base", ["/etc", "../base", "./base", "a/b/c", "~/base", "\\\\server\\share", "file:///etc", ""])
def test_a_downloaded_adapter_names_no_path(hub, client, pushed, base):
    config = json.loads(hub.files(pushed)["ctrl_config.json"])
    config["base"]["id"] = base
    hub.create("user/path", {**hub.files(pushed), "ctrl_config.json": json.dumps(config).encode()})
    raised = client("CTRLPipeline.from_pretrained('user/path')")
    assert "ValueError" in raised.kinds and "no Hub id" in raised.message


def test_programs_are_not_run(hub, client, pushed, sd_folder):
    for name in ("trust_remote_code", "custom_pipeline"):
        raised = client("CTRLPipeline.from_pretrained(repo, **more)", repo=pushed, more={name: "x"})
        assert "ValueError" in raised.kinds and name in raised.message
    # a base with pickles only: plain diffusers would read them
    files = contents(sd_folder)
    weights = files.pop("unet/diffusion_pytorch_model.safetensors")
    hub.create("user/pickled", files | {"unet/diffusion_pytorch_model.bin": weights})
    config = json.loads(hub.files(pushed)["ctrl_config.json"])
    config["base"] |= {"id": "user/pickled", "revision": None}
    hub.create("user/on-pickled", {**hub.files(pushed), "ctrl_config.json": json.dumps(config).encode()})
    before = len(hub.requests)
    raised = client("CTRLPipeline.from_pretrained('user/on-pickled')")
    assert isinstance(raised, Raised) and "safetensors" in raised.message
    assert not any(line.startswith("GET") and line.endswith(".bin") for line in hub.requests[before:])


@pytest.mark.parametrize("subfolder", ["..", "../other", "a/../../b", "/etc", "a\\..\\b", "c:x"])
def test_subfolders_stay_inside(hub, client, pushed, subfolder):
    raised = client("CTRLPipeline.from_pretrained(repo, subfolder=subfolder)", repo=pushed, subfolder=subfolder)
    assert "ValueError" in raised.kinds and "subfolder" in raised.message


def test_an_adapter_of_terabytes_is_not_fetched(hub, client, pushed, monkeypatch):
    hub.create("user/huge", hub.files(pushed))
    client.ok("import diffusers_ctrl.hub as h; h.MAX_DOWNLOAD_BYTES, before = 1000, h.MAX_DOWNLOAD_BYTES")
    try:
        before = len(hub.requests)
        raised = client("CTRLPipeline.from_pretrained('user/huge')")
    finally:
        client.ok("h.MAX_DOWNLOAD_BYTES = before")
    assert "ValueError" in raised.kinds and "bytes" in raised.message
    assert not any("safetensors" in line for line in hub.requests[before:] if "/resolve/" in line)


def test_tokens_appear_nowhere(hub, client, trained, pushed, tmp_path):
    """Not in logs at the highest level, nor in files, nor in errors, that of a token with a line break included."""
    folder = str(tmp_path / "saved")
    code = """
import logging, huggingface_hub, diffusers
huggingface_hub.logging.set_verbosity_debug(); diffusers.utils.logging.set_verbosity_debug(); logging.getLogger("httpx").setLevel(10)
handler = logging.StreamHandler(); logging.getLogger().addHandler(handler); logging.getLogger().setLevel(10)
from diffusers_ctrl.sharing import push_adapter
try:
    push_adapter(src, "user/quiet", token=token, private=True)
    pipe = CTRLPipeline.from_pretrained("user/quiet", token=token, cache_dir=folder + "-cache")
    pipe.save_ctrl_adapter(folder); pipe.save_pretrained(folder + "-whole")
    result = repr(pipe) + repr(vars(pipe))
finally:
    logging.getLogger().removeHandler(handler); logging.getLogger().setLevel(30)
    huggingface_hub.logging.set_verbosity_warning(); diffusers.utils.logging.set_verbosity_warning()
"""
    result = client.ok(code, src=str(trained), folder=folder, token=TOKEN)
    assert client.text and TOKEN not in client.text and TOKEN not in result
    for path in [*tmp_path.rglob("*")]:
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
    assert all(TOKEN.encode() not in data for repo in hub.repos for data in hub.files(repo).values())
    for bad in (TOKEN + "\n", TOKEN + "é", "a " + TOKEN):
        for call in ("push_adapter(src, 'user/quiet', token=token)", "CTRLPipeline.from_pretrained('user/quiet', token=token)"):
            raised = client(call, src=str(trained), token=bad)
            assert "ValueError" in raised.kinds and "token" in raised.message and TOKEN not in raised.text
    calls = (
        "push_adapter(src, 'user/quiet2', token=token)",
        "CTRLPipeline.from_pretrained(src).push_ctrl_adapter_to_hub('user/quiet3', token=token)",
        "CTRLPipeline.from_pretrained('user/quiet', token=token, force_download=True)",
    )
    wrong = (("commit", "cut", 0), ("preupload", "status", 500), ("resolve", "status", 401), ("resolve", "cut", 0))
    for pattern, kind, status in wrong:
        hub.fail(pattern, kind, times=50, status=status)
        failed = 0
        for call in calls:
            raised = client(call, src=str(trained), token=TOKEN)
            assert TOKEN not in client.text
            failed += isinstance(raised, Raised) and TOKEN not in raised.text + raised.message
        assert failed, (pattern, kind)
        hub.faults.clear()


def test_a_password_in_the_address_of_a_mirror_is_not_printed(client, pushed, tmp_path):
    code = "import huggingface_hub.constants as c; before, c.ENDPOINT = c.ENDPOINT, 'http://me:hf_password@127.0.0.1:9'"
    client.ok(code + "; c.HUGGINGFACE_CO_URL_TEMPLATE = c.HUGGINGFACE_CO_URL_TEMPLATE.replace(before, c.ENDPOINT)")
    try:
        raised = client("CTRLPipeline.from_pretrained(repo, cache_dir=cache)", repo=pushed, cache=str(tmp_path))
        assert "ValueError" in raised.kinds and "127.0.0.1:9" in raised.message and "hf_password" not in raised.message
    finally:
        client.ok("c.HUGGINGFACE_CO_URL_TEMPLATE = c.HUGGINGFACE_CO_URL_TEMPLATE.replace(c.ENDPOINT, before); c.ENDPOINT = before")
