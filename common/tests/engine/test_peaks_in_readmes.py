"""Predicted peaks that the READMEs tell are those of the committed Records and tables of memory."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SWIN_L, SWIN_T, VIT_L = "Video Swin-L, 900 frames", "Video Swin-T, 768 frames, bf16", "ViT-L, 128 images, bf16"
METHODS = ("conventional", "checkpointed", "checkpointed, chunks", "dr2net", "dr2net, chunks")


def peaks(part: str) -> dict[tuple[str, str], float]:
    """GiB by setting and method."""
    rows = json.loads((ROOT / f"results/memory_{part}.json").read_text())["rows"]
    return {(row["setting"], row["method"]): row["peak"] / 2**30 for row in rows}


def hosts() -> dict[tuple[str, str], float]:
    rows = json.loads((ROOT / "results/memory_rivals.json").read_text())["rows"]
    return {(row["setting"], row["method"]): row["host"] / 2**30 for row in rows if "host" in row}


def row(task: str, name: str) -> float:
    (run,) = json.loads((ROOT / f"results/{task}/{name}.json").read_text())["runs"]
    return run["memory"]["peak"] / 2**30


def text(name: str) -> str:
    return " ".join((ROOT / name).read_text().split())


def test_the_table_of_30_seconds_of_video() -> None:
    found = peaks("seconds")
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if line.endswith(" GiB |")]
    assert [line.split(" | ")[-1] for line in lines] == [f"{found[f'{SWIN_L}, fp32', m]:.1f} GiB |" for m in METHODS]
    wide = next(
        line for line in (ROOT / "common/README.md").read_text().splitlines() if line.startswith("| Video Swin-L")
    )
    assert (
        f"| {found[f'{SWIN_L}, fp32', 'conventional']:.1f} GiB | {found[f'{SWIN_L}, fp32', 'checkpointed']:.1f} GiB"
        in wide
    )
    assert f"| {found[f'{SWIN_L}, fp32', 'dr2net, chunks']:.2f} GiB |" in wide


def test_what_reversibility_adds_and_where_it_loses() -> None:
    found, moved, readme = peaks("rivals"), hosts(), text("README.md")
    chunks, ours, away = "checkpointed, chunks", "dr2net, chunks", "checkpointed, chunks, offloaded"
    for setting in (SWIN_T, f"{SWIN_L}, bf16", VIT_L):
        assert (
            f"{found[setting, chunks]:.2f} GiB checkpointed in chunks, {found[setting, ours]:.2f} as Dr2Net" in readme
        )
        assert f"{found[setting, away]:.2f} with {moved[setting, away]:.1f} GiB" in readme


@pytest.mark.parametrize("name", ["a2d_swint", "a2d_swint_w8", "refytvos_swint"])
def test_the_table_of_video_object_segmentation(name: str) -> None:
    methods = ("conventional", "frozen", "checkpointed", "checkpointed_chunks", "reversible", "dr2net")
    cells = " | ".join(f"{row('vos', f'{name}_{method}'):.2f}" for method in methods)
    assert f"| {cells} |" in text("vos/README.md")


def test_slowfast() -> None:
    whole, blocks, chunks, ours = (
        row("action_detection", f"anet_slowfast101_{method}")
        for method in ("conventional", "checkpointed", "checkpointed_chunks", "dr2net")
    )
    said = f"needs {whole:.1f} GiB, checkpointed {blocks:.1f}, in chunks {chunks:.2f}, ours {ours:.2f}"
    assert said in text("common/README.md")


def test_the_parts_of_a_detector() -> None:
    rows = json.loads((ROOT / "results/detection_memory.json").read_text())["rows"]
    found = {(one["family"], one["name"]): one["peak"] / 2**30 for one in rows}
    both, readme = "backbone and encoder {}, head in pieces", text("detection/README.md")
    for family in ("coco_swint", "coco_swinl"):
        stored = found[family, "all stored"]
        ours, theirs = (found[family, both.format(how)] for how in ("reversible (dr2net)", "checkpointed"))
        alone = found[family, "backbone reversible (dr2net)"]
        assert f"{stored:.2f}" in readme and f"to {ours:.2f} with Dr2Net" in readme and f"{theirs:.2f} with" in readme
        assert f"{alone:.2f}" in readme.split("on the backbone alone")[1]


@pytest.mark.slow
def test_the_table_that_plan_prints() -> None:
    import timm

    from dr2net import planner
    from dr2net.memory import format_bytes

    lines = [line.split("  ") for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("    ")]
    shown = {cells[2]: [cell.strip() for cell in cells[3:] if cell.strip()] for cells in lines if len(cells) > 8}
    model = timm.create_model("vit_small_patch16_224").train()
    for method in planner.METHODS:
        m = planner.predictor(model, method, planner.Setting("bf16"))((16, 3, 224, 224))
        split = (m.peak, m.parameters, m.gradients, m.optimizer, m.stored, m.temporaries)
        assert shown[method][:6] == [format_bytes(size) for size in split], method
