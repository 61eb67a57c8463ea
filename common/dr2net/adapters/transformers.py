"""The branches of transformers' layers: a line of words for each way that they are written (`layer_words.py`), and the
classes that are written so.

A class is registered when a layer of it is met, so no model's code is imported for its name. Layers of mixed experts
are cut by samples, since routers want the batch. Not here: layers with windows, convolutions or pooled queries
(`transformers_special.py`), and transformers without an adapter, which run as one branch each (`convert(probe=)`).
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from dr2net.adapters import transformers_special as special
from dr2net.adapters.layer_words import Words, branches
from dr2net.branches import Branch, branches_of

LLAMA = Words("input_layernorm self_attn*", "post_attention_layernorm mlp")
FULLY_CONNECTED = "fc1 activation_fn ~activation_dropout fc2 ~dropout"
BART = Words(
    "self_attn* ~dropout + self_attn_layer_norm",
    f"{FULLY_CONNECTED} + final_layer_norm",
    cross="encoder_attn^ ~dropout + encoder_attn_layer_norm",
    without="use_cache",
)
BERT = Words("attention* =", "feed_forward_chunk =", cross="crossattention^ =", parts="intermediate output LayerNorm")
BERT_OF_OLD = Words("attention* =", "intermediate output&", hands_out=True)
DETR = Words(
    "self_attn* ~dropout + self_attn_layer_norm",
    "mlp + final_layer_norm",
    renamed={"spatial_position_embeddings": "position_embeddings"},
)
DINO = Words(
    "norm1 attention* layer_scale1 drop_path", "norm2 mlp layer_scale2 drop_path", shared="position_embeddings"
)
GEMMA = Words(
    "input_layernorm self_attn* post_attention_layernorm",
    "pre_feedforward_layernorm mlp post_feedforward_layernorm",
)
GPT = Words("ln_1 attn*", "ln_2 mlp", cross="ln_cross_attn crossattention^")
MBART = Words(
    "self_attn_layer_norm self_attn* ~dropout",
    f"final_layer_norm {FULLY_CONNECTED}",
    cross="encoder_attn_layer_norm encoder_attn^ ~dropout",
    without="use_cache",
)
WAV2VEC = Words("layer_norm attention* dropout", "final_layer_norm feed_forward", adapter="adapter_layer")
PHI = Words("input_layernorm | self_attn* resid_dropout | mlp resid_dropout")


def _with_position_bias(layer: Any, x: Tensor, given: dict[str, Any]) -> dict[str, Any]:
    """BEiT: relative positions are added to the mask."""
    height, width = given["resolution"]
    mask, interpolate = given["attention_mask"], given["interpolate_pos_encoding"]
    rest = {key: value for key, value in given.items() if key not in ("resolution", "interpolate_pos_encoding")}
    if layer.relative_position_bias is None:
        return rest
    window = (height // layer.patch_size, width // layer.patch_size)
    bias = layer.relative_position_bias(window, interpolate, dim_size=x.shape[1])
    return {**rest, "attention_mask": bias if mask is None else bias + mask}


# Each class is "module.Class" of transformers.models.{module}.modeling_{module}.
FAMILIES: tuple[tuple[Words, str], ...] = (
    (
        Words("layer_norm1 self_attn*", "layer_norm2 mlp"),
        "altclip.AltCLIPEncoderLayer blip.BlipEncoderLayer blip_2.Blip2EncoderLayer "
        "chinese_clip.ChineseCLIPVisionLayer clip.CLIPEncoderLayer clipseg.CLIPSegEncoderLayer "
        "git.GitVisionEncoderLayer groupvit.GroupViTEncoderLayer idefics2.Idefics2EncoderLayer "
        "idefics3.Idefics3EncoderLayer "
        "instructblip.InstructBlipEncoderLayer instructblipvideo.InstructBlipVideoEncoderLayer "
        "janus.JanusVisionEncoderLayer kosmos2.Kosmos2VisionEncoderLayer metaclip_2.MetaClip2EncoderLayer "
        "owlv2.Owlv2EncoderLayer owlvit.OwlViTEncoderLayer siglip.SiglipEncoderLayer siglip2.Siglip2EncoderLayer "
        "smolvlm.SmolVLMEncoderLayer x_clip.XCLIPEncoderLayer",
    ),
    (
        Words("layernorm_before attention* dropout", "layernorm_after mlp dropout"),
        "audio_spectrogram_transformer.ASTLayer deit.DeiTLayer ijepa.IJepaLayer vit.ViTLayer vit_mae.ViTMAELayer "
        "vit_msn.ViTMSNLayer vivit.VivitLayer",
    ),
    (
        DINO,
        "dinov2.Dinov2Layer dinov2_with_registers.Dinov2WithRegistersLayer dinov3_vit.DINOv3ViTLayer eomt.EomtLayer "
        "eomt_dinov3.EomtDinov3Layer radio.RadioLayer sapiens2.Sapiens2Layer",
    ),
    (
        Words("layernorm_before attention*", "layernorm_after intermediate output!"),
        "dpt.DPTViTLayer videomae.VideoMAELayer",
    ),
    (
        Words(
            "layernorm_before attention*",
            "layernorm_after intermediate output!",
            hands_out=True,
            only="attention_mask output_attentions",
        ),
        "vilt.ViltLayer",
    ),
    (
        Words("norm1 attention* drop_path", "norm2 mlp drop_path", hands_out=True, only="position_mask"),
        "vjepa2.VJEPA2Layer",
    ),
    (
        Words(
            "layernorm_before attention* dropout lambda_1 drop_path",
            "layernorm_after mlp dropout lambda_2 drop_path",
            held="relative_position_bias",
            prepare=_with_position_bias,
        ),
        "beit.BeitLayer",
    ),
    (
        Words(
            "layernorm_before attention* lambda_1? drop_path",
            "layernorm_after intermediate output lambda_2? drop_path",
            hands_out=True,
            shared="relative_position_bias",
        ),
        "data2vec.modeling_data2vec_vision.Data2VecVisionLayer",
    ),
    (
        MBART,
        "blenderbot.BlenderbotEncoderLayer blenderbot.BlenderbotDecoderLayer m2m_100.M2M100EncoderLayer "
        "m2m_100.M2M100DecoderLayer mbart.MBartEncoderLayer mbart.MBartDecoderLayer musicgen.MusicgenDecoderLayer "
        "pegasus.PegasusEncoderLayer pegasus.PegasusDecoderLayer qwen2_audio.Qwen2AudioEncoderLayer "
        "speech_to_text.Speech2TextEncoderLayer speech_to_text.Speech2TextDecoderLayer voxtral.VoxtralEncoderLayer "
        "whisper.WhisperEncoderLayer whisper.WhisperDecoderLayer xglm.XGLMDecoderLayer",
    ),
    (
        BART,
        "bart.BartEncoderLayer bart.BartDecoderLayer blenderbot_small.BlenderbotSmallEncoderLayer "
        "blenderbot_small.BlenderbotSmallDecoderLayer marian.MarianEncoderLayer marian.MarianDecoderLayer "
        "plbart.PLBartEncoderLayer plbart.PLBartDecoderLayer",
    ),
    (DETR, "detr.DetrEncoderLayer"),
    (
        replace(
            DETR,
            cross="encoder_attn^ ~dropout + encoder_attn_layer_norm",
            without="spatial_position_embeddings",
            renamed={"object_queries_position_embeddings": "position_embeddings"},
            of_cross={
                "object_queries_position_embeddings": "position_embeddings",
                "spatial_position_embeddings": "encoder_position_embeddings",
            },
        ),
        "detr.DetrDecoderLayer",
    ),
    (
        WAV2VEC,
        "hubert.HubertEncoderLayerStableLayerNorm unispeech.UniSpeechEncoderLayerStableLayerNorm "
        "unispeech_sat.UniSpeechSatEncoderLayerStableLayerNorm wav2vec2.Wav2Vec2EncoderLayerStableLayerNorm",
    ),
    (
        Words("attention* dropout + layer_norm", "feed_forward + final_layer_norm"),
        "data2vec.modeling_data2vec_audio.Data2VecAudioEncoderLayer hubert.HubertEncoderLayer sew.SEWEncoderLayer "
        "unispeech.UniSpeechEncoderLayer unispeech_sat.UniSpeechSatEncoderLayer wav2vec2.Wav2Vec2EncoderLayer",
    ),
    (
        BERT,
        "bert.BertLayer bert_generation.BertGenerationLayer bridgetower.BridgeTowerTextLayer camembert.CamembertLayer "
        "data2vec.modeling_data2vec_text.Data2VecTextLayer electra.ElectraLayer ernie.ErnieLayer roberta.RobertaLayer "
        "roberta_prelayernorm.RobertaPreLayerNormLayer roc_bert.RoCBertLayer xlm_roberta.XLMRobertaLayer "
        "xlm_roberta_xl.XLMRobertaXLLayer align.AlignTextLayer altclip.AltRobertaLayer "
        "chinese_clip.ChineseCLIPTextLayer clap.ClapTextLayer layoutlm.LayoutLMLayer markuplm.MarkupLMLayer "
        "splinter.SplinterLayer",
    ),
    (
        Words("attention* =", "feed_forward_chunk =", parts="intermediate output LayerNorm"),
        "esm.EsmLayer",
    ),
    (
        replace(BERT_OF_OLD, only="attention_mask output_attentions"),
        "nystromformer.NystromformerLayer visual_bert.VisualBertLayer yoso.YosoLayer",
    ),
    (replace(BERT_OF_OLD, only="attention_mask position_bias output_attentions"), "mpnet.MPNetLayer"),
    (
        Words("attention* + sa_layer_norm", "ffn + output_layer_norm"),
        "distilbert.TransformerBlock",
    ),
    (
        Words(
            "self_attn* post_attention_dropout + post_attention_layernorm", "mlp post_mlp_dropout + post_mlp_layernorm"
        ),
        "gte.GteLayer jina_embeddings_v3.JinaEmbeddingsV3Layer nomic_bert.NomicBertLayer",
    ),
    (Words("attn_norm attn*", "mlp_norm mlp"), "modernbert.ModernBertEncoderLayer"),
    (
        LLAMA,
        "arcee.ArceeDecoderLayer bitnet.BitNetDecoderLayer csm.CsmDecoderLayer cwm.CwmDecoderLayer "
        "diffllama.DiffLlamaDecoderLayer ernie4_5.Ernie4_5DecoderLayer eurobert.EuroBertDecoderLayer "
        "gemma.GemmaDecoderLayer glm.GlmDecoderLayer helium.HeliumDecoderLayer "
        "hunyuan_v1_dense.HunYuanDenseV1DecoderLayer llama.LlamaDecoderLayer ministral.MinistralDecoderLayer "
        "mistral.MistralDecoderLayer moonshine.MoonshineEncoderLayer olmo.OlmoDecoderLayer qwen2.Qwen2DecoderLayer "
        "qwen2_5_vl.Qwen2_5_VLDecoderLayer qwen2_vl.Qwen2VLDecoderLayer qwen3.Qwen3DecoderLayer "
        "seed_oss.SeedOssDecoderLayer smollm3.SmolLM3DecoderLayer starcoder2.Starcoder2DecoderLayer",
    ),
    (
        replace(LLAMA, tokens=False),
        "mixtral.MixtralDecoderLayer olmoe.OlmoeDecoderLayer qwen2_moe.Qwen2MoeDecoderLayer "
        "qwen3_moe.Qwen3MoeDecoderLayer",
    ),
    (GEMMA, "gemma2.Gemma2DecoderLayer gemma3.Gemma3DecoderLayer"),
    (
        Words("self_attn* post_attention_layernorm", "mlp post_feedforward_layernorm"),
        "exaone4.Exaone4DecoderLayer olmo2.Olmo2DecoderLayer olmo3.Olmo3DecoderLayer",
    ),
    (
        Words("input_layernorm self_attn* residual_multiplier", "post_attention_layernorm mlp residual_multiplier"),
        "granite.GraniteDecoderLayer",
    ),
    (
        Words("input_layernorm self_attn* resid_attn_dropout", "post_attention_layernorm mlp resid_mlp_dropout"),
        "phi3.Phi3DecoderLayer",
    ),
    (
        Words(
            "ln_1 | attn* | mlp",
            hands_out=True,
            only="layer_past attention_mask position_ids use_cache output_attentions",
        ),
        "codegen.CodeGenBlock gptj.GPTJBlock",
    ),
    (
        Words("ln_1 attn*", "ln_2 mlp", hands_out=True, only="layer_past attention_mask use_cache output_attentions"),
        "gpt_neo.GPTNeoBlock",
    ),
    (GPT, "gpt2.GPT2Block gpt_bigcode.GPTBigCodeBlock"),
    (PHI, "phi.PhiDecoderLayer"),
    (Words("input_layernorm | self_attn* | mlp"), "cohere.CohereDecoderLayer cohere2.Cohere2DecoderLayer"),
)


def _words_of_opt(layer: nn.Module) -> Words:
    attention, mlp = "self_attn* ~dropout", "fc1 activation_fn fc2 ~dropout"
    if layer.do_layer_norm_before:
        return Words(f"self_attn_layer_norm {attention}", f"final_layer_norm {mlp}", without="use_cache")
    return Words(f"{attention} + self_attn_layer_norm", f"{mlp} + final_layer_norm", without="use_cache")


def _words_of_gpt_neox(layer: nn.Module) -> Words:
    attention = "input_layernorm attention* post_attention_dropout"
    mlp = "post_attention_layernorm mlp post_mlp_dropout"
    return Words(f"| {mlp} | {attention}") if layer.use_parallel_residual else Words(attention, mlp)


CHOOSING: dict[str, Callable[[Any], Words]] = {
    "opt.OPTDecoderLayer": _words_of_opt,
    "gpt_neox.GPTNeoXLayer": _words_of_gpt_neox,
}


SPECIAL: dict[str, Callable[[Any], tuple[Branch, ...]]] = {
    "clap.ClapAudioLayer": special.of_old_swin,
    "convnext.ConvNextLayer": special.of_convnext,
    "convnextv2.ConvNextV2Layer": special.of_convnext,
    "dinov3_convnext.DINOv3ConvNextLayer": special.of_convnext,
    "donut.modeling_donut_swin.DonutSwinLayer": special.of_old_swin,
    "regnet.RegNetXLayer": special.of_resnet,
    "regnet.RegNetYLayer": special.of_resnet,
    "resnet.ResNetBasicLayer": special.of_resnet,
    "resnet.ResNetBottleNeckLayer": special.of_resnet,
    "sam.SamVisionLayer": special.of_sam,
    "sam_hq.SamHQVisionLayer": special.of_sam,
    "swin.SwinLayer": special.of_swin,
    "swin2sr.Swin2SRLayer": special.of_swin_v2,
    "swinv2.Swinv2Layer": special.of_swin_v2,
    "timesformer.TimesformerLayer": special.of_timesformer,
}


def _full(name: str) -> str:
    """bert.BertLayer -> transformers.models.bert.modeling_bert.BertLayer"""
    model, *file, cls = name.split(".")
    return ".".join(("transformers.models", model, *(file or (f"modeling_{model}",)), cls))


def _table() -> dict[str, Callable[[Any], tuple[Branch, ...]]]:
    """The branches of a layer, by the full name of its class."""
    rows: dict[str, Callable[[Any], tuple[Branch, ...]]] = {}
    for words, names in FAMILIES:
        rows |= {name: functools.partial(branches, words=words) for name in names.split()}
    for name, choose in CHOOSING.items():
        rows[name] = functools.partial(_chosen, choose)
    return {_full(name): row for name, row in (rows | SPECIAL).items()}


def _chosen(choose: Callable[[Any], Words], layer: nn.Module) -> tuple[Branch, ...]:
    return branches(layer, choose(layer))


TABLE = _table()


def register(cls: type[nn.Module]) -> None:
    """Make layers of class `cls` known, if it is in the table and nobody has registered it."""
    row = TABLE.get(f"{cls.__module__}.{cls.__qualname__}")
    if row is None or cls in branches_of.registry:
        return

    def branches_of_layer(layer: nn.Module) -> tuple[Branch, ...]:
        return row(layer)

    branches_of.register(cls, branches_of_layer)
