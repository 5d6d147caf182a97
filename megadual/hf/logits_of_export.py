"""Logits of an exported folder, in a process that has nothing but the folder: what verify.py compares with.

`python -I logits_of_export.py DIR INPUT.safetensors OUTPUT.safetensors`. For sample i INPUT holds `i.tokens` (S,),
`i.codes.STREAM` (V, D) for each stream; OUTPUT gets `i.text` (S, vocabulary) and `i.STREAM` (P, D, K).
"""

import sys


class _NoMegadual:
    """Makes `import megadual` fail, even where it is installed."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "megadual":
            raise ModuleNotFoundError(f"the exported folder imports '{name}', which its users do not have")


sys.meta_path.insert(0, _NoMegadual)

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

folder, inputs, outputs = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
given, results = load_file(inputs), {}
for name in [name for name in given if name.endswith(".tokens")]:
    i = name.removesuffix(".tokens")
    codes = {key.removeprefix(f"{i}.codes."): codes for key, codes in given.items() if key.startswith(f"{i}.codes.")}
    with torch.no_grad():
        found = model(input_ids=given[name][None], codes=codes)
    results |= {f"{i}.text": found.logits[0], **{f"{i}.{key}": x for key, x in found.visual_logits.items()}}
save_file({name: tensor.contiguous() for name, tensor in results.items()}, outputs)
