"""What people write without this project: torchvision's transforms on PIL images, a DataLoader, a loop."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose, RandomCrop, RandomHorizontalFlip, ToTensor

from utils.data import Split

FLIP = Compose([RandomHorizontalFlip(), ToTensor()])
FLIP_AND_SHIFT = Compose([RandomCrop(32, padding=2), RandomHorizontalFlip(), ToTensor()])

LossFunction = Callable[[nn.Module, Tensor, Tensor], Tensor]  # network, images, labels


class PILImages(Dataset):
    """A split as torchvision's CIFAR10 has it: bytes (32, 32, 3), made into an image each time one is asked for."""

    def __init__(self, split: Split, transform: Callable[[Any], Any]) -> None:
        self.images, self.labels = split.images.permute(0, 2, 3, 1).contiguous().numpy(), split.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


class AttackedImages(PILImages):
    """The same images, each moved by FGSM each time it is asked for, as the study did it."""

    def __init__(self, split: Split, network: nn.Module, epsilon: float) -> None:
        super().__init__(split, ToTensor())
        self.network, self.epsilon = network.eval().requires_grad_(False), epsilon

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = super().__getitem__(index)
        image.requires_grad_()
        loss = F.cross_entropy(self.network(image[None]), torch.tensor([label]))
        (gradient,) = torch.autograd.grad(loss, image)
        return (image.detach() + self.epsilon * gradient.sign()).clamp(0, 1), label


def loader(dataset: Dataset, batch_size: int, workers: int, shuffle: bool = False) -> DataLoader:
    """A DataLoader with so many worker processes; 0: the loop's own process loads the images."""
    return DataLoader(
        dataset,
        batch_size,
        shuffle=shuffle,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def clean_loss(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy on the images as they are."""
    return F.cross_entropy(network(images), labels)


def n_fgsm_loss(network: nn.Module, images: Tensor, labels: Tensor, epsilon: float = 8 / 255) -> Tensor:
    """Cross-entropy on N-FGSM's examples."""
    noisy = (images + torch.empty_like(images).uniform_(-2 * epsilon, 2 * epsilon)).requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(network(noisy), labels), noisy)
    return F.cross_entropy(network((noisy + epsilon * gradient.sign()).detach()), labels)


def pgd_loss(network: nn.Module, images: Tensor, labels: Tensor, epsilon: float = 8 / 255, steps: int = 7) -> Tensor:
    """Cross-entropy on PGD's examples."""
    adversarial = (images + torch.empty_like(images).uniform_(-epsilon, epsilon)).clamp(0, 1)
    for _ in range(steps):
        adversarial.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(network(adversarial), labels), adversarial)
        adversarial = adversarial.detach() + 2.5 * epsilon / steps * gradient.sign()
        adversarial = torch.clamp(torch.min(torch.max(adversarial, images - epsilon), images + epsilon), 0, 1)
    return F.cross_entropy(network(adversarial), labels)


def train(
    network: nn.Module,
    batches: DataLoader,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    device: torch.device,
    loss_function: LossFunction = clean_loss,
) -> None:
    """The loop that everyone writes."""
    network.train()
    for _ in range(epochs):
        for images, labels in batches:
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            loss = loss_function(network, images, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.no_grad()
def accuracy(network: nn.Module, batches: DataLoader, device: torch.device) -> float:
    """The fraction of the images that the network classifies correctly."""
    network.eval()
    correct = sum((network(images.to(device)).argmax(1).cpu() == labels).sum().item() for images, labels in batches)
    return correct / len(batches.dataset)  # type: ignore[arg-type]  # every Dataset here has a length
