"""A page on which an exported model draws and describes: `python -m megadual.web DIR`. Needs `megadual[web]`.

It listens on this machine alone unless --host says otherwise; nothing is sent anywhere else.
"""

import argparse
import random
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from megadual.errors import command
from megadual.hf.folder import open_folder

MOST_IMAGES = 16
SEEDS = 100_000  # short enough to be shown whole
MAX_NEW_TOKENS = 64
EXAMPLE = "two red apples to the left of a cat, on blue"
CSS = """
.gradio-container { width: 100% !important; max-width: 1180px !important; margin: auto; }
#drawings img, #shown img { image-rendering: pixelated; object-fit: contain; }
"""


def page(model, name: str) -> gr.Blocks:
    """The page of a model; `name` is what it shows as the model's."""
    (rows, columns), size = model.dualtoken.config.grid, model.dualtoken.config.image_size

    def draw(prompt, count, scale, temperature, top_k, top_p, seed, progress=gr.Progress(track_tqdm=True)):  # noqa: B008
        seed = random.randrange(SEEDS) if seed is None or seed < 0 else int(seed)
        images = model.draw(
            prompt, int(count), cfg_scale=scale, temperature=temperature, top_k=int(top_k), top_p=top_p, seed=seed,
            progress=True,
        )  # fmt: skip
        return [(image, f"seed {seed + i}") for i, image in enumerate(images)]

    def describe(image: Image.Image | None, beginning: str) -> str:
        if image is None:
            raise gr.Error("Choose an image first.")
        (text,) = model.describe([image], beginning, max_new_tokens=MAX_NEW_TOKENS)
        return (beginning + text).strip()

    # One at a time: both use the model's caches.
    alone = dict(concurrency_limit=1, concurrency_id="model")
    with gr.Blocks(title="MegaDual", analytics_enabled=False, fill_width=True) as blocks:
        gr.Markdown(f"# MegaDual\n`{name}` · images of {size} × {size}, {rows} × {columns} positions · {model.device}")
        with gr.Tab("Draw"), gr.Row():
            with gr.Column(scale=2):
                prompt = gr.Textbox(EXAMPLE, label="What to draw", lines=2, elem_id="prompt")
                with gr.Row():
                    count = gr.Slider(1, MOST_IMAGES, 4, step=1, label="Images")
                    scale = gr.Slider(1, 8, 3, step=0.5, label="Guidance", info="1: none")
                with gr.Accordion("Sampling", open=False):
                    temperature = gr.Slider(0.1, 2, 1, step=0.05, label="Temperature")
                    top_k = gr.Slider(1, 2000, 900, step=1, label="Top k")
                    top_p = gr.Slider(0.05, 1, 0.96, step=0.01, label="Top p")
                    seed = gr.Number(-1, label="Seed", info="-1: another one each time", precision=0, elem_id="seed")
                start = gr.Button("Draw", variant="primary", elem_id="draw")
            gallery = gr.Gallery(
                label="Drawings", columns=2, height=680, format="png", elem_id="drawings", scale=3, interactive=False
            )
            inputs = [prompt, count, scale, temperature, top_k, top_p, seed]
            gr.on([start.click, prompt.submit], draw, inputs, gallery, api_name="draw", **alone)
        with gr.Tab("Describe"), gr.Row():
            with gr.Column(scale=2):
                shown = gr.Image(
                    type="pil",
                    image_mode=None,  # the processor knows what to do with transparency
                    label="Image",
                    sources=["upload", "clipboard"],
                    height=380,
                    elem_id="shown",
                )
                beginning = gr.Textbox(label="Beginning of the text", info="may be left empty", elem_id="beginning")
                tell = gr.Button("Describe", variant="primary", elem_id="describe")
            with gr.Column(scale=3):
                text = gr.Textbox(label="Description", lines=6, elem_id="description", buttons=["copy"])
            gr.on([tell.click, beginning.submit], describe, [shown, beginning], text, api_name="describe", **alone)
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
