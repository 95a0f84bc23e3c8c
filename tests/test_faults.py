"""What goes wrong while an adapter is saved, uploaded or downloaded. Whatever it is, nothing half-written is ever loaded, the error says what
to do, and a second try succeeds. Real HTTP, real file systems; disks are filled by RLIMIT_FSIZE (writing fails with EFBIG), processes are
ended by SIGKILL while the server stands still in the middle.

| fault | upload | download | save |
| --- | --- | --- | --- |
| connection cut in the middle | of a large file, of the commit | of the weights, of the config | |
| answer lost | to the commit | | |
| server stops sending (time-out) | | of the weights | |
| no connection | | empty and filled cache | |
| 500, 502, 503 | storage, commit, start | storage, Hub, base | |
| 429 | commit | any request | |
| 409, 412: someone else pushed | commit | | |
| 401: the token expires on the way | storage, commit | weights | |
| part of a file, with headers as if it were whole | | weights | |
| other bytes than the Hub has | | weights | |
| disk full | | three sizes | before each file |
| folder that cannot be written | | cache | target |
| SIGKILL | in a large file, in the commit, after it | in the config, the weights, the base | before each step, at random |
| locks and parts left behind by a killed process | | config, weights, base | folder |
"""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hub_client import BASE, TOKEN, Raised, environment

from diffusers_ctrl.adapters import ADAPTER_FILES, load_adapter, save_adapter


PUSH = "from diffusers_ctrl.sharing import push_adapter; result = push_adapter(folder, repo, token=token)"
LOAD = "result = draw(CTRLPipeline.from_pretrained(repo, cache_dir=cache, **more))"
ALWAYS = 1000


@pytest.fixture(autouse=True)
def no_faults_left(request):
    yield
    if "hub" in request.fixturenames:
        request.getfixturevalue("hub").release()


@pytest.fixture(scope="module")
def images(client, pushed, tmp_path_factory):
    """What the pushed adapter draws, in the same process and without faults."""
    return client.ok(LOAD, repo=pushed, cache=str(tmp_path_factory.mktemp("cache")), more={})


# -- uploads --


UPLOAD_FAULTS = {
    "the connection is cut in the middle of a large file": ("PUT /lfs", "cut", 0, "connection"),
    "the connection is cut in the middle of the commit": ("POST .*/commit/", "cut", 0, "connection"),
    "the answer to the commit is lost": ("POST .*/commit/", "lost", 0, "connection"),
    "the storage fails": ("PUT /lfs", "status", 503, "try again later"),
    "the Hub fails at the commit": ("POST .*/commit/", "status", 500, "try again later"),
    "the Hub fails at the start": ("POST /api/repos/create", "status", 502, "try again later"),
    "too many requests": ("POST .*/(preupload|commit)/", "status", 429, "wait some minutes"),
    "someone else pushes": ("POST .*/commit/", "status", 412, "try again"),
    "someone else pushes at the same time": ("POST .*/commit/", "status", 409, "try again"),
    "the token expires before the files": ("POST .*/objects/batch", "status", 401, "did not accept the token"),
    "the token expires before the commit": ("POST .*/commit/", "status", 401, "did not accept the token"),
}


@pytest.mark.parametrize("fault", UPLOAD_FAULTS)
def test_uploads(hub, client, trained, images, fault, tmp_path):
    pattern, kind, status, advice = UPLOAD_FAULTS[fault]
    repo = f"user/up-{list(UPLOAD_FAULTS).index(fault)}"
    hub.objects.clear()
    hub.fail(pattern, kind, times=ALWAYS, status=status)
    raised = client(PUSH, folder=str(trained), repo=repo, token=TOKEN)
    assert isinstance(raised, Raised) and "ValueError" in raised.kinds
    assert advice in raised.message and repo in raised.message and raised.message.count("\n") == 0
    assert TOKEN not in raised.text
    # either all of it is there or none
    there = set(hub.files(repo)) - {".gitattributes"} if repo in hub.repos else set()
    assert there == set() or (kind == "lost" and there >= set(ADAPTER_FILES))
    load_adapter(trained)  # what is here is whole, whatever happened there
    hub.faults.clear()
    client.ok(PUSH, folder=str(trained), repo=repo, token=TOKEN)
    assert client.ok(LOAD, repo=repo, cache=str(tmp_path), more={}) == images


def test_an_update_that_fails_leaves_the_old_version(hub, client, trained, images, tmp_path):
    repo, adapter = "user/updated", load_adapter(trained)
    client.ok(PUSH, folder=str(trained), repo=repo, token=TOKEN)
    other = replace(adapter, lora={key: value * 0 for key, value in adapter.lora.items()})
    changed = save_adapter(tmp_path / "changed", other)
    hub.fail("POST .*/commit/", "cut", times=ALWAYS)
    assert "ValueError" in client(PUSH, folder=str(changed), repo=repo, token=TOKEN).kinds
    assert client.ok(LOAD, repo=repo, cache=str(tmp_path / "cache"), more={}) == images
    hub.faults.clear()
    client.ok(PUSH, folder=str(changed), repo=repo, token=TOKEN)
    assert client.ok(LOAD, repo=repo, cache=str(tmp_path / "cache"), more={}) != images


def test_a_short_interruption_of_an_upload_is_not_even_noticed(hub, client, trained):
    hub.objects.clear()
    hub.fail("PUT /lfs", "cut", times=1)
    hub.fail("POST .*/preupload/", "status", times=1, status=503)
    hub.fail("POST .*/objects/batch", "status", times=1, status=429)
    client.ok(PUSH, folder=str(trained), repo="user/bumpy", token=TOKEN)
    assert set(ADAPTER_FILES) < set(hub.files("user/bumpy"))
    assert not [fault for fault in hub.faults if fault.times]


# -- downloads --


DOWNLOAD_FAULTS = {
    "the connection is cut in the middle of the weights": ("GET /cdn/", "cut", 0, "connection"),
    "the connection is cut in the middle of the config": ("GET .*/ctrl_config.json", "cut", 0, "connection"),
    "the storage fails": ("GET /cdn/", "status", 503, "try again later"),
    "the Hub fails": ("(HEAD|GET) /(api/models/)?user/(?!tiny-sd)", "status", 500, "try again later"),
    "too many requests": ("(HEAD|GET|POST) ", "status", 429, "wait some minutes"),
    "the token expires after the config": ("POST .*/paths-info/", "status", 401, "did not accept the token"),
    "the token expires before the weights": ("(HEAD|GET) /(?!cdn|api).*safetensors", "status", 401, "did not accept the token"),
    "half of the weights come as if that were all": ("GET /cdn/", "short", 0, "incomplete"),
    "the base fails": (f"(HEAD|GET) /(api/models/)?{BASE}", "status", 503, "try again later"),
}


@pytest.mark.parametrize("fault", DOWNLOAD_FAULTS)
def test_downloads(hub, client, pushed, images, fault, tmp_path):
    pattern, kind, status, advice = DOWNLOAD_FAULTS[fault]
    arguments = {"repo": pushed, "cache": str(tmp_path), "more": {}}
    hub.fail(pattern, kind, times=ALWAYS, status=status)
    raised = client(LOAD, **arguments)
    assert isinstance(raised, Raised) and "ValueError" in raised.kinds, raised
    assert advice in raised.message and raised.message.count("\n") == 0
    assert not list(tmp_path.rglob("*.incomplete"))
    # not from the cache either, which is not whole
    offline = client(LOAD, **arguments | {"more": {"local_files_only": True}})
    assert isinstance(offline, Raised) and "ValueError" in offline.kinds
    hub.faults.clear()
    assert client.ok(LOAD, **arguments) == images


def test_a_cut_download_is_resumed(hub, client, pushed, images, tmp_path):
    hub.fail("GET /cdn/", "cut", times=3)
    assert client.ok(LOAD, repo=pushed, cache=str(tmp_path), more={}) == images
    assert not [fault for fault in hub.faults if fault.times]


def test_other_bytes_than_the_hub_has(hub, client, pushed, images, tmp_path):
    """The client compares sizes only, so they get into the cache; they are refused there, and force_download replaces them."""
    hub.fail("GET /cdn/", "garbled", times=3)  # the adapter's three files of weights
    raised = client(LOAD, repo=pushed, cache=str(tmp_path), more={})
    assert "ValueError" in raised.kinds and "not a safetensors file" in raised.message and "force_download=True" in raised.message
    hub.faults.clear()
    assert "ValueError" in client(LOAD, repo=pushed, cache=str(tmp_path), more={}).kinds
    assert client.ok(LOAD, repo=pushed, cache=str(tmp_path), more={"force_download": True}) == images


def test_the_hub_goes_away_and_the_cache_serves(hub, client, pushed, images, tmp_path):
    assert client.ok(LOAD, repo=pushed, cache=str(tmp_path), more={}) == images
    for status in (503, 429):
        hub.fail("", "status", times=ALWAYS, status=status)
        assert client.ok(LOAD, repo=pushed, cache=str(tmp_path), more={}) == images
        hub.faults.clear()


def test_no_connection_at_all(client, pushed, images, tmp_path):
    assert client.ok(LOAD, repo=pushed, cache=str(tmp_path / "filled"), more={}) == images
    code = "import huggingface_hub.constants as c; before, c.ENDPOINT = c.ENDPOINT, 'http://127.0.0.1:9'"
    client.ok(code + "; c.HUGGINGFACE_CO_URL_TEMPLATE = c.HUGGINGFACE_CO_URL_TEMPLATE.replace(before, c.ENDPOINT)")
    try:
        raised = client(LOAD, repo=pushed, cache=str(tmp_path / "empty"), more={})
        assert "ValueError" in raised.kinds and "connection" in raised.message and raised.message.count("\n") == 0
        assert client.ok(LOAD, repo=pushed, cache=str(tmp_path / "filled"), more={}) == images
    finally:
        client.ok("c.HUGGINGFACE_CO_URL_TEMPLATE = c.HUGGINGFACE_CO_URL_TEMPLATE.replace(c.ENDPOINT, before); c.ENDPOINT = before")


def test_the_disk_fills_while_downloading(hub, client, pushed, images, tmp_path):
    client.ok("import resource; hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]")
    for limit in (500, 5_000, 20_000):
        client.ok("resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))", limit=limit)
        raised = client(LOAD, repo=pushed, cache=str(tmp_path / str(limit)), more={})
        client.ok("resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))")
        assert isinstance(raised, Raised) and "disk is full" in raised.message, raised.message
        assert client.ok(LOAD, repo=pushed, cache=str(tmp_path / str(limit)), more={}) == images


def test_a_server_that_stops_sending(hub, client, pushed, images, tmp_path):
    """It is given up after the Hub client's own time, ten seconds or HF_HUB_DOWNLOAD_TIMEOUT, here less."""
    client.ok("import huggingface_hub.constants as c; before, c.HF_HUB_DOWNLOAD_TIMEOUT = c.HF_HUB_DOWNLOAD_TIMEOUT, 0.3")
    hub.fail("GET /cdn/", "stall", times=ALWAYS)
    try:
        raised = client(LOAD, repo=pushed, cache=str(tmp_path), more={})
    finally:
        client.ok("c.HF_HUB_DOWNLOAD_TIMEOUT = before")
    assert "ValueError" in raised.kinds and "connection" in raised.message and raised.message.count("\n") == 0
    hub.release()
    assert client.ok(LOAD, repo=pushed, cache=str(tmp_path), more={}) == images


def test_a_cache_that_cannot_be_written(client, pushed, images, tmp_path):
    (tmp_path / "file").write_text("")
    if os.geteuid() == 0:
        cache = tmp_path / "file" / "cache"  # root may write anywhere but below a file
    else:
        cache = tmp_path / "closed"
        cache.mkdir(mode=0o500)
    raised = client(LOAD, repo=pushed, cache=str(cache), more={})
    assert "ValueError" in raised.kinds and "check its permissions" in raised.message and str(tmp_path) in raised.message
    assert client.ok(LOAD, repo=pushed, cache=str(tmp_path / "other"), more={}) == images


# -- kills --


def killed(hub, client, code, **names):
    """Runs the code in a process of its own, forked from the client's, and ends it by SIGKILL when the server stands still."""
    lines = [
        "import os",
        "pid = os.fork()",
        "if pid == 0:",
        "    try:",
        f"        exec({code!r})",
        "    finally:",
        "        os._exit(0)",
    ]
    pid = client.ok("\n".join([*lines, "result = pid"]), **names)
    found = hub.stalled.wait(60)
    os.kill(pid, signal.SIGKILL)
    ended = client.ok("result = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])", pid=pid)
    assert found and ended == -signal.SIGKILL, "it did not come to that"
    hub.release()


UPLOAD_KILLS = {
    "in a large file": ("PUT /lfs", "stall"),
    "in the commit": ("/commit/", "stall"),
    "after the commit": ("/commit/", "held"),
}


@pytest.mark.parametrize("moment", UPLOAD_KILLS)
@pytest.mark.parametrize("exists", [False, True])
def test_a_kill_in_an_upload(hub, client, trained, images, moment, exists, tmp_path):
    repo = f"user/killed-{list(UPLOAD_KILLS).index(moment)}-{exists}"
    here = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    adapter, before = load_adapter(trained), {}
    if exists:  # another version, of which nothing may get mixed with this one
        other = save_adapter(tmp_path / "other", replace(adapter, lora={key: value * 0 for key, value in adapter.lora.items()}))
        client.ok(PUSH, folder=str(other), repo=repo, token=TOKEN)
        before = hub.files(repo)
    hub.objects.clear()
    hub.fail(*UPLOAD_KILLS[moment], times=ALWAYS)
    killed(hub, client, PUSH, folder=str(trained), repo=repo, token=TOKEN)
    there = hub.files(repo) if repo in hub.repos else {}
    if moment == "after the commit":
        assert client.ok(LOAD, repo=repo, cache=str(tmp_path / "cache"), more={}) == images
    else:
        assert there == before if exists else set(there) <= {".gitattributes"}
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == here
    client.ok(PUSH, folder=str(trained), repo=repo, token=TOKEN)
    assert client.ok(LOAD, repo=repo, cache=str(tmp_path / "cache"), more={}) == images


DOWNLOAD_KILLS = {
    "in the config": "GET .*/ctrl_config.json",
    "in the weights": "GET /cdn/",
    "in the base": f"GET /{BASE}/resolve/.*/unet/config.json",
}


@pytest.mark.parametrize("moment", DOWNLOAD_KILLS)
def test_a_kill_in_a_download(hub, client, pushed, images, moment, tmp_path):
    """Parts and locks of the killed process stay in the cache; neither is taken for an adapter, and neither is in the way."""
    arguments = {"repo": pushed, "cache": str(tmp_path), "more": {}}
    hub.fail(DOWNLOAD_KILLS[moment], "stall", times=ALWAYS)
    killed(hub, client, LOAD, **arguments)
    assert list(tmp_path.rglob("*.lock")) and list(tmp_path.rglob("*.incomplete"))
    offline = client(LOAD, **arguments | {"more": {"local_files_only": True}})
    assert isinstance(offline, Raised) and "ValueError" in offline.kinds and offline.message.count("\n") == 0
    assert client.ok(LOAD, **arguments) == images
    assert client.ok(LOAD, **arguments | {"more": {"local_files_only": True}}) == images


def test_a_kill_of_a_users_own_process(hub, client, pushed, images, tmp_path):
    """Not forked: started as a user starts it, in the middle of its first download."""
    hub.fail("GET /cdn/", "stall", times=ALWAYS)
    code = f"from diffusers_ctrl import CTRLPipeline; CTRLPipeline.from_pretrained({pushed!r}, cache_dir={str(tmp_path)!r})"
    user = subprocess.Popen([sys.executable, "-c", code], env=environment(hub.url, tmp_path / "home"), stderr=subprocess.DEVNULL)
    try:
        assert hub.stalled.wait(120)
    finally:
        user.kill()
    assert user.wait() == -signal.SIGKILL
    hub.release()
    assert client.ok(LOAD, repo=pushed, cache=str(tmp_path), more={}) == images


# -- saving --


def other_than(adapter):
    """Another adapter of the same shapes: a mixture of the two would load without an error."""
    encoder = type(adapter.label_encoder).from_config(adapter.label_encoder.config)
    encoder.load_state_dict({key: -value for key, value in adapter.label_encoder.state_dict().items()})
    lora = {key: -value for key, value in adapter.lora.items()}
    return replace(adapter, lora=lora, label_encoder=encoder.eval(), config=replace(adapter.config, gamma=2.0))


def same(a, b):
    encoders = zip(a.label_encoder.state_dict().values(), b.label_encoder.state_dict().values(), strict=True)
    return (
        a.config == b.config
        and a.lora.keys() == b.lora.keys()
        and all(torch.equal(a.lora[key], b.lora[key]) for key in a.lora)
        and all(torch.equal(x, y) for x, y in encoders)
    )


@contextmanager
def disk_of(limit):
    """No file may grow beyond `limit` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("exists", [False, True])
def test_the_disk_fills_while_saving(adapter, tmp_path, exists):
    folder, other = tmp_path / "adapter", other_than(adapter)
    if exists:
        save_adapter(folder, adapter)
    sizes = sorted(path.stat().st_size for path in save_adapter(tmp_path / "sizes", other).rglob("*") if path.is_file())
    failed = 0
    for limit in sorted({0, 10, 400, *(size - 1 for size in sizes)}):
        with disk_of(limit):
            with pytest.raises(OSError, match="the disk is full: free some space and save again") as error:
                save_adapter(folder, other)
        failed += 1
        assert str(folder) in str(error.value) and "\n" not in str(error.value)
        assert same(load_adapter(folder), adapter) if exists else not folder.exists()
        assert not list(tmp_path.rglob("*.saving"))
    assert failed >= 6
    assert same(load_adapter(save_adapter(folder, other)), other)


def in_a_child(run, kill_after=None):
    """Runs `run(started)` in a forked process, which SIGKILL ends some seconds after it called `started()`. Returns its exit code."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            run(lambda: os.write(writing, b"."))
        finally:
            os._exit(0)
    os.close(writing)
    if kill_after is not None:
        os.read(reading, 1)
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    os.close(reading)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def outcome(folder, adapter, other):
    try:
        found = load_adapter(folder)
    except ValueError as error:
        assert str(folder) in str(error)
        return "ended" if "Save it again" in str(error) else "refused"
    assert same(found, adapter) or same(found, other), "half of each"
    return "old" if same(found, adapter) else "new"


def test_a_kill_before_each_step_of_saving(adapter, tmp_path):
    """Every rename and removal that saving does is once the last thing that does not happen."""
    folder, other, seen = tmp_path / "adapter", other_than(adapter), []
    for step in range(100):
        save_adapter(folder, adapter)

        def save(started, step=step):
            left = step

            def deadly(function):
                def call(*args, **kwargs):
                    nonlocal left
                    left -= 1
                    if left < 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return function(*args, **kwargs)

                return call

            os.replace, os.unlink, os.mkdir, os.rmdir = map(deadly, (os.replace, os.unlink, os.mkdir, os.rmdir))
            save_adapter(folder, other)

        ended = in_a_child(save)
        seen.append(outcome(folder, adapter, other))
        assert same(load_adapter(save_adapter(folder, other)), other)  # a second try succeeds
        if ended == 0:
            break
    print(f"{len(seen) - 1} kills, one before each step: {seen}")
    assert seen[0] == "old" and seen[-1] == "new" and "ended" in seen and len(seen) > 8


def test_kills_at_random_moments_of_saving(adapter, tmp_path):
    folder, other, rng, seen = tmp_path / "adapter", other_than(adapter), random.Random(0), []
    save_adapter(folder, adapter)
    begun = time.monotonic()
    save_adapter(folder, adapter)
    seconds = time.monotonic() - begun

    def save_for_ever(started):
        started()
        while True:
            save_adapter(folder, other)
            save_adapter(folder, adapter)

    for _ in range(30):
        assert in_a_child(save_for_ever, kill_after=2.5 * seconds * rng.random()) == -signal.SIGKILL
        seen.append(outcome(folder, adapter, other))
    print({kind: seen.count(kind) for kind in sorted(set(seen))})
    assert same(load_adapter(save_adapter(folder, adapter)), adapter)


def test_no_permission(adapter, tmp_path):
    if os.geteuid() == 0:
        (tmp_path / "file").write_text("")
        where = tmp_path / "file" / "adapter"  # root may write anywhere but below a file
    else:
        tmp_path.chmod(0o500)
        where = tmp_path / "adapter"
    with pytest.raises(OSError, match="could not be written"):
        save_adapter(where, adapter)
    Path(tmp_path).chmod(0o700)
