"""The planner: predicted equals measured, the split adds up, and nothing of the user's is left changed."""

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import dr2net
from dr2net.memory import Memory, format_bytes, largest, measure, predict

RELATIVE = 0.02  # the promise of the planner; kernels may round workspace sizes differently on real tensors


def small_vit() -> tuple[nn.Module, tuple[int, ...]]:
    import timm

    model = timm.create_model("vit_tiny_patch16_224", depth=4, img_size=128, num_classes=10)
    return model, (16, 3, 128, 128)


def small_swin3d() -> tuple[nn.Module, tuple[int, ...]]:
    from torchvision.models.video import swin_transformer as transformer

    model = transformer.SwinTransformer3d(
        patch_size=[2, 4, 4], embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=[4, 7, 7], num_classes=10
    )
    return model, (2, 3, 8, 56, 56)


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, shape: tuple[int, ...], precision: torch.dtype
) -> Callable[[], None]:
    def step() -> None:
        batch = torch.randn(shape)
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            output = model(batch)
        output.float().square().mean().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def test_stored_is_what_lives_at_the_end_of_forward_and_temporaries_are_the_rest() -> None:
    model = nn.Linear(1, 1)

    def step() -> None:
        x = torch.zeros(1000, requires_grad=True)
        y = x.sin().cos()  # keeps x and sin(x), 4000 bytes each
        torch.zeros(300)  # gone before forward ends
        y.sum().backward()

    for memory in (measure(step, model), predict(step, model)):
        assert memory.stored == pytest.approx(12_000, abs=16)  # with y itself, and the scalars that begin backward
        assert memory.temporaries > 4000 and memory.stored + memory.temporaries == memory.activations


def test_the_first_step_of_a_run_counts_like_the_second() -> None:
    model = nn.Linear(300, 300)
    optimizer = torch.optim.AdamW(model.parameters())
    step = training_step(model, optimizer, (4000, 300), torch.float32)
    predicted = predict(step, model, optimizer)
    first, second = measure(step, model, optimizer), measure(step, model, optimizer)
    assert first.peak == second.peak == predicted.peak and predicted.optimizer > 700_000


def test_gradients_that_a_step_leaves_behind_are_found_by_the_next() -> None:
    model = nn.Linear(500, 500)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step() -> None:
        model(torch.randn(8, 500)).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    predicted = predict(step, model, optimizer)
    step()
    assert predicted.peak == measure(step, model, optimizer).peak


def apply(method: str, model: nn.Module) -> None:
    if method == "checkpointed":
        dr2net.checkpoint_blocks(model)
    elif method != "conventional":
        dr2net.convert(model, inversion=method)
        dr2net.set_coefficients(model, 0.9, 0.1)


@pytest.mark.filterwarnings("ignore::UserWarning")  # the float inverse says that its gradient is poor at (.9, .1)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["conventional", "checkpointed", "float", "anchored", "exact"])
@pytest.mark.parametrize("build", [small_vit, small_swin3d])
def test_predicted_peak_is_the_measured_one(build, method: str, precision: torch.dtype) -> None:
    model, shape = build()
    apply(method, model)
    step = training_step(model, None, shape, precision)
    predicted, measured = predict(step, model, like="cpu"), measure(step, model)
    assert measured.activations > measured.parameters + measured.gradients, "the case must be about activations"
    assert predicted.peak == pytest.approx(measured.peak, rel=RELATIVE)
    assert predicted.activations == pytest.approx(measured.activations, rel=RELATIVE)


def test_optimizer_state_and_gradients_are_split_from_the_rest() -> None:
    model = nn.Linear(1000, 1000, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    step = training_step(model, optimizer, (1, 1000), torch.float32)
    predicted = predict(step, model, optimizer)
    step()  # makes the state
    for memory in (predicted, measure(step, model, optimizer)):
        assert memory.parameters == memory.gradients == 4_000_000
        assert memory.optimizer == pytest.approx(8_000_000, abs=64)  # and the step counter
        assert memory.peak == memory.parameters + memory.gradients + memory.optimizer + memory.activations


def test_measured_peak_of_a_known_computation_is_the_sum_of_its_tensors() -> None:
    model = nn.Linear(1, 1)

    def step() -> None:
        a = torch.zeros(1000)
        b = a.view(10, 100).T  # a view: no bytes
        c = b + 1
        del a, b
        d = c.to(torch.float16)
        del c, d
        torch.zeros(1500)

    for memory in (measure(step, model), predict(step, model)):
        assert memory.activations == 4000 + 4000
        assert memory.parameters == 8


def test_a_resized_storage_counts_with_its_new_size() -> None:
    model = nn.Linear(1, 1)

    def step() -> None:
        a = torch.zeros(1000)
        a.resize_(5000)
        a.resize_(0)

    assert measure(step, model).activations >= 20_000


def test_live_tensors_at_the_peak_name_the_largest_first() -> None:
    model = nn.Linear(1, 1)

    def step() -> None:
        kept = [torch.zeros(10, 100) for _ in range(3)]
        kept.append(torch.ones(100))

    live = measure(step, model).live
    assert (live[0].count, live[0].bytes, live[0].shape) == (3, 12_000, (10, 100))
    assert "zeros" in live[0].operator and "test_memory.py" in live[0].line
    assert "3 x float32[10, 100]" in str(live[0])


def test_prediction_leaves_model_and_optimizer_as_they_were() -> None:
    model, shape = small_vit()
    optimizer = torch.optim.AdamW(model.parameters())
    step = training_step(model, optimizer, (1, *shape[1:]), torch.float32)
    step()
    before = {name: (id(p), p.clone()) for name, p in [*model.named_parameters(), *model.named_buffers()]}
    state = {id(p): (id(s["exp_avg"]), s["exp_avg"].clone()) for p, s in optimizer.state.items()}
    random = torch.get_rng_state()
    predict(step, model, optimizer)
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        assert id(p) == before[name][0] and torch.equal(p, before[name][1])
    assert all(id(s["exp_avg"]) == state[id(p)][0] for p, s in optimizer.state.items())
    assert all(torch.equal(s["exp_avg"], state[id(p)][1]) for p, s in optimizer.state.items())
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    assert not any(isinstance(v, FakeTensor) for m in model.modules() for v in vars(m).values())
    assert torch.equal(torch.get_rng_state(), random)
    step()


def test_prediction_restores_an_optimizer_without_state() -> None:
    model = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    predict(training_step(model, optimizer, (1, 3), torch.float32), model, optimizer)
    assert len(optimizer.state) == 0


def test_measuring_runs_the_step_once() -> None:
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # which has no state, ever
    calls = []
    measure(lambda: calls.append(1), model, optimizer)
    assert len(calls) == 1


def test_prediction_restores_the_model_when_the_step_fails() -> None:
    model = nn.Linear(3, 3)
    own = model.weight

    def step() -> None:
        raise KeyError("the user's own error")

    with pytest.raises(KeyError):
        predict(step, model)
    assert model.weight is own


def test_a_model_without_memory_can_be_planned() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(100_000, 100_000, bias=False), nn.Linear(100_000, 10))  # 40 GB
    memory = predict(training_step(model, None, (1, 100_000), torch.float32), model)
    assert memory.parameters == pytest.approx(4e10, rel=1e-3)
    assert memory.gradients == memory.parameters
    assert model[0].weight.is_meta


def test_tied_parameters_count_once() -> None:
    model = nn.Sequential(nn.Linear(100, 100, bias=False), nn.Linear(100, 100, bias=False))
    model[1].weight = model[0].weight
    step = training_step(model, None, (1, 100), torch.float32)
    assert predict(step, model).parameters == measure(step, model).parameters == 40_000


def test_integer_buffers_and_batch_norm_count_as_parameters_and_stay_as_they_were() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    model.register_buffer("table", torch.arange(1000))
    step = training_step(model, None, (2, 3, 16, 16), torch.float32)
    predicted = predict(step, model)
    assert model[1].num_batches_tracked == 0 and torch.equal(model.table, torch.arange(1000))
    assert predicted.parameters == measure(step, model).parameters > 8000
    assert predicted.peak == pytest.approx(measure(step, model).peak, rel=RELATIVE)


def test_measuring_reports_the_process_and_predicting_does_not() -> None:
    model = nn.Linear(3, 3)
    step = training_step(model, None, (1, 3), torch.float32)
    assert measure(step, model).process > 50 * 2**20  # an interpreter with torch
    assert predict(step, model).process is None
    assert isinstance(predict(step, model), Memory)


def test_a_model_without_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameters"):
        predict(lambda: None, nn.ReLU())


@pytest.mark.parametrize(
    ("peak", "expected"),
    [
        (lambda n: 10 + 7 * n, 141),
        (lambda n: max(900, 10 + 7 * n), 141),  # the optimizer's step is the peak of small inputs
        (lambda n: 10 + n * n, 31),
        (lambda n: 1001, 0),
        (lambda n: 999 + n, 1),
        (lambda n: 5, 500),
        (lambda n: 900 + n - 60 * (n > 70), 160),  # falls once
    ],
)
def test_largest_input_is_found_in_few_tries(peak: Callable[[int], int], expected: int) -> None:
    tried: list[int] = []

    def counted(n: int) -> int:
        tried.append(n)
        return peak(n)

    assert largest(counted, 1000, limit=500) == expected
    assert len(tried) <= 6 + 9 and len(set(tried)) == len(tried)  # six by the line, then 500 is halved nine times


def test_largest_fits_and_the_next_does_not_where_the_peak_goes_up_and_down() -> None:
    def peak(n: int) -> int:
        return 10 * n + 300 * (n % 7)

    most = largest(peak, 1000, limit=500)
    assert peak(most) <= 1000 < peak(most + 1)


def test_bytes_are_written_with_a_unit() -> None:
    assert format_bytes(3 << 29) == "1.50 GiB"
    assert format_bytes(1 << 19) == "0.5 MiB"


@pytest.mark.parametrize("method", ["float", "exact"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_nothing_of_a_step_stays_alive_until_the_next(method: str) -> None:
    model, shape = small_vit()  # its attention saves its own output, which once kept itself alive
    apply(method, model)
    alive: list[weakref.ref] = []
    handles = [
        block.attn.qkv.register_forward_hook(lambda *a: alive.append(weakref.ref(a[2].untyped_storage())))
        for block in model.blocks
    ]
    training_step(model, None, (1, *shape[1:]), torch.float32)()
    assert len(handles) < len(alive) and not [reference for reference in alive if reference() is not None]
    first = measure(training_step(model, None, shape, torch.float32), model)
    assert measure(training_step(model, None, shape, torch.float32), model).peak == first.peak
