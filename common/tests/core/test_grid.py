"""The grid of the exact streams: fine enough for every row beside outliers, coarse enough for streams that grow."""

import functools
from collections.abc import Callable

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from toy_blocks import WIDTH, build_input, build_net, converted, gradients, relative

import dr2net
from dr2net.grid import PRECISION_BITS, Rows, coarser, grid_of, rows_of

NUM_TOKENS, DIM = 17, 96
NOT_NOISE = 3e-4  # relative error of a gradient, against float64


class Blocks(nn.Module):
    """Blocks and a norm over channels, so that no row of the output dwarfs the others."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor, *arguments: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, *arguments)
        return nn.functional.layer_norm(x, x.shape[-1:])


def transformer(depth: int = 6) -> Blocks:
    torch.manual_seed(0)
    return Blocks([Block(DIM, num_heads=3) for _ in range(depth)])


def against_floats(
    net: nn.Module, x: Tensor, *arguments: Tensor, at: Callable[[Tensor], Tensor] = lambda y: y
) -> float:
    """Relative error of the exact gradient from that of the same network in float64 without a grid."""
    found = []
    for dtype, how in ((torch.float32, {}), (torch.float64, {"inversion": "float", "store": True})):
        ours = converted(net.to(dtype), 7 / 8, 1 / 8, **how)
        y = at(ours(x.to(dtype), *(a.to(dtype) for a in arguments)))
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
        (y * weights.to(dtype)).sum().backward()
        found.append(gradients(ours))
    return relative(*found)


def tokens() -> Tensor:
    x = 0.5 * build_input(2, NUM_TOKENS, DIM, dtype=torch.float32)
    x[:, 0] *= 0.04  # a fresh class token
    return x


OUTLIERS = {
    "one token": lambda x, size: x[:, 5].mul_(size),
    "the class token": lambda x, size: x[:, 0].mul_(25 * size),
    "a quarter of the tokens": lambda x, size: x[:, 4:8].mul_(size),
    "two fifths of the tokens": lambda x, size: x[:, 4:11].mul_(size),
    "one channel": lambda x, size: x[:, :, 7].mul_(size),
    "one channel of one token": lambda x, size: x[:, 5, 7].fill_(size),
    "one sample": lambda x, size: x[1].mul_(size),
}


@pytest.mark.parametrize("size", [1e2, 1e3, 1e4, 1e5])
@pytest.mark.parametrize("where", OUTLIERS)
def test_an_outlier_does_not_make_the_gradient_wrong(where: str, size: float) -> None:
    x = tokens()
    OUTLIERS[where](x, size)
    assert against_floats(transformer(), x) < NOT_NOISE


@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-3, 1e-4, 0.0])
def test_a_weak_sample_has_a_right_gradient(size: float) -> None:
    x = tokens()
    x[1] *= size
    assert against_floats(transformer(), x) < NOT_NOISE


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 1.0])
def test_tokens_that_are_zero_have_a_right_gradient(part: float) -> None:
    x = tokens()
    x[:, : round(part * NUM_TOKENS)] = 0
    assert against_floats(transformer(), x) < NOT_NOISE


class Decoder(nn.Module):
    """Queries that look at a memory, as in detectors: x + attention(norm(x) + place, memory), then x + mlp(norm(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attention = nn.MultiheadAttention(DIM, 3, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(DIM, DIM), nn.GELU(), nn.Linear(DIM, DIM))
        self.place = nn.Parameter(torch.randn(NUM_TOKENS, DIM))

    def look(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.attention(self.norm1(x) + self.place, memory, memory, need_weights=False)[0]

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.look(x, memory)
        return x + self.mlp(self.norm2(x))


@dr2net.branches_of.register
def _(block: Decoder):
    own = nn.Module()
    own.place = block.place
    return (
        dr2net.Branch("look", block.look, (block.norm1, block.attention, own)),
        dr2net.Branch("mlp", lambda x, memory: block.mlp(block.norm2(x)), (block.norm2, block.mlp)),
    )


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e-8])
def test_a_sample_that_is_faint_everywhere_does_not_become_zero(size: float) -> None:
    net, x = transformer(), tokens() * size
    for block in net.blocks:
        block.norm1.eps = block.norm2.eps = 1.0  # so that branches add no more than what entered
    for name, parameter in net.named_parameters():
        parameter.data *= not name.endswith("bias")
    with torch.no_grad():
        expected, ours = net.blocks(x), converted(net, 1, 0).blocks(x)
    assert relative([ours / size], [expected / size]) < NOT_NOISE
    at = functools.partial(torch.mul, other=1 / size)
    assert against_floats(net.blocks, x, at=at) < NOT_NOISE


def test_a_faint_sample_that_grows_is_an_overflow_and_not_silently_zero() -> None:
    with pytest.raises(OverflowError, match="times the scale of what entered"):
        converted(transformer(), 7 / 8, 1 / 8).blocks(tokens() * 1e-12)


class NormAfter(nn.Module):
    """norm(x + linear(x)), as in BERT: whatever enters, what leaves is about one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(DIM, DIM), nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.linear(x))


@dr2net.branches_of.register
def _(block: NormAfter):
    return (dr2net.Branch("only", lambda x: block.norm(x + block.linear(x)) - x, (block.linear, block.norm)),)


@pytest.mark.parametrize("samples", [slice(None), slice(1)])
def test_a_stream_that_falls_below_its_grid_is_an_error(samples: slice) -> None:
    torch.manual_seed(0)
    net, x = Blocks([NormAfter() for _ in range(4)]), tokens()
    assert against_floats(net, x) < NOT_NOISE
    x[samples] *= 1e5
    with pytest.raises(FloatingPointError, match="so weak against what entered.*inversion='anchored'"):
        converted(net.float(), 1, 0).blocks(x)


def test_zeros_to_which_branches_add_less_than_their_grid_are_an_error() -> None:
    net = transformer()
    for parameter in net.parameters():
        parameter.data *= 1e-7
    with pytest.raises(FloatingPointError, match="so weak against what entered"):
        converted(net, 7 / 8, 1 / 8).blocks(torch.zeros(2, NUM_TOKENS, DIM))


@pytest.mark.parametrize("start", [0.0, 1e-8, 1e-4, 1e-2])
def test_queries_that_start_near_zero_have_a_right_gradient(start: float) -> None:
    torch.manual_seed(0)
    queries = start * build_input(2, NUM_TOKENS, DIM, dtype=torch.float32)
    memory = build_input(2, 9, DIM, seed=2, dtype=torch.float32)
    assert against_floats(Blocks([Decoder() for _ in range(4)]), queries, memory) < NOT_NOISE


class Convolutional(nn.Module):
    """x + conv(gelu(conv(x))), channels first and without a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)

    def branch(self, x: Tensor) -> Tensor:
        return self.second(nn.functional.gelu(self.first(x)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


@dr2net.branches_of.register
def _(block: Convolutional):
    return (dr2net.Branch("convolutions", block.branch, (block.first, block.second), independent="samples"),)


def images() -> Tensor:
    return build_input(2, 16, 24, 24, dtype=torch.float32)


@pytest.mark.parametrize("size", [1.0, 1e2, 1e3, 1e4, 1e5])
@pytest.mark.parametrize("where", ["patch", "channel", "sample"])
def test_an_outlier_in_an_image_does_not_make_the_gradient_wrong(where: str, size: float) -> None:
    torch.manual_seed(0)
    x = images()
    {"patch": x[:, :, :3, :3], "channel": x[:, 3], "sample": x[1]}[where].mul_(size)
    assert against_floats(Blocks([Convolutional() for _ in range(6)]), x) < NOT_NOISE


@pytest.mark.parametrize("size", [1.0, 1e2, 1e3, 1e4])
def test_far_from_an_outlier_in_an_image_the_gradient_is_right_too(size: float) -> None:
    torch.manual_seed(0)
    x = images()
    x[:, :, :3, :3] *= size
    net = Blocks([Convolutional() for _ in range(4)])
    assert against_floats(net, x, at=lambda y: y[:, :, -4:, -4:]) < NOT_NOISE


@pytest.mark.parametrize("size", [0.0, 1e-5, 1e-3])
def test_a_weak_image_has_a_right_gradient(size: float) -> None:
    torch.manual_seed(0)
    x = images()
    x[1] *= size
    assert against_floats(Blocks([Convolutional() for _ in range(6)]), x) < NOT_NOISE


LAYOUTS = {
    "tokens": (Block(DIM, 3), (2, 7, DIM), (2, 7, 1)),
    "decoder": (Decoder(), (2, NUM_TOKENS, DIM), (2, NUM_TOKENS, 1)),
    "image": (Convolutional(), (2, 16, 5, 6), (2, 1, 5, 6)),
    "no token at all": (Block(DIM, 3), (2, 0, DIM), (2, 0, 1)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_grid_is_a_power_of_two_for_each_token_or_position(layout: str) -> None:
    block, shape, expected = LAYOUTS[layout]
    x = build_input(*shape, dtype=torch.float32)
    rows = rows_of(dr2net.branches_of(block), x, 2**30)
    grid = grid_of(x, rows)
    assert grid.shape == expected and torch.equal(torch.frexp(grid)[0], torch.full_like(grid, 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_of_normal_values_is_measured_in_its_root_mean_square(dtype: torch.dtype) -> None:
    x = build_input(3, 4, 10**4, dtype=dtype) * torch.tensor([1.5, 6, 24, 96], dtype=dtype).view(4, 1)
    scale = grid_of(x, Rows()) * 2.0 ** PRECISION_BITS[dtype]
    assert scale.flatten().tolist() == 3 * [4.0, 4.0, 16.0, 64.0]  # the lower median is 6; all are rounded down


def test_a_sample_has_the_same_grid_whatever_its_batch_mates() -> None:
    x = torch.randn(5, 6, 8) * torch.tensor([1e-3, 1.0, 1e3, 0.0, 1e30]).view(5, 1, 1)
    for rows in (Rows(), Rows(spread=0.0, faint=1e-3), Rows(dim=1)):
        grid = grid_of(x, rows)
        for i in range(5):
            assert torch.equal(grid_of(x[i : i + 1], rows)[0], grid[i])
            grown = coarser(grid[i : i + 1].clone(), 1e3 * x[i : i + 1].flip(1), rows)
            together = coarser(grid.clone(), 1e3 * x.flip(1), rows)
            assert torch.equal((grid[i : i + 1] if grown is None else grown)[0], together[i])


def growing(**how: float) -> tuple[nn.Module, Tensor]:
    """A network whose first branch adds far more than what enters, in some of the samples."""
    net = build_net(4, dtype=torch.float32, **how)
    net.stem = nn.Identity()
    first = net.blocks[0]
    (first.batch_norm if how.get("batch_norm") else first.value).bias.data.fill_(1e4)
    x = build_input(3, 5, WIDTH, dtype=torch.float32)
    return net, x * torch.tensor([1.0, 1e-5, 0.0]).view(3, 1, 1)


@pytest.mark.parametrize(("alpha", "beta"), [(7 / 8, 1 / 8), (0.7, 0.3), (0, 1), (1, 0)])
@pytest.mark.parametrize("how", [{}, {"dropout": 0.1, "drop_path": 0.3}, {"batch_norm": True}])
def test_a_grid_made_coarser_is_still_inverted_bit_for_bit(how: dict, alpha: float, beta: float) -> None:
    net, x = growing(**how)
    found = []
    for store in (False, True):
        ours = converted(net, alpha, beta, store=store)
        calls: list[Tensor] = []
        norm = ours.blocks[0].norm1

        def forward(h: Tensor, plain=norm.forward, calls=calls) -> Tensor:  # hooks do not see the first attempt
            if not isinstance(h, FakeTensor):
                calls.append(h.detach().clone())
            return plain(h)

        norm.forward = forward
        torch.manual_seed(0)
        entering = x.clone().requires_grad_()
        y = ours(entering)
        assert len(calls) == 2  # the grid was made coarser, and the first branch ran again
        state = torch.get_rng_state()
        y.square().sum().backward()
        assert store or torch.equal(calls[1], calls[2])  # rebuilt
        found.append((y, entering.grad, *gradients(ours), *ours.buffers(), state))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True) if a is not None)
    torch.manual_seed(0)
    net(x)
    assert torch.equal(state, torch.get_rng_state())  # drawn as often as by the plain network
    assert all(
        torch.equal(a, b) for a, b in zip(net.buffers(), ours.buffers(), strict=True) if a.dtype == torch.int64
    )  # number of batches seen


def test_evaluation_computes_on_the_grid_of_training() -> None:
    net, x = growing()
    ours = converted(net, 7 / 8, 1 / 8)
    trained = ours(x)
    with torch.no_grad():
        assert torch.equal(ours(x), trained)
    with torch.inference_mode():
        assert torch.equal(ours(x), trained)


def test_a_sample_whose_grid_is_made_coarser_does_not_depend_on_its_batch() -> None:
    net, x = growing()
    ours = converted(net, 7 / 8, 1 / 8)
    other = torch.cat([100 * x[:1], x[1:]])
    assert torch.equal(ours(x)[1:], ours(other)[1:])


def test_the_caller_s_tensor_is_not_changed() -> None:
    net, x = growing()
    before = x.clone()
    converted(net, 7 / 8, 1 / 8)(x).sum().backward()
    assert torch.equal(x, before)


class Late(nn.Module):
    """Two branches: the first adds nothing, the second a hundred thousand times what entered."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale(x) * 1e5


@dr2net.branches_of.register
def _(block: Late):
    return (
        dr2net.Branch("nothing", torch.zeros_like, ()),
        dr2net.Branch("much", lambda x: 1e5 * block.scale(x), (block.scale,)),
    )


def test_an_overflow_names_its_cause() -> None:
    net = nn.Module()
    net.blocks = nn.Sequential(Late(), Late())
    x = 1e-6 * build_input(dtype=torch.float32)
    with pytest.raises(OverflowError, match=r"0.much.*times the scale of what entered.*start near zero"):
        converted(net, 7 / 8, 1 / 8).blocks(x)
    with pytest.raises(OverflowError, match=r"alpha \+ beta <= 1, not 1.5"):
        converted(net, 1, 0.5).blocks(x)


def test_the_check_says_what_the_grid_costs() -> None:
    net, x = build_net(4, dtype=torch.float32), build_input(dtype=torch.float32)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().sum()

    fine = dr2net.gradient_error(converted(net, 0.9, 0.1), x, loss)
    assert fine.overall == 0 and 0 < fine.grid < NOT_NOISE
    assert dr2net.gradient_error(converted(net, 0, 1, inversion="float"), x, loss).grid is None


def test_a_grid_that_is_too_coarse_is_said_aloud(monkeypatch) -> None:
    net, x = transformer(), tokens()
    x[:, 5] *= 1e5
    ours = converted(net, 7 / 8, 1 / 8)
    monkeypatch.setattr("dr2net.reversible.rows_of", lambda *_: Rows(faint=2e4))
    with pytest.warns(UserWarning, match="the grid of the exact inversion costs"):
        error = dr2net.gradient_error(ours, x, lambda m, b: m(b).square().mul(torch.rand(DIM)).sum())
    assert error.overall < 1e-6 and error.grid > 0.01
    state = ours.blocks
    assert state.inversion == "exact" and not state.store and state.beta == 1 / 8


def test_branches_in_bfloat16_do_not_pass_for_the_grid(recwarn) -> None:
    net, x = transformer(), tokens()

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(batch).square().mul(torch.linspace(0, 1, DIM)).sum()

    error = dr2net.gradient_error(converted(net, 7 / 8, 1 / 8), x, loss)
    assert error.overall == 0 and not recwarn.list
