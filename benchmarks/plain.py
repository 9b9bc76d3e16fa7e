"""What people write without this project: torchvision's transforms on PIL images, a DataLoader, a loop."""

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose, RandomCrop, RandomHorizontalFlip, ToTensor

FLIP = Compose([RandomHorizontalFlip(), ToTensor()])
FLIP_AND_SHIFT = Compose([RandomCrop(32, padding=2), RandomHorizontalFlip(), ToTensor()])


class PILImages(Dataset):
    """A split as torchvision's CIFAR10 has it: bytes (32, 32, 3), an image of which is made when it is asked for."""

    def __init__(self, split, transform):
        self.images, self.labels = split.images.permute(0, 2, 3, 1).contiguous().numpy(), split.labels.tolist()
        self.transform = transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


class AttackedImages(PILImages):
    """The same, each image moved by FGSM when it is asked for, as the study did it."""

    def __init__(self, split, network, epsilon):
        super().__init__(split, ToTensor())
        self.network, self.epsilon = network.eval().requires_grad_(False), epsilon

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        image.requires_grad_()
        loss = F.cross_entropy(self.network(image[None]), torch.tensor([label]))
        (gradient,) = torch.autograd.grad(loss, image)
        return (image.detach() + self.epsilon * gradient.sign()).clamp(0, 1), label


def loader(dataset, batch_size, workers, shuffle=False):
    options = {"persistent_workers": workers > 0, "pin_memory": torch.cuda.is_available()}
    return DataLoader(dataset, batch_size, shuffle=shuffle, num_workers=workers, **options)


def cross_entropy(network, images, labels):
    return F.cross_entropy(network(images), labels)


def n_fgsm(network, images, labels, epsilon=8 / 255):
    noisy = (images + torch.empty_like(images).uniform_(-2 * epsilon, 2 * epsilon)).requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(network(noisy), labels), noisy)
    return F.cross_entropy(network((noisy + epsilon * gradient.sign()).detach()), labels)


def pgd(network, images, labels, epsilon=8 / 255, steps=7):
    adversarial = (images + torch.empty_like(images).uniform_(-epsilon, epsilon)).clamp(0, 1)
    for _ in range(steps):
        adversarial.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(network(adversarial), labels), adversarial)
        adversarial = adversarial.detach() + 2.5 * epsilon / steps * gradient.sign()
        adversarial = torch.clamp(torch.min(torch.max(adversarial, images - epsilon), images + epsilon), 0, 1)
    return F.cross_entropy(network(adversarial), labels)


def train(network, batches, optimizer, epochs, device, loss_function=cross_entropy):
    network.train()
    for _ in range(epochs):
        for images, labels in batches:
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            loss = loss_function(network, images, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.no_grad()
def accuracy(network, batches, device):
    network.eval()
    correct = sum((network(images.to(device)).argmax(1).cpu() == labels).sum().item() for images, labels in batches)
    return correct / len(batches.dataset)
