"""Train the classifier behind FD (Fashion-MNIST CNN), the distance that `benchmarks/quality.py` reports.

    python benchmarks/classifier.py --data FOLDER --out tcc/data/fd-fmnist-cnn.safetensors

Writes the weights in float16 and the statistics of the 10,000 test images, taken with the weights as they are stored.
The test images serve as the real images of the distance; no choice was made on them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from tcc.data import fashion_mnist
from tcc.metrics import FeatureNetwork, Statistics, load_features, save_features


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift a batch `[B, 1, H, W]` by up to 2 pixels in each direction, and flip half of it left to right."""
    shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
    images = torch.roll(images, shift, dims=(2, 3))  # the border is black and 2 pixels wide: nothing comes round
    flipped = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(flipped[:, None, None, None], images.flip(3), images)


def train(images: Tensor, labels: Tensor, *, epochs: int, batch: int, rate: float, seed: int) -> FeatureNetwork:
    """Train on uint8 images `[N, 1, 32, 32]`: AdamW, one learning-rate cycle, label smoothing 0.05."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = FeatureNetwork(num_classes=int(labels.max()) + 1).to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.02)
    per_epoch = len(images) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=epochs * per_epoch)
    columns = (TextColumn("loss {task.fields[loss]:.3f}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("training", total=epochs * per_epoch, loss=float("nan"))
        for _ in range(epochs):
            order = torch.randperm(len(images), generator=generator)
            for picked in order.split(batch)[:per_epoch]:
                x = augment(fashion_mnist.to_signal(images[picked]), generator)
                logits = network.classify(x.contiguous(memory_format=torch.channels_last))
                loss = F.cross_entropy(logits, labels[picked], label_smoothing=0.05)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                progress.update(bar, advance=1, loss=loss.item())
    return network.eval()


@torch.no_grad()
def evaluate(network: FeatureNetwork, images: Tensor, labels: Tensor) -> tuple[float, Statistics]:
    """Share of uint8 images that are classified rightly, and the statistics of their features."""
    features = torch.cat([network(fashion_mnist.to_signal(part)) for part in images.split(500)])
    return (network.head(features).argmax(dim=1) == labels).double().mean().item(), Statistics.of(features)


def main(arguments: list[str] | None = None) -> int:
    """Train, store, and say how well the stored weights classify."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/fashion-mnist"), help="folder of IDX files")
    parser.add_argument("--out", type=Path, default=Path("fd-fmnist-cnn.safetensors"))
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    try:
        images, labels = fashion_mnist.load(args.data, "train")
        test_images, test_labels = fashion_mnist.load(args.data, "test")
    except (ValueError, FileNotFoundError) as error:
        print(f"classifier: {error}", file=sys.stderr)
        return 2
    network = train(images, labels, epochs=args.epochs, batch=args.batch, rate=args.rate, seed=args.seed)
    _, real = evaluate(network, test_images, test_labels)
    save_features(network, real, args.out)
    stored, _ = load_features(args.out)
    accuracy, real = evaluate(stored, test_images, test_labels)
    save_features(stored, real, args.out)
    print(f"wrote {args.out}: test accuracy {accuracy:.2%}, {args.out.stat().st_size / 1e3:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
