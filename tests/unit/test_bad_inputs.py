"""What an exported model and the tokenizer let in: each bad input is one line of error, and nothing else happens."""

import base64
import http.server
import io
import os
import struct
import sys
import threading
import zlib

import pytest
import torch
from PIL import Image

from megadual import chat, images
from megadual.hf import processing_megadual
from megadual.hf.folder import open_folder
from megadual.testing.models import write_export
from megadual.testing.vision import tiny_dualtoken
from megadual.vision import to_image
from megadual.vision.tokenizer import centre_crop


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_export(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def model(folder):
    return open_folder(folder, "cpu")


def png_of(width: int, height: int) -> bytes:
    """A PNG that says it is so large, and holds nothing."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = b"IDAT" + bytes(4)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in (header, data)
    )


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of what may be called an image."""
    folder = tmp_path_factory.mktemp("files")
    good = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(good, "PNG")
    contents = {
        "good.png": good.getvalue(), "text.png": b"no image", "empty.png": b"", "cut.png": good.getvalue()[:60],
        "eps.jpg": EPS, "huge.png": png_of(60_000, 60_000), "large.png": png_of(12_000, 12_000),
    }  # fmt: skip
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    (folder / "dir.png").mkdir()
    os.mkfifo(folder / "fifo.png")
    with open(folder / "long.png", "wb") as file:
        file.truncate(images.MAX_BYTES + 1)
    return folder


FILES = [
    ("text.png", "it is none of JPEG, PNG"),
    ("empty.png", "it is none of JPEG"),
    ("cut.png", "."),
    ("eps.jpg", "it is none of JPEG"),
    ("huge.png", "pixels"),
    ("large.png", "it has 12000 x 12000 pixels, more than 100000000"),
    ("long.png", "bytes, more than"),
    ("dir.png", "it is no file"),
    ("fifo.png", "it is no file"),
    ("/dev/zero", "it is no file"),
    ("nowhere.png", "No such file"),
    ("a\0b.png", "null"),
    ("\udcff.png", "No such file"),
]


@pytest.mark.parametrize(("name", "reason"), FILES)
def test_a_file_that_is_no_image(files, name, reason):
    with pytest.raises(ValueError, match=reason) as raised:
        images.read_image(files / name)
    assert str(raised.value) and "\n" not in str(raised.value)


def test_a_file_is_read_by_what_it_holds(files):
    (files / "png.jpg").write_bytes((files / "good.png").read_bytes())
    assert images.read_image(files / "png.jpg").getpixel((0, 0)) == (255, 0, 0)


LINES = [
    ("a\0b", "the line holds U+0000"),
    ("a\x1bb", "the line holds U+001B"),
    ("\udcff\udcfe", "the line holds U+DCFF"),
    ("x " * 100_000, "the prompt takes 200"),
    ("/draw " + "x" * 1000, "the prompt takes 1001 positions and an image 16; the model has 512"),
    ("/" + "x" * 1000, "'/xxx"),
    ('/image "', "a quote is not closed"),
    ("/describe '", "a quote is not closed"),
    ("/image ''", "'' cannot be read as an image: No such file"),
    *((f"/image FILES/{name}", f"{name}' cannot be read") for name, _ in FILES if name.isprintable()),
    ("/describe FILES/dir.png", "it is no file"),
    ("/image /dev/zero", "it is no file"),
    ("/set temperature nan", "temperature nan: it must be at least 0.01"),
    ("/set cfg_scale inf", "cfg_scale inf: it must be at least 0"),
    ("/set seed " + "9" * 5000, "seed 9999"),
    ("/set top_k 1e3", "it takes a whole number"),
    ("/set max_new_tokens -1", "it must be at least 1"),
    ("/edit <image>", "there is no image yet"),
]


def test_lines_that_are_none_cost_a_line_of_error_each(folder, files, monkeypatch, capsys, tmp_path):
    typed = "\n".join([line.replace("FILES", str(files)) for line, _ in LINES] + ["/set seed 7"])
    stdin = io.TextIOWrapper(io.BytesIO(typed.encode(errors="surrogateescape")), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    chat.main([str(folder), "--device", "cpu", "--output", str(tmp_path)])
    said = capsys.readouterr()
    errors = said.err.splitlines()[1:]
    assert len(errors) == len(LINES) > 25
    for error, (line, reason) in zip(errors, LINES, strict=True):
        assert error.startswith("error: ") and reason in error and len(error) < 400, line
    assert said.out == "seed is 7\n"


def test_an_answer_that_is_stopped_leaves_the_conversation(folder, monkeypatch, capsys, tmp_path):
    model = open_folder(folder, "cpu")
    monkeypatch.setattr(chat, "open_folder", lambda *_: model)
    stops = iter([True, False])
    embed = model.model.embed_tokens.forward

    def interrupted(ids):
        if next(stops, False):
            raise KeyboardInterrupt
        return embed(ids)

    monkeypatch.setattr(model.model.embed_tokens, "forward", interrupted)
    monkeypatch.setattr(sys, "stdin", io.StringIO("/set max_new_tokens 2\ntwo cats\n/history\na tree\n/history"))
    chat.main([str(folder), "--output", str(tmp_path)])
    said = capsys.readouterr()
    assert "error: stopped\n" in said.err
    assert said.out.startswith("max_new_tokens is 2\n\n") and "user: a tree" in said.out and "two cats" not in said.out


TEXT = {"type": "text", "text": "a"}


def message(*parts, role="user") -> list[dict]:
    return [{"role": role, "content": list(parts)}]


PROMPTS = [
    ([], "there are no messages"),
    (message(TEXT, role="user\n<image>"), "a message has the role 'user"),
    ([{"content": "a"}], "a message has the role None"),
    (message({"type": "video", "url": "http://127.0.0.1:9/"}), "has the part {'type': 'video'"),
    (message({"type": "audio", "audio": "/etc/passwd"}), "parts are texts and images"),
    (message({"type": "text"}), "parts are texts and images"),
    (message({"type": "text", "text": 5}), "parts are texts and images"),
    (message(5), "has the part 5"),
    (message("a\ud800"), "U+D800, which is no character"),
    (message({"type": "image"}), "1 <image> marks for 0 images"),
    (message({"type": "image", "url": "http://127.0.0.1:9/a.png"}), "allow_addresses=True"),
    (message({"type": "image_url", "image_url": {"url": "HTTPS://127.0.0.1:9/a.png"}}), "allow_addresses=True"),
    (message({"type": "image", "path": "/etc/hostname"}), "allow_paths=FOLDER"),
    (message({"type": "image", "url": "file:///etc/hostname"}), "not opened if a file"),
    (message({"type": "image", "url": "ftp://127.0.0.1/a.png"}), "no base64"),
    (message({"type": "image", "image": "data:image/png,abc"}), "data:image/...;base64,..."),
    (message({"type": "image", "image": "data:image/png;base64,abc"}), "is no image"),
    (message({"type": "image", "image": "data:image/png;base64," + base64.b64encode(EPS).decode()}), "is none of JPEG"),
    (message({"type": "image", "base64": base64.b64encode(png_of(60_000, 60_000)).decode()}), "pixels"),
    (message({"type": "image", "image": "x" * 200}), "'" + "x" * 80 + "...' is no image"),
]


@pytest.mark.parametrize(("messages", "reason"), PROMPTS)
def test_messages_that_are_refused(model, messages, reason, monkeypatch):
    monkeypatch.setattr(processing_megadual, "read_address", None)
    with pytest.raises(ValueError) as raised:
        model.processor.prompt(messages)
    assert reason in str(raised.value) and "\n" not in str(raised.value) and len(str(raised.value)) < 400


def red(model, image, **allowed) -> bool:
    """Whether the processor sees a red image."""
    (pixels,) = model.processor(images=image, **allowed)["pixel_values"]
    return bool((pixels[0] > 0.9).all() and (pixels[1:] < -0.9).all())


def test_files_are_opened_where_they_are_allowed(model, files, tmp_path):
    good = str(files / "good.png")
    encoded = base64.b64encode((files / "good.png").read_bytes()).decode()
    assert red(model, encoded) and red(model, f"data:image/png;base64,{encoded}")
    assert red(model, good, allow_paths=True) and red(model, files / "good.png", allow_paths=str(files))
    (tmp_path / "link.png").symlink_to(good)
    with pytest.raises(ValueError, match="it is not in"):
        red(model, str(tmp_path / "link.png"), allow_paths=tmp_path)
    with pytest.raises(ValueError, match="is no image: it is none of JPEG"):
        red(model, str(files / "eps.jpg"), allow_paths=True)
    with pytest.raises(ValueError, match="allow_paths"):
        red(model, good)


def test_what_a_caller_allows_is_not_saved(model, tmp_path):
    processor = type(model.processor)(model.tokenizer, allow_addresses=True, allow_paths="/")
    assert processor.allow_addresses and processor.allow_paths == "/"
    processor.save_pretrained(tmp_path)
    assert not any("allow" in path.read_text() for path in tmp_path.glob("*.json"))
    opened = type(processor).from_pretrained(tmp_path)
    assert not opened.allow_addresses and not opened.allow_paths
    assert type(processor).from_pretrained(tmp_path, allow_addresses=True).allow_addresses


class Server(http.server.BaseHTTPRequestHandler):
    """Of each path what it says."""

    def do_GET(self):
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
            return
        self.send_response(404 if self.path == "/404" else 200)
        self.end_headers()
        try:
            if self.path == "/good":
                self.wfile.write(self.server.good)
            while self.path in ("/endless", "/slow"):
                self.wfile.write(bytes(1 << 16 if self.path == "/endless" else 1))
                if self.path == "/slow" and self.server.stop.wait(0.05):
                    return
        except OSError:  # the other side has gone
            return

    def log_message(self, *_):
        return


@pytest.fixture(scope="module")
def server(files):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.good, server.stop = (files / "good.png").read_bytes(), threading.Event()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.stop.set()
        server.shutdown()


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/404", "404"),
        ("/text", "it is none of JPEG"),
        ("/endless", "it has more than 1000000 bytes"),
        ("/slow", "it takes more than 0.2 s"),
        ("/to/file:///etc/hostname", "file:"),
        ("/to/ftp://127.0.0.1/a", "ftp"),
    ],
)
def test_addresses_are_bounded(model, server, path, reason, monkeypatch):
    monkeypatch.setattr(images, "MAX_BYTES", 1_000_000)
    monkeypatch.setattr(images, "SECONDS", 0.2)
    with pytest.raises(ValueError, match=reason) as raised:
        red(model, server + path, allow_addresses=True)
    assert "\n" not in str(raised.value)


def test_addresses_are_opened_where_they_are_allowed(model, server):
    assert red(model, f"{server}/good", allow_addresses=True) and red(model, f"{server}/to//good", allow_addresses=True)
    part = {"type": "image", "url": f"{server}/good"}
    options = dict(tokenize=True, return_dict=True, processor_kwargs={"allow_addresses": True})
    assert "pixel_values" in model.processor.apply_chat_template(message(part), **options)


SAMPLING = [
    (dict(temperature=float("nan")), "temperature nan: it must be"),
    (dict(temperature=-1.0), "temperature -1.0: it must be"),
    (dict(top_p=0.0), "top_p 0.0"),
    (dict(top_k=0), "top_k 0"),
    (dict(seed=-1), "seed -1"),
]


@pytest.mark.parametrize(("options", "reason"), SAMPLING)
def test_sampling_that_cannot_be(model, options, reason):
    image = Image.new("RGB", (8, 8))
    calls = [
        lambda: model.draw("a", **options),
        lambda: model.edit(image, "a", **options),
        lambda: model.interleave("a", **options),
        lambda: model.describe([image], **options),
        lambda: model.ask([image], "a", **options),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=reason):
            call()
    for draws in calls[:3]:
        options = dict(temperature=0.0)
        with pytest.raises(ValueError, match="temperature 0.0"):
            draws()


DUALTOKEN = [
    (lambda dualtoken: dualtoken.encode(torch.zeros(1, 3, 8, 8)), r"shape \(1, 3, 8, 8\), this DualToken takes"),
    (lambda dualtoken: dualtoken.encode(torch.zeros(3, 16, 16)), r"shape \(3, 16, 16\)"),
    (lambda dualtoken: dualtoken.encode([]), "there are no images"),
    (lambda dualtoken: dualtoken.encode(["a.png"]), "images are a tensor or PIL images, not str"),
    (lambda dualtoken: dualtoken.decode({}), "pixel are missing"),
    (lambda dualtoken: dualtoken.decode({"pixel": torch.zeros(1, 4, 4, 2, dtype=torch.int64)}), "expected"),
    (lambda dualtoken: dualtoken.decode({"pixel": torch.zeros(1, 4, 4, 3)}), "expected integers"),
    (lambda dualtoken: dualtoken.decode({"pixel": torch.full((1, 4, 4, 3), 32)}), "codes are 0 to 31, here 32 to 32"),
    (lambda dualtoken: dualtoken.decode({"pixel": torch.full((1, 4, 4, 3), -1)}), "pixel codes are 0 to 31, here -1"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "reason"), DUALTOKEN)
def test_what_a_dualtoken_refuses(call, reason):
    with pytest.raises(ValueError, match=reason):
        call(tiny_dualtoken())


def test_a_dualtoken_takes_pictures_and_what_it_gave():
    dualtoken = tiny_dualtoken()
    picture = Image.effect_mandelbrot((40, 30), (-2, -1.5, 1, 1.5), 20)
    pixels = dualtoken.preprocess(picture)[None]
    encoded, expected = dualtoken.encode(picture), dualtoken.encode(pixels)
    assert all(torch.equal(encoded.codes[name], codes) for name, codes in expected.codes.items())
    assert torch.equal(encoded.pooled, expected.pooled)
    assert len(dualtoken.encode([picture, picture]).codes["pixel"]) == 2
    decoded = dualtoken.decode(encoded)
    assert torch.equal(decoded, dualtoken.decode(expected.codes)) and to_image(decoded[0]).size == (16, 16)
    about = "DualToken(16 px, 4 x 4 positions; codes a position: semantic 3 of 32, pixel 3 of 32; "
    assert repr(dualtoken).startswith(about) and "\n" not in repr(dualtoken)
    assert repr(encoded) == "Encoded(semantic (1, 4, 4, 3), pixel (1, 4, 4, 3), pooled (1, 32))"


def test_a_line_of_pixels_is_cropped_before_it_grows():
    """Its shortest side at 256 would make 256 x 25.6 million pixels of it."""
    line = Image.new("L", (1, 100_000))
    line.putpixel((0, 50_000), 255)
    assert max(centre_crop(line, 256).getdata()) > (200, 200, 200)
