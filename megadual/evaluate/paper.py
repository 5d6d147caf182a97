"""The DualToken paper's scores (arXiv 2503.14324), and what is known to differ from how they are taken here."""

SOURCE = "arXiv 2503.14324"

_UNDERSTANDING = {
    "DualToken-3B, 256 px": (86.0, 70.9, 70.2, 38.6, 32.5, 46.5, 1489.2),
    "DualToken-3B, 384 px": (88.1, 76.2, 72.2, 40.3, 40.2, 49.2, 1588.4),
    "DualToken-7B, 256 px": (88.6, 74.9, 71.8, 45.8, 40.5, 55.8, 1502.7),
    "DualToken-7B, 384 px": (89.4, 80.0, 72.5, 47.4, 44.3, 57.6, 1625.0),
}
_BENCHMARKS = ("pope", "mmbench", "seedbench", "mmmu", "mmvet", "mathvista", "mme")
_GENAI = {
    "DualToken-3B": (0.76, 0.76, 0.78, 0.50, 0.72, 0.68),
    "VILA-U-3B, as reproduced there": (0.68, 0.66, 0.70, 0.49, 0.64, 0.60),
    "pixel codes alone": (0.59, 0.59, 0.59, 0.47, 0.59, 0.55),
}
_SKILLS = ("counting", "differentiation", "comparison", "negation", "universal", "advanced")

# (benchmark, metric) -> row of the paper -> score
ROWS: dict[tuple[str, str], dict[str, float]] = {
    **{(name, ""): {row: of[i] for row, of in _UNDERSTANDING.items()} for i, name in enumerate(_BENCHMARKS)},
    **{("genai-bench", skill): {row: of[i] for row, of in _GENAI.items()} for i, skill in enumerate(_SKILLS)},
    ("mjhq", "fid"): {"DualToken-3B": 7.88, "VILA-U-3B, as reproduced there": 15.12, "two encoders": 17.55},
    ("geneval", "overall"): {"DualToken-3B": 0.72, "DualToken-7B": 0.75},
    ("wise", "overall"): {"DualToken-3B": 0.35, "DualToken-7B": 0.39},
}

_SAMPLING = "the paper states no sampling (guidance, temperature, top-k, top-p)"
DIFFERS = {
    "pope": "F1 over the three sets together; the paper does not say whether it reports F1 or accuracy",
    "mmbench": "English, dev; answers that are no letter are matched by a judge model, which the paper does not name",
    "seedbench": "questions about images; the paper does not say whether its figure includes videos",
    "mmmu": "validation set",
    "mmvet": "a judge model scores; the paper does not name its version",
    "mathvista": "testmini; a judge model extracts the answer; the paper does not name its version",
    "mme": "perception alone, of 2,000",
    "genai-bench": f"VQAScore by clip-flant5-xxl, JPEG as the benchmark's own script saves; {_SAMPLING}",
    "mjhq": f"see library, resizing and formats; the paper names 256 px and no format; {_SAMPLING}",
    "geneval": f"prompts as they are, not rewritten, unless the prompts' hash says otherwise; {_SAMPLING}",
    "wise": "the first WISE (judge gpt-4o-2024-05-13) is the paper's; scores of WISE_Verified are not to be compared; "
    + _SAMPLING,
    "dpg": "not in the paper",
    "t2i-compbench": "not in the paper",
    "scenes": "this project's own; not in the paper",
}
