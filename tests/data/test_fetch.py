"""Bytes from servers and commands that fail: asked again for what is missing, named when given up."""

import builtins
import os
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from flaky import FlakyServer, flaky_server
from sequencer2d.data import fetch as module
from sequencer2d.data.fetch import Patience, ShardError, check_url, fetch

CONTENT = bytes(range(256)) * 4096  # a megabyte
SIZE = len(CONTENT)


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    patience = Patience(attempts=3, timeout_s=0.5, first_delay_s=0.01, max_delay_s=0.02)
    monkeypatch.setattr(module, "PATIENCE", patience)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FlakyServer]:
    root = tmp_path_factory.mktemp("store")
    (root / "bucket").mkdir()
    (root / "bucket" / "file").write_bytes(CONTENT)
    with flaky_server(root) as server:
        yield server
    module._s3_client.cache_clear()


@pytest.fixture
def server(store: FlakyServer) -> FlakyServer:
    store.faults.clear()
    store.requests.clear()
    return store


@pytest.fixture
def urls(server: FlakyServer, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The same file by every way that a network goes; to boto3 the flaky server is a store."""
    pytest.importorskip("boto3", reason="the extra shards is not installed")
    settings = {"ENDPOINT_URL": server.url, "ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s", "DEFAULT_REGION": "any"}
    for name, value in settings.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    return {"http": f"{server.url}/bucket/file", "s3": "s3://bucket/file"}


@pytest.mark.parametrize("scheme", ["http", "s3"])
@pytest.mark.parametrize(
    "faults", [[], ["reset"], ["stall"], [503, 503], [429, "reset"], [500, "stall"], ["reset"] * 5]
)
def test_a_server_in_trouble_is_asked_again(
    scheme: str, faults: list[int | str], server: FlakyServer, urls: dict[str, str]
) -> None:
    server.faults["file"] = list(faults)
    assert fetch(urls[scheme], size=SIZE, total=SIZE) == CONTENT
    assert len(server.requests) == len(faults) + 1


@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_what_has_come_is_not_asked_for_again(scheme: str, server: FlakyServer, urls: dict[str, str]) -> None:
    server.faults["file"] = ["reset"]
    fetch(urls[scheme], size=SIZE, total=SIZE)
    assert [range for _, range in server.requests] == [f"bytes=0-{SIZE - 1}", f"bytes={SIZE // 2}-{SIZE - 1}"]


@pytest.mark.parametrize("scheme", ["http", "s3"])
@pytest.mark.parametrize(("fault", "reason"), [(503, "answered 503"), ("stall", "timed? ?out")])
def test_a_server_that_stays_in_trouble_is_given_up_by_name(
    scheme: str, fault: int | str, reason: str, server: FlakyServer, urls: dict[str, str]
) -> None:
    server.faults["*"] = [fault]
    url = urls[scheme]
    with pytest.raises(ConnectionError, match=f"(?i)^{url}: given up after 3 attempts: .*{reason}"):
        fetch(url, size=1, total=SIZE)
    assert len(server.requests) == 3


def test_nobody_there_is_named() -> None:
    with pytest.raises(ConnectionError, match=r"^http://127.0.0.1:9/file: given up .*refused"):
        fetch("http://127.0.0.1:9/file", size=1)


@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_a_missing_file_is_not_asked_for_again(scheme: str, server: FlakyServer, urls: dict[str, str]) -> None:
    url = urls[scheme].replace("/file", "/other")
    with pytest.raises(FileNotFoundError, match=f"^{url}: not found"):
        fetch(url)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_a_closed_door_is_not_knocked_at_again(
    scheme: str, status: int, server: FlakyServer, urls: dict[str, str]
) -> None:
    server.faults["*"] = [status]
    with pytest.raises(PermissionError, match=f"^{urls[scheme]}: the server answered {status}"):
        fetch(urls[scheme])
    assert len(server.requests) == 1


def test_a_server_without_ranges_will_do(server: FlakyServer) -> None:
    server.faults["file"] = ["no-range", "reset", "no-range"]
    url = f"{server.url}/bucket/file"
    assert fetch(url, start=1000, size=500, total=SIZE) == CONTENT[1000:1500]
    assert fetch(url, size=SIZE, total=SIZE) == CONTENT


@pytest.mark.parametrize("kind", ["http", "s3", "pipe", "path"])
def test_a_part_and_the_whole_and_the_wrong_size(kind: str, server: FlakyServer, urls: dict[str, str]) -> None:
    path = str(server.root / "bucket" / "file")
    url = {**urls, "pipe": f"pipe:cat {path}", "path": path}[kind]
    assert fetch(url) == CONTENT
    assert fetch(url, start=300, size=7, total=SIZE) == CONTENT[300:307]
    with pytest.raises(ShardError, match=r"file: 1,048,576 bytes, where its list says 1,048,577"):
        fetch(url, size=SIZE + 1, total=SIZE + 1)


def test_a_list_of_unknown_length_that_breaks_off_is_read_afresh(server: FlakyServer) -> None:
    server.faults["file"] = ["reset", 503]
    assert fetch(f"{server.url}/bucket/file") == CONTENT


def test_a_command_that_fails_is_repeated_then_named_with_what_it_said(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    assert fetch(f"pipe:test -e {marker} && echo yes || (touch {marker}; exit 1)") == b"yes\n"
    with pytest.raises(ConnectionError, match=r"^pipe:echo half.*: given up .* status 3: no such host"):
        fetch("pipe:echo half; echo no such host >&2; exit 3")


def test_attempts_end_when_nobody_waits_for_the_answer(server: FlakyServer) -> None:
    stop = Event()
    stop.set()
    server.faults["*"] = [503]
    with pytest.raises(ConnectionError, match="no longer wanted"):
        fetch(f"{server.url}/bucket/file", stop=stop)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("https://me:secret@host/shards", "password"),
        ("https://secret@host/shards", "password"),
        ("s3://me:secret@bucket/shards", "password"),
        ("https://host/shards?X-Amz-Signature=secret", "signed"),
    ],
)
def test_a_secret_in_a_url_is_refused_and_not_repeated(url: str, hint: str) -> None:
    with pytest.raises(ValueError, match=hint) as caught:
        check_url(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["http:///shards", "s3://"])
def test_a_url_without_a_server_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="names no"):
        check_url(url)


def test_without_boto3_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def refuse(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith(("boto3", "botocore")):
            raise ImportError(name)
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    module._s3_client.cache_clear()  # the tests before share a client
    with pytest.raises(ImportError, match=r"pip install 'sequencer2d\[shards\]'"):
        fetch("s3://bucket/file")


def test_without_credentials_it_says_so(urls: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("AWS_") and name != "AWS_ENDPOINT_URL":
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    module._s3_client.cache_clear()
    with pytest.raises(PermissionError, match=r"^s3://bucket/file: no credentials; set AWS_PROFILE"):
        fetch(urls["s3"])


def test_a_profile_that_is_not_there_is_named(urls: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    module._s3_client.cache_clear()
    with pytest.raises(ValueError, match=r"s3:// cannot be used: .*nobody.*see to AWS_PROFILE"):
        fetch(urls["s3"])
