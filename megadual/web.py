"""A page on which an exported model talks, draws, describes and edits: `python -m megadual.web DIR`.

It needs `megadual[web]`, and listens on this machine alone unless --host says otherwise; nothing is sent anywhere else.
Requests are answered under the names of this machine's loopback, under --host and each --allow-host alone: whatever
page is open in a browser beside it could else use it under a name of its own (DNS rebinding) or by a form.
"""

import argparse
import functools
import html
import random
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
from PIL import Image
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from megadual.chat import one_line
from megadual.errors import UserError, command
from megadual.hf.folder import open_folder
from megadual.images import ADDRESSES, read_image

MOST_IMAGES = 16
SEEDS = 100_000  # short enough to be shown whole
MAX_NEW_TOKENS = 64
MOST_FILES = 8  # of a message
MOST_BYTES = 32 << 20  # of a file
MOST_TYPED = 1 << 20  # bytes of any other request
MOST_PIXELS = 50_000_000  # of an image
MOST_WAITING = 32  # requests
MOST_VISITORS = 100  # whose conversations are kept
DAY = 86_400  # seconds that files are kept for
NO_UPLOAD = "an image is uploaded; files and addresses that a request names are not read"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
ANY = ("0.0.0.0", "::", "")  # as --host: all addresses of this machine
EXAMPLE = "two red apples to the left of a cat, on blue"
CSS = """
.gradio-container { width: 100% !important; max-width: 1180px !important; margin: auto; }
.drawings img, #shown img, #source img, #history img { image-rendering: pixelated; object-fit: contain; }
"""


def shown(messages: list[dict]) -> list[dict]:
    """A conversation as the page shows it: each text and each image by itself."""
    return [
        {"role": message["role"], "content": gr.Image(part, format="png") if isinstance(part, Image.Image) else part}
        for message in messages
        for part in message["content"]
    ]


class OwnRequests:
    """Lets requests through that are made under one of `names`, by a page of one of them, with no more than a message's
    files in their bodies; others are told why not."""

    def __init__(self, app, names: set[str]):
        self.app, self.names = app, names

    async def __call__(self, scope, receive, send) -> None:
        refused = self._refused(scope) if scope["type"] in ("http", "websocket") else None
        if refused is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": refused[1]})
        else:
            await PlainTextResponse(refused[1] + "\n", refused[0])(scope, receive, send)

    def _refused(self, scope) -> tuple[int, str] | None:
        """The status and the reason."""
        headers = Headers(scope=scope)
        host, origin = _host_name(f"//{headers.get('host', '')}"), headers.get("origin")
        if host not in self.names:
            return 403, f"this page is not at '{host}'; --allow-host {host or 'NAME'} lets it be"
        if origin is not None and _host_name(origin) not in self.names:
            return 403, f"requests of pages of '{origin}' are refused"
        if scope.get("method") in ("POST", "PUT", "PATCH"):
            length = headers.get("content-length", "")
            if not length.isdecimal():
                return 411, "the length of the request is missing"
            most = MOST_FILES * MOST_BYTES if scope["path"].endswith("/upload") else MOST_TYPED
            if int(length) > most:
                return 413, f"the request has {length} bytes, more than {most}"
        return None


def _host_name(address: str) -> str:
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""


def only_uploads(component):
    """`component`, which takes files that a browser has sent: gradio would fetch addresses that requests name, too."""
    move = component.async_move_resource_to_block_cache

    async def moved(path):
        if str(path).lower().startswith(ADDRESSES):
            raise problem(NO_UPLOAD)
        return await move(path)

    component.async_move_resource_to_block_cache = moved
    return component


def from_uploads(image: gr.Image) -> gr.Image:
    """`image`, which gives the path of what was uploaded: gradio would open it, in any format, and where a request
    leaves out what marks a file, any other of this machine as well."""

    def path(data) -> str | None:
        if data is None:
            return None
        if not data.path or not Path(data.path).resolve().is_relative_to(Path(image.GRADIO_CACHE).resolve()):
            raise problem(NO_UPLOAD)
        return data.path

    image.preprocess = path  # type: ignore[method-assign,assignment]
    return image


def problem(text: str) -> gr.Error:
    """What the page shows, as text: gradio would render it."""
    return gr.Error(html.escape(text), print_exception=False)


def told(handler):
    """`handler`, whose mistakes (a prompt that is too long, a file that is no image) the page shows."""

    @functools.wraps(handler)
    def handled(*args, **kwargs):
        try:
            return handler(*args, **kwargs)
        except (ValueError, RuntimeError) as error:  # one without memory is a RuntimeError
            raise problem(one_line(error)) from error

    return handled


def uploaded(path: str | None) -> Image.Image:
    """The image of a file that was uploaded, as it is: the processor knows what to do with transparency."""
    if path is None:
        raise UserError("choose an image first")
    try:
        return read_image(path, MOST_PIXELS)
    except ValueError as error:
        raise UserError(f"'{Path(path).name}' cannot be read as an image: {error}") from error


def page(model, name: str) -> gr.Blocks:
    """The page of a model; `name` is what it shows as the model's."""
    (rows, columns), size = model.dualtoken.config.grid, model.dualtoken.config.image_size

    def sampling(scale, temperature, top_k, top_p, seed) -> dict:
        seed = random.randrange(SEEDS) if seed is None or seed < 0 else int(seed)
        return dict(
            cfg_scale=scale, temperature=temperature, top_k=int(top_k), top_p=top_p, seed=seed, progress=True
        )  # fmt: skip

    def with_seeds(images: list[Image.Image], seed: int) -> list[tuple[Image.Image, str]]:
        return [(image, f"seed {seed + i}") for i, image in enumerate(images)]

    @told
    def chat(said, messages, *options, progress=gr.Progress(track_tqdm=True)):  # noqa: B008
        text, files = (said or {}).get("text", ""), (said or {}).get("files", [])
        if not text.strip() and not files:
            raise UserError("say something first")
        if len(files) > MOST_FILES:
            raise UserError(f"{len(files)} images at once; at most {MOST_FILES} are read")
        content = [*map(uploaded, files), *([text.strip()] if text.strip() else [])]
        messages = [*messages, {"role": "user", "content": content}]
        answer = model.interleave(messages, **sampling(*options))
        messages.append({"role": "assistant", "content": answer})
        return None, messages, shown(messages)

    @told
    def draw(prompt, count, *options, progress=gr.Progress(track_tqdm=True)):  # noqa: B008
        chosen = sampling(*options)
        return with_seeds(model.draw(prompt, int(count), **chosen), chosen["seed"])

    @told
    def describe(path: str | None, beginning: str, question: str) -> str:
        image = uploaded(path)
        if question.strip():
            return model.ask([image], question, max_new_tokens=MAX_NEW_TOKENS)[0].strip()
        (text,) = model.describe([image], beginning, max_new_tokens=MAX_NEW_TOKENS)
        return (beginning + text).strip()

    @told
    def edit(path, instruction, image_scale, count, *options, progress=gr.Progress(track_tqdm=True)):  # noqa: B008
        image, chosen = uploaded(path), sampling(*options)
        return with_seeds(model.edit(image, instruction, int(count), image_scale=image_scale, **chosen), chosen["seed"])

    def drawing_options(tab: str) -> list[gr.components.Component]:
        """Guidance and, folded away, sampling: what `sampling` takes."""
        scale = gr.Slider(1, 8, 3, step=0.5, label="Guidance", info="1: none")
        with gr.Accordion("Sampling", open=False):
            return [
                scale,
                gr.Slider(0.1, 2, 1, step=0.05, label="Temperature"),
                gr.Slider(1, 2000, 900, step=1, label="Top k"),
                gr.Slider(0.05, 1, 0.96, step=0.01, label="Top p"),
                gr.Number(-1, label="Seed", info="-1: another one each time", precision=0, elem_id=f"{tab}-seed"),
            ]

    def chosen_image(elem_id: str) -> gr.Image:
        image = gr.Image(
            type="filepath",
            image_mode=None,
            label="Image",
            sources=["upload", "clipboard"],
            height=380,
            elem_id=elem_id,
        )
        return from_uploads(only_uploads(image))

    def gallery(elem_id: str) -> gr.Gallery:
        return gr.Gallery(
            label="Drawings", columns=2, height=680, format="png", elem_id=elem_id, elem_classes="drawings", scale=3,
            interactive=False,
        )  # fmt: skip

    # One at a time: all use the model's caches.
    alone: dict[str, Any] = dict(concurrency_limit=1, concurrency_id="model")
    with gr.Blocks(title="MegaDual", analytics_enabled=False, fill_width=True, delete_cache=(DAY, DAY)) as blocks:
        gr.Markdown(f"# MegaDual\n`{name}` · images of {size} × {size}, {rows} × {columns} positions · {model.device}")
        with gr.Tab("Chat"):
            messages = gr.State([])
            history = gr.Chatbot(
                label="Conversation", height=560, elem_id="history", render_markdown=False, buttons=[],
                feedback_options=None,
            )  # fmt: skip
            said = gr.MultimodalTextbox(
                placeholder="Say something, with images or without", show_label=False, file_types=["image"],
                file_count="multiple", sources=["upload"], elem_id="said",
            )  # fmt: skip
            only_uploads(said)
            again = gr.Button("New conversation", elem_id="again")
            options = drawing_options("chat")
            inputs = [said, messages, *options]
            said.submit(chat, inputs, [said, messages, history], api_name="chat", **alone)
            again.click(lambda: ([], []), None, [messages, history])
        with gr.Tab("Draw"), gr.Row():
            with gr.Column(scale=2):
                prompt = gr.Textbox(EXAMPLE, label="What to draw", lines=2, elem_id="prompt")
                count = gr.Slider(1, MOST_IMAGES, 4, step=1, label="Images")
                options = drawing_options("draw")
                start = gr.Button("Draw", variant="primary", elem_id="draw")
            drawings = gallery("drawings")
            gr.on([start.click, prompt.submit], draw, [prompt, count, *options], drawings, api_name="draw", **alone)
        with gr.Tab("Describe"), gr.Row():
            with gr.Column(scale=2):
                image = chosen_image("shown")
                question = gr.Textbox(label="Question", info="empty: a caption", elem_id="question")
                beginning = gr.Textbox(label="Beginning of the caption", info="may be left empty", elem_id="beginning")
                tell = gr.Button("Describe", variant="primary", elem_id="describe")
            with gr.Column(scale=3):
                text = gr.Textbox(label="Description", lines=6, elem_id="description", buttons=["copy"])
            asked = [tell.click, beginning.submit, question.submit]
            gr.on(asked, describe, [image, beginning, question], text, api_name="describe", **alone)
        with gr.Tab("Edit"), gr.Row():
            with gr.Column(scale=2):
                source = chosen_image("source")
                instruction = gr.Textbox(label="What to change", lines=2, elem_id="instruction")
                image_scale = gr.Slider(
                    1, 4, 1.5, step=0.1, label="Guidance to the image", info="with more of it less is changed"
                )
                count = gr.Slider(1, MOST_IMAGES, 1, step=1, label="Images")
                options = drawing_options("edit")
                change = gr.Button("Edit", variant="primary", elem_id="edit")
            edits = gallery("edits")
            inputs = [source, instruction, image_scale, count, *options]
            gr.on([change.click, instruction.submit], edit, inputs, edits, api_name="edit", **alone)
    return blocks.queue(max_size=MOST_WAITING)


def check_free(host: str, port: int | None) -> None:
    """UserError where nothing can listen there: gradio would try for seconds and say another thing."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host.strip("[]"), port or 0), family=family).close()
    except (OSError, OverflowError) as error:
        where = f"--host {host}" + (f" --port {port}" if port else "")
        raise UserError(f"{where}: {getattr(error, 'strerror', None) or error}; give others") from error


def serve(
    blocks: gr.Blocks, host: str, port: int | None, allowed: tuple[str, ...] | list[str] = (), block: bool = True
) -> str:
    """Show the page and return its address; with `block`, until the process is stopped.

    `allowed` are names that it may be asked for under, beside `host` and those of the loopback. UserError where the
    port is taken.
    """
    check_free(host, port)
    names = {name.lower().strip("[]") for name in (*LOOPBACK, host, *allowed)} - {*ANY}
    look: dict[str, Any] = dict(theme=gr.themes.Base(primary_hue="indigo"), css=CSS, footer_links=[])
    bounds: dict[str, Any] = dict(
        max_file_size=MOST_BYTES,
        state_session_capacity=MOST_VISITORS,
        app_kwargs={"middleware": [Middleware(OwnRequests, names=names)]},
    )
    _, address, _ = blocks.launch(
        server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, ssr_mode=False, **look,
        **bounds,
    )  # fmt: skip
    if block:
        print(f"{address} (Ctrl-C ends it)", flush=True)
        blocks.block_thread()
    return address


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", metavar="DIR", help="exported folder")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    parser.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="name of this machine that "
        "browsers may reach the page under, for --host 0.0.0.0 or a proxy before it; may be given again")  # fmt: skip
    parser.add_argument("--port", type=int, help="port (default: a free one from 7860 on)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")
    args = parser.parse_args(argv)
    check_free(args.host, args.port)  # before the model is read
    blocks = page(open_folder(args.model, args.device), Path(args.model).resolve().name)
    serve(blocks, args.host, args.port, args.allow_host)


if __name__ == "__main__":
    main()
