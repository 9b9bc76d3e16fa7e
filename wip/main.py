# %% [markdown]
# # How does a network break?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/robust-networks/robust-networks/blob/main/main.ipynb)
#
# A network that is right about nine images in ten can be made wrong about nearly all of them, by changes that no person
# would notice. This notebook trains a small one, breaks it with a single gradient, and then lets you try the same on
# networks that were trained to withstand it.
#
# It takes about three minutes on two CPU cores, and needs no GPU. CIFAR-10 (170 MB) is downloaded on first use.

# %% tags=["parameters"]
dataset = "cifar10"  # or "digits", which needs no download (but `make demo` first)
data_dir = None  # the folder that holds cifar-10-batches-py; None means $DATA_DIR, else data
quick = False  # fewer images and epochs, for a look
retrain = False  # train the small network again, even if runs/ has it

# %%
import sys

if "google.colab" in sys.modules:  # there, the repository has to be fetched first
    !git clone --quiet --depth 1 https://github.com/robust-networks/robust-networks
    %cd -q robust-networks
    %pip install -q -r requirements.txt

# %%
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

from attacks import fgsm
from utils import plotting
from utils.notebooks import Explorer, Notebook

notebook = Notebook(dataset, data_dir, quick, retrain)
print(notebook.welcome(minutes=3))

# %% [markdown]
# ## The images
#
# CIFAR-10 has 60,000 of them, 32 by 32 pixels, in ten classes. Everywhere in this repository a pixel lies between 0 and
# 1; whatever a network does to its input besides, it does inside.

# %%
test = notebook.test
plotting.class_examples(test)
plt.show()

# %% [markdown]
# ## A small network
#
# Three convolutions and a linear layer, older and shallower than the ones of the study. It is trained for a few epochs,
# as every network here: stochastic gradient descent on the cross-entropy.

# %%
network = notebook.trained("small-cnn", epochs=3)
network

# %%
from utils.evaluation import evaluate_fgsm

clean, *_ = evaluate_fgsm(network, notebook.first(10_000), [])
print(f"accuracy on {clean.examples:,} test images: {clean.accuracy:.1%}")

# %% [markdown]
# ## One image, one gradient
#
# To train a network is to ask how the loss changes with each *weight*. To attack it is to ask how the loss changes with
# each *pixel*. It is the same backward pass, with another leaf:

# %%
image, label = notebook.correct_image(network)
pixels = image.clone().requires_grad_()
loss = F.cross_entropy(network(pixels), label)
loss.backward()
print(f"a {test.class_names[label]}; loss {loss:.3f}")
print(f"largest gradient of a pixel: {pixels.grad.abs().max():.3f}")

# %% [markdown]
# The gradient says for each pixel which way the loss goes up. Its size differs from pixel to pixel; the *Fast Gradient
# Sign Method* ([Goodfellow et al., 2015](https://arxiv.org/abs/1412.6572)) forgets that, and keeps the sign:
#
# $$x' = \operatorname{clamp}\left(x + \varepsilon \cdot \operatorname{sign}\left(\nabla_x \, L(f(x), y)\right),\ 0,\ 1\right)$$
#
# Of all changes of at most $\varepsilon$ a pixel, that is the one that raises the loss most, as far as the gradient can
# tell.

# %%
epsilon = notebook.radius
adversarial = (image + epsilon * pixels.grad.sign()).clamp(0, 1)

title = f"The same image, plus a sign (epsilon = {plotting.pixels(epsilon)})"
plotting.attacked_image(network, image, adversarial, label, test, title)
plt.show()

# %% [markdown]
# No pixel moved by more than epsilon, and the label is another. `attacks.fgsm` is the same thing, for whole
# batches:

# %%
assert torch.equal(fgsm(network, image, label, epsilon=epsilon), adversarial)

# %% [markdown]
# ## How little is enough?
#
# The sign does not depend on $\varepsilon$, so we can walk along it and watch what the network says.

# %%
plotting.along_the_sign(network, image, label, test)
plt.show()

# %% [markdown]
# ## All images
#
# One image proves nothing. Over many of them, accuracy falls with $\varepsilon$ like this:

# %%
epsilons = [level / 255 for level in (1, 2, 4, 6, 8, 12, 16)]
results = evaluate_fgsm(network, notebook.first(2000), epsilons)
title = f"White-box FGSM, {results[0].examples:,} test images"
plotting.accuracies({"small CNN": results}, title)
plt.show()

# %% [markdown]
# ## What defends it?
#
# Three larger networks, all of them this repository's CNN: one trained on clean images; one retrained on the first one's
# adversarial images, which is the study's defence; and one trained, in every step, on adversarial examples of itself.
# Here is each of them under its own gradient, one step (FGSM) and twenty (PGD):

# %%
from utils.evaluation import evaluate

names = {
    "baseline": "cnn",
    "the study's defence": "cnn-fgsm-augment-0.2",
    "robust": "cnn-robust",
}
networks = {name: notebook.network(stem) for name, stem in names.items()}
images = notebook.first(500)
print(f"{len(images)} test images       clean   FGSM  PGD-20")
for name, defended in networks.items():
    clean, one_step = evaluate_fgsm(defended, images, [epsilon])
    steps = evaluate(defended, images, "pgd", epsilon)
    print(f"{name:20}", *(f"{result.accuracy:6.1%}" for result in (clean, one_step, steps)))

# %% [markdown]
# [cnn.ipynb](cnn.ipynb) tells how the second one came to look like a defence, and [README](README.md) has all of the
# figures.
#
# ## Try it
#
# Choose an image, a network and an attack, and move the slider. (Where this page is only shown and not run, the slider
# does not move: the grid below it stands for what you would see.)

# %%
explorer = Explorer(test, networks)
explorer

# %%
plotting.explored(networks, test, index=explorer.image.value)
plt.show()

# %% [markdown]
# To the robust network small changes are small, and where it gives way, it is because the image has become ambiguous.
# To the other two, a few grey levels are the world.
