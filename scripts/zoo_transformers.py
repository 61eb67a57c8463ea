"""Tiny models of transformers' families with random weights, and a batch for each; for `scripts.try_models`.

The default configuration of each model type with everything that sets its size replaced by small numbers, which suits
most types; the others raise what transformers raises and are counted as not built. Not here: timm, torchvision
(`zoo_vision.py`).
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Run = Callable[[nn.Module], Any]
DEPTH, WIDTH, HEADS, WORDS, TOKENS, SIDE = 3, 32, 4, 99, 8, 64

# Values by the names that transformers' configurations have; applied to nested configurations too.
SMALL = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers"), DEPTH),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers", "num_encoder_layers", "decoder_num_layers"), DEPTH),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "emb_dim"), WIDTH),
    **dict.fromkeys(("decoder_hidden_size", "text_embed_dim", "n_embed"), WIDTH),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "hidden_dim", "n_inner", "encoder_ffn_dim"), 2 * WIDTH),
    **dict.fromkeys(("decoder_ffn_dim", "mlp_dim", "moe_intermediate_size", "decoder_intermediate_size"), 2 * WIDTH),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), HEADS),
    **dict.fromkeys(("decoder_attention_heads", "num_key_value_heads", "decoder_num_attention_heads"), HEADS),
    **dict.fromkeys(("head_dim", "d_kv", "d_head"), WIDTH // HEADS),
    **dict.fromkeys(("vocab_size", "entity_vocab_size"), WORDS),
    **dict.fromkeys(("image_size",), SIDE),
    **dict.fromkeys(("patch_size",), 16),
    **dict.fromkeys(("num_frames",), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 128),
    **dict.fromkeys(("layerdrop", "encoder_layerdrop", "decoder_layerdrop"), 0.0),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1),
}


def names() -> list[str]:
    """All model types that AutoModel knows."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return sorted(MODEL_MAPPING_NAMES)


def build(name: str) -> tuple[nn.Module, Run]:
    """The model of a type, and a function that runs it on a batch of two."""
    from transformers import AutoConfig, AutoModel

    for widths in (True, False):
        config = AutoConfig.for_model(name)
        _shrink(config, widths=widths)
        try:
            model = AutoModel.from_config(config)
            if sum(p.numel() for p in model.parameters()) > 3e8:
                raise ValueError("it is not tiny")
            arguments = inputs_of(model, config)
            with torch.no_grad():
                model.eval()(**arguments)
        except Exception:
            if not widths:
                raise
        else:
            break
    return model, lambda model: model(**arguments)


def _shrink(config: Any, *, widths: bool) -> None:
    """In place. widths: else only the depth and the words, which suits configurations whose widths hang together."""
    for key, value in list(vars(config).items()):
        if key in SMALL and isinstance(value, int | float) and not isinstance(value, bool):
            if widths or SMALL[key] in (DEPTH, WORDS, 0.0):
                setattr(config, key, SMALL[key])
        elif hasattr(value, "to_dict"):
            _shrink(value, widths=widths)
    for key in ("layer_types", "mlp_layer_types"):
        if isinstance(vars(config).get(key), list):
            setattr(config, key, vars(config)[key][:DEPTH])
    if hasattr(config, "use_cache"):
        config.use_cache = False


def inputs_of(
    model: nn.Module, config: Any, *, samples: int = 2, tokens: int = TOKENS, sound: int = 4000
) -> dict[str, Any]:
    """A batch by the names of forward's arguments: texts of `tokens`, sounds of `sound` values, pictures or videos of
    the config's own size. ValueError for another kind of input."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: Any) -> Tensor:
        return torch.randn(samples, *shape, generator=generator)

    words = torch.randint(3, WORDS, (samples, tokens), generator=generator)
    parameters = inspect.signature(type(model).forward).parameters
    side: Any = getattr(config, "image_size", None) or getattr(
        getattr(config, "vision_config", None), "image_size", SIDE
    )
    side = side if isinstance(side, int) else side[0]
    channels = getattr(config, "num_channels", 3)
    main = model.main_input_name
    found: dict[str, Any] = {}
    if main in ("input_ids", "decoder_input_ids"):
        found["input_ids"] = words
        if "attention_mask" in parameters:
            found["attention_mask"] = torch.ones_like(words)
    elif main == "pixel_values":
        frames = getattr(config, "num_frames", None)
        video = (frames and "bool_masked_pos" not in parameters) or type(model).__name__.startswith(
            ("VideoMAE", "VJEPA")
        )
        found["pixel_values"] = random(frames, channels, side, side) if video else random(channels, side, side)
    elif main == "pixel_values_videos":
        found["pixel_values_videos"] = random(getattr(config, "frames_per_clip", 4), 3, side, side)
    elif main == "input_values":
        bins = getattr(config, "num_mel_bins", None)
        found["input_values"] = random(getattr(config, "max_length", 1024), bins) if bins else random(sound)
    elif main == "input_features":
        bins = getattr(config, "num_mel_bins", 80)
        length = 2 * getattr(config, "max_source_positions", 100)
        found["input_features"] = random(bins, length) if "max_source_positions" in vars(config) else random(64, bins)
    else:
        raise ValueError(f"its main input is {main}")
    if "pixel_values" in parameters and "pixel_values" not in found and "input_ids" in found:
        found["pixel_values"] = random(channels, side, side)
    if "decoder_input_ids" in parameters:
        found["decoder_input_ids"] = words
    if "bbox" in parameters:
        found["bbox"] = torch.zeros(samples, tokens, 4, dtype=torch.long)
    return found
