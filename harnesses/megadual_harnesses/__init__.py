"""Exported MegaDual models in the harnesses that the field reports with. Only the exported folder is needed."""


def lmms_eval_manifest():
    """What lmms-eval registers: `--model megadual`, with `--force_simple` for tasks that compare likelihoods."""
    from lmms_eval.models.registry_v2 import ModelManifest  # here: VLMEvalKit's users need not have it

    return ModelManifest(
        model_id="megadual",
        chat_class_path="megadual_harnesses.lmms_eval_model.MegaDual",
        simple_class_path="megadual_harnesses.lmms_eval_model.MegaDualSimple",
    )
