"""From a trained checkpoint of any layout to a Hugging Face folder that works by itself, its verification, and back."""

import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from checkpoints_tools import convert_from_hf, convert_to_hf, try_export, verify
from megadual.errors import UserError
from megadual.hf.export import Exported
from megadual.hf.modeling_megadual import MegaDualForCausalLM
from megadual.hf.tensors import CheckpointTensors, FolderTensors
from megadual.streams import Marks, SpecialIds
from megadual.synthetic.corpus import make_corpus
from megadual.synthetic.files import png_bytes, write_tar
from megadual.testing.checkpoints import train_and_save
from megadual.testing.distributed import run_distributed
from megadual.testing.models import write_dualtoken, write_run
from megadual.testing.shards import random_conversations, write_shard_set
from megadual.text import fingerprint, load_text_tokenizer
from megadual.train.checkpoint import resolve_checkpoint
from megadual.vision import DualToken

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("MEGADUAL_EXPORT_PYTHON", sys.executable)  # `make test-transformers`: with transformers 4
LAYOUTS = {
    "one": (1, ["train.seq_len=128"]),
    "TP2": (2, ["parallel.tensor=2"]),
    "PP2": (2, ["parallel.pipeline=2"]),
    "TP2xPP2+SP": (4, ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true", "train.seq_len=128"]),
    "DeepSpeed ZeRO-3": (2, ["engine=deepspeed", "parallel.zero_stage=3"]),
    "DeepSpeed PP2": (2, ["engine=deepspeed", "parallel.pipeline=2"]),
    "tied bf16 PP2": (
        2,
        [
            "parallel.pipeline=2",
            "model.tie_embeddings=true",
            "train.precision=bf16",
            "model.kv_heads=1",
            "train.seq_len=128",
        ],  # fmt: skip
    ),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Gives (run, exported folder) of a run of two steps under one of LAYOUTS; each is made once."""
    made = {}

    def export(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("convert")
            processes, overrides = LAYOUTS[name]
            run = write_run(folder, *overrides)
            run_distributed(train_and_save, processes, run)
            convert_to_hf.main(["--checkpoint", run.run.dir, "--output", str(folder / "hf")])
            made[name] = run, folder / "hf"
        return made[name]

    return export


@pytest.fixture(scope="module")
def layout_4(exported):
    return exported("TP2xPP2+SP")


def run_verify(run, folder, capsys, *args) -> tuple[int, dict]:
    """(exit code, report) of verify.py."""
    capsys.readouterr()
    try:
        verify.main(["--checkpoint", run.run.dir, "--model", str(folder), "--python", PYTHON, *map(str, args)])
        code = 0
    except SystemExit as exit:
        code = exit.code
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_export_is_the_checkpoint(name, exported, tmp_path, capsys):
    run, folder = exported(name)
    code, report = run_verify(run, folder, capsys, "--output", tmp_path / "report.json")
    assert code == 0 and report["equal"] and report["tensors_compared"] > 100
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert set(report["max_abs_logit_diff_per_stream"]) == {"text", "semantic", "pixel"}
    assert min(report["logits_compared"].values()) > 1000 and min(report["logit_std"].values()) > 0.01


def test_the_export_is_the_checkpoint_on_conversations_and_edits_too(exported, tmp_path, capsys):
    run, folder = exported("one")
    tokenizer, dualtoken = load_text_tokenizer(run.model.text_tokenizer), DualToken.from_pretrained(run.model.dualtoken)
    documents = random_conversations(
        12, grid=dualtoken.config.grid, streams=dualtoken.config.code_streams, special=Marks.of(tokenizer)
    )
    write_shard_set(
        tmp_path / "set",
        documents,
        dualtoken={"fingerprint": dualtoken.fingerprint()},
        text_tokenizer={"fingerprint": fingerprint(tokenizer)},
        marks=Marks.of(tokenizer),
    )
    code, report = run_verify(run, folder, capsys, "--data", tmp_path / "set", "--samples", 10)
    assert code == 0 and report["equal"] and report["logits_compared"]["pixel"] > 1000
    assert report["kinds"] == {"pairs": 3, "edits": 3, "conversations": 4}


@pytest.mark.parametrize("name", LAYOUTS)
def test_export_import_export_is_bitwise(name, exported, tmp_path):
    run, folder = exported(name)
    convert_from_hf.main(["--model", str(folder), "--output", str(tmp_path / "start")])
    convert_to_hf.main(["--checkpoint", str(tmp_path / "start"), "--output", str(tmp_path / "again")])
    names = {path.name for path in folder.iterdir() if path.suffix != ".py"}
    assert {"model.safetensors", "config.json", "tokenizer.json", "processor_config.json"} < names
    for file in names - {"README.md"}:  # which tells what the checkpoint is
        assert (folder / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_several_files_are_one_model(layout_4, tmp_path):
    """Each but those of a single tensor keeps to the size; transformers reads them by their index, and so do we."""
    run, folder = layout_4
    several, limit = tmp_path / "several", 100_000
    sizes = ["--max-shard-size", "100KB"]
    convert_to_hf.main(["--checkpoint", run.run.dir, "--output", str(several), *sizes])
    files = {path.name: load_file(path) for path in several.glob("*.safetensors")}
    assert len(files) > 5
    assert all(len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= limit for tensors in files.values())
    whole = load_file(folder / "model.safetensors")
    assert {name for tensors in files.values() for name in tensors} == whole.keys()
    loaded = MegaDualForCausalLM.from_pretrained(several).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in whole.items())
    again = FolderTensors(several)
    assert all(torch.equal(again.read(name), tensor) for name, tensor in whole.items())
    (several / sorted(files)[2]).unlink()
    with pytest.raises(UserError, match=f"holds no {sorted(files)[2]}"):
        FolderTensors(several)


def test_a_changed_weight_is_found(layout_4, tmp_path, capsys):
    run, folder = layout_4
    changed = shutil.copytree(folder, tmp_path / "hf")
    weights = load_file(changed / "model.safetensors")
    weights["model.layers.1.self_attn.k_proj.weight"][3, 5] += 0.5
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    code, report = run_verify(run, changed, capsys)
    assert code == 1 and not report["equal"]
    assert report["tensors_different"] == [
        "model.layers.1.self_attn.k_proj.weight", "decoder.layers.1.self_attention.linear_qkv.weight"
    ]  # fmt: skip
    assert report["max_abs_logit_diff"] > report["tolerance"]


USE = """
import sys

class NoMegadual:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "megadual":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NoMegadual)
import json, torch
from PIL import Image
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, AutoTokenizer, pipeline

folder = sys.argv[1]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
image = Image.effect_mandelbrot((40, 30), (-2, -1.5, 1, 1.5), 20)
inputs = processor(text=["a <image>"], images=[image])
generated = model.generate(**inputs, max_new_tokens=4)
buffers = {name: tensor.double().sum().item() for name, tensor in model.named_buffers()}
first = model.draw(["two cats"], seed=3)[0]
for name in ("AutoModel", "AutoModelForImageTextToText"):
    other = getattr(transformers, name).from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(other.lm_head.weight.float(), model.lm_head.weight.float()), name

question = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "two"}]}]
pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
piped = pipe(text=question, max_new_tokens=3, return_full_text=False)[0]["generated_text"]
inputs_of_chat = processor.apply_chat_template(
    question, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
chatted = model.generate(**inputs_of_chat, max_new_tokens=3, do_sample=True, num_return_sequences=2)
edited = model.edit(image, "two", seed=3)[0]
history = [*question, {"role": "assistant", "content": ["a", edited]}, {"role": "user", "content": "and"}]
again = processor.prompt(history)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
trained = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).train()
trained.gradient_checkpointing_enable()
loss = trained(**again, labels=again["input_ids"]).loss
loss.backward()
print(json.dumps({
    "modules": sorted(name for name in sys.modules if name.partition(".")[0] == "megadual"),
    "described": model.describe([image], max_new_tokens=3, min_new_tokens=3),
    "generated": generated.shape[1] - inputs["input_ids"].shape[1],
    "size": first.size,
    "repeats": first.tobytes() == model.draw(["two cats"], seed=3)[0].tobytes(),
    "dtypes": [str(model.lm_head.weight.dtype), str(model.dualtoken.codebook("pixel").dtype)],
    "codes": model.dualtoken.encode(inputs["pixel_values"]).codes["semantic"].flatten().tolist(),
    "rope": config.text_config.to_dict()["rope_parameters"]["rope_theta"],
    "buffers": buffers,
    "piped": piped == model.ask([image], "two", max_new_tokens=3)[0],
    "sampled": len(chatted),
    "shown as codes": list(again["image_codes"].shape),
    "answer": [type(part).__name__ for part in model.interleave(history, max_new_tokens=3, max_images=1)],
    "loss": loss.item(),
    "template": tokenizer.chat_template == processor.chat_template,
    "ends": model.generation_config.eos_token_id,
}))
"""


@pytest.mark.parametrize("name", ["TP2xPP2+SP", "tied bf16 PP2"])
def test_the_folder_works_without_megadual(name, exported, tmp_path):
    """Also under the meta device that loading uses: buffers that are in no file must hold their values."""
    run, folder = exported(name)
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [PYTHON, "-I", "-c", USE, str(folder)]
    pipes = dict(stdin=subprocess.DEVNULL, capture_output=True, text=True)
    done = subprocess.run(command, cwd=tmp_path, env=environment, **pipes)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["modules"] == [] and found["repeats"] and found["size"] == [16, 16] and 1 <= found["generated"] <= 4
    assert found["piped"] and found["sampled"] == 2 and found["shown as codes"] == [2, 16, 6] and found["template"]
    assert set(found["answer"]) <= {"str", "Image"} and 5 < found["loss"] < 20
    special = SpecialIds.of(load_text_tokenizer(run.model.text_tokenizer))
    assert found["ends"] == [special.end_of_text, special.im_end]
    assert found["described"][0] and found["rope"] == run.model.rope_base
    assert found["dtypes"] == ["torch.bfloat16" if run.train.precision == "bf16" else "torch.float32", "torch.float32"]
    dualtoken = DualToken.from_pretrained(run.model.dualtoken)
    image = Image.effect_mandelbrot((40, 30), (-2, -1.5, 1, 1.5), 20)
    codes = dualtoken.encode(dualtoken.preprocess(image)[None]).codes["semantic"].flatten().tolist()
    assert found["codes"] == codes
    for name, tensor in dualtoken.named_buffers():
        assert found["buffers"][f"dualtoken.{name}"] == tensor.double().sum().item(), name
    head = run.model.hidden // run.model.heads
    inverse = run.model.rope_base ** -(torch.arange(0, head, 2).float() / head)
    assert found["buffers"]["model.rotary_emb.inv_freq"] == pytest.approx(inverse.double().sum().item(), abs=1e-6)


def test_try_export_describes_draws_answers_and_edits(layout_4, tmp_path):
    _, folder = layout_4
    make_corpus(tmp_path / "corpus", train=4, questions=1, edits=1, heldout=6, size=16)
    script = ROOT / "checkpoints_tools" / "try_export.py"
    arguments = [
        "--model", folder, "--output", "use", "--data", "corpus/heldout-*.tar", "--describe", 2, "--draw", 3,
        "--questions", "corpus/questions-heldout-*.tar", "--answer", 4, "--edits", "corpus/edits-heldout-*.parquet",
        "--edit", 2,
    ]  # fmt: skip
    command = [PYTHON, "-I", str(script), *map(str, arguments)]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = ("descriptions", "drawings", "answers", "edits")
    descriptions, drawings, answers, edits = (
        json.loads((tmp_path / "use" / f"{name}.json").read_text()) for name in names
    )
    assert len(descriptions) == 2 and len(drawings) == 3 and len(edits) == 2
    both = descriptions + drawings
    assert all((tmp_path / "use" / record["file"]).is_file() for record in both + answers)
    assert len({record["caption"] for record in both}) == 5
    assert len({record["file"] for record in answers}) == 4 <= len(answers)
    assert all(record["right"] == (record["said"].lower() == record["answer"]) for record in answers)
    pictures = [(tmp_path / "use" / edit[name]).read_bytes() for edit in edits for name in ("source", "drawn", "true")]
    assert len(set(pictures)) == 6


@pytest.mark.parametrize("image", [b"no image", png_bytes(Image.new("RGB", (32, 32)))[:60]], ids=["none", "cut"])
def test_try_export_names_an_image_that_it_cannot_read(tmp_path, image):
    write_tar(tmp_path / "a.tar", [("good.png", png_bytes(Image.new("RGB", (8, 8)))), ("good.txt", b"a cat")])
    write_tar(tmp_path / "b.tar", [("bad.png", image), ("bad.txt", b"a dog")])
    arguments = ["--model", "none", "--output", str(tmp_path / "use"), "--describe", "1", "--draw", "1"]
    with pytest.raises(SystemExit, match="^error: --data: sample 'bad' of '.*b.tar' can't be read: "):
        try_export.main([*arguments, "--data", str(tmp_path / "*.tar")])


def test_try_export_passes_over_what_is_no_file_and_names_a_broken_tar(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for kind, name in ((tarfile.DIRTYPE, "some.pictures"), (tarfile.SYMTYPE, "some.pictures/b.png")):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "nowhere"
            tar.addfile(entry)
        for name, data in (("c.png", png_bytes(Image.new("RGB", (8, 8)))), ("c.txt", b"a cat")):
            entry = tarfile.TarInfo(f"some.pictures/{name}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    ((key, image, caption),) = try_export.samples("--data", str(tmp_path / "*.tar"), "txt")
    assert (key, image.size, caption) == ("some.pictures/c", (8, 8), b"a cat")
    for data in ((tmp_path / "a.tar").read_bytes()[: 3 * 512 + 20], b"no tar", gzip.compress(b"x" * 999)[:20]):
        (tmp_path / "b.tar").write_bytes(data)
        with pytest.raises(SystemExit, match="^error: --data: '.*b.tar' can't be read as a tar: "):
            list(try_export.samples("--data", str(tmp_path / "b.tar"), "txt"))


def error_of(main, capsys, *args) -> str:
    with pytest.raises(SystemExit) as exit:
        main([*map(str, args)])
    assert exit.value.code == 2
    return capsys.readouterr().err


def test_wrong_input_is_named(layout_4, tmp_path, capsys):
    run, _ = layout_4
    error = error_of(convert_to_hf.main, capsys, "--checkpoint", tmp_path / "nowhere", "--output", tmp_path / "hf")
    assert "nowhere' is not a checkpoint" in error
    error = error_of(convert_to_hf.main, capsys, "--checkpoint", run.run.dir, "--output", ROOT / "tests")
    assert "tests' exists and is not an exported model" in error
    error = error_of(verify.main, capsys, "--checkpoint", run.run.dir, "--model", tmp_path)
    assert "holds no model.safetensors" in error


def test_another_dualtoken_is_refused(layout_4, tmp_path):
    run, _ = layout_4
    write_dualtoken(tmp_path / "other", seed=1)
    run.model.dualtoken = str(tmp_path / "other")
    trainer = CheckpointTensors(resolve_checkpoint(run.run.dir))
    with pytest.raises(UserError, match="not the code vectors of the DualToken in '.*/other'"):
        Exported(run, trainer, 300).check_codebooks()
