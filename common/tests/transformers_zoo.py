"""Tiny models of the families of transformers that have an adapter, with random weights, and an input for each.

Not here: the models of `model_zoo.py`, which all libraries share.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, dict[str, Any]]

TEXT = {
    "vocab_size": 60,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
DECODER = {"num_key_value_heads": 1, "head_dim": 12, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"n_embd": 24, "n_layer": 3, "n_head": 2, "n_positions": 64}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
IMAGE = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
    "num_channels": 3,
}
SEQUENCES = {
    "vocab_size": 60,
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "use_cache": False,
}
AUDIO = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "layerdrop": 0.0,
    "mask_time_prob": 0.0,
}
STAGES = {"hidden_sizes": [8, 8, 12, 12], "depths": [2, 2, 2, 2]}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 8], "depths": [2, 2, 2, 2]}


def model_of(kind: str, **config: Any) -> nn.Module:
    from transformers import AutoConfig, AutoModel

    return AutoModel.from_config(AutoConfig.for_model(kind, **config))


def ids(length: int = 7) -> Tensor:
    return torch.randint(3, 60, (2, length), generator=torch.Generator().manual_seed(1))


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def padded() -> dict[str, Any]:
    return {"input_ids": ids(), "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2])}


def text(kind: str, **config: Any) -> Built:
    return model_of(kind, **{**TEXT, **config}), padded()


def decoder(kind: str, **config: Any) -> Built:
    model, inputs = text(kind, **{**DECODER, **config})
    model.config.use_cache = False
    return model, inputs


def image(kind: str, size: int = 32, **config: Any) -> Built:
    return model_of(kind, **{**IMAGE, **config}), {"pixel_values": normal(2, 3, size, size)}


def stages(kind: str, size: int = 64, height: int | None = None, **config: Any) -> Built:
    return model_of(kind, **config), {"pixel_values": normal(2, 3, height or size, size)}


def swin(kind: str, height: int = 64, **config: Any) -> Built:
    own = {"image_size": 64, "patch_size": 4, "embed_dim": 12, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}
    return stages(kind, 64, height, **{**own, "drop_path_rate": 0.2, **config})


def video(kind: str, **config: Any) -> Built:
    return model_of(kind, **{**IMAGE, "num_frames": 4, **config}), {"pixel_values": normal(2, 4, 3, 32, 32)}


def audio(kind: str, **config: Any) -> Built:
    mask = torch.tensor([[1] * 400, [1] * 300 + [0] * 100])
    return model_of(kind, **{**AUDIO, **config}), {"input_values": normal(2, 400), "attention_mask": mask}


def stable(kind: str, **config: Any) -> Built:
    return audio(kind, do_stable_layer_norm=True, feat_extract_norm="layer", **config)


def sequences(kind: str, **config: Any) -> Built:
    return model_of(kind, **{**SEQUENCES, **config}), {**padded(), "decoder_input_ids": ids(5)}


def both(kind: str, **config: Any) -> Built:
    """Image and text."""
    parts = {"text_config": {**TEXT, "eos_token_id": 2}, "vision_config": IMAGE, "projection_dim": 16}
    return model_of(kind, **{**parts, **config}), {**padded(), "pixel_values": normal(2, 3, 32, 32)}


def crossed(built: Built) -> Built:
    model, inputs = built
    return model, {**inputs, "encoder_hidden_states": normal(2, 5, 24)}


def ast() -> Built:
    own = {"max_length": 32, "num_mel_bins": 16, "frequency_stride": 8, "time_stride": 8}
    return model_of("audio-spectrogram-transformer", **IMAGE, **own), {"input_values": normal(2, 32, 16)}


def blip() -> Built:
    from transformers import BlipVisionConfig, BlipVisionModel

    return BlipVisionModel(BlipVisionConfig(**IMAGE, initializer_range=0.1)), {"pixel_values": normal(2, 3, 32, 32)}


def detr() -> Built:
    from transformers import DetrConfig, DetrModel, ResNetConfig

    backbone = ResNetConfig(**{**RESNET, "depths": [1, 1, 1, 1]}, layer_type="basic", out_features=["stage4"])
    own = {key: value for key, value in SEQUENCES.items() if key not in ("vocab_size", "use_cache")}
    config = DetrConfig(use_timm_backbone=False, backbone_config=backbone, num_queries=4, **own)
    return DetrModel(config), {"pixel_values": normal(2, 3, 64, 64)}


def dpt() -> Built:
    from transformers import DPTConfig, DPTModel

    config = DPTConfig(**IMAGE, backbone_out_indices=[0, 1, 2], neck_hidden_sizes=[8, 8, 8, 8])
    return DPTModel(config), {"pixel_values": normal(2, 3, 32, 32)}


def sam() -> Built:
    from transformers import SamVisionConfig, SamVisionModel

    own = {"image_size": 48, "output_channels": 8, "window_size": 4, "mlp_dim": 48, "global_attn_indexes": [2]}
    return SamVisionModel(SamVisionConfig(**{**IMAGE, **own})), {"pixel_values": normal(2, 3, 48, 48)}


def speech_to_text() -> Built:
    own = {"input_feat_per_channel": 8, "conv_channels": 16, "num_conv_layers": 1, "conv_kernel_sizes": [3]}
    inputs = {"input_features": normal(2, 20, 8), "decoder_input_ids": ids(5)}
    return model_of("speech_to_text", **SEQUENCES, **own), inputs


def timesformer_with_drop_path() -> Built:
    from transformers.models.timesformer.modeling_timesformer import TimesformerDropPath

    model, inputs = video("timesformer")  # its configuration takes no fraction
    for layer in model.encoder.layer:
        layer.drop_path = TimesformerDropPath(0.2)
    return model, inputs


def vilt() -> Built:
    return model_of("vilt", **{**IMAGE, **TEXT}), {"input_ids": ids(), "pixel_values": normal(2, 3, 32, 32)}


def vjepa2() -> Built:
    predictor = {"pred_hidden_size": 12, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 2}
    own = {"crop_size": 32, "frames_per_clip": 4, "mlp_ratio": 2.0, "drop_path_rate": 0.2, "pred_num_mask_tokens": 2}
    kept = {key: value for key, value in IMAGE.items() if key not in ("image_size", "intermediate_size")}
    return model_of("vjepa2", **{**kept, **predictor, **own}), {"pixel_values_videos": normal(2, 4, 3, 32, 32)}


def whisper(**config: Any) -> Built:
    own = {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 20, "decoder_start_token_id": 1}
    kept = {key: value for key, value in SEQUENCES.items() if key != "max_position_embeddings"}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    inputs = {"input_features": normal(2, 8, 40), "decoder_input_ids": ids(5)}
    return model_of("whisper", **{**kept, **own, **special, **config}), inputs


def x_clip() -> Built:
    own = {"num_frames": 2, "mit_hidden_size": 24, "mit_intermediate_size": 48, "mit_num_attention_heads": 2}
    model, inputs = both("xclip", vision_config={**IMAGE, **own}, projection_dim=24, prompt_num_attention_heads=2)
    return model, {"input_ids": inputs["input_ids"], "pixel_values": normal(2, 2, 3, 32, 32)}


def _named(build: Callable[..., Built], *names: str, **config: Any) -> dict[str, Callable[[], Built]]:
    return {name: lambda name=name: build(name, **config) for name in names}


FAMILIES: dict[str, Callable[[], Built]] = {
    **_named(image, "vit", "deit", "vit_mae", "vit_msn", "ijepa", "siglip_vision_model", "clip_vision_model"),
    **_named(image, "dinov2", "dinov2_with_registers", drop_path_rate=0.2, mlp_ratio=2),
    **_named(image, "dinov3_vit", drop_path_rate=0.2, num_register_tokens=2),
    **_named(video, "vivit", tubelet_size=[2, 8, 8]),
    **_named(video, "videomae", "timesformer"),
    **_named(both, "clip", "siglip", "metaclip_2", "altclip", "chinese_clip", "clipseg", "owlvit"),
    **_named(sequences, "mbart", "pegasus", "m2m_100", "blenderbot", "bart", "plbart", "blenderbot-small"),
    **_named(audio, "wav2vec2", "hubert", "unispeech", "unispeech-sat"),
    **_named(text, "bert", "roberta", "camembert", "data2vec-text", "ernie", "roberta-prelayernorm", "xlm-roberta"),
    **_named(text, "xlm-roberta-xl", "layoutlm", "markuplm", "splinter", "roc_bert", "nomic_bert", "gte", "mpnet"),
    **_named(text, "yoso", "esm", pad_token_id=0, mask_token_id=3, position_embedding_type="rotary"),
    **_named(decoder, "llama", "mistral", "qwen2", "qwen3", "gemma", "glm", "helium", "ministral", "olmo", "smollm3"),
    **_named(decoder, "starcoder2", "seed_oss", "arcee", "bitnet", "cwm", "ernie4_5", "hunyuan_v1_dense"),
    **_named(decoder, "eurobert", "gemma2", "gemma3_text", "olmo2", "olmo3", "exaone4", "granite", "phi3", "phi"),
    **_named(decoder, "cohere", "cohere2", "gpt_neox", "modernbert"),
    **_named(decoder, "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", **EXPERTS),
    **_named(decoder, "gpt2", "gpt_bigcode", **GPT2),
    **_named(stages, "convnext", "dinov3_convnext", drop_path_rate=0.2, layer_scale_init_value=0.1, **STAGES),
    **_named(stages, "convnextv2", drop_path_rate=0.2, **STAGES),
    **_named(stages, "resnet", layer_type="basic", **RESNET),
    **_named(stages, "regnet", layer_type="y", groups_width=8, **RESNET),
    **_named(swin, "swin", "donut-swin", height=60),
    **_named(swin, "swinv2"),
    **{f"{name} stable": lambda name=name: stable(name) for name in ("wav2vec2", "hubert", "unispeech-sat")},
    "ast": ast,
    "beit": lambda: image("beit", use_relative_position_bias=True, drop_path_rate=0.2),
    "beit shared": lambda: image("beit", use_shared_relative_position_bias=True, layer_scale_init_value=0.0),
    "bert decoder": lambda: crossed(text("bert", is_decoder=True, add_cross_attention=True, use_cache=False)),
    "blip": blip,
    "codegen": lambda: decoder(
        "codegen", n_embd=64, n_layer=3, n_head=4, num_attention_heads=4, rotary_dim=4, n_positions=64
    ),
    "data2vec-audio": lambda: audio("data2vec-audio", num_conv_pos_embeddings=3, conv_pos_kernel_size=3),
    "data2vec-vision": lambda: image("data2vec-vision", use_relative_position_bias=True),
    "data2vec-vision shared": lambda: image(
        "data2vec-vision", use_shared_relative_position_bias=True, layer_scale_init_value=0.0
    ),
    "detr": detr,
    "diffllama": lambda: decoder("diffllama", num_key_value_heads=2),
    "distilbert": lambda: text("distilbert", dim=24, n_layers=3, n_heads=2, hidden_dim=48),
    "dpt": dpt,
    "electra": lambda: text("electra", embedding_size=12),
    "gpt2 with cross attention": lambda: crossed(decoder("gpt2", add_cross_attention=True, **GPT2)),
    "gpt_neo": lambda: decoder(
        "gpt_neo", num_layers=4, num_hidden_layers=4, num_heads=2, attention_types=[[["global", "local"], 2]]
    ),
    "gpt_neox serial": lambda: decoder("gpt_neox", use_parallel_residual=False),
    "gptj": lambda: decoder("gptj", rotary_dim=4, **GPT2),
    "marian": lambda: sequences("marian", pad_token_id=0, decoder_start_token_id=1),
    "opt": lambda: decoder("opt", ffn_dim=48, word_embed_proj_dim=24),
    "opt post-norm": lambda: decoder("opt", ffn_dim=48, word_embed_proj_dim=24, do_layer_norm_before=False),
    "sam": sam,
    "sew": lambda: audio("sew", squeeze_factor=2),
    "speech_to_text": speech_to_text,
    "swin2sr": lambda: swin("swin2sr", image_size=16, patch_size=1),
    "timesformer with drop path": timesformer_with_drop_path,
    "timesformer joint": lambda: video("timesformer", attention_type="joint_space_time"),
    "vilt": vilt,
    "visual_bert": lambda: text("visual_bert", visual_embedding_dim=8),
    "vjepa2": vjepa2,
    "wav2vec2 with adapters": lambda: stable("wav2vec2", adapter_attn_dim=8),
    "whisper": whisper,
    "x_clip": x_clip,
    "xglm": lambda: decoder("xglm", d_model=24, ffn_dim=48, num_layers=3, attention_heads=2),
}
FLOAT32_ONLY = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "xglm", "codegen")  # the plain model takes no float64
