"""Batches of text and other kinds on the command line: what --input and --batch say, and models of transformers."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dr2net.cli import main
from dr2net.inputs import Input, Inputs, MadeBatch, find_batch, parse_grow, parse_inputs
from dr2net.model_names import find_model
from dr2net.planner import loss_of

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 11,
    "max_position_embeddings": 24,
    "type_vocab_size": 2,
}
MODULE = '''
import torch
from torch import nn
import dr2net

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(8, 8)
    def forward(self, x):
        return x + self.f(x).tanh()

dr2net.branches_of.register(Block, lambda b: (dr2net.Branch("f", lambda x: b.f(x).tanh(), (b.f,)),))

class Reader(nn.Module):
    """Fails on ids beyond its words, and without its mask."""
    def __init__(self, depth):
        super().__init__()
        self.words, self.kinds = nn.Embedding(11, 8), nn.Embedding(3, 8)
        self.blocks = nn.Sequential(*(Block() for _ in range(depth)))
    def forward(self, ids, mask, *, kinds=None):
        assert mask.dtype == torch.int64 and ids.shape == mask.shape
        x = self.words(ids) if kinds is None else self.words(ids) + self.kinds(kinds)
        return {"states": self.blocks(x * mask[..., None]), "ids": ids}

def reader(depth=3):
    return Reader(depth)

def image_and_size(count=2):
    return torch.randn(count, 8), torch.randn(count, 1)

def batch(count=4):
    return {"ids": torch.randint(11, (count, 6)), "mask": torch.ones(count, 6, dtype=torch.int64)}

def fixed():
    return {"ids": torch.zeros(2, 6, dtype=torch.int64), "mask": torch.ones(2, 6, dtype=torch.int64)}

def of_numpy(count=3):
    import numpy
    return {"ids": torch.from_numpy(numpy.zeros((count, 6), numpy.int64)), "mask": torch.ones(count, 6).long()}

def nothing():
    return {"ids": None}

def needs(count):
    return count

three = 3
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "module_for_inputs.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "module_for_inputs", raising=False)
    return "module_for_inputs"


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A folder with a configuration alone."""
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", **TINY}))
    return folder


def run(capsys, command: str) -> str:
    assert main(command.split()) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_an_input_is_read_as_it_is_written() -> None:
    assert parse_inputs(["16x3x8x8"]) == Inputs((Input((16, 3, 8, 8)),))
    assert parse_inputs(["ids:1x512:int"]) == Inputs((Input((1, 512), "ids", "int"),))
    listed = parse_inputs(["ids:4x8:int:2,mask:4x8:bool", "x:4x3"])
    assert listed == Inputs((Input((4, 8), "ids", "int", 2), Input((4, 8), "mask", "bool"), Input((4, 3), "x")))
    assert str(listed) == "ids:4x8:int, mask:4x8:bool, x:4x3:float"
    assert str(parse_inputs(["16X3x8x8"])) == "16x3x8x8"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ids", "is not a shape"),
        ("ids:4", "is not a shape"),
        ("ids:4x8:word", "kinds are float, int, bool"),
        ("ids:4x8:int:0", "int:2 is below 2"),
        ("ids:4x8:float:3", "int:2 is below 2"),
        ("ids:4x8:int:3:4", "is not name:shape:kind"),
        ("my-ids:4x8:int", "is not name:shape:kind"),
        ("ids:4x8,5x8", "with and without a name"),
        ("ids:4x8,ids:4x8", "'ids' twice"),
        ("", "is not a shape"),
        (",", "is not a shape"),
    ],
)
def test_what_is_no_input_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_inputs([text])


def test_numbers_stay_below_the_vocabulary_and_masks_are_one() -> None:
    model = find_model("transformers:BertConfig")
    assert model.args[2].vocab_size == 30522
    inputs = parse_inputs(
        ["input_ids:4x50:int", "attention_mask:4x50:int", "token_type_ids:4x50:int", "position_ids:4x50:int"]
    )
    from transformers import BertConfig, BertModel

    made = inputs.of_model(BertModel(BertConfig(**{**TINY, "max_position_embeddings": 64}))).make()
    assert made["input_ids"].unique().tolist() == list(range(11)) and made["token_type_ids"].unique().tolist() == [0, 1]
    assert made["attention_mask"].eq(1).all() and made["position_ids"].eq(torch.arange(50)).all()
    assert all(value.dtype == torch.int64 for value in made.values())


def test_without_a_configuration_the_largest_embedding_is_the_vocabulary() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kinds, self.words = nn.Embedding(2, 4), nn.Embedding(7, 4)

        def forward(self, ids: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
            return self.words(ids) + self.kinds(kinds)

    made = parse_inputs(["ids:9x30:int", "kinds:9x30:int:2"]).of_model(Text()).make()
    assert made["ids"].max() == 6 and made["kinds"].max() == 1
    with pytest.raises(ValueError, match="Linear has no embedding .* input:2x3:int:1000"):
        parse_inputs(["input:2x3:int"]).of_model(nn.Linear(3, 3))


def test_a_name_that_forward_has_not_is_refused_unless_it_is_the_only_one() -> None:
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(**TINY))
    with pytest.raises(ValueError, match="no such argument; it has input_ids, attention_mask"):
        parse_inputs(["ids:1x8:int,attention_mask:1x8:int"]).of_model(model)
    one = parse_inputs(["ids:1x8:int"]).of_model(model)
    assert one.make().shape == (1, 8) and str(one) == "1x8:int"


def test_inputs_of_a_model_are_given_by_position_or_by_name() -> None:
    class Sum(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a + 10 * b

    a, b = torch.full((2, 2), 1.0), torch.full((2, 2), 2.0)
    values = {21.0**2, loss_of(Sum(), (a, b), "fp32").item(), loss_of(Sum(), {"b": b, "a": a}, "fp32").item()}
    assert values == {441.0}


def test_growing_concerns_the_dimensions_that_are_equal() -> None:
    inputs = parse_inputs(["ids:4x8:int,mask:4x8:int,pixels:4x3x8x8"])
    assert [tensor.shape for tensor in inputs.grow(parse_grow("0", inputs), 6).tensors] == [
        (6, 8),
        (6, 8),
        (6, 3, 8, 8),
    ]
    longer = inputs.grow(parse_grow("1:16", inputs), 2)
    assert [tensor.shape for tensor in longer.tensors] == [(4, 32), (4, 32), (4, 3, 8, 8)]


def test_plan_of_a_text_model_says_where_its_positions_end(bert: Path, capsys) -> None:
    command = f"plan --model transformers:{bert} --input input_ids:2x8:int --input attention_mask:2x8:int"
    printed = run(capsys, f"{command} --grow 1:8 --chunk-mib 0")
    assert "input input_ids:2x8:int, attention_mask:2x8:int" in printed
    assert printed.splitlines()[2].split()[-1] == "24"
    assert "does not run on an input of input_ids:2x32:int, attention_mask:2x32:int" in printed


def test_plan_and_check_take_several_inputs(module: str, capsys) -> None:
    command = f"--model {module}:reader --input ids:2x6:int,mask:2x6:int,kinds:2x6:int:3"
    assert "dr2net" in run(capsys, f"plan {command} --chunk-mib 0")
    printed = run(capsys, f"check {command}")
    assert "3  branches ran" in printed and "problem" not in printed


def test_a_function_makes_the_batch_and_grows_if_it_takes_a_count(module: str, capsys) -> None:
    assert "3  branches ran" in run(capsys, f"check --model {module}:reader --batch {module}:batch")
    for name in ("batch", "of_numpy"):
        command = f"plan --model {module}:reader --batch {module}:{name} --chunk-mib 0 --budget 8MiB --optimizer sgd"
        printed = run(capsys, command)
        assert f"input {module}:{name}," in printed
        (row,) = [line for line in printed.splitlines() if line.startswith("conventional ")]
        assert int(row.split()[-1]) > 100
    printed = run(capsys, f"plan --model {module}:reader --batch {module}:fixed --chunk-mib 0")
    assert next(line for line in printed.splitlines() if line.startswith("conventional ")).endswith(" -")


def test_a_tokenizers_batch_is_a_dictionary(module: str) -> None:
    from transformers import BatchEncoding

    made = MadeBatch(lambda: BatchEncoding({"ids": torch.zeros(2, 3)}), "x", grows=False).make()
    assert type(made) is dict and made["ids"].shape == (2, 3)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("check --model MODULE:reader", "give one of --input"),
        ("check --model MODULE:reader --input 2x3 --batch MODULE:batch", "give one of --input"),
        ("check --model MODULE:reader --batch MODULE:absent", "cannot import 'absent'"),
        ("check --model MODULE:reader --batch absent_module:f", "cannot import 'f' from 'absent_module'"),
        ("check --model MODULE:reader --batch batch", "write package.module:function"),
        ("check --model MODULE:reader --batch MODULE:three", "is a int, not a function"),
        ("check --model MODULE:reader --batch MODULE:needs", "needs count; give its arguments defaults"),
        ("check --model MODULE:reader --batch MODULE:nothing", "returned a dict, not tensors"),
        ("plan --model MODULE:reader --batch MODULE:batch --grow 1", "only 0, the number of samples, can grow"),
        ("check --model MODULE:reader --input ids:2x6:int:12,mask:2x6:int", "does not run on an input of ids:2x6:int"),
        ("check --model MODULE:reader --input ids:2x6:int,masks:2x6:int", "no such argument; it has ids, mask, kinds"),
        ("check --model MODULE:reader --input 2x6", "does not run on an input of 2x6"),
        ("check --model transformers:bert-base-uncased --input 2x6:int", "similar types: bert"),
        ("check --model transformers:some/model --input 2x6:int", "need a network, which dr2net does not use"),
        ("check --model transformers:EMPTY --input 2x6:int", "the folder has no config.json"),
        ("check --model transformers:NONSENSE --input 2x6:int", "config.json: transformers makes no model of it"),
        ("check --model transformers:bert --pretrained --input 2x6:int", "transformers:bert is no local folder"),
    ],
)
def test_what_the_user_can_mend_is_one_line(module: str, tmp_path: Path, capsys, command: str, message: str) -> None:
    for name in ("empty", "nonsense"):
        (tmp_path / name).mkdir()
    (tmp_path / "nonsense" / "config.json").write_text('{"model_type": "no such type"}')
    replaced = {"MODULE": module, "EMPTY": str(tmp_path / "empty"), "NONSENSE": str(tmp_path / "nonsense")}
    for old, new in replaced.items():
        command = command.replace(old, new)
    assert main(command.split()) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_transformers_models_are_found_by_type_class_and_folder(bert: Path) -> None:
    with torch.device("meta"):
        assert type(find_model("transformers:bert")()).__name__ == "BertModel"
        assert type(find_model("transformers:BertForMaskedLM")()).__name__ == "BertForMaskedLM"
        assert find_model("transformers:gpt2")().config.use_cache is False
    model = find_model(f"transformers:{bert}")()
    assert model.config.num_hidden_layers == 2 and next(model.parameters()).device.type == "cpu"


def test_weights_of_a_folder_fill_the_model_or_are_refused(bert: Path) -> None:
    plain = find_model(f"transformers:{bert}")()
    plain.save_pretrained(bert)
    loaded = find_model(f"transformers:{bert}", pretrained=True)()
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in plain.state_dict().items())
    tensors = load_file(bert / "model.safetensors")
    del tensors["encoder.layer.0.output.dense.weight"]
    save_file(tensors, bert / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fill the model: encoder\.layer\.0\.output\.dense\.weight"):
        find_model(f"transformers:{bert}", pretrained=True)()


def test_a_model_that_no_memory_holds_is_planned_without_it(capsys) -> None:
    printed = run(capsys, "plan --model transformers:llama --input input_ids:1x16:int --chunk-mib 0 --optimizer sgd")
    assert float(printed.splitlines()[2].split()[1]) > 24


def test_a_batch_function_is_found_with_what_it_grows_by(module: str) -> None:
    assert find_batch(f"{module}:batch").grows and not find_batch(f"{module}:fixed").grows
    assert find_batch(f"{module}:batch").grow(((0,), 4), 3).make()["ids"].shape == (12, 6)
    first, second = find_batch(f"{module}:image_and_size").make()
    assert first.shape == (2, 8) and second.shape == (2, 1)
