"""Plot the training record of a checkpoint: accuracy, complexity and group counts by epoch.

``python -m bench.training_curve examples/g_resnext17_cifar10.pt -o examples/curve.svg``
"""

from __future__ import annotations

from pathlib import Path

import click
import torch


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True, path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Image to write (.svg or .png).")
def main(checkpoint: Path, output: Path) -> None:
    """Write the curve of CHECKPOINT and print it as a Markdown table."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "foldgroup"
    from matplotlib import pyplot as plt

    history = torch.load(checkpoint, weights_only=True)["training"]["history"]
    epochs = [entry["epoch"] for entry in history]
    print("| epoch | loss | train % | held-out % | ζ/o | groups |\n| --- | --- | --- | --- | --- | --- |")
    for entry in history:
        print(
            f"| {entry['epoch']} | {entry['loss']:.3f} | {entry['train_accuracy']:.1f} | "
            f"{entry['holdout_accuracy']:.1f} | {entry['zeta_over_budget']:.3f} | "
            f"{' '.join(map(str, entry['groups']))} |"
        )
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3), constrained_layout=True)
    left.plot(epochs, [e["train_accuracy"] for e in history], "o-", label="training, augmented")
    left.plot(epochs, [e["holdout_accuracy"] for e in history], "s-", label="held out")
    left.set(xlabel="epoch", ylabel="top-1 accuracy in %")
    left.legend()
    middle.plot(epochs, [e["zeta_over_budget"] for e in history], "o-", color="tab:green")
    middle.axhline(1, color="black", linewidth=0.8, linestyle="--")
    middle.set(xlabel="epoch", ylabel="ζ/o")
    for i, counts in enumerate(zip(*(e["groups"] for e in history), strict=True)):
        right.plot(epochs, counts, "o-", label=f"DGConv {i + 1}", alpha=0.8)
    right.set(xlabel="epoch", ylabel="groups")
    right.set_yscale("log", base=2)
    right.legend(fontsize="small")
    figure.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
