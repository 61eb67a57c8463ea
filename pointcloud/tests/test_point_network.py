"""PointViT: shapes and parameters of the authors', what recomputation and the methods change (nothing), the key map."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import dr2net
from dr2net import Options, ReversibleSequence
from engine.backbones.point_vit import build_point_vit
from engine.task import Recomputed
from engine.training.finetuning import apply_method, set_coefficients, set_mode
from engine.weights import write_tensors
from pointcloud import pix4point
from pointcloud.configs import ROWS
from pointcloud.head import Stage, Tokenizer, gather
from pointcloud.model import build_model, example_batch
from pointcloud.tests.toy_rooms import official, tiny_config, write_rooms


def network(method="conventional", *, seed=0, **model):
    config = ROWS[f"rooms_tiny_{method}"]()
    data = replace(config.data, num_points=64, neighbors=4)
    config = replace(config, data=data, model=replace(config.model, **model), run=replace(config.run, micro_batch=3))
    torch.manual_seed(seed)
    return config, build_model(config, pretrained=False)


def noisy_batch(config):
    batch = example_batch(config)
    generator = torch.Generator().manual_seed(1)
    for key in ("position", "features"):
        batch[key] = torch.randn(batch[key].shape, generator=generator)
    batch["label"] = torch.randint(0, 13, batch["label"].shape, generator=generator)
    return batch


def gradients(model, batch, seed=2):
    model.zero_grad()
    torch.manual_seed(seed)
    sum(model.losses(model(batch), batch).values()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def difference(a, b):
    assert a.keys() == b.keys()
    square = sum((a[key] - b[key]).double().square().sum() for key in a)
    return (square / sum(value.double().square().sum() for value in b.values())).sqrt().item()


def test_the_network_of_the_paper_has_its_size_and_shapes():
    config = ROWS["s3dis_vits_conventional"]()
    model = build_model(config, pretrained=False)
    assert sum(p.numel() for p in model.parameters()) == 23_685_453  # published: 23.7 M
    small = replace(config, data=replace(config.data, num_points=512), run=replace(config.run, micro_batch=2))
    batch = example_batch(small)
    positions, features = model.tokenizer(batch)
    assert [tuple(p.shape) for p in positions] == [(2, 512, 3), (2, 128, 3), (2, 32, 3)]
    assert [tuple(f.shape) for f in features] == [(2, 512, 7), (2, 128, 192), (2, 32, 384)]
    with torch.no_grad():
        assert model.eval()(batch)["logits"].shape == (2, 512, 13)
    assert {name.split(".")[0] for name, _ in model.backbone.named_parameters()} == {"blocks"}


def test_gathering_is_indexing_sample_by_sample():
    values, index = torch.randn(3, 10, 4), torch.randint(0, 10, (3, 5, 2), dtype=torch.int32)
    for sample in range(3):
        assert torch.equal(gather(values, index)[sample], values[sample][index[sample].long()])


def test_a_stage_is_its_formula_center_by_center():
    torch.manual_seed(0)
    stage = Stage(7, 16).double()
    position, features = torch.randn(1, 20, 3).double(), torch.randn(1, 20, 7).double()
    center, neighbor = torch.randint(0, 20, (1, 5)), torch.randint(0, 20, (1, 5, 6))
    found = stage(position, features, center, neighbor)
    for m in range(5):
        c, rows = center[0, m], []
        for j in neighbor[0, m]:
            told = torch.cat([position[0, j] - position[0, c], features[0, j] - features[0, c]])
            rows.append(stage.second(torch.relu(stage.first_norm(stage.first(told)))))
        most = torch.stack(rows).max(dim=0).values
        last = [torch.relu(stage.third_norm(stage.third(torch.cat([most, row])))) for row in rows]
        last = [torch.relu(stage.fourth_norm(stage.fourth(row))) for row in last]
        torch.testing.assert_close(found[0, m], torch.stack(last).max(dim=0).values)


def test_the_classifier_is_that_of_the_joined_features():
    _, model = network()
    head = model.decoder.classifier.eval()
    width = head.hidden.in_features // 3
    features, cls = torch.randn(2, 9, width), torch.randn(2, width)
    cloud = torch.cat([cls, features.amax(dim=1)], dim=-1)
    joined = torch.cat([cloud[:, None].expand(-1, 9, -1), features], dim=-1)
    wanted = head.linear(torch.relu(head.norm(head.hidden(joined))))
    torch.testing.assert_close(head(features, cls), wanted, rtol=1e-4, atol=1e-5)


def test_a_block_adds_its_position_each_time():
    vit = build_point_vit("tiny", weights=None)
    block = vit.blocks.blocks[0]
    x, position = torch.randn(2, 5, 128), torch.randn(2, 5, 128)
    h = x + position  # Pix4Point: block(x + pos)
    h = h + block.attn(block.norm1(h))
    torch.testing.assert_close(block(x, position), h + block.mlp(block.norm2(h)))


@pytest.mark.parametrize("chunk_mib", [None, 0.05])
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_recomputed_parts_give_the_same_gradients_and_statistics(chunk_mib, norm):
    config, plain = network(decoder_norm=norm, dropout=0.3)
    _, again = network(decoder_norm=norm, dropout=0.3)
    for part in (again.tokenizer, again.decoder):
        assert isinstance(part, Recomputed)
        part.recompute(chunk_mib)
    batch = noisy_batch(config)
    assert difference(gradients(again, batch), gradients(plain, batch)) < 1e-5
    for (name, ours), theirs in zip(again.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("method", ["checkpointed", "dr2net", "reversible"])
def test_a_method_acts_on_the_blocks_and_recomputes_what_is_around_them(method):
    config, model = network(method)
    options = Options(tolerance=1e-2, chunk_mib=0.05)
    apply_method(model, replace(config.finetuning, options=options))
    assert model.tokenizer.recomputed and "forward" in vars(model.decoder.classifier)
    sequences = [name for name, m in model.named_modules() if isinstance(m, ReversibleSequence)]
    assert sequences == ([] if method == "checkpointed" else ["backbone.blocks"])
    set_mode(model, config.finetuning)
    set_coefficients(model, config.finetuning, 0.5)
    batch = noisy_batch(config)
    found = gradients(model, batch)
    _, twin = network(method)
    apply_method(twin, replace(config.finetuning, also=(), options=replace(options, chunk_mib=None, store=True)))
    set_mode(twin, config.finetuning)
    set_coefficients(twin, config.finetuning, 0.5)
    assert difference(found, gradients(twin, batch)) < 1e-4
    assert found["pos_embed.2.weight"].abs().sum() > 0 and found["tokenizer.stages.0.first.weight"].abs().sum() > 0


def test_conventional_and_frozen_recompute_nothing_and_frozen_blocks_pass_gradients_on():
    for method in ("conventional", "frozen"):
        config, model = network(method)
        apply_method(model, config.finetuning)
        assert not model.tokenizer.recomputed
    found = gradients(model, noisy_batch(config))
    assert not any(name.startswith("backbone.") for name in found)
    assert found["tokenizer.stages.0.first.weight"].abs().sum() > 0, "through the frozen blocks"


def test_in_bfloat16_the_rebuilt_gradient_is_that_of_stored_activations():
    config, model = network("dr2net")
    apply_method(model, config.finetuning)
    set_mode(model, config.finetuning)
    set_coefficients(model, config.finetuning, 0.5)
    (sequence,) = (m for m in model.modules() if isinstance(m, ReversibleSequence))
    batch, found = noisy_batch(config), []
    for store in (False, True):
        sequence.store = store
        with torch.autocast("cpu", torch.bfloat16):
            found.append(gradients(model, batch))
    assert difference(*found) < 1e-6, "8e-4 while all blocks added to a bfloat16 gradient of the positions"


def test_at_one_zero_the_surrogate_is_the_network():
    config, model = network(drop_path=0.0)
    batch, plain = noisy_batch(config), None
    plain = model.eval()(batch)["logits"]
    dr2net.convert(model.backbone)
    torch.testing.assert_close(model(batch)["logits"], plain, rtol=1e-3, atol=1e-3)


def test_drop_path_leaves_positions_alone():
    block = build_point_vit("tiny", weights=None, drop_path=0.9).blocks.blocks[-1].train()
    position = torch.ones(64, 3, 128)
    torch.manual_seed(0)
    added = block.attend(torch.randn(64, 3, 128), position) - position
    dropped = (added == 0).flatten(1).all(dim=1)
    assert 0.7 < dropped.float().mean() < 1


def test_tokens_enter_with_the_scale_that_the_row_says():
    config, model = network(token_scale=0.13)
    _, features = model.tokenizer(noisy_batch(config))
    tokens = model.token_scale(model.proj(features[-1]))
    assert tokens.std().item() == pytest.approx(0.13, rel=0.02)


def paper_network():
    config = ROWS["s3dis_vits_conventional"]()
    config = replace(config, model=replace(config.model, name="tiny", weights=None, channels=(16, 128)))
    return config, build_model(config, pretrained=False)


def test_the_official_checkpoint_is_read_key_for_key(tmp_path):
    _, model = paper_network()
    state = official(model)
    for key in (
        *("encoder.patch_embed.convs.0.0.1.0.bias", "encoder.patch_embed.convs.1.1.0.0.weight", "encoder.cls_pos"),
        *("decoder.decoder.1.0.convs.0.1.running_mean", "head.head.0.0.weight", "encoder.blocks.3.attn.qkv.bias"),
    ):
        assert key in state
    path = tmp_path / "pix4point.pth"
    torch.save({"model": {f"module.{k}": v for k, v in state.items()}, "epoch": 600, "best_val": 69.6}, path)
    read = pix4point.read_state_dict(path, inside="model")
    found = pix4point.from_official(read, "pix4point.pth")
    own = model.state_dict()
    assert found.keys() == own.keys() and all(torch.equal(found[key], own[key]) for key in own)


def test_what_does_not_fit_or_is_reversible_is_refused(tmp_path):
    _, model = paper_network()
    found = pix4point.from_official(official(model), "file")
    lacking = {key: value for key, value in found.items() if key != "cls_pos"}
    with pytest.raises(ValueError, match="1 missing: cls_pos"):
        pix4point.load_tensors(model, lacking, "file")
    with pytest.raises(ValueError, match="another function"):
        pix4point.from_official({"encoder.blocks.0.inv_block.Fm.norm1.weight": torch.zeros(1)}, "file")


def test_weights_of_mae_lend_their_blocks_and_nothing_else(tmp_path):
    vit = build_point_vit("tiny", weights=None)
    state = {**vit.blocks.state_dict(), "cls_token": vit.cls_token + 1}
    state |= {f"norm.{key}": value + 2 for key, value in vit.norm.state_dict().items()}
    more = {"pos_embed": torch.zeros(1, 17, 128), "patch_embed.proj.weight": torch.zeros(128, 3, 16, 16)}
    more |= {"decoder_blocks.0.norm1.weight": torch.zeros(4), "mask_token": torch.zeros(1, 1, 4)}
    torch.save({"model": {**state, **more}}, tmp_path / "mae.pth")
    write_tensors({key: value.clone() for key, value in {**state, **more}.items()}, tmp_path / "mae.safetensors")
    for name in ("mae.pth", "mae.safetensors"):
        torch.manual_seed(9)
        lent = build_point_vit("tiny", weights=str(tmp_path / name), depth=4)
        assert torch.equal(lent.cls_token, state["cls_token"])
        assert torch.equal(lent.norm.weight, state["norm.weight"])
        assert torch.equal(lent.blocks.blocks[3].mlp.fc1.weight, state["blocks.3.mlp.fc1.weight"])
    torch.save({"model": {**state, "blocks.0.surprise": torch.zeros(1)}}, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="1 unused: blocks.0.surprise"):
        build_point_vit("tiny", weights=str(tmp_path / "odd.pth"))
    with pytest.raises(FileNotFoundError, match="no weights at"):
        build_point_vit("tiny", weights=str(tmp_path / "none.pth"))


def test_a_batch_of_rooms_has_the_shapes_of_the_example(tmp_path):
    from pointcloud import data

    config = tiny_config(write_rooms(tmp_path))
    dataset = data.build_dataset(config, "train")
    real, example = data.collate([dataset[(k, 0)] for k in range(4)]), example_batch(config)
    shapes = {key: (value.shape, value.dtype) for key, value in real.items() if isinstance(value, torch.Tensor)}
    assert shapes == {key: (value.shape, value.dtype) for key, value in example.items()}


def test_the_tokenizer_alone_has_no_batch_statistics():
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in Tokenizer(7, (8, 16)).modules())
