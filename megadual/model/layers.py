"""The transformer's shape for megatron-core: its config and the spec of its layers."""

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megadual.model.attention import PackedAttention
from megadual.train.config import PretrainConfig


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, its weight's gradient summed over tensor-parallel ranks under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel


def transformer_config(run: PretrainConfig) -> TransformerConfig:
    """A Qwen2.5-shaped TransformerConfig (GQA, QKV bias, SwiGLU, RMSNorm) for the run's model and layout.

    With a pipeline `run.parallel.stage_layers` is set (megadual.train.setup.resolve_stages).
    """
    model, parallel, train = run.model, run.parallel, run.train
    virtual = parallel.virtual_pipeline > 1
    split = [model.layers] if parallel.pipeline == 1 else parallel.stage_layers
    stages = [["decoder"] * layers for layers in split]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
    recompute = (
        dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
        if train.recompute
        else {}
    )
    return TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden,
        ffn_hidden_size=model.ffn,
        num_attention_heads=model.heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.hidden // model.heads,
        gated_linear_unit=True,
        activation_func=F.silu,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        add_bias_linear=False,
        add_qkv_bias=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if virtual else None,
        pipeline_model_parallel_layout=stages if len(stages) > 1 else None,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence,
        # Two chunks of one rank pair may send at once, which batched point-to-point calls would swap.
        overlap_p2p_comm=virtual,
        batch_p2p_comm=not virtual,
        batch_p2p_sync=False,  # or the host waits for the GPU at every exchange, for the sake of an older PyTorch
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=True,  # SwiGLU in one kernel each way
        gradient_accumulation_fusion=False,
        **recompute,
    )


def block_spec(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """This pipeline stage's layers: megatron-core's own, with our norm and attention."""
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    layer.submodules.self_attention.submodules.core_attention = PackedAttention
    layer.submodules.sharded_state_dict_keys_map = {}  # checkpoints name parameters as the model does
    layers = get_num_layers_to_build(config, vp_stage, parallel_state.get_pipeline_model_parallel_rank())
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=RMSNorm)
