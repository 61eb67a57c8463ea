"""Which models become reversible: docs/models.md, over timm, torchvision and transformers.

    python -m scripts.table_models [--parts timm memory] [--force] [--dry-run]

    timm            one model of each of its modules: branches, share of the parameters, what chunks are cut along, or
                    why it does not convert (minutes)
    torchvision     the same of each of its models
    transformers    the same of the families that are finetuned most
    memory          predicted activations of all of these, against checkpointing each block (half an hour; --force
                    keeps what stands in its file and predicts the rest; delete the file to begin anew)

Each part writes results/models_<part>.json and is skipped when that is there, unless --force. No weights are loaded and
nothing is computed, but for families that only a probe takes. Whether outputs and gradients are right is not said here
but in common/tests/core/test_families.py and test_convert.py; "tested" means that a model of the family is in one of
them.
"""

import argparse
import inspect
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dr2net
from dr2net import planner
from dr2net.branches import blocks_of, find_branches
from dr2net.console import print_table
from dr2net.convert import NoBlocksError, sequences
from dr2net.memory import predict
from engine.files import read_json, write_text
from engine.records.provenance import commit, versions
from scripts import zoo_transformers
from scripts.models_page import CHUNK_MIB, REASONS, SAMPLES, SOUND, TOKENS, Row, page

TRAINABLE = {  # what convert refuses, and masks of random size, which nothing predicts
    **dict.fromkeys(("layerdrop", "encoder_layerdrop", "decoder_layerdrop"), 0.0),
    **dict.fromkeys(("use_cache", "apply_spec_augment"), False),
}
SLOW = {"mamba"}  # its scan is a loop over tokens in Python, ten minutes of prediction
VIDEO = ("videomae", "timesformer", "vivit", "vjepa2")  # transformers
TRIES = 10
ZOOS = ("common/tests/library_zoo.py", "common/tests/model_zoo.py", "common/tests/transformers_zoo.py")
SMALL = ("pico", "nano", "tiny", "small", "_xs", "_s", "_t", "_b0", "_m0")
TESTED = {  # words in torchvision's names, of networks of which a tiny one is tested
    *("vit", "swin", "swin3d", "maxvit", "mvit", "convnext", "regnet", "efficientnet", "mobilenet", "mnasnet"),
    *("resnet", "resnext", "wide", "r3d", "mc", "r2plus1d"),
}
TRANSFORMERS = (  # in order of demand
    *("dinov2", "dinov3_vit", "clip_vision_model", "siglip_vision_model", "vit", "deit", "vit_mae", "beit", "dpt"),
    *(
        "videomae",
        "timesformer",
        "vivit",
        "vjepa2",
        "hiera",
        "wav2vec2",
        "hubert",
        "whisper",
        "audio-spectrogram-transformer",
    ),
    *("convnext", "convnextv2", "swin", "swinv2", "sam", "segformer", "detr", "mask2former", "resnet"),
    *("bert", "roberta", "distilbert", "albert", "electra", "deberta-v2", "modernbert", "xlm-roberta", "mpnet"),
    *("gpt2", "llama", "qwen2", "qwen3", "mistral", "gemma", "phi", "opt", "gpt_neox", "bart", "t5", "mamba"),
)


def timm_models() -> Iterator[tuple[str, list[str]]]:
    """(module, its models, smaller ones first as far as their names tell)."""
    import timm

    for module in timm.list_modules():
        names = timm.list_models(module=module)
        if names:
            known = {name: any(word in name for word in SMALL) and not name.startswith("test_") for name in names}
            yield module, sorted(names, key=lambda name: (not known[name], len(name), name))


def torchvision_models() -> Iterator[tuple[str, str]]:
    """(library part, name) of all of torchvision's models without quantized ones."""
    from torchvision import models

    for part in (models, models.video, models.segmentation, models.detection):
        for name in models.list_models(module=part):
            yield part.__name__.rpartition(".")[2].replace("models", "classification"), name


def build(library: str, name: str) -> nn.Module:
    """With random weights, on the meta device if it can be built there (torchvision's RegNet looks at numbers)."""
    try:
        return _build(library, name, "meta")
    except NotImplementedError:
        return _build(library, name, "cpu")


def _build(library: str, name: str, device: str) -> nn.Module:
    with torch.device(device):
        if library == "timm":
            import timm

            return timm.create_model(name).train()
        if library == "torchvision":
            from torchvision import models

            options = inspect.signature(models.get_model_builder(name)).parameters
            backbone = {"weights_backbone": None} if "weights_backbone" in options else {}  # else it would be fetched
            return models.get_model(name, weights=None, **backbone).train()
        from transformers import AutoConfig, AutoModel

        config = AutoConfig.for_model(name)
        for key, value in TRAINABLE.items():
            if hasattr(config, key):
                setattr(config, key, value)
        return AutoModel.from_config(config).train()


def batch_of(library: str, name: str, model: nn.Module, samples: Row = SAMPLES) -> Any:
    """Random tensors of the model's own size, or a dictionary of them by name. ValueError for detectors."""
    if library == "transformers":
        main = getattr(model, "main_input_name", "")
        config = getattr(model, "config", None)
        kind = "sound" if main.startswith("input_") and main != "input_ids" else "text" if main == "input_ids" else ""
        moving = name in VIDEO or "num_frames" in vars(config)
        count = samples[kind or ("video" if moving else "picture")]
        longest = min(TOKENS, getattr(config, "max_position_embeddings", TOKENS))
        return zoo_transformers.inputs_of(model, config, samples=count, tokens=longest, sound=SOUND)
    if library == "timm":
        return torch.randn(samples["picture"], *getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224)))
    if ".video" in type(model).__module__:
        return torch.randn(samples["video"], 3, 16, 224, 224)
    if ".detection" in type(model).__module__:
        raise ValueError("a detector wants boxes; its backbone stands in the table by itself")
    return torch.randn(samples["picture"], 3, 224, 224)


def described(model: nn.Module, probe: Any = None) -> Row:
    """What `dr2net.convert` makes of it."""
    report = dr2net.convert(model, probe=probe, chunk_mib=None if probe is None else CHUNK_MIB)
    blocks = [block for s in sequences(model) for block in blocks_of(s).values()]
    branches = [found for block in blocks if (found := find_branches(block)[0])]
    counts = Counter(len(found) for found in branches)
    cuts = Counter(
        branch.independent if isinstance(branch.independent, str) else "windows" if branch.independent else "whole"
        for found in branches
        for branch in found
    )
    return {
        "blocks": len(branches),
        "branches": sorted(counts),
        "share": report.reversible_parameters / report.all_parameters,
        "cuts": [kind for kind, _ in cuts.most_common()],
    }


def attempt(row: Row) -> Row:
    """The row with what came of the conversion, or the reason why nothing did."""
    try:
        return row | described(build(row["library"], row["model"]))
    except Exception as error:  # of any model of three libraries: it is told in the table
        lines = str(error).splitlines() or [type(error).__name__]
    try:
        return row | {"probe": True, **probed(row["library"], row["model"])[1]}
    except RuntimeError as error:  # of a training step
        row["reason"] = f"taken by a probe, but not trained: {str(error).splitlines()[0]}"
        return row
    except NoBlocksError as error:
        lines = str(error).splitlines()
    except Exception:  # then the reason without a probe is told
        pass
    row["reason"] = REASONS.get(row["family"]) or REASONS.get(re.split(r"[\d_]", row["family"])[0]) or lines[0]
    if "can be made reversible" in lines[0] and row["reason"] == lines[0] and len(lines) > 1:
        row["reason"] = lines[1].strip().partition(": ")[2]
    return row


def probed(library: str, name: str, *, checkpointed: bool = False) -> tuple[nn.Module, Row]:
    """A model whose blocks a probe has made reversible, and what came of them; or checkpointed."""
    model = _build(library, name, "cpu")
    batch = batch_of(library, name, model, dict.fromkeys(SAMPLES, 2))

    def probe(model: nn.Module) -> object:
        return planner.call(model, batch)

    if checkpointed:
        dr2net.checkpoint_blocks(model, probe=probe)
        return model, {}
    row = described(model, probe)
    planner.loss_of(model, batch, "fp32").backward()  # what fails in training is no reversible model
    return model, row


def of_timm() -> Iterator[Row]:
    """The first model of each module with a fifth of its parameters in reversible blocks, of TRIES, else the last."""
    tested = "\n".join(Path(zoo).read_text() for zoo in ZOOS)
    for module, names in timm_models():
        marks = [f'"{module}.', f"timm.models.{module} import", *(f'"{name}"' for name in names)]
        row: Row = {}
        for name in names[:TRIES]:
            row = attempt({"library": "timm", "family": module, "model": name, "models": len(names)})
            if row.get("share", 0) >= 0.2:
                break
        yield row | {"tested": any(mark in tested for mark in marks)}


def of_torchvision() -> Iterator[Row]:
    for part, name in torchvision_models():
        row = attempt({"library": "torchvision", "family": name, "model": name, "part": part})
        yield row | {"tested": any(word.rstrip("0123456789") in TESTED for word in name.split("_"))}


def of_transformers() -> Iterator[Row]:
    tested = Path(ZOOS[-1]).read_text()
    for name in TRANSFORMERS:
        row = attempt({"library": "transformers", "family": name, "model": name})
        yield row | {"tested": re.search(rf"\b{re.escape(name)}\b", tested) is not None}


def memory() -> Iterator[Row]:
    """Activations at the peak of forward and backward in float32."""
    there = (
        {row["model"]: row for row in read_json(part_file("memory"), "")["rows"]}
        if part_file("memory").exists()
        else {}
    )
    for library in LIBRARIES:
        for row in read_json(part_file(library), f"run the part {library} first")["rows"]:
            if "share" not in row or row["model"] in SLOW:
                continue
            sizes = there.get(row["model"]) or {"library": library, "model": row["model"]}
            for method in ("dr2net", "checkpointed") if "why" not in sizes else ():
                try:
                    sizes[method] = sizes.get(method) or activations(row, method)
                except Exception as error:  # of any model: it is said here, and a dash in the table
                    sizes["why"] = f"{method}: {type(error).__name__}: {str(error)[:200]}"
                    print(f"{row['model']}: {sizes['why']}", flush=True)
                    break
            yield sizes


def activations(row: Row, method: str) -> int:
    library, name = row["library"], row["model"]
    if row.get("probe"):
        model, _ = probed(library, name, checkpointed=method == "checkpointed")
    else:
        model = build(library, name)
        if method == "dr2net":
            dr2net.convert(model, chunk_mib=CHUNK_MIB)
        else:
            dr2net.checkpoint_blocks(model)
    if method == "dr2net":
        dr2net.set_coefficients(model, 7 / 8, 1 / 8)

    def step() -> None:
        planner.loss_of(model, batch_of(library, name, model), "fp32").backward()

    return predict(step, model).activations


LIBRARIES = {"timm": of_timm, "torchvision": of_torchvision, "transformers": of_transformers}
PARTS: dict[str, Callable[[], Iterator[Row]]] = {**LIBRARIES, "memory": memory}


def part_file(name: str) -> Path:
    return Path("results") / f"models_{name}.json"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--force", action="store_true", help="make again what is there")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    known, sources = versions(), commit()
    for name in options.parts:
        file = part_file(name)
        if file.exists() and not options.force:
            print(f"{name}: there already, skipped")
        elif options.dry_run:
            print(f"{name}: would write {file}")
        else:
            rows: list[Row] = []
            for row in PARTS[name]():  # what is there when it is stopped stays
                rows.append(row)
                write_text(file, json.dumps({"commit": sources, "versions": known, "rows": rows}, indent=1) + "\n")
            print_table((name, "rows"), [(str(file), str(len(rows)))])
    parts = {name: read_json(part_file(name), "make it again") for name in PARTS if part_file(name).exists()}
    if options.dry_run or "timm" not in parts:
        print("docs/models.md: " + ("would be written" if options.dry_run else "waits for timm"))
        return
    Path("docs").mkdir(exist_ok=True)
    write_text(Path("docs/models.md"), page(parts))
    print("docs/models.md")


if __name__ == "__main__":
    main()
