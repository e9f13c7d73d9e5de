"""Weights from and to the Hugging Face hub, played by a server on this machine: cache, offline mode, errors, cards."""

import base64
import hashlib
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import save
from timm.data import resolve_data_config
from torch import nn

import sequencer2d.registry  # noqa: F401 - so that timm knows the architecture of what we push
from sequencer2d import zoo
from sequencer2d.model import Sequencer2D, SequencerConfig
from sequencer2d.preprocessing import Preprocessing
from sequencer2d.weights import ModelCard, from_pretrained, load_model, push_to_hub, save_model
from sequencer2d.zoo import create_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """The part of the hub's API that downloads and uploads need, files in memory."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.broken = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub  # type: ignore[assignment]

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        name = self.path.lstrip("/").replace("/resolve/main/", ":").replace(f"/resolve/{COMMIT}/", ":")
        repos = {name.partition(":")[0] for name in self.server.files}
        if self.server.broken:
            self.reply(403, X_Error_Message="the hub is closed today")
        elif name in self.server.files:
            body = self.server.files[name]
            self.reply(200, body, ETag=f'"{hashlib.sha256(body).hexdigest()}"', X_Repo_Commit=COMMIT)
        else:
            self.reply(404, X_Error_Code="EntryNotFound" if name.partition(":")[0] in repos else "RepoNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer: Any = {}
        if self.server.broken:
            return self.reply(403, X_Error_Message="the hub is closed today")
        if self.path == "/api/repos/create":
            wish = json.loads(body)
            answer = {"url": f"{self.server.address}/{wish['organization']}/{wish['name']}"}
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        elif "/commit/" in self.path:
            repo = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.server.files[f"{repo}:{entry['value']['path']}"] = content
            answer = {
                "success": True,
                "commitOid": COMMIT,
                "commitUrl": f"{self.server.address}/{repo}/commit/{COMMIT}",
            }
        return self.reply(200, json.dumps(answer).encode(), Content_Type="application/json")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
    template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def published(hub: Hub, tiny_config: SequencerConfig, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A small variant whose weights timm has published."""
    variant = zoo.Variant(
        config=tiny_config, image_size=16, crop_pct=0.9, source="test", hub_id="timm/sequencer2d_test.in1k"
    )
    monkeypatch.setitem(zoo.VARIANTS, "sequencer2d_test", variant)
    model = Sequencer2D(tiny_config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    hub.files[f"{variant.hub_id}:model.safetensors"] = save(model.state_dict(), {"format": "pt"})
    return model


IMAGE = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_published_weights_are_fetched_once_and_then_come_from_the_cache(
    hub: Hub, published: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert torch.equal(create_model("sequencer2d_test", pretrained=True).eval()(IMAGE), published(IMAGE))
    downloads = [request for request in hub.requests if request.startswith("GET")]
    create_model("sequencer2d_test", pretrained=True)
    assert [request for request in hub.requests if request.startswith("GET")] == downloads
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    before = list(hub.requests)
    assert torch.equal(create_model("sequencer2d_test", pretrained=True).eval()(IMAGE), published(IMAGE))
    assert hub.requests == before


def test_weights_may_come_from_any_repository_name_or_folder(
    hub: Hub, published: nn.Module, tmp_path: Path, tiny_config: SequencerConfig
) -> None:
    hub.files["someone/finetuned:model.safetensors"] = hub.files["timm/sequencer2d_test.in1k:model.safetensors"]
    torch.save(published.state_dict(), tmp_path / "pytorch_model.bin")
    for source in ("hf-hub:someone/finetuned", "sequencer2d_test", tmp_path, tmp_path / "pytorch_model.bin"):
        model = create_model("sequencer2d_test", pretrained=source).eval()
        assert torch.equal(model(IMAGE), published(IMAGE)), source
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth does not exist; give .*hf-hub:user/name"):
        create_model("sequencer2d_test", pretrained="nowhere.pth")
    with pytest.raises(FileNotFoundError, match="no repository someone/nothing"):
        create_model("sequencer2d_test", pretrained="hf-hub:someone/nothing")


def test_another_number_of_classes_is_adapted_to_and_said(
    published: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="sequencer2d"):
        model = create_model("sequencer2d_test", pretrained=True, num_classes=3, in_chans=1)
    assert model(IMAGE[:, :1]).shape == (1, 3)
    assert "classifier of 5 classes begun anew; first convolution adapted from 3 to 1 channels" in caplog.text


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_network_the_error_says_how_to_pass_a_file(
    offline: bool, hub: Hub, published: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.shutdown()
    hub.server_close()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between its attempts
    reason = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
    with pytest.raises(FileNotFoundError, match=rf"sequencer2d_test\.in1k.*{reason}.*pretrained='path/to/file'"):
        create_model("sequencer2d_test", pretrained=True)
    with pytest.raises(FileNotFoundError, match=rf"someone/animals.*{reason}.*give load_model\('path/to/file'\)"):
        from_pretrained("someone/animals")
    with pytest.raises(FileNotFoundError, match=rf"someone/animals.*{reason}.*the local file in its place"):
        load_model("hf-hub:someone/animals")


@pytest.mark.parametrize(
    ("repo", "message"),
    [
        ("timm/nothing", "no repository timm/nothing"),
        ("timm/empty", "has no model.safetensors"),
        ("a b", "is no name of a repository"),
    ],
)
def test_what_the_hub_lacks_is_named(repo: str, message: str, hub: Hub) -> None:
    hub.files["timm/empty:README.md"] = b"nothing else"
    with pytest.raises(FileNotFoundError, match=message):
        from_pretrained(repo)


def test_a_variant_without_published_weights_says_which_have_some() -> None:
    with pytest.raises(ValueError, match=r"no weights of gru_sequencer2d_s .*sequencer2d_s, .*pretrained='path"):
        create_model("gru_sequencer2d_s", pretrained=True)


def test_timms_repository_is_loaded_by_its_id(published: nn.Module) -> None:
    model, card = load_model("hf-hub:timm/sequencer2d_test.in1k")
    assert torch.equal(model(IMAGE), published(IMAGE))
    assert card.architecture == "sequencer2d_test"
    assert card.preprocessing == Preprocessing(image_size=16, crop_pct=0.9)
    by_name, _ = load_model("sequencer2d_test")
    assert torch.equal(by_name(IMAGE), published(IMAGE))


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, Sequencer2D, ModelCard]:
    model = create_model("sequencer2d_conv_p_patch2_16", layers=(1, 1), num_classes=3).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    card = ModelCard(
        architecture="sequencer2d_conv_p_patch2_16",
        config=model.config,
        class_names=("cat", "dog", "größe"),
        preprocessing=Preprocessing(image_size=16),
        training={"data": "animals", "val_top1": 0.9123},
    )
    save_model(model, card, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors", model, card


def test_a_model_pushed_comes_back_and_brings_its_card(hub: Hub, trained: tuple[Path, Sequencer2D, ModelCard]) -> None:
    path, model, card = trained
    assert push_to_hub(path, "someone/animals") == f"{hub.address}/someone/animals"
    back, card_back = from_pretrained("someone/animals")
    assert card_back == card
    assert torch.equal(back(IMAGE), model(IMAGE))
    readme = hub.files["someone/animals:README.md"].decode()
    assert readme.startswith("---\nlibrary_name: sequencer2d\n")
    assert "91.23%" in readme
    assert "cat, dog, größe" in readme


def test_timm_loads_what_was_pushed(hub: Hub, trained: tuple[Path, Sequencer2D, ModelCard]) -> None:
    path, model, _ = trained
    push_to_hub(path, "someone/animals")
    theirs: Any = timm.create_model("hf-hub:someone/animals", pretrained=True).eval()
    assert torch.equal(theirs(IMAGE), model(IMAGE))
    assert resolve_data_config(model=theirs)["crop_pct"] == 1.0
    assert theirs.pretrained_cfg["label_names"] == ["cat", "dog", "größe"]


def test_a_refused_upload_says_why(hub: Hub, trained: tuple[Path, Sequencer2D, ModelCard]) -> None:
    hub.broken = True
    with pytest.raises(OSError, match=r"someone/animals could not be uploaded: .*HF_TOKEN"):
        push_to_hub(trained[0], "someone/animals")


@pytest.mark.parametrize("text", ["no route to the proxy\nmore", ""])
def test_what_the_http_library_says_is_passed_on(
    text: str, trained: tuple[Path, Sequencer2D, ModelCard], monkeypatch: pytest.MonkeyPatch
) -> None:
    class ProxyError(Exception):
        """Not an `OSError`, as of httpx."""

    def fail(*_: Any, **__: Any) -> None:
        raise ProxyError(text)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", fail)
    why = text.partition("\n")[0] or "ProxyError"
    with pytest.raises(FileNotFoundError, match=rf"model\.safetensors could not be downloaded: {why}; try again"):
        from_pretrained("someone/animals")
    with pytest.raises(OSError, match=rf"someone/animals could not be uploaded: {why}; log in"):
        push_to_hub(trained[0], "someone/animals")


def test_torch_hub_finds_a_variant_and_loads_a_file(tmp_path: Path, tiny_config: SequencerConfig) -> None:
    root = str(Path(__file__).parent.parent)
    torch.save(Sequencer2D(tiny_config).state_dict(), tmp_path / "weights.pth")
    shapes = {name: getattr(tiny_config, name) for name in ("layers", "patch_sizes", "embed_dims", "hidden_sizes")}
    model = torch.hub.load(
        root,
        "sequencer2d_s",
        source="local",
        pretrained=str(tmp_path / "weights.pth"),
        num_classes=5,
        mlp_ratios=(2.0, 2.0),
        **shapes,
    )
    assert isinstance(model, nn.Module)


def test_a_description_that_cannot_be_had_is_told(
    hub: Hub,
    trained: tuple[Path, Sequencer2D, ModelCard],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Without it, other classes and another preprocessing would be taken without a word."""
    push_to_hub(trained[0], "someone/animals")
    original = zoo.download

    def download(repo_id: str, filename: str, **options: Any) -> Path:
        if filename == "config.json":
            raise FileNotFoundError("the hub cannot be reached")
        return original(repo_id, filename, **options)

    with monkeypatch.context() as patch:
        patch.setattr(zoo, "download", download)
        from_pretrained("someone/animals")
    assert "the hub cannot be reached; classes and preprocessing are taken for those of the architecture" in caplog.text
    caplog.clear()
    del hub.files["someone/animals:config.json"]
    hub.files["someone/other:model.safetensors"] = hub.files["someone/animals:model.safetensors"]
    from_pretrained("someone/other")
    assert not caplog.messages
