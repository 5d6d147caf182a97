"""A page on which an exported model talks, draws, describes and edits: `python -m megadual.web DIR`.

It needs `megadual[web]`, and listens on this machine alone unless --host says otherwise; nothing is sent anywhere else.
"""

import argparse
import random
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from megadual.chat import read_image
from megadual.errors import command
from megadual.hf.folder import open_folder

MOST_IMAGES = 16
SEEDS = 100_000  # short enough to be shown whole
MAX_NEW_TOKENS = 64
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

    def chat(said, messages, *options, progress=gr.Progress(track_tqdm=True)):  # noqa: B008
        text, files = (said or {}).get("text", ""), (said or {}).get("files", [])
        if not text.strip() and not files:
            raise gr.Error("Say something first.")
        content = [*map(read_image, files), *([text.strip()] if text.strip() else [])]
        messages = [*messages, {"role": "user", "content": content}]
        answer = model.interleave(messages, **sampling(*options))
        messages.append({"role": "assistant", "content": answer})
        return None, messages, shown(messages)

    def draw(prompt, count, *options, progress=gr.Progress(track_tqdm=True)):  # noqa: B008
        chosen = sampling(*options)
        return with_seeds(model.draw(prompt, int(count), **chosen), chosen["seed"])

    def describe(image: Image.Image | None, beginning: str, question: str) -> str:
        if image is None:
            raise gr.Error("Choose an image first.")
        if question.strip():
            return model.ask([image], question, max_new_tokens=MAX_NEW_TOKENS)[0].strip()
        (text,) = model.describe([image], beginning, max_new_tokens=MAX_NEW_TOKENS)
        return (beginning + text).strip()

    def edit(image, instruction, image_scale, count, *options, progress=gr.Progress(track_tqdm=True)):  # noqa: B008
        if image is None:
            raise gr.Error("Choose an image first.")
        chosen = sampling(*options)
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
        # As it is: the processor knows what to do with transparency.
        return gr.Image(
            type="pil", image_mode=None, label="Image", sources=["upload", "clipboard"], height=380, elem_id=elem_id
        )

    def gallery(elem_id: str) -> gr.Gallery:
        return gr.Gallery(
            label="Drawings", columns=2, height=680, format="png", elem_id=elem_id, elem_classes="drawings", scale=3,
            interactive=False,
        )  # fmt: skip

    # One at a time: all use the model's caches.
    alone: dict[str, Any] = dict(concurrency_limit=1, concurrency_id="model")
    with gr.Blocks(title="MegaDual", analytics_enabled=False, fill_width=True) as blocks:
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
    return blocks


def serve(blocks: gr.Blocks, host: str, port: int | None, block: bool = True) -> str:
    """Show the page and return its address; with `block`, until the process is stopped."""
    look: dict[str, Any] = dict(theme=gr.themes.Base(primary_hue="indigo"), css=CSS, footer_links=[])
    _, address, _ = blocks.launch(
        server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, ssr_mode=False, **look
    )
    if block:
        print(f"{address} (Ctrl-C ends it)", flush=True)
        blocks.block_thread()
    return address


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", metavar="DIR", help="exported folder")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    parser.add_argument("--port", type=int, help="port (default: a free one from 7860 on)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")
    args = parser.parse_args(argv)
    serve(page(open_folder(args.model, args.device), Path(args.model).resolve().name), args.host, args.port)


if __name__ == "__main__":
    main()
