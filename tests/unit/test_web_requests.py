"""The page's requests, without a browser: who is answered, what is read, and how much of it."""

import http.client
import io
import json
import socket
import urllib.request
from urllib.parse import urlsplit

import pytest
from PIL import Image

from megadual import web
from megadual.errors import UserError
from megadual.hf.folder import open_folder
from megadual.testing.models import write_export


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return open_folder(write_export(tmp_path_factory.mktemp("web")), "cpu")


@pytest.fixture(scope="module")
def address(model):
    blocks = web.page(model, "tiny")
    yield web.serve(blocks, "127.0.0.1", None, ["Pictures.example"], block=False).rstrip("/")
    blocks.close(verbose=False)


def request(address: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, str]:
    """Status and text of the answer to a request with these headers."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=30)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("GET" if body is None else "POST", path, body, headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def call(address: str, name: str, *data) -> dict:
    """What a handler gives: {"data": ...} or {"error": ...}."""
    _, said = request(
        address, f"/gradio_api/call/{name}", json.dumps({"data": data}).encode(), Content_Type="application/json"
    )
    with urllib.request.urlopen(
        f"{address}/gradio_api/call/{name}/{json.loads(said)['event_id']}", timeout=30
    ) as stream:
        event, _, data = stream.read().decode().strip().rpartition("event: ")[2].partition("\ndata: ")
    return {"data" if event == "complete" else "error": json.loads(data)}


def upload(address: str, data: bytes, name: str = "a.png") -> tuple[int, str]:
    head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\nContent-Type: image/png\r\n\r\n'
    body = head.encode() + data + b"\r\n--x--\r\n"
    return request(address, "/gradio_api/upload", body, Content_Type="multipart/form-data; boundary=x")


def file(path: str) -> dict:
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:1"}, 200),
        ({"Host": "[::1]:7860"}, 200),
        ({"Host": "pictures.EXAMPLE"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "evil.example:7860"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Host": ""}, 403),
        ({"Origin": "http://localhost:7860"}, 200),
        ({"Origin": "https://pictures.example"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost.evil.example"}, 403),
        ({"Host": "evil.example", "Origin": "http://evil.example"}, 403),
    ],
)
def test_foreign_requests_are_refused(address, headers, status):
    found, said = request(address, "/", **headers)
    assert found == status, said
    if "Host" in headers and status == 403:
        assert f"--allow-host {'evil' if 'evil' in headers['Host'] and headers['Host'][0] == 'e' else ''}" in said


def test_a_foreign_page_can_start_nothing(address):
    body = json.dumps({"data": ["a cat", 1, 3, 1, 900, 0.96, 5]}).encode()
    status, _ = request(address, "/gradio_api/call/draw", body, Origin="http://evil.example")
    assert status == 403


def test_a_long_prompt_is_told(address):
    sampling = [3, 1, 900, 0.96, 5]
    assert "data" in call(address, "draw", "a <image> of a cat<|im_end|>", 1, *sampling)
    assert "the prompt takes 18001 positions" in call(address, "draw", "x" * 18_000, 1, *sampling)["error"]["error"]
    said = {"text": "x" * 18_000, "files": []}
    assert "the model has 512" in call(address, "chat", said, *sampling)["error"]["error"]
    assert "error" in call(address, "draw", "a cat", web.MOST_IMAGES + 1, *sampling)


def test_uploads_are_bounded(address, monkeypatch):
    status, said = upload(address, b"x" * (web.MOST_BYTES + 1))
    assert status == 413 and "size" in said
    status, said = request(address, "/gradio_api/upload", b"", Content_Length=str(web.MOST_FILES * web.MOST_BYTES + 1))
    assert status == 413 and "bytes, more than" in said
    status, said = request(address, "/gradio_api/call/draw", b"", Content_Length=str(web.MOST_TYPED + 1))
    assert status == 413 and f"more than {web.MOST_TYPED}" in said
    status, said = request(address, "/gradio_api/upload", iter([b"x"]), Transfer_Encoding="chunked")
    assert status == 411
    _, said = upload(address, png(Image.new("RGB", (8, 8))))
    (path,) = json.loads(said)
    error = call(address, "chat", {"text": "a", "files": [file(path)] * (web.MOST_FILES + 1)}, 3, 1, 900, 0.96, 5)
    assert f"at most {web.MOST_FILES} are read" in error["error"]["error"]
    monkeypatch.setattr(web, "MOST_PIXELS", 63)
    assert "8 x 8 pixels, more than 63" in call(address, "describe", file(path), "", "")["error"]["error"]


def test_images_are_read_in_the_formats_that_are_meant(address, model):
    picture = Image.effect_mandelbrot((40, 30), (-2, -1.5, 1, 1.5), 20)
    (path,) = json.loads(upload(address, png(picture))[1])
    (text,) = model.describe([picture], "a", max_new_tokens=web.MAX_NEW_TOKENS)
    assert call(address, "describe", file(path), "a", "")["data"] == [("a" + text).strip()]
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    (path,) = json.loads(upload(address, eps, "<b>.jpg")[1])
    error = call(address, "describe", file(path), "", "")["error"]["error"]
    assert "it is none of JPEG" in error and "<b>" not in error
    assert "choose an image first" in call(address, "describe", None, "", "")["error"]["error"]


def test_nothing_but_uploads_is_read(address, tmp_path, monkeypatch):
    """Neither files of this machine nor addresses, however a request spells them."""
    local, read = str(tmp_path / "a.png"), []
    (tmp_path / "a.png").write_bytes(png(Image.new("RGB", (8, 8))))
    monkeypatch.setattr(web, "read_image", lambda path, _: read.append(path) or Image.open(local))
    sampling = [3, 1, 900, 0.96, 5]
    images = [
        file(local), {"path": local}, {"url": local}, {"path": None, "url": "data:image/png;base64,AAAA"},
        file("http://127.0.0.1:9/a.png"), {"path": "http://127.0.0.1:9/a.png"},
    ]  # fmt: skip
    for image in images:
        answers = [
            call(address, "describe", image, "", ""),
            call(address, "edit", image, "a", 1.5, 1, *sampling),
            call(address, "chat", {"text": "a", "files": [image]}, *sampling),
        ]
        assert all("error" in answer for answer in answers) and not read, image
        assert all(web.NO_UPLOAD in str(answer) for answer in answers[:2]) or image == file(local), answers


def test_a_port_in_use_is_one_line(model, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit):
            web.main(["nowhere", "--port", str(port)])
        said = capsys.readouterr().err
    assert said.startswith(f"error: --host 127.0.0.1 --port {port}: Address already in use") and said.count("\n") == 1
    with pytest.raises(UserError, match="--host 192.0.2.1: "):
        web.serve(web.page(model, "tiny"), "192.0.2.1", None, block=False)
