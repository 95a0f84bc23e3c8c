"""With hf_xet installed and on, as `pip install huggingface_hub` leaves it: every other test of the Hub says HF_HUB_DISABLE_XET=1, since the
loopback Hub has no Xet storage. What is not tested anywhere is an upload or a download through that storage itself.
"""

import pytest
from hub_client import SNIPPET, TOKEN, Client, Raised

from diffusers_ctrl.adapters import ADAPTER_FILES


PUSH = "from diffusers_ctrl.sharing import push_adapter; result = push_adapter(folder, repo, token=token)"
LOAD = "result = draw(CTRLPipeline.from_pretrained(repo, cache_dir=cache))"


@pytest.fixture(scope="module")
def xet_client(hub, tmp_path_factory):
    pytest.importorskip("hf_xet")
    client = Client(hub.url, tmp_path_factory.mktemp("xet-home"), HF_HUB_DISABLE_XET="0")
    client.ok(SNIPPET)
    assert client.ok("from huggingface_hub.utils._runtime import is_xet_available; result = is_xet_available()")
    yield client
    client.close()


def test_downloads_from_storage_that_is_not_xet(xet_client, hub, pushed, client, tmp_path):
    assert len({c.ok(LOAD, repo=pushed, cache=str(tmp_path / str(i))) for i, c in enumerate((xet_client, client))}) == 1


def test_an_upload_to_a_hub_without_xet_says_what_to_do(xet_client, hub, trained, tmp_path):
    """The client does not fall back by itself. Nothing is sent, and the error names the switch; with it the upload succeeds."""
    raised = xet_client(PUSH, folder=str(trained), repo="user/xet", token=TOKEN)
    assert isinstance(raised, Raised) and "ValueError" in raised.kinds, raised
    assert "HF_HUB_DISABLE_XET=1" in raised.message and raised.message.count("\n") == 0 and TOKEN not in raised.text
    assert set(hub.files("user/xet")) == {".gitattributes"}
    xet_client.ok("import huggingface_hub.constants as c; c.HF_HUB_DISABLE_XET = True")
    try:
        xet_client.ok(PUSH, folder=str(trained), repo="user/xet", token=TOKEN)
    finally:
        xet_client.ok("c.HF_HUB_DISABLE_XET = False")
    assert set(ADAPTER_FILES) < set(hub.files("user/xet"))


def test_a_hub_that_takes_small_files_into_the_commit(xet_client, hub, trained, monkeypatch, tmp_path):
    """Adapters of a few megabytes may go up that way: then Xet has no part in it."""
    monkeypatch.setattr(hub, "lfs", ())
    xet_client.ok(PUSH, folder=str(trained), repo="user/small", token=TOKEN)
    assert set(ADAPTER_FILES) < set(hub.files("user/small"))
    assert not any(blob.lfs for blob in hub.repos["user/small"].at("main").files.values())
