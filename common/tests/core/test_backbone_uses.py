"""What a backbone is asked for (attention weights, hidden states, features, text, copies) works on a converted model,
or is refused with the way that works."""

import copy
from typing import Any

import pytest
import torch
from model_zoo import FAMILIES as ZOO
from torch import Tensor, nn
from toy_blocks import build_input, build_net, gradients, relative
from transformers_zoo import FAMILIES

import dr2net

pytestmark = [
    pytest.mark.filterwarnings("ignore:float inversion"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # transformers and torch announce what they rename
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

ATTENTIVE = ["bert", "vit", "llama", "whisper", "mpnet", "gptj", "timesformer", "vjepa2", "swin"]


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model, inputs = FAMILIES[name]()
    return model.eval(), inputs


def attentions(outputs: Any) -> list[Tensor]:
    names = ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions")
    return [weights for name in names for weights in outputs.get(name) or () if weights is not None]


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("name", ATTENTIVE)
def test_attention_weights_and_hidden_states_are_those_of_the_plain_model(name: str, gradient: bool) -> None:
    model, inputs = build(name)
    model.set_attn_implementation("eager")  # the fused kernels compute no weights
    how = {**inputs, "output_attentions": True, "output_hidden_states": True}
    with torch.set_grad_enabled(gradient):
        expected = model(**how)
        for inversion in ("float", "exact"):
            twin = copy.deepcopy(model)
            dr2net.convert(twin, inversion=inversion)
            found = twin(**how)
            near = (
                0 if inversion == "float" and name not in ("bert", "mpnet") else 1e-4
            )  # norm(x + f) - x, and the grid
            for ours, theirs in (
                (attentions(found), attentions(expected)),
                (found.get("hidden_states") or (), expected.get("hidden_states") or ()),
            ):
                assert len(ours) == len(theirs)
                assert not theirs or relative(list(ours), list(theirs)) <= near
    assert attentions(expected) or name == "whisper"


def test_a_loss_on_attention_weights_that_a_block_hands_out_is_an_error_or_stored() -> None:
    model, inputs = build("mpnet")
    found = []
    for how in ({}, {"store": True}):
        twin = copy.deepcopy(model)
        dr2net.convert(twin, **how)
        weights = twin(**inputs, output_attentions=True).attentions[1]
        if not how:
            with pytest.raises(RuntimeError, match=r"handed out .*convert with store=True"):
                weights.square().sum().backward()
        else:
            weights.square().sum().backward()
            found = [g for g in gradients(twin) if g is not None]
    assert found


def test_weights_of_a_branch_in_chunks_are_put_together() -> None:
    model, inputs = build("mpnet")
    expected = model(**inputs, output_attentions=True).attentions
    dr2net.convert(model, chunk_mib=1e-6)
    found = model(**inputs, output_attentions=True).attentions
    assert relative(list(found), list(expected)) < 1e-4


@pytest.mark.parametrize("outgrown", [False, True])
def test_a_hook_that_looks_at_a_module_inside_sees_each_pass_once(outgrown: bool) -> None:
    net, x = build_net(2), build_input()
    if outgrown:  # the first branch outgrows the grid, and runs again
        net.blocks[0].value.bias.data.fill_(1e4)
    net.stem = nn.Identity()
    dr2net.convert(net)
    seen = []
    net.blocks[0].value.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        net(x)
    assert len(seen) == 1


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gptj"])
def test_generated_text_is_that_of_the_plain_model(name: str) -> None:
    model, inputs = build(name)
    for parameter in model.parameters():  # as initialized it would say one word
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.4)
    model = _with_head(name, model)
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(inputs["input_ids"], **how, use_cache=True)
    dr2net.convert(model)
    assert torch.equal(model.generate(inputs["input_ids"], **how, use_cache=True), expected)
    assert len(set(expected[:, 7:].flatten().tolist())) > 1
    dr2net.set_coefficients(model, 7 / 8, 1 / 8)
    cached = model.generate(inputs["input_ids"], **how, use_cache=True)
    assert torch.equal(cached, model.generate(inputs["input_ids"], **how, use_cache=False))
    model.train()
    with pytest.raises(ValueError, match="use_cache=False"):
        model(input_ids=inputs["input_ids"], use_cache=True)
    model(input_ids=inputs["input_ids"], use_cache=False).logits.sum().backward()


def _with_head(name: str, model: nn.Module) -> nn.Module:
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_config(model.config).eval()
    getattr(whole, whole.base_model_prefix).load_state_dict(model.state_dict())
    nn.init.normal_(whole.get_output_embeddings().weight, std=0.4)
    return whole


def test_intermediate_features_of_timm_are_those_of_the_plain_model() -> None:
    model, x = ZOO["vit"]()
    model.eval()
    calls = (
        lambda m: m.forward_intermediates(x, indices=[0, 1], intermediates_only=True, stop_early=True),
        lambda m: m.forward_intermediates(x, indices=3)[1],
        lambda m: m.get_intermediate_layers(x, n=2),
    )
    with torch.no_grad():
        expected = [call(model) for call in calls]
        dr2net.convert(model, inversion="float")
        found = [call(model) for call in calls]
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    features = model.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
    sum(feature.square().mean() for feature in features).backward()
    assert model.blocks[0].mlp.fc1.weight.grad is not None


def test_a_model_cut_to_features_is_converted_and_trains() -> None:
    import timm

    how = {"img_size": 32, "depth": 3, "embed_dim": 24, "num_heads": 2, "features_only": True, "out_indices": (0, 1)}
    model, x = timm.create_model("vit_tiny_patch16_224", **how), ZOO["vit"]()[1]
    plain = copy.deepcopy(model)
    dr2net.convert(model)
    for net in (model, plain):
        sum(feature.square().mean() for feature in net(x)).backward()
    assert relative(gradients(model), gradients(plain)) < 1e-3


def test_a_feature_extractor_of_torchvision_is_refused_with_another_way() -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    model, x = ZOO["swin"]()
    dr2net.convert(model.eval(), inversion="float")
    with pytest.raises(ValueError, match=r"traced.*register_forward_hook.*dr2net\.deconvert"):
        create_feature_extractor(model, ["features.1"])
    seen: list[Tensor] = []
    model.features[1].register_forward_hook(lambda module, args, output: seen.append(output))
    features = model(x).sum() + seen[0].square().mean()
    features.backward()
    assert len(seen) == 1 and model.features[1][0].mlp[0].weight.grad is not None


@pytest.mark.parametrize("how", ["export", "onnx"])
def test_export_is_refused_and_works_on_what_deconvert_gives_back(how: str) -> None:
    model, x = ZOO["vit"]()
    model.eval()
    dr2net.convert(model)

    def export() -> Any:
        if how == "export":
            return torch.export.export(model, (x,))
        return torch.onnx.export(model, (x,), "unwritten.onnx", dynamo=False)

    with pytest.raises(Exception, match=r"dr2net\.deconvert\(model\)"):
        export()
    dr2net.deconvert(model)
    assert torch.allclose(torch.export.export(model, (x,)).module()(x), model(x), atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "swin", "llama"])
def test_copies_averages_and_files_of_a_converted_model_compute_what_it_computes(name: str, tmp_path) -> None:
    model, inputs = build(name)
    dr2net.convert(model)
    dr2net.set_coefficients(model, 7 / 8, 1 / 8)
    expected = model(**inputs).last_hidden_state
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    for twin in (copy.deepcopy(model), loaded, average):
        found = twin(**inputs).last_hidden_state
        assert torch.equal(found, expected)
        found.square().sum().backward()
    assert all(p.grad is None for p in model.parameters())
