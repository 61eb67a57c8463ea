"""Does the operating system see what `dr2net.memory` counts? Resident memory against live tensor bytes, per method.

    python -m scripts.check_memory [--batch 16]

Each method trains one step of a small ViT in a process of its own. Compared is the rise of the peak of resident memory
during the step with the counted peak less the parameters. The C library is told to hand freed blocks back at once, as
otherwise its own stock is part of what is resident. Kernels also need memory inside one operator: expect more than
counted, by some tens of MiB, not by a factor.
"""

import argparse
import os
import subprocess
import sys
import warnings

METHODS = ("conventional", "checkpointed", "reversible")
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # of glibc


def run_step(method: str, batch: int) -> str:
    """One line for `method`; to be called in a fresh process, whose peak is this step's."""
    import timm
    import torch

    import dr2net
    from dr2net.memory import format_bytes, measure, predict, process_peak

    warnings.simplefilter("ignore")
    model = timm.create_model("vit_tiny_patch16_224", depth=12, img_size=256)
    if method == "checkpointed":
        dr2net.checkpoint_blocks(model)
    elif method == "reversible":
        dr2net.convert(model)
        dr2net.set_coefficients(model, 0, 1)

    def step(size: int = batch) -> None:
        model(torch.randn(size, 3, 256, 256)).square().mean().backward()
        model.zero_grad()

    predicted = predict(step, model)
    step(1)  # load the kernels
    before = process_peak()
    measured = measure(step, model)
    sizes = (
        *(predicted.peak - predicted.parameters, measured.peak - measured.parameters),
        process_peak() - before,
    )
    return f"{method:14}" + "".join(f"{format_bytes(size):>14}" for size in sizes)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--method", choices=METHODS, help="only this one, in this process")
    options = parser.parse_args()
    if options.method:
        print(run_step(options.method, options.batch))
        return
    print(f"{'':14}{'predicted':>14}{'counted':>14}{'resident':>14}", flush=True)
    for method in METHODS:
        command = [sys.executable, "-m", "scripts.check_memory", "--method", method, "--batch", str(options.batch)]
        subprocess.run(command, check=True, env={**os.environ, **RETURN_FREED_MEMORY})


if __name__ == "__main__":
    main()
