"""Files of others into our model: the official MTTR's names, made from its modules, and what must be refused."""

import re
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from engine.weights import Tensors, write_tensors
from vos.checkpoints import kind_of, our_names
from vos.configs import ROWS, Config
from vos.model import Segmenter, build_model

# What an official file holds besides its weights.
AROUND = {"epoch": 53, "total_epochs": 70, "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 1e-4}]}}


def config_of(weights: Path | None, **changes: Any) -> Config:
    """MTTR's own shape, with fewer and narrower layers."""
    config = ROWS["a2d_swint_dr2net"]()
    small = {"width": 32, "heads": 4, "feedforward": 24, "text_width": 16, "mask_widths": (32, 16, 8, 8), "queries": 5}
    return replace(
        config,
        model=replace(config.model, weights=None if weights is None else str(weights), **{**small, **changes}),
    )


def random_segmenter(config: Config) -> Segmenter:
    torch.manual_seed(0)
    model = build_model(config, pretrained=False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def official(model: Segmenter) -> Tensors:
    """MTTR's names: stages as layers, merging beside them, the window's table of indices, and a RoBERTa."""
    state: Tensors = {}
    for key, value in model.state_dict().items():
        part, rest = key.split(".", 1)
        if part == "head":
            state[rest] = value
            continue
        if found := re.match(r"features\.(\d+)\.(.+)", rest):
            number, inner = int(found[1]), found[2].replace("mlp.0.", "mlp.fc1.").replace("mlp.3.", "mlp.fc2.")
            rest = f"downsamples.{number // 2}.{inner}" if number % 2 else f"layers.{number // 2}.blocks.{inner}"
        state[f"backbone.{rest}"] = value
        if rest.endswith("relative_position_bias_table"):
            index = rest.replace("bias_table", "index")
            state[f"backbone.{index}"] = torch.zeros(392, 392, dtype=torch.int64)
    state["transformer.text_encoder.embeddings.position_ids"] = torch.arange(514)[None]
    state["transformer.text_encoder.encoder.layer.0.output.dense.weight"] = torch.ones(2, 2)
    return state


def same(model: Segmenter, expected: Tensors) -> bool:
    found = model.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("best", [46.1, np.float64(46.1), np.float32(46.1)])
def test_an_official_file_fills_every_layer(best: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its best mAP is a number of numpy: weights_only would refuse it, and it is read as a number and nothing else."""
    model = random_segmenter(config_of(None))
    file = tmp_path / "mttr.pth.tar"
    torch.save({**AROUND, "model_state_dict": official(model), "best_mAP": best}, file)
    assert same(build_model(config_of(file)), model.state_dict())
    assert "of official MTTR, all layers loaded" in capsys.readouterr().out


def test_a_number_that_an_older_numpy_wrote_is_read(tmp_path: Path) -> None:
    model = random_segmenter(config_of(None))
    file = tmp_path / "mttr.pth.tar"
    torch.save({"model_state_dict": official(model), "best_mAP": np.float64(46.1)}, file)
    content = file.read_bytes()
    new, old = b"cnumpy._core.multiarray\nscalar", b"cnumpy.core.multiarray\nscalar"
    assert new in content
    source, target = tmp_path / "new", tmp_path / "old.pth.tar"
    source.write_bytes(content)
    with zipfile.ZipFile(source) as theirs, zipfile.ZipFile(target, "w") as ours:
        for name in theirs.namelist():
            ours.writestr(name, theirs.read(name).replace(new, old))
    assert same(build_model(config_of(target)), model.state_dict())


def test_names_go_there_and_back() -> None:
    model = random_segmenter(config_of(None))
    theirs = official(model)
    assert kind_of(theirs) == "official MTTR" and kind_of(model.state_dict()) == "ours"
    assert our_names(theirs).keys() == model.state_dict().keys()


def test_the_official_shape_has_the_official_number_of_tensors_and_parameters() -> None:
    model = build_model(ROWS["a2d_swint_dr2net"](), pretrained=False)
    theirs = official(model)
    assert sum(not key.startswith("transformer.text_encoder.") for key in theirs) == 277
    head = model.head

    def millions(*modules: nn.Module) -> float:
        return round(sum(p.numel() for module in modules for p in module.parameters()) / 1e6, 2)

    assert millions(model.backbone) == 12.36
    assert millions(head.transformer.encoder) == 3.95 and millions(head.transformer.decoder) == 4.74
    assert millions(head.spatial_decoder) == 1.01
    parts = (head.transformer.txt_proj, head.is_referred_head, head.instance_kernels_head, head.obj_queries)
    assert millions(*parts, head.vid_embed_proj) == 0.38


@pytest.mark.parametrize("bare", [True, False])
def test_our_own_file_and_a_bare_official_one(bare: bool, tmp_path: Path) -> None:
    model = random_segmenter(config_of(None))
    if bare:
        file = tmp_path / "bare.pth"
        torch.save(official(model), file)
    else:
        file = tmp_path / "model.safetensors"
        write_tensors(model.state_dict(), file)
    assert same(build_model(config_of(file)), model.state_dict())


def test_a_backbone_alone_leaves_the_head_fresh_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = random_segmenter(config_of(None))
    file = tmp_path / "swin.safetensors"
    write_tensors(dict(model.backbone.state_dict()), file)
    found = build_model(config_of(file))
    assert all(torch.equal(found.backbone.state_dict()[k], v) for k, v in model.backbone.state_dict().items())
    assert "of a Video Swin; fresh: the head" in capsys.readouterr().out


def test_files_of_other_networks_are_one_clear_error(tmp_path: Path) -> None:
    model = random_segmenter(config_of(None))
    theirs = official(model)

    def refused(state: dict[str, Any], *said: str, **changes: Any) -> None:
        file = tmp_path / "file.pth"
        torch.save(state, file)
        with pytest.raises(ValueError) as caught:
            build_model(config_of(file, **changes))
        assert all(words in str(caught.value) for words in ("file.pth", *said)), caught.value

    refused(theirs, "obj_queries.weight [5, 32] instead of [7, 32]", queries=7)
    refused({**theirs, "box_head.weight": torch.ones(1)}, "unused: box_head.weight")
    refused({key: value for key, value in theirs.items() if "adapter2" not in key}, "missing: head.spatial_decoder")
    refused({"model_state_dict": {**theirs, "obj_queries.weight": torch.full((5, 32), torch.nan)}}, "NaN or infinite")
    refused({**theirs, "obj_queries.weight": torch.ones(5, 32, dtype=torch.int8)}, "another kind of numbers")
    refused({"epoch": 3, "model_state_dict": 5}, "no state dict of tensors")
    # a checkpoint of another task: a Video Swin with a head of its own
    other = {f"backbone.{key}": value for key, value in model.backbone.state_dict().items()}
    refused({**other, "head.class_embed.weight": torch.ones(3, 3)}, "another task", "head.class_embed.weight")
    refused({"head.class_embed.weight": torch.ones(3, 3)}, "another task")
    with pytest.raises(FileNotFoundError, match=r"absent.pth"):
        build_model(config_of(tmp_path / "absent.pth"))


class Hostile:
    """An object that runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("/tmp/should_not_exist"),))


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "hostile.pth.tar"
    torch.save({"model_state_dict": {}, "best_mAP": Hostile()}, file)
    with pytest.raises(ValueError, match="could run code"):
        build_model(config_of(file))
    assert not Path("/tmp/should_not_exist").exists()
