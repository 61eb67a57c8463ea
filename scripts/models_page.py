"""docs/models.md as text, from what `table_models.py` found out. Not here: how it is found out."""

from typing import Any

from engine.records.tables import markdown_table

Row = dict[str, Any]
LIBRARIES = ("timm", "torchvision", "transformers")
SAMPLES = {"picture": 64, "text": 16, "sound": 16, "video": 8}
TOKENS, SOUND = 512, 80_000  # of a text; values of a sound, five seconds
CHUNK_MIB = 64
WITHOUT = "no blocks of the form x + f(x) with equal shapes: "
REASONS = {  # of what does not convert, by the module of timm or the name in torchvision
    "convmixer": "every residual block stands alone between two convolutions, so a run would be one block",
    "densenet": WITHOUT + "each layer's output is put beside its input",
    "dla": "a block gets its shortcut as an argument, and blocks are attributes of trees, not of a container",
    "dpn": WITHOUT + "channels are put beside x as well as added",
    "efficientvim": "a block returns two tensors, its output and a state",
    "googlenet": WITHOUT + "branches are concatenated",
    "inception_v3": WITHOUT + "branches are concatenated",
    "inception_v4": WITHOUT + "branches are concatenated",
    "nasnet": WITHOUT + "a cell takes the outputs of two cells",
    "pnasnet": WITHOUT + "a cell takes the outputs of two cells",
    "rdnet": WITHOUT + "each layer's output is put beside its input",
    "rexnet": WITHOUT + "a block has more channels than the one before it",
    "s3d": WITHOUT + "branches are concatenated",
    "selecsls": WITHOUT + "outputs of layers are concatenated",
    "ssd": WITHOUT + "its backbone is a VGG",
    "shufflenet": WITHOUT + "half of the channels pass, the other half is replaced",
    "squeezenet": WITHOUT + "branches are concatenated",
    "tnt": "a block carries two streams, pixels and patches",
    "twins": "positions are added to x between the first block and the second, which interrupts the run",
    "vgg": WITHOUT + "a chain of convolutions",
    "alexnet": WITHOUT + "a chain of convolutions",
    "xception": "its blocks are attributes of the model, not of a container",
}


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def ratio_of(sizes: dict[str, Row], row: Row) -> float | None:
    """Predicted activations over those of checkpointing each block."""
    size = sizes.get(row["model"], {})
    return size["dr2net"] / size["checkpointed"] if {"dr2net", "checkpointed"} <= set(size) else None


def table(rows: list[Row], sizes: dict[str, Row]) -> str:
    """Those that become reversible."""
    lines = []
    for row in rows:
        ratio = ratio_of(sizes, row)
        per_block = " or ".join(map(str, row["branches"]))
        lines.append(
            (
                row["family"] + (" with `probe=`" if row.get("probe") else ""),
                row["model"] if row["model"] != row["family"] else "",
                str(row["blocks"]),
                per_block,
                percent(row["share"]),
                ", ".join(row["cuts"]),
                "-" if ratio is None else f"{ratio:.2f}",
                "yes" if row.get("tested") else "-",
            )
        )
    titles = ("family", "model", "blocks", "branches per block", "parameters", "cut by", "memory", "tested")
    return markdown_table(titles, lines) + "\n"


def page(parts: dict[str, dict[str, Any]]) -> str:
    """docs/models.md."""
    sizes = {row["model"]: row for row in parts.get("memory", {"rows": []})["rows"]}
    known = parts["timm"]["versions"]
    used = ", ".join(
        f"{name} {known[name]}" for name in ("torch", "timm", "torchvision", "transformers") if name in known
    )
    texts = []
    for library in LIBRARIES:
        own = parts.get(library, {"rows": []})["rows"]
        if not own:
            continue
        taken = [row for row in own if "share" in row]
        rest = [row for row in own if "share" not in row]
        grouped: dict[str, list[str]] = {}
        for row in rest:
            grouped.setdefault(row["reason"], []).append(f"`{row['family']}`")
        lines = "\n".join(f"- {', '.join(names)}: {reason}" for reason, names in grouped.items())
        what = "modules" if library == "timm" else "models" if library == "torchvision" else "families"
        texts.append(
            f"## {library}\n\n{len(taken)} of {len(own)} {what}.\n\n{table(taken, sizes)}\nNot these:\n\n{lines}\n"
        )
    counted = parts["timm"]["rows"]
    residual = [row for row in counted if not REASONS.get(row["family"], "").startswith(WITHOUT)]
    taken = sum(row["models"] for row in residual if "share" in row)
    models = sum(row["models"] for row in residual)
    number = (
        f"Of timm's {sum(row['models'] for row in counted)} models, {models} stand in modules with residual blocks of "
        f"equal shape; modules that become reversible have {taken} of them, {percent(taken / models)}."
    )
    ratios = {
        library: sorted(filter(None, (ratio_of(sizes, row) for row in parts[library]["rows"])))
        for library in parts
        if library in LIBRARIES
    }
    less = "; ".join(
        f"{library} {sum(r < 0.9 for r in own)} less, {sum(0.9 <= r <= 1.1 for r in own)} about as much, "
        f"{sum(r > 1.1 for r in own)} more (median {own[len(own) // 2]:.2f})"
        for library, own in ratios.items()
        if own
    )
    batch = (
        f"{SAMPLES['picture']} pictures of the model's own size, {SAMPLES['video']} clips, {SAMPLES['text']} texts of "
        f"{TOKENS} tokens\nor {SAMPLES['sound']} sounds of five seconds"
    )
    return f"""# Models that `dr2net.convert` knows

Made by `python -m scripts.table_models` ({used}). For what is not here, `dr2net.convert(model, probe=...)` finds the
chains of blocks itself, each block one branch; your own block is one short function (`common/dr2net/branches.py`).

{number}

Blocks: those that become reversible; the others run as they are, and `convert` reports why. Parameters: the share in
reversible blocks. Cut by: along what a branch may run in chunks; batch norms that train make it run as a whole.
Memory: predicted activations of a training step in float32, exact inversion at (7/8, 1/8) in chunks of {CHUNK_MIB} MiB,
divided by those of checkpointing each block; above 1 checkpointing needs less (`dr2net.checkpoint_blocks`), as with few
blocks per stage and batch norms that train; a dash was not predicted: detectors, losses that look at values, Mamba.
The batch: {batch}.
Against checkpointing Dr2Net stores, of the models here: {less}.
So it is for transformers with long stages. For convolutions with batch norm, and for hierarchies whose large first
stages have few blocks (MViT, Hiera, MaxViT), take checkpointing.
A family with `probe=` has no adapter: each block that a probe finds is one branch.
Tested: keys, outputs, gradients, dropout, chunks and bf16 of a tiny model of the family.

{chr(10).join(texts)}"""
