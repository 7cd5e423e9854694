"""Any model type of transformers as a small random model, and inputs that it and its parts accept.

A config is made small by the names of its fields (`SIZES`), through all its sub-configs; `OVERRIDES` holds what some
model types need beside that. Inputs follow from the signature of a forward; where its names leave a shape open,
several are tried.
"""

import copy
import dataclasses
import itertools
import math
import re
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

LENGTH = 16  # of the texts that tiny_inputs makes: windows are shorter, so that they matter
VOCAB, WIDTH, FEED_FORWARD, HEADS, KV_HEADS, HEAD_DIM, LAYERS, IMAGE, PATCH = 160, 64, 96, 4, 2, 16, 2, 64, 16
# The first expression found in the name of a field says how large the field may be at most.
SIZES = [
    (r"vocab_size|num_embeddings$", VOCAB),
    (r"(num|n)_(key_value|kv)_heads$|multi_query_group_num", KV_HEADS),
    (r"heads?$", HEADS),
    (r"head_dim$|attention_head_size|d_kv|kv_channels|dim_head|d_head", HEAD_DIM),
    (r"rotary_dim", HEAD_DIM // 2),
    (r"intermediate_(size|dim)|ffn_|mlp_dim|d_ff$|d_inner|n_inner|dff|mlp_hidden", FEED_FORWARD),
    (r"(experts_per_tok|topk|top_k|moe_k|num_selected_experts|top_k_experts)$", 2),
    (r"(n_group|topk_group|n_shared_experts|first_k_dense_replace|num_shared_experts)$", 1),
    (r"experts$", 4),
    (r"layers?$|depths?$|num_blocks$|n_layer$", LAYERS),
    (r"sliding_window$|attention_window_size|attention_chunk_size", LENGTH // 2),
    (r"max_position_embeddings|n_positions|max_(source|target)_positions|n_ctx|context_length", 512),
    (r"patch_size$", PATCH),
    (r"image_size$|img_size$", IMAGE),
    (r"num_pos_feats$", WIDTH // 2),
    (r"num_groups$|n_groups$", 4),
    (r"num_latents|num_query_tokens|num_queries$", 8),
    (r"patch_embed_hidden_size|keypoint_decoder_dim", 1024),
    (r"hidden_(size|dim)|d_model|n_embd|embedding_size|_dims?$|^dim$|lora_rank|width$|channels?$|filters$", WIDTH),
    (r"d_latents|upsample_initial_channel|base_channels|feature_size|conv_dim|groups$|(output|input)_size$", WIDTH),
]
# Fields that some configs leave open and their models need.
UNSET = {"head_dim": HEAD_DIM, "num_key_value_heads": KV_HEADS, "num_experts_per_tok": 2, "prediction_length": 4,
         "sliding_window": LENGTH // 2}  # fmt: skip
# What is off in the defaults of some configs and on in released models.
FEATURES = {"use_sliding_window": True, "max_window_layers": 1, "attention_k_eq_v": True}
# Per layer, one entry of each kind is enough.
LAYER_LISTS = ("layer_types", "layers_block_type", "mlp_layer_types")
RESNET = dict(
    model_type="resnet", embedding_size=16, hidden_sizes=[16, 16, 32, 64], depths=[1] * 4, layer_type="basic",
    out_features=["stage4"],
)  # fmt: skip
RESNET3 = RESNET | {"out_features": ["stage2", "stage3", "stage4"]}
IMAGE_TOKENS = {"<image>": 150, "<|extra_200|>": 151, "IMGIMGA": 90, "IMGIMGB": 91}
HIERA = dict(
    hidden_size=16, embed_dim_per_stage=[16, 32, 64, 128], blocks_per_stage=[1, 1, 2, 1], global_attention_blocks=[3],
    num_attention_heads_per_stage=[1, 2, 4, 8], image_size=[128, 128],
)  # fmt: skip
SAM2_VISION = dict(
    backbone_channel_list=[128, 64, 32, 16], backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]], fpn_hidden_size=64,
)  # fmt: skip
SERIES = dict(prediction_length=4, context_length=8, lags_sequence=[1, 2], d_model=WIDTH)
DETECTOR = {"decoder_in_channels": [WIDTH] * 3}
MROPE = {"rope_theta": 10000.0, "rope_type": "default"}
OVERRIDES: dict[str, dict[str, Any]] = {
    "autoformer": SERIES,
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "bamba": {"attn_layer_indices": [1]},
    "chameleon": {"vocabulary_map": IMAGE_TOKENS},
    "clvp_decoder": {"hidden_size": 128},
    "clvp_encoder": {"hidden_size": 128, "projection_dim": 256},
    "cohere_compass_text": {
        "rope_parameters": {k: MROPE | {"mrope_section": [2, 3, 3]} for k in ("full_attention", "sliding_attention")}
    },
    "conditional_detr": {"backbone_config": RESNET},
    "cvt": {"depth": [1, 2, 3]},
    "d_fine": DETECTOR,
    "dab-detr": {"backbone_config": RESNET},
    "dbrx": {"attn_config": {"kv_n_heads": KV_HEADS, "clip_qkv": 8.0, "rope_theta": 10000.0}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "deformable_detr": {"backbone_config": RESNET3},
    "deimv2": DETECTOR,
    "detr": {"backbone_config": RESNET},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "donut-swin": {"window_size": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "dots3_note_text": {"num_key_value_heads": HEADS},
    "efficientloftr": {"out_features": [16, 16, 32, 64]},
    "emu3": {"vocabulary_map": IMAGE_TOKENS},
    "ernie4_5_vl_moe_text": {"rope_parameters": MROPE | {"mrope_section": [3, 3, 2]}},
    "esm": {"vocab_size": VOCAB, "pad_token_id": 1, "mask_token_id": 2},
    "gemma3": {"mm_tokens_per_image": 4},
    "glm4v_moe_text": {"rope_parameters": MROPE | {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}},
    "glm5_next_text": {"num_key_value_heads": HEADS, "index_kpool": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "downsample_rate": "1/2"},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "informer": SERIES,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kosmos-2": {"latent_query_num": 8},
    "layoutlmv3": {"coordinate_size": 12, "shape_size": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 96},
    "llama4_vision_model": {"intermediate_size": 256, "projector_input_dim": 64},
    "mamba2": {"head_dim": 32},
    "mllama_vision_model": {"intermediate_layers_indices": [0, 1], "vision_output_dim": 3 * WIDTH},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "moonshine_streaming": {"num_key_value_heads": HEADS},
    "muse_spark_audio": {"num_hidden_layers": 4},
    "omdet-turbo": {"backbone_config": RESNET3},
    "paddleocr_vl_text": {"head_dim": HEAD_DIM, "rope_parameters": MROPE | {"mrope_section": [2, 3, 3]}},
    "pp_doclayout_v2": DETECTOR,
    "pp_doclayout_v3": DETECTOR | {"x4_feat_dim": 128},
    "pp_doclayout_v4": DETECTOR | {"x4_feat_dim": 128},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 32},
    "qwen4_exp_text": {"head_dim": HEAD_DIM, "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16,
                       "indexer_budget": 8, "indexer_compress_ratio": 4},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "sam2_hiera_det_model": HIERA,
    "sam2_vision_model": SAM2_VISION,
    "step3p5": {"sliding_window": 8},
    "swin": {"window_size": 2},
    "t5gemma2_text": {"dropout_rate": 0.0},
    "table-transformer": {"backbone_config": RESNET},
    "time_series_transformer": SERIES,
    "tvp": {"max_img_size": 128, "visual_prompt_size": 32, "backbone_config": RESNET},
    "voxtral_encoder": {"intermediate_size": 4 * WIDTH},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 4,
              "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"]},
}  # fmt: skip
# Convolutional backbones whose channel lists depend on one another in ways of their own.
KEEP_LISTS = set("hgnet_v2 efficientnet align_vision_model d_fine deimv2 pp_doclayout_v2 pp_doclayout_v3".split())
KEEP_LISTS |= {"pp_doclayout_v4", "textnet", "gemma4_audio"}


def model_types() -> dict[str, list[Any]]:
    """Every model type that some auto class builds, with the mappings of those auto classes, AutoModel's first."""
    others = [m for name, m in vars(modeling_auto).items() if re.fullmatch(r"MODEL_FOR_.*MAPPING", name)]
    mappings = [modeling_auto.MODEL_MAPPING, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING, *others]
    found = {t: [m for m in mappings if t in m._model_mapping] for t in CONFIG_MAPPING}
    return {model_type: mappings for model_type, mappings in found.items() if mappings}


def tiny_model(model_type: str, mappings: list[Any], seed: int = 0) -> PreTrainedModel:
    """The model in eval mode, with weights so large that its attention is far from uniform.

    Raises:
        whatever the first auto class raises, where none builds the type.
    """
    config_class = CONFIG_MAPPING[model_type]
    fields = small_fields(config_class, {})
    errors = []
    for mapping in mappings:
        torch.manual_seed(seed)
        try:
            classes = mapping._load_attr_from_module(model_type, mapping._model_mapping[model_type])
            model = (classes[0] if isinstance(classes, tuple) else classes)(config_class(**copy.deepcopy(fields)))
        except Exception as error:
            errors.append(error)
            continue
        redraw(model, torch.Generator().manual_seed(seed))
        return model.float().eval()
    raise errors[0]


def small_fields(config_class: type[PreTrainedConfig], given: dict[str, Any]) -> dict[str, Any]:
    """Arguments for a config class, sub-configs included, that make its model small."""
    names = {field.name for field in dataclasses.fields(config_class)}
    given = {name: on for name, on in FEATURES.items() if name in names} | given
    default = config_class(**copy.deepcopy(given))
    small = dict(given)
    ids = itertools.count(VOCAB - 1, -1)
    for name in names | given.keys():
        field = config_class.__dataclass_fields__.get(name)
        value, declared = read(default, name), given.get(name, field.default if field else None)
        if isinstance(value, PreTrainedConfig):
            spec = config_class.sub_configs_defaults.get(name)
            start = given.get(name) or (spec.init_kwargs if spec else {})
            start = {k: v for k, v in dict(start).items() if k != "model_type"}
            own = {"model_type": value.model_type} if value.model_type else {}
            small[name] = own | small_fields(type(value), start)
        elif name in LAYER_LISTS:
            continue
        elif re.search(r"(_token|_id|_index)(_id|_index|_ids)?$", name):
            large = [isinstance(v, int) and v >= VOCAB for v in (declared if is_list(declared) else [declared])]
            if any(large):
                small[name] = [next(ids) for _ in large] if is_list(declared) else next(ids)
        elif value is None and name in UNSET:
            small[name] = UNSET[name]
        elif not (is_list(declared) and config_class.model_type in KEEP_LISTS):
            smaller = shrink(name, declared)
            if declared is not dataclasses.MISSING and smaller != declared:
                small[name] = smaller
    small |= one_layer_of_each_kind(default, names) | stages(names, given)
    if "num_kv_shared_layers" in names and "layer_types" in small:
        small["num_kv_shared_layers"] = len(small["layer_types"])  # as many again, with the keys and values of these
        small["layer_types"] = small["layer_types"] * 2
        small["num_hidden_layers"] = len(small["layer_types"])
    if isinstance(small.get("embed_dim"), int) and is_list(read(default, "num_heads")):
        small["embed_dim"] = HEAD_DIM  # doubles from stage to stage, as the numbers of heads do
    heads, width, share = (read(default, name) for name in ("num_attention_heads", "hidden_size", "head_dim"))
    if "head_dim" in names and all(type(n) is int for n in (heads, width, share)) and heads * share > width:
        small["head_dim"] = 2 * HEAD_DIM  # all heads together are wider than the model
    if "kv_lora_rank" in names and "num_key_value_heads" in small:
        small["num_key_value_heads"] = HEADS  # multi-head latent attention has keys and values for every head
    if "mrope_section" in getattr(config_class, "ignore_keys_at_rope_validation", ()):
        rope, section = read(default, "rope_parameters") or {}, {"mrope_section": [2, 3, 3]}
        nested = {k: v | section for k, v in rope.items() if isinstance(v, dict)}
        small["rope_parameters"] = nested or MROPE | rope | section
    return small | OVERRIDES.get(config_class.model_type, {})


def one_layer_of_each_kind(default: PreTrainedConfig, names: set[str]) -> dict[str, Any]:
    kinds = [kind for kind in LAYER_LISTS if is_list(read(default, kind))]
    rows = list(dict.fromkeys(zip(*(read(default, kind) for kind in kinds), strict=False)))
    if not rows:
        return {}
    rows = rows if len(rows) > 1 else rows * LAYERS
    small = {kind: list(column) for kind, column in zip(kinds, zip(*rows, strict=True), strict=True) if kind in names}
    count = next((n for n in ("num_hidden_layers", "n_layer", "num_layers") if n in names), None)
    return small | ({count: len(rows)} if count else {})


def stages(names: set[str], given: dict[str, Any]) -> dict[str, Any]:
    """Backbones of equal layers name the layers whose output they return: as many layers as names."""
    for name in ("out_indices", "out_features"):
        if given.get(name) and "num_hidden_layers" in names and "depths" not in names:
            layers = range(1, len(given[name]) + 1)
            kept = [f"stage{n}" if name == "out_features" else n for n in layers]
            return {"num_hidden_layers": max(LAYERS, len(kept)), name: kept}
    return {}


def is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def read(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # fields that differ between layers raise kinds of their own
        return None


def shrink(name: str, value: Any) -> Any:
    """A size as small as `SIZES` says; lists entry by entry, in proportion where the entries differ."""
    if isinstance(value, float) and re.search(r"dropout|drop_path|layerdrop|pdrop|drop_rate", name):
        return 0.0
    limit = next((size for pattern, size in SIZES if re.search(pattern, name)), None)
    if limit is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return min(value, limit)
    if is_list(value) and value and all(isinstance(v, int) for v in value):
        if len(set(value)) > 1 and name.endswith("heads"):
            return type(value)(v // math.gcd(*value) for v in value)
        if (
            len(set(value)) > 1
            and max(value) > limit
            and limit == WIDTH
            and not name.endswith(("image_size", "img_size"))
        ):
            return type(value)(max(v // 4, 1) for v in value)
        return type(value)(min(v, limit) for v in value)
    return value


@torch.no_grad()
def redraw(model: nn.Module, generator: torch.Generator) -> None:
    for parameter in model.parameters():
        if not parameter.is_floating_point() or not parameter.numel():
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.copy_(noise * min(0.3, 1.5 / max(parameter[0].numel(), 1) ** 0.5))
        else:
            # Layer scales start so near to zero that nothing of a layer would arrive.
            if parameter.max() == parameter.min() and 0 < parameter.max() < 0.2:
                parameter.fill_(1.0)
            parameter.add_(0.05 * noise)
