# %% [markdown]
# # How does a network break?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/robust-networks/robust-networks/blob/main/main.ipynb)
#
# A network that is right about most images can be made wrong about nearly all of them, by changes that no person would
# notice. This notebook trains a small one, breaks it with a single gradient, and then lets you try the same on networks
# that were trained to withstand it.
#
# No GPU is needed. CIFAR-10 (170 MB) is downloaded on first use.

# %% tags=["parameters"]
dataset = "cifar10"  # or "digits", which needs no download (but `make demo` first)
data_dir = None  # the folder that holds cifar-10-batches-py; None means $DATA_DIR, else data
quick = False  # fewer images and epochs, for a look
retrain = False  # no difference here: the small network is always trained, the others loaded

# %%
import sys
from pathlib import Path

if "google.colab" in sys.modules and not Path("utils").exists():  # fetch the repository first
    !git clone --quiet --depth 1 https://github.com/robust-networks/robust-networks
    %cd -q robust-networks

# %%
import matplotlib.pyplot as plt
import torch.nn.functional as F
from IPython.display import Markdown, display

from attacks import fgsm
from utils import plotting, tables
from utils.evaluation import evaluate_fgsm
from utils.notebooks import Explorer, Notebook

notebook = Notebook(dataset, data_dir, quick)
print(notebook.welcome(minutes=3))

# %% [markdown]
# ## The images
#
# Small colour images of ten classes, 32 by 32 pixels. Everywhere in this repository a pixel lies between 0 and 1;
# normalisation happens inside the network.

# %%
test = notebook.test
plotting.class_examples(test)
plt.show()

# %% [markdown]
# ## A small network
#
# Three convolutions and a linear layer, older and shallower than the networks of the study. It is trained for a few
# epochs, with stochastic gradient descent on the cross-entropy.

# %%
network = notebook.trained("small-cnn", epochs=3)
network

# %%
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
print(f"label: {test.class_names[label]}; loss {loss:.3f}")
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
# No pixel moved by more than epsilon. What did the network say before, and what does it say now?

# %%
before, after = (test.class_names[network(x).argmax()] for x in (image, adversarial))
print(f"before: {before}; after: {after}; the label: {test.class_names[label]}")

# %% [markdown]
# `attacks.fgsm` is the same thing, for whole batches and any model:

# %%
same = fgsm(network, image, label, epsilon=epsilon) == adversarial
print(f"{same.float().mean():.2%} of the pixel values are equal")

# %% [markdown]
# ## How little is enough?
#
# The sign does not depend on $\varepsilon$, so we can walk along it and watch what the network says.

# %%
plotting.along_the_sign(network, image, label, test, largest=2 * epsilon)
plt.show()

# %% [markdown]
# ## All images
#
# One image proves nothing. Over many of them, accuracy falls with $\varepsilon$ like this:

# %%
epsilons = [part * epsilon for part in (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1, 1.5, 2)]
results = evaluate_fgsm(network, notebook.first(2000), epsilons)
title = f"White-box FGSM, {results[0].examples:,} test images"
plotting.accuracies({"small CNN": results}, title)
plt.show()

# %% [markdown]
# ## What defends it?
#
# Three larger networks of the study's kind: one trained on clean images; one retrained on the first one's adversarial
# images, which is the study's defence; and a wider one trained, at every step, on adversarial examples of itself. Here is
# each of them under its own gradient, one step (FGSM) and twenty (PGD); accuracy in percent, with 95 % intervals:

# %%
names = {
    "baseline": "cnn",
    "the study's defence": "cnn-fgsm-augment-0.2",
    "robust": "cnn-robust",
}
networks = {name: notebook.network(stem) for name, stem in names.items()}
table = tables.attacked_table(networks, notebook.first(500), epsilon, progress=True)
display(Markdown(table))

# %% [markdown]
# [cnn.ipynb](cnn.ipynb) tells how the second one came to look like a defence, and [README](README.md) has all of the
# figures.
#
# ## Try it
#
# Choose an image, a network and an attack, and move the slider. (Where this page is shown and not run, a picture of what
# all three say stands in its place.)

# %%
Explorer(test, networks, largest=round(2 * 255 * epsilon))

# %% [markdown]
# Small changes move the robust network little. But it gives way too, on images that people still read without trouble; the
# other two give way almost at once.
