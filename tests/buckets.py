"""An S3-compatible server on loopback, with one bucket."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sequencer2d.data import fetch


@contextmanager
def bucket(monkeypatch: pytest.MonkeyPatch) -> "Iterator[Any]":
    """boto3's client of a server that has the bucket `images`; environment variables lead `fetch` to it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        boto3: Any = pytest.importorskip("boto3", reason="the extra shards is not installed")
        moto: Any = pytest.importorskip("moto.server", reason="moto, the S3-compatible server, is not installed")
    store = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    store.start()
    host, port = store.get_host_and_port()
    settings = {"ENDPOINT_URL": f"http://{host}:{port}", "ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s"}
    for name, value in {**settings, "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    fetch._s3_client.cache_clear()
    client = boto3.client("s3")
    client.create_bucket(Bucket="images")
    try:
        yield client
    finally:
        fetch._s3_client.cache_clear()
        store.stop()


def upload(client: Any, folder: Path, prefix: str) -> str:
    """Puts the files of a folder into the bucket; returns their address."""
    for path in folder.iterdir():
        client.upload_file(str(path), "images", f"{prefix}/{path.name}")
    return f"s3://images/{prefix}"
