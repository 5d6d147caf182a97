"""Logits of an exported folder, in a process that has nothing but the folder: what verify.py compares with.

`python -I logits_of_export.py DIR INPUT.safetensors OUTPUT.safetensors`. For sample i INPUT holds `i.tokens` (S,),
`i.semantic` and `i.pixel` (V, D); OUTPUT gets `i.text` (S, vocabulary), `i.semantic` and `i.pixel` (P, D, K).
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
samples, results = load_file(inputs), {}
for i in range(len(samples) // 3):
    with torch.no_grad():
        found = model(
            input_ids=samples[f"{i}.tokens"][None],
            semantic_codes=samples[f"{i}.semantic"],
            pixel_codes=samples[f"{i}.pixel"],
        )
    results |= {
        f"{i}.text": found.logits[0],
        f"{i}.semantic": found.semantic_logits,
        f"{i}.pixel": found.pixel_logits,
    }
save_file({name: tensor.contiguous() for name, tensor in results.items()}, outputs)
