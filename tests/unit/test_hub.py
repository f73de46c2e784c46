"""The hub client against a small fake hub on this machine: what is asked for and sent, what is said when it fails."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from library import hub
from library.hub import HubPath, Uploader, files_of_model, parse_hub_path
from library.log import UserError
from library.options import HubOptions

COMMIT = "a" * 40


class FakeHub:
    """Repositories in memory; ``refuse`` makes every commit fail, ``gate`` is the only token that may read."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.created: list[dict[str, Any]] = []
        self.tokens: set[str | None] = set()
        self.fetched: list[str] = []
        self.refuse = False
        self.gate: str | None = None
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def _handler(hub_self) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                hub_self.get(self)

            def do_HEAD(self) -> None:
                hub_self.get(self)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                hub_self.post(self, body)

        return Handler

    def answer(self, request: BaseHTTPRequestHandler, status: int, value: Any, headers: dict[str, str] | None = None):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        request.send_response(status)
        for name, text in {"Content-Length": str(len(data)), **(headers or {})}.items():
            request.send_header(name, text)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(data)

    def get(self, request: BaseHTTPRequestHandler) -> None:
        if self.gate is not None and request.headers.get("Authorization") != f"Bearer {self.gate}":
            self.answer(request, 401, {"error": "who are you"}, {"X-Error-Code": "GatedRepo"})
            return
        path = unquote(urlsplit(request.path).path)
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repo = "/".join(parts[2:4])
            if repo not in self.files:
                self.answer(request, 404, {"error": "no"}, {"X-Error-Code": "RepoNotFound"})
                return
            names = sorted(self.files[repo])
            if "tree" in parts:
                rows = [
                    {"type": "file", "path": n, "size": len(self.files[repo][n]), "oid": _etag(self.files[repo][n])}
                    for n in names
                ]
                self.answer(request, 200, rows)
                return
            info = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names], "private": False}
            self.answer(request, 200, info)
            return
        repo, name = "/".join(parts[:2]), "/".join(parts[4:])
        content = self.files.get(repo, {}).get(name)
        if content is None:
            self.answer(request, 404, {"error": "no"}, {"X-Error-Code": "EntryNotFound"})
            return
        if request.command == "GET":
            self.fetched.append(name)
        self.answer(request, 200, content, {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": COMMIT})

    def post(self, request: BaseHTTPRequestHandler, body: bytes) -> None:
        path = unquote(urlsplit(request.path).path)
        self.tokens.add(request.headers.get("Authorization"))
        if path == "/api/repos/create":
            asked = json.loads(body)
            self.created.append(asked)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.files.setdefault(repo, {})
            self.answer(request, 200, {"url": f"{self.url}/{repo}"})
        elif path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            rows = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            self.answer(request, 200, {"files": rows})
        elif path.endswith("/commit/main") and not self.refuse:
            repo = "/".join(path.strip("/").split("/")[2:4])
            for line in body.splitlines():
                row = json.loads(line)
                if row["key"] == "file":
                    self.files[repo][row["value"]["path"]] = base64.b64decode(row["value"]["content"])
            self.answer(request, 200, {"commitUrl": f"{self.url}/{repo}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self.answer(request, 403, {"error": "not allowed"})


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    from huggingface_hub import constants

    server = FakeHub()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server
    server.server.shutdown()
    server.server.server_close()


# ---- uploads


def options(**values: Any) -> HubOptions:
    return HubOptions(huggingface_repo_id="me/loras", **values)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(("folder", "place"), [(None, ""), ("runs/one", "runs/one/"), ("/runs/", "runs/")])
def test_upload_of_a_file_and_a_folder(
    fake: FakeHub, tmp_path: Path, background: bool, folder: str | None, place: str
) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"weights")
    state = tmp_path / "a-state"
    (state / "sub").mkdir(parents=True)
    (state / "state.json").write_bytes(b"{}")
    (state / "sub" / "x.bin").write_bytes(b"x")
    uploader = Uploader(options(huggingface_path_in_repo=folder, async_upload=background))
    uploader.check()
    uploader.upload(tmp_path / "a.safetensors")
    uploader.upload(state, wait=True)
    assert fake.files["me/loras"] == {
        f"{place}a.safetensors": b"weights",
        f"{place}a-state/state.json": b"{}",
        f"{place}a-state/sub/x.bin": b"x",
    }
    uploader.close()
    assert uploader.failures == []
    assert fake.tokens == {"Bearer hf_secret"}
    assert len(fake.created) == 1


@pytest.mark.parametrize(("visibility", "private"), [(None, True), ("private", True), ("public", False)])
def test_visibility_of_a_new_repository(fake: FakeHub, visibility: str | None, private: bool) -> None:
    Uploader(options(huggingface_repo_visibility=visibility)).check()
    (asked,) = fake.created
    assert asked.get("visibility", "private" if asked.get("private") else "public") == (
        "private" if private else "public"
    )


@pytest.mark.parametrize("kind", [None, "model", "dataset"])
def test_kind_of_the_repository(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str | None
) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"weights")
    paths: list[str] = []
    original = fake.post

    def post(request: BaseHTTPRequestHandler, body: bytes) -> None:
        paths.append(request.path)
        original(request, body)

    monkeypatch.setattr(fake, "post", post)
    uploader = Uploader(options(huggingface_repo_type=kind))
    uploader.upload(tmp_path / "a.safetensors")
    assert uploader.failures == []
    assert fake.created[0].get("type", "model") == (kind or "model")
    assert paths[-1] == f"/api/{kind or 'model'}s/me/loras/commit/main"


@pytest.mark.parametrize("background", [False, True])
def test_a_failed_upload_is_said_twice_and_stops_nothing(
    fake: FakeHub, tmp_path: Path, caplog: pytest.LogCaptureFixture, background: bool
) -> None:
    fake.refuse = True
    (tmp_path / "a.safetensors").write_bytes(b"w")
    uploader = Uploader(options(async_upload=background, huggingface_token="hf_other"))
    with caplog.at_level(logging.WARNING):
        uploader.upload(tmp_path / "a.safetensors")
        uploader.close()
    assert uploader.failures == ["a.safetensors"]
    messages = [record.getMessage() for record in caplog.records if record.name == "library.hub"]
    assert len(messages) == 2
    assert all("a.safetensors" in message and "me/loras" in message for message in messages)
    assert "hf_other" not in caplog.text
    assert fake.tokens == {"Bearer hf_other"}


def test_hub_that_cannot_be_reached_is_one_line_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="--huggingface_repo_id me/loras") as caught:
        Uploader(options()).check()
    assert "\n" not in str(caught.value)


def test_mistyped_path_is_told_at_once_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def nobody_knows(*place: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("library.hub.getproxies", dict)
    monkeypatch.setattr("library.hub.socket.getaddrinfo", nobody_knows)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_: pytest.fail("the hub was asked"))
    with pytest.raises(UserError, match=r"modles/dir: no such file or folder here.*Name or service not known"):
        hub.download_model("modles/dir", "--pretrained_model_name_or_path")


# ---- downloads

DIFFUSERS = [
    "README.md",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder/pytorch_model.bin",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.bin",
    "vae/config.json",
    "vae/diffusion_pytorch_model.bin",
    "whole.ckpt",
]


def test_needed_files_of_a_model() -> None:
    assert files_of_model(DIFFUSERS) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.bin",
    ]
    assert files_of_model([name for name in DIFFUSERS if name != "unet/config.json"]) is None
    shards = [f"unet/diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    index = "unet/diffusion_pytorch_model.safetensors.index.json"
    sharded = [name for name in DIFFUSERS if not name.startswith("unet/diff")] + [*shards, index]
    chosen = files_of_model(sharded)
    assert chosen is not None
    assert {index, *shards} <= set(chosen)
    assert files_of_model(["config.json", "diffusion_pytorch_model.safetensors"], ("vae",)) is not None
    assert files_of_model(["config.json", "model.safetensors"]) is None


def test_files_of_a_variant() -> None:
    assert files_of_model(DIFFUSERS, ("unet",), "fp16") == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.fp16.safetensors",
    ]
    assert files_of_model(DIFFUSERS, variant="fp16") is None  # the text encoder has none


def test_a_variant_is_fetched_beside_what_is_here(fake: FakeHub) -> None:
    fake.files["some/model"] = {name: name.encode() for name in DIFFUSERS}
    hub.download_model("some/model", "model_to_load", ("unet",))
    folder = hub.download_model("some/model", "model_to_load", ("unet",), variant="fp16")
    assert (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    with pytest.raises(UserError, match="no whole variant fp32 of a Diffusers model"):
        hub.download_model("some/model", "model_to_load", ("unet",), variant="fp32")


def test_download_of_a_model_once_and_only_what_is_needed(fake: FakeHub) -> None:
    fake.files["some/model"] = {name: name.encode() for name in DIFFUSERS}
    folder = hub.download_model("some/model", "--pretrained_model_name_or_path")
    wanted = files_of_model(DIFFUSERS)
    assert wanted is not None
    assert sorted(fake.fetched) == sorted(wanted)
    assert (folder / "unet" / "config.json").read_bytes() == b"unet/config.json"
    fake.server.shutdown()
    fake.server.server_close()
    assert hub.download_model("some/model", "--pretrained_model_name_or_path") == folder
    assert len(fake.fetched) == len(wanted)


def test_a_gated_model_is_fetched_with_the_given_token(fake: FakeHub) -> None:
    fake.files["some/model"] = {name: name.encode() for name in DIFFUSERS}
    fake.gate = "hf_other"
    with pytest.raises(UserError, match="could not be fetched") as caught:
        hub.download_model("some/model", "--vae")
    assert "hf_" not in str(caught.value)
    assert (hub.download_model("some/model", "--vae", token="hf_other") / "unet" / "config.json").is_file()


@pytest.mark.parametrize("repo", ["some/nothing", "some/lora"])
def test_a_model_that_is_not_there_is_one_line(fake: FakeHub, repo: str) -> None:
    fake.files["some/lora"] = {"a.safetensors": b"x"}
    with pytest.raises(UserError, match=f"--vae {repo}") as caught:
        hub.download_model(repo, "--vae", ("vae",))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("me/repo/a/b-state", HubPath("me/repo", "a/b-state")),
        ("me/repo/a/:dev", HubPath("me/repo", "a", "dev", "model")),
        ("me/repo/a:dev:dataset", HubPath("me/repo", "a", "dev", "dataset")),
    ],
)
def test_state_paths(text: str, expected: HubPath) -> None:
    assert parse_hub_path(text) == expected


@pytest.mark.parametrize("text", ["me/repo", "state", "me/repo/a:b:c:d", ""])
def test_wrong_state_paths(text: str) -> None:
    with pytest.raises(UserError, match="owner/name/path"):
        parse_hub_path(text)


def test_a_run_resumes_from_the_hub_only_when_told_so(fake: FakeHub) -> None:
    from library.options import SaveOptions
    from library.options.settings import ScriptOptions, Settings
    from library.training.setup import find_state

    fake.files["me/loras"] = {"s/x-state/state.json": b"{}"}

    def found(**values: Any) -> str | None:
        return find_state(Settings(ScriptOptions("test", (SaveOptions, HubOptions)), values, {}))

    there = found(resume="me/loras/s/x-state", resume_from_huggingface=True)
    assert there is not None
    assert (Path(there) / "state.json").read_bytes() == b"{}"
    assert found(resume="me/loras/s/x-state") == "me/loras/s/x-state"
    assert found() is None


def test_download_of_a_state(fake: FakeHub) -> None:
    fake.files["me/loras"] = {"s/x-state/state.json": b"{}", "s/x-state/a/b": b"1", "s/x-state-2/c": b"2", "m": b"3"}
    folder = hub.download_state("me/loras/s/x-state")
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == [
        "a/b",
        "state.json",
    ]
    assert sorted(fake.fetched) == ["s/x-state/a/b", "s/x-state/state.json"]
    with pytest.raises(UserError, match="there is no folder s/y"):
        hub.download_state("me/loras/s/y")
