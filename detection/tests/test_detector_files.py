"""Files of others into our detector: their names, made from the modules of those projects, and what must be refused."""

import argparse
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from detection.checkpoints import COCO_IDS, load_file
from detection.configs import ROWS, Config
from detection.model import Detector, build_model
from engine.weights import Tensors, write_tensors

DETREX = {"shared_heads": False, "temperature": 10000.0, "position_offset": -0.5}


def config_of(num_classes: int = 80, **changes: object) -> Config:
    config = ROWS["shapes_tiny_dr2net"]()
    changes = {"weights": None, "decoder_layers": 2, "encoder_layers": 1, "queries": 20, **changes}
    return replace(config, data=replace(config.data, num_classes=num_classes), model=replace(config.model, **changes))


def random_detector(config: Config) -> Detector:
    torch.manual_seed(0)
    model = build_model(config, pretrained=False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def swin_names(key: str) -> str:
    """Ours -> Microsoft's, below "backbone."."""
    if key.startswith("norm"):
        return key
    _, part, rest = key.split(".", 2)
    if part == "0":
        return f"patch_embed.{'proj' if rest[0] == '0' else 'norm'}.{rest.split('.')[1]}"
    if int(part) % 2 == 0:
        return f"layers.{int(part) // 2 - 1}.downsample.{rest}"
    rest = rest.replace("mlp.0.", "mlp.fc1.").replace("mlp.3.", "mlp.fc2.")
    return f"layers.{(int(part) - 1) // 2}.blocks.{rest}"


def by_category_id(value: Tensor, rows: int) -> Tensor:
    wide = torch.full((rows, *value.shape[1:]), 7.0)
    wide[COCO_IDS] = value
    return wide


def official(model: Detector) -> Tensors:
    """Official DINO: heads six times (here two), once more below the decoder; a row per category id."""
    state: Tensors = {}
    for key, value in model.state_dict().items():
        part, rest = key.split(".", 1)
        if part == "backbone":
            state[f"backbone.0.{swin_names(rest)}"] = value
            continue
        if re.match(r"class_embed|transformer\.enc_out_class_embed", rest):
            value = by_category_id(value, 91)
        if rest.startswith("label_enc"):
            value = by_category_id(value, 92)
        if rest.startswith(("class_embed.", "bbox_embed.")):
            name, _, tail = rest.split(".", 2)
            for layer in range(2):
                state[f"{name}.{layer}.{tail}"] = state[f"transformer.decoder.{name}.{layer}.{tail}"] = value
        else:
            state[rest] = value
    return state


def detrex(model: Detector) -> Tensors:
    state: Tensors = {}
    levels = len(model.head.input_proj)
    for key, value in model.state_dict().items():
        part, rest = key.split(".", 1)
        if part == "backbone":
            state[f"backbone.{swin_names(rest)}"] = value
            continue
        if found := re.match(r"input_proj\.(\d+)\.(\d)\.(.+)", rest):
            level, kind = int(found[1]), ("conv", "norm")[int(found[2])]
            neck = f"extra_convs.{level - levels + 1}" if level == levels - 1 else f"convs.{level}"
            state[f"neck.{neck}.{kind}.{found[3]}"] = value
            continue
        rest = rest.replace("level_embed", "level_embeds")
        rest = re.sub(r"linear1\.", "ffns.0.layers.0.0.", re.sub(r"linear2\.", "ffns.0.layers.1.", rest))
        if ".encoder.layers." in rest:
            rest = (
                rest.replace("self_attn.", "attentions.0.").replace("norm1.", "norms.0.").replace("norm2.", "norms.1.")
            )
        elif ".decoder.layers." in rest:
            rest = rest.replace("self_attn.", "attentions.0.attn.").replace("cross_attn.", "attentions.1.")
            rest = rest.replace("norm1.", "norms.1.").replace("norm2.", "norms.0.").replace("norm3.", "norms.2.")
        rest = re.sub(r"transformer\.enc_out_(class|bbox)_embed\.", r"\1_embed.2.", rest)
        state[rest] = value
        if rest.startswith(("class_embed.", "bbox_embed.")):
            state[f"transformer.decoder.{rest}"] = value
    return state


def mmdetection(model: Detector) -> Tensors:
    state: Tensors = {}
    for key, value in detrex(model).items():
        if key.startswith(("transformer.decoder.class_embed", "transformer.decoder.bbox_embed")):
            continue
        if key.startswith("backbone."):
            name = key.removeprefix("backbone.")
            if "downsample" in name:
                flat = value[None] if value.dim() == 1 else value
                grid = flat.view(len(flat), 2, 2, -1).transpose(1, 2)
                moved = grid.permute(0, 3, 1, 2).reshape(len(flat), -1)
                value = moved[0] if value.dim() == 1 else moved
            name = name.replace("layers.", "stages.").replace("patch_embed.proj.", "patch_embed.projection.")
            name = name.replace(".attn.", ".attn.w_msa.") if ".blocks." in name else name
            name = name.replace("mlp.fc1.", "ffn.layers.0.0.").replace("mlp.fc2.", "ffn.layers.1.")
            state[f"backbone.{name}"] = value
            continue
        key = re.sub(r"^(neck\..*)\.norm\.", r"\1.gn.", key)
        key = key.replace("transformer.level_embeds", "level_embed").replace("transformer.tgt_embed", "query_embedding")
        key = key.replace("transformer.enc_output_norm", "memory_trans_norm").replace(
            "transformer.enc_output", "memory_trans_fc"
        )
        key = key.replace("label_enc", "dn_query_generator.label_embedding").replace(
            "class_embed", "bbox_head.cls_branches"
        )
        if found := re.match(r"bbox_embed\.(\d+)\.layers\.(\d)\.(.+)", key):
            key = f"bbox_head.reg_branches.{found[1]}.{2 * int(found[2])}.{found[3]}"
        key = key.removeprefix("transformer.")
        if key.startswith("encoder.layers."):
            key = key.replace("attentions.0.", "self_attn.")
        key = key.replace("attentions.0.attn.", "self_attn.attn.").replace("attentions.1.", "cross_attn.")
        key = key.replace("ffns.0.", "ffn.")
        state[key] = value
    return state


def assert_same(model: Detector, source: Detector, *, but: str = "nothing") -> None:
    own = model.state_dict()
    for key, value in source.state_dict().items():
        if not re.search(but, key):
            assert torch.equal(own[key], value), key


def test_an_official_file_loads_with_its_arguments_and_category_ids(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of()
    source, path = random_detector(config), tmp_path / "checkpoint.pth"
    torch.save({"model": official(source), "args": argparse.Namespace(lr=1e-4, num_classes=91), "epoch": 11}, path)
    model = build_model(replace(config, model=replace(config.model, weights=str(path))))
    assert_same(model, source)
    assert "of official DINO, all layers loaded" in capsys.readouterr().out
    batch = {"image": torch.randn(1, 3, 128, 128), "padding": torch.zeros(1, 128, 128, dtype=torch.bool), "targets": []}
    with torch.no_grad():
        a, b = model.eval()(batch), source.eval()(batch)
    assert torch.equal(a["logits"], b["logits"]) and torch.equal(a["boxes"], b["boxes"])


@pytest.mark.parametrize("kind", ["detrex", "mmdetection"])
def test_files_with_a_head_per_layer_load_where_the_row_says_so(kind: str, tmp_path: Path) -> None:
    changes = DETREX if kind == "detrex" else {"shared_heads": False}
    config = config_of(extra_levels=1, **changes)
    source = random_detector(config)
    state = detrex(source) if kind == "detrex" else mmdetection(source)
    path = tmp_path / "theirs.pth"
    torch.save({"model": state} if kind == "detrex" else {"state_dict": state, "meta": {"epoch": 12}}, path)
    model = build_model(replace(config, model=replace(config.model, weights=str(path))))
    assert_same(model, source)


def test_a_file_of_another_network_names_the_flags(tmp_path: Path) -> None:
    source = random_detector(config_of(extra_levels=1, **DETREX))
    torch.save({"model": detrex(source)}, tmp_path / "detrex.pth")
    with pytest.raises(ValueError, match="--model.no-shared-heads --model.temperature 10000.0 --model.position-o"):
        load_file(build_model(config_of(extra_levels=1)), tmp_path / "detrex.pth", config_of(extra_levels=1))


@pytest.mark.parametrize("kind", ["official DINO", "detrex", "mmdetection"])
def test_a_file_that_takes_the_map_of_stride_4_is_refused_by_that_name(kind: str, tmp_path: Path) -> None:
    others = {"official DINO": {}, "detrex": DETREX, "mmdetection": {**DETREX, "temperature": 20, "position_offset": 0}}
    config = config_of(extra_levels=1, **others[kind])
    names = {"official DINO": official, "detrex": detrex, "mmdetection": mmdetection}[kind]
    state = names(random_detector(config))
    state["backbone.0.norm0.weight" if kind == "official DINO" else "backbone.norm0.weight"] = torch.ones(48)
    torch.save({"model": state}, tmp_path / "five.pth")
    with pytest.raises(
        ValueError, match=rf"five.pth: of {kind} 5-scale, .* stride 4; .* stride 8: give a 4-scale file"
    ):
        load_file(build_model(config), tmp_path / "five.pth", config)


def test_a_file_of_more_levels_names_the_flag(tmp_path: Path) -> None:
    torch.save({"model": official(random_detector(config_of(extra_levels=2)))}, tmp_path / "four.pth")
    with pytest.raises(ValueError, match=r"has 4 levels, the row 3: give --model.extra-levels 2"):
        load_file(build_model(config_of(extra_levels=1)), tmp_path / "four.pth", config_of(extra_levels=1))


def test_a_file_of_another_number_of_queries_names_the_flag(tmp_path: Path) -> None:
    write_tensors(random_detector(config_of()).state_dict(), tmp_path / "twenty.safetensors")
    with pytest.raises(ValueError, match=r"has 20 queries, the row 30: give --model.queries 20") as error:
        load_file(build_model(config_of(queries=30)), tmp_path / "twenty.safetensors", config_of(queries=30))
    assert "classes" not in str(error.value)


def test_other_classes_leave_the_class_layers_fresh_and_say_which(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = random_detector(config_of())
    torch.save({"model": official(source)}, tmp_path / "coco.pth")
    config = config_of(num_classes=3)
    model = build_model(config)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    load_file(model, tmp_path / "coco.pth", config)
    said = capsys.readouterr().out
    classes = r"class_embed|label_enc"
    assert_same(model, source, but=classes)
    for key, value in model.state_dict().items():
        if re.search(classes, key):
            assert torch.equal(value, before[key]) and key in said


def test_our_own_file_loads_and_a_wrong_one_is_refused(tmp_path: Path) -> None:
    config = config_of(num_classes=4)
    source = random_detector(config)
    state = {key: value.contiguous() for key, value in source.state_dict().items()}
    write_tensors(state, tmp_path / "ours.safetensors")
    model = build_model(config)
    load_file(model, tmp_path / "ours.safetensors", config)
    assert_same(model, source)
    del state["head.transformer.enc_output.weight"]
    write_tensors(state, tmp_path / "short.safetensors")
    with pytest.raises(ValueError, match="1 missing: head.transformer.enc_output.weight"):
        load_file(model, tmp_path / "short.safetensors", config)
    wrong = official(random_detector(config_of()))
    wrong["class_embed.1.bias"] = wrong["class_embed.1.bias"] + 1
    torch.save({"model": wrong}, tmp_path / "differ.pth")
    with pytest.raises(ValueError, match=r"copies of head\.class_embed\.(0|1)\.bias differ"):
        load_file(build_model(config_of()), tmp_path / "differ.pth", config_of())


def test_a_backbone_alone_fills_the_backbone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of()
    source = random_detector(config)
    swin = {swin_names(key): value for key, value in source.backbone.state_dict().items() if key[:4] != "norm"}
    torch.save(
        {"model": {**swin, "norm.weight": torch.ones(192), "head.bias": torch.ones(1000)}}, tmp_path / "swin.pth"
    )
    model = build_model(config)
    load_file(model, tmp_path / "swin.pth", config)
    for key, value in source.backbone.state_dict().items():
        if not key.startswith("norm"):
            assert torch.equal(model.backbone.state_dict()[key], value)
    assert "fresh: backbone.norm1.weight" in capsys.readouterr().out


def test_objects_of_another_program_are_not_unpickled(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "meta": Path("x")}, tmp_path / "meta.pth")
    with pytest.raises(ValueError, match="not a file of tensors"):
        load_file(build_model(config_of()), tmp_path / "meta.pth", config_of())
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff\xe0 not weights")
    with pytest.raises(ValueError, match="not what torch.save writes") as error:
        load_file(build_model(config_of()), tmp_path / "photo.jpg", config_of())
    assert "weights_only" not in str(error.value)  # torch's advice is to run it all the same


CLASSES = "head.class_embed.0.weight"
OFFICIAL = {"transformer.x": torch.zeros(1), "class_embed.0.weight": torch.zeros(2)}
HOSTILE = {
    "a name that is a number": (lambda own: {**own, 3: torch.zeros(1)}, "names that are no words"),
    "a class layer that is one number": (lambda own: {**own, CLASSES: torch.tensor(1.0)}, CLASSES),
    "a class layer of another width": (lambda own: {**own, CLASSES: torch.zeros(5, 31)}, CLASSES),
    "a tensor of lists": (lambda own: {**own, CLASSES: torch.nested.nested_tensor([torch.zeros(2)])}, CLASSES),
    "a sparse copy": (lambda own: {**OFFICIAL, "class_embed.1.weight": torch.zeros(2).to_sparse()}, "class_embed.1"),
    "a copy without values": (
        lambda own: {**OFFICIAL, "class_embed.1.weight": torch.zeros(2, device="meta")},
        "embed.1",
    ),
    "plain DETR": (lambda own: {"transformer.x": torch.zeros(1), "class_embed.weight": torch.zeros(2)}, "another kind"),
    "a layer without a name": (
        lambda own: {"transformer.x": torch.zeros(1), "class_embed.0": torch.zeros(2)},
        "another",
    ),
    "a merging of three": (lambda own: {"stages.0.downsample.reduction.weight": torch.zeros(3, 5)}, "does not fit"),
    "a merging of nothing": (lambda own: {"stages.0.downsample.norm.weight": torch.tensor(1.0)}, "does not fit"),
}


@pytest.mark.filterwarnings("ignore")  # of torch, about layouts that nobody uses
def test_hostile_files_are_one_line_and_change_nothing(tmp_path: Path) -> None:
    config = config_of(5)
    model = random_detector(config)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for name, (make, said) in HOSTILE.items():
        torch.save(make(before), tmp_path / "bad.pth")
        with pytest.raises(ValueError, match=re.escape(said)) as error:
            load_file(model, tmp_path / "bad.pth", config)
        assert "bad.pth" in str(error.value), name
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), name


def test_an_own_detector_of_91_classes_is_not_taken_for_category_ids(tmp_path: Path, capsys) -> None:
    write_tensors(random_detector(config_of(91)).state_dict(), tmp_path / "own.safetensors")
    model = build_model(config_of(80))
    before = model.head.class_embed[0].weight.clone()
    load_file(model, tmp_path / "own.safetensors", config_of(80))
    assert torch.equal(model.head.class_embed[0].weight, before)
    assert "fresh: head.class_embed.0.weight" in capsys.readouterr().out
