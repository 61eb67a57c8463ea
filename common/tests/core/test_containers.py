"""Which containers of blocks are converted, whatever their class and place, and what is said of the others."""

import copy

import pytest
import torch
from torch import Tensor, nn
from toy_blocks import WIDTH, build_input, build_net, gradients, relative

import dr2net

pytestmark = pytest.mark.filterwarnings("ignore:float inversion")

WAYS = ["float", "exact"]


class Subclass(nn.Sequential):
    """Without a forward of its own."""

    note = "kept"


class Scaling(nn.Sequential):
    """With a forward and a parameter of its own."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__(*blocks)
        self.add_module("tail", nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(3 * x)


class Stage(nn.Module):
    """Blocks in an nn.ModuleDict, called by key."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({f"part{index}": block for index, block in enumerate(blocks)})

    def forward(self, x: Tensor) -> Tensor:
        for key in self.parts:
            x = self.parts[key](x)
        for block in self.parts.values():
            x = block(x)
        return x


class Attributes(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.rest = *blocks[:2], nn.Sequential(*blocks[2:])

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.second(self.first(x)))


def blocks(num: int = 3) -> list[nn.Module]:
    return list(build_net(num).blocks)


def mixed() -> nn.Module:
    """A block beside containers of blocks."""
    one, two, three, four, five = blocks(5)
    return nn.Sequential(one, nn.Sequential(two, three), nn.ModuleDict({"a": nn.Sequential(four, five)})["a"])


MODELS = {
    "subclass": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), Subclass(*blocks())),
    "subclass with a forward": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), Scaling(*blocks())),
    "dictionary": lambda: Stage(*blocks()),
    "model itself": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), *blocks(), nn.Linear(WIDTH, 3)),
    "mixed": mixed,
    "attributes beside a container": lambda: Attributes(*blocks(4)),
}
BRANCHES = {"mixed": 10, "attributes beside a container": 4}


@pytest.mark.parametrize("inversion", WAYS)
@pytest.mark.parametrize("kind", MODELS)
def test_containers_of_any_kind(kind: str, inversion: str) -> None:
    model, x = MODELS[kind]().double(), build_input()
    plain, keys, classes = copy.deepcopy(model), list(model.state_dict()), [type(m) for m in model.modules()]
    report = dr2net.convert(model, inversion=inversion)
    assert list(model.state_dict()) == keys
    assert all(isinstance(m, cls) for m, cls in zip(model.modules(), classes, strict=True))
    assert sum(branches for _, _, branches in report.sequences) == BRANCHES.get(kind, 6)
    expected, found = plain(x), model(x)
    assert relative([found], [expected]) < 1e-6  # the grid
    expected.square().sum().backward()
    found.square().sum().backward()
    assert relative(gradients(model), gradients(plain)) < 1e-6
    found = [m for m in model.modules() if isinstance(m, dr2net.ReversibleSequence)]
    assert all(m.ran == m.num_branches() for m in found) and len(found) == len(report.sequences)
    dr2net.set_coefficients(model, 0.5, 0.5)
    assert not torch.allclose(model(x), plain(x))
    error = dr2net.gradient_error(model, x, lambda model, x: model(x).square().sum())
    assert error.overall < 1e-8
    dr2net.set_coefficients(model, 1, 0)
    dr2net.deconvert(model)
    assert [type(m) for m in model.modules()] == classes and torch.equal(model(x), plain(x))
    assert [vars(m).keys() for m in model.modules()] == [vars(m).keys() for m in plain.modules()]


def test_nested_containers_are_listed_as_they_run() -> None:
    report = dr2net.convert(mixed())
    assert report.sequences == (("Sequential", 1, 2), ("1", 2, 4), ("2", 2, 4)) and report.ordinary == ()


def test_blocks_that_are_attributes_stay_and_the_report_says_so() -> None:
    report = dr2net.convert(Attributes(*blocks(4)))
    assert [name for name, _ in report.ordinary] == ["first", "second"]
    assert "attribute of Attributes" in str(report) and "nn.ModuleList" in str(report)


def test_what_stands_in_no_container_is_refused_truly() -> None:
    model = Attributes(*blocks(2))
    with pytest.raises(ValueError, match=r"first: it is an attribute of Attributes.*put the blocks into"):
        dr2net.convert(model)
    with pytest.raises(ValueError, match="ToyBlock is a block itself; put it into an nn.Sequential"):
        dr2net.convert(blocks(1)[0])


def test_a_container_with_names_that_a_sequence_needs_is_refused() -> None:
    class Named(nn.Sequential):
        alpha = 3

    model = nn.Sequential(nn.Sequential(*blocks()), Named(*blocks()))
    with pytest.raises(ValueError, match=r"1 \(Named\) has attributes.*: alpha"):
        dr2net.convert(model)
    assert type(model[0]) is nn.Sequential and type(model[1]) is Named


def test_a_block_in_two_containers_is_refused_and_a_container_with_two_names_is_not() -> None:
    net = build_net(3)
    net.alias = net.blocks
    dr2net.convert(net)
    assert net.alias is net.blocks and net(build_input()) is not None and net.alias.ran == 6
    net = build_net(3)
    net.again = nn.ModuleList(net.blocks[:2])
    with pytest.raises(ValueError, match=r"again\.0 also stands in blocks"):
        dr2net.convert(net)


def test_a_block_that_begins_two_runs_is_refused() -> None:
    (block,) = blocks(1)
    with pytest.raises(ValueError, match="2 begins two runs"):
        dr2net.convert(nn.Sequential(block, nn.Linear(WIDTH, WIDTH), block))


class Scaled(nn.Module):
    """A parameter of the block itself, and an answer in one of several forms."""

    def __init__(self, form: str = "tensor") -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.gamma = nn.Parameter(torch.full((WIDTH,), 0.5))
        self.form, self.calls, self.seen = form, 0, []

    def forward(self, x: Tensor) -> Tensor | tuple | dict | list:
        self.calls += 1
        x = x + self.gamma * self.linear(x).tanh()
        forms = {"tensor": x, "pair": (x, None), "single": (x,), "list": [x, "text"], "dictionary": {"x": x}}
        return forms[self.form] if self.form != "two tensors" else (x, x.mean())


@dr2net.branches_of.register
def _(block: Scaled):
    function = lambda x: block.gamma * block.linear(x).tanh()  # noqa: E731
    return (dr2net.Branch("only", function, (block.linear, block.gamma), independent="tokens"),)


@pytest.mark.parametrize("how", [{}, {"chunk_mib": 1e-3}, {"store": True}, {"inversion": "anchored"}])
def test_a_parameter_of_the_block_itself_is_named_like_a_module(how: dict) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(*(Scaled() for _ in range(3))).double(), build_input()
    plain = copy.deepcopy(model)
    dr2net.convert(model, **how)
    for net in (model, plain):
        net(x).square().sum().backward()
    assert relative(gradients(model), gradients(plain)) < 1e-6
    (branch,) = dr2net.branches_of(model[0])
    assert branch.modules == (model[0].linear,) and branch.own_parameters == (model[0].gamma,)


def test_a_parameter_that_is_not_named_is_told_how() -> None:
    class Forgetful(Scaled):
        pass

    @dr2net.branches_of.register
    def _(block: Forgetful):
        return (dr2net.Branch("only", lambda x: block.gamma * block.linear(x), (block.linear,)),)

    with pytest.raises(ValueError, match=r"hold gamma; .*modules=\(block\.norm, block\.gamma\)"):
        dr2net.convert(nn.Sequential(Forgetful()))
    with pytest.raises(ValueError, match="must be modules, or parameters"):
        dr2net.Branch("only", lambda x: x, (nn.Linear(2, 2), torch.ones(2)))


@pytest.mark.parametrize("form", ["pair", "single", "list", "dictionary"])
def test_a_block_answers_in_the_form_in_which_it_answered(form: str) -> None:
    torch.manual_seed(0)
    model, x = nn.ModuleList(Scaled(form) for _ in range(3)).double(), build_input()

    def forward(model: nn.ModuleList, x: Tensor) -> Tensor:
        for block in model:
            x = block(x)["x" if form == "dictionary" else 0]
        return x

    expected = forward(model, x)
    calls = [block.calls for block in model]
    state = torch.get_rng_state()
    dr2net.convert(model, inversion="float")
    assert torch.equal(forward(model, x), expected) and model.ran == 3
    assert [block.calls for block in model] == calls and torch.equal(torch.get_rng_state(), state)
    forward(model, x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_block_that_looks_at_its_numbers_answers_in_its_form_too(batch_norm: bool) -> None:
    class Looking(Scaled):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(5) if batch_norm else nn.Identity()

        def branch(self, x: Tensor) -> Tensor:
            return self.gamma * torch.dropout(self.norm(self.linear(x)), 0.5, True)

        def forward(self, x: Tensor) -> tuple:
            assert x.abs().max() < 1e9
            return x + self.branch(x), None

    @dr2net.branches_of.register
    def _(block: Looking):
        return (dr2net.Branch("only", block.branch, (block.linear, block.norm, block.gamma)),)

    model, x = nn.ModuleList(Looking() for _ in range(2)).double(), build_input()
    plain = copy.deepcopy(model)
    dr2net.convert(model, inversion="float")
    outputs = []
    for net in (plain, model):
        torch.manual_seed(0)
        h = x
        for block in net:
            h, _ = block(h)
        outputs.append(h)
    assert torch.equal(*outputs) and model.ran == 2
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers(), strict=True))


def test_a_block_that_returns_two_tensors_is_refused() -> None:
    model = nn.ModuleList([Scaled("two tensors")]).double()
    dr2net.convert(model)
    with pytest.raises(ValueError, match="Scaled returns a tuple with 2 tensors"):
        model[0](build_input())


def test_asking_what_a_block_returns_writes_to_no_cache() -> None:
    class Caching(Scaled):
        def forward(self, x: Tensor, cache: list, step: int) -> Tensor:
            cache.append(x)
            return super().forward(x)

    @dr2net.branches_of.register
    def _(block: Caching):
        def function(x: Tensor, cache: list, step: int) -> Tensor:
            cache.append(x)
            return block.gamma * block.linear(x)

        return (dr2net.Branch("only", function, (block.linear, block.gamma)),)

    class Cache(list):
        """No list to pytree, as transformers' caches are none."""

    model, cache = nn.ModuleList([Caching()]).double(), Cache()
    dr2net.convert(model)
    dr2net.set_coefficients(model, 0.5, 0.5)  # at (1, 0) a block with a cache runs as it is
    with torch.no_grad():
        for step in range(3):
            model[0](build_input(), cache, step)
    assert len(cache) == 3 and all(type(t) is Tensor for t in cache) and len(model.returns) == 1


def test_asking_what_a_block_returns_leaves_no_trace() -> None:
    net = build_net(2, dropout=0.5, batch_norm=True)
    plain = copy.deepcopy(net)
    dr2net.convert(net, inversion="float")
    seen = []
    for block in net.blocks:
        block.value.register_forward_hook(lambda module, args, output: seen.append(type(output)))
    outputs = []
    for model in (net, plain):
        torch.manual_seed(0)
        outputs.append(model(build_input()))
    assert torch.equal(*outputs) and seen == [Tensor, Tensor]
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), plain.buffers(), strict=True))
    assert not any(isinstance(t, torch._subclasses.FakeTensor) for t in net.state_dict().values())
