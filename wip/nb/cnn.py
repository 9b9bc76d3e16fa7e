# %% [markdown]
# # The CNN, without and with adversarial training
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/robust-networks/robust-networks/blob/main/cnn.ipynb)
#
# What the network is and how well it does, how FGSM breaks it, what the study did about that, why it looked as if it
# worked, and what does work. [main.ipynb](main.ipynb) says what FGSM is; [rnn.ipynb](rnn.ipynb) is this page for the
# CNN-LSTM.
#
# The shipped checkpoints are loaded. With `retrain = True` the whole study is done again, of both architectures, and the
# robust networks are trained, which takes hours.

# %% tags=["parameters"]
dataset = "cifar10"  # or "digits", which needs no download (but `make demo` first)
data_dir = None  # the folder that holds cifar-10-batches-py; None means $DATA_DIR, else data
quick = False  # fewer images, for a look
retrain = False  # do the whole study again, and train the robust networks

# %%
import sys
from pathlib import Path

if "google.colab" in sys.modules and not Path("utils").exists():  # fetch the repository first
    !git clone --quiet --depth 1 https://github.com/robust-networks/robust-networks
    %cd -q robust-networks

# %%
import matplotlib.pyplot as plt
from IPython.display import Markdown, display

from attacks import fgsm
from utils import plotting, tables
from utils.evaluation import evaluate_fgsm, predictions
from utils.notebooks import Notebook

notebook = Notebook(dataset, data_dir, quick, retrain)
print(notebook.welcome(minutes=3))

# %% [markdown]
# ## The data
#
# The networks learn from the training images. Every choice was made on the validation images, which are held out of
# them; the test images had no part in any.

# %%
train, validation, test = notebook.train, notebook.validation, notebook.test
mean, deviation = train.channel_statistics()
for split in (train, validation, test):
    print(f"{split.name:10} {len(split):6,} images")
print("channels:", *(f"{m:.3f} ± {d:.3f}" for m, d in zip(mean, deviation, strict=True)))

# %%
plotting.class_examples(train)
plt.show()

# %% [markdown]
# ## The network
#
# Six convolutions of 3 by 3, each followed by ReLU and batch norm. Strides of two stand in place of pooling. Normalisation
# is the network's first layer, so that an attack, and its epsilon, are always in units of pixels.

# %%
baseline = notebook.network("cnn")
plotting.layers(baseline)
plt.show()

# %% [markdown]
# ## Trained on clean images
#
# Cross-entropy, the images flipped and shifted at random. The curve is the training log's:

# %%
plotting.training_curve(notebook.log("cnn"), "The baseline: cross-entropy on clean images")
plt.show()

# %%
clean, *_ = evaluate_fgsm(baseline, notebook.first(10_000), [])
low, high = clean.confidence_interval
print(f"{clean.examples:,} test images: {clean.accuracy:.2%} correct")
print(f"95 % interval: {low:.2%} to {high:.2%}")

# %% [markdown]
# ## Under attack
#
# One step of FGSM through the network's own gradient. Green is right and orange is wrong.

# %%
epsilon = notebook.radius
plotting.adversarial_examples(baseline, test, epsilon)
plt.show()

# %% [markdown]
# What is taken for what? Left: which classes are confused on clean images. Right: where the attack pushes each class.

# %%
images, labels = notebook.batch(1000)
attacked = fgsm(baseline, images, labels, epsilon=epsilon)
taken = {
    "clean": predictions(baseline, images),
    f"FGSM, {plotting.pixels(epsilon)}": predictions(baseline, attacked),
}
plotting.confusion_matrices(taken, labels, test.class_names)
plt.show()

# %% [markdown]
# ## The study's defence
#
# Craft the FGSM example of every training image on the baseline, and train a fresh network on both together. The study did
# that for four radii, and tested all of its networks on FGSM examples crafted on the baseline. These are our networks; on
# CIFAR-10, the second line of a cell has the study's figures:

# %%
report = notebook.study()
display(Markdown(tables.transfer_table(report, "cnn")))

# %%
plotting.transfer_accuracy(report, "cnn")
plt.show()

# %% [markdown]
# The network retrained on 0.2 is about as accurate on attacked images as on clean ones, at every radius in the table. It
# looks as if the problem were solved.
#
# ## The surprise
#
# But nobody has attacked *that* network yet. The examples were crafted on another one. This is what happens when the
# attack follows the network's own gradient:

# %%
plotting.transfer_and_white_box(report, "cnn")
plt.show()

# %% [markdown]
# The same in figures, at one radius:

# %%
retrained = notebook.network("cnn-fgsm-augment-0.2")
part = notebook.first(1000)
_, transferred = evaluate_fgsm(retrained, part, [0.1], source=baseline)
_, white_box = evaluate_fgsm(retrained, part, [0.1])
print(f"retrained on 0.2, under FGSM at 0.1 on {len(part):,} images:")
print(f"crafted on the baseline {transferred.accuracy:.1%}, on itself {white_box.accuracy:.1%}")

# %% [markdown]
# And image by image, each network under attack through its own gradient:

# %%
title = "CNN baseline, and retrained on its examples at 0.2"
plotting.side_by_side(baseline, retrained, test, 0.1, title)
plt.show()

# %% [markdown]
# It never had to learn what a cat looks like under attack. It was enough to recognise the baseline's perturbations, and they
# even give the label away: they were computed from it. On CIFAR-10 the strongest examples are even a little easier for this
# network than clean images, which is called *label leaking*
# ([Kurakin et al., 2017](https://arxiv.org/abs/1611.01236)).
#
# ## What works
#
# Craft the examples on the network itself, anew in every step of its training. N-FGSM
# ([de Jorge et al., 2022](https://arxiv.org/abs/2202.01181)) does so with one step from a noisy image.

# %%
robust = notebook.network("cnn-robust")
count = sum(parameter.numel() for parameter in robust.parameters())
print(f"width {robust.arguments['width']}, {count:,} parameters")
plotting.training_curve(notebook.log("cnn-robust"), "Adversarial training with N-FGSM")
plt.show()

# %% [markdown]
# The three networks side by side, under FGSM and under PGD, which takes twenty small steps where FGSM takes a large one;
# accuracy in percent, with 95 % intervals:

# %%
networks = {"baseline": baseline, "retrained on 0.2": retrained, "robust": robust}
table = tables.attacked_table(networks, notebook.first(500), epsilon, progress=True)
display(Markdown(table))

# %% [markdown]
# What has the robust network learnt? Move an image towards another class, as far as the radius allows and for as long as
# the loss falls. Through the baseline that makes noise; through the robust network it draws the other class.

# %%
plotting.targeted_examples({"baseline": baseline, "robust": robust}, test, "CNN")
plt.show()

# %% [markdown]
# ## What to take away
#
# - A network of high accuracy is not a robust one.
# - A defence tested on examples made for another network has not been tested.
# - Adversarial training keeps part of the accuracy under attack, and costs some on clean images. [README](README.md) has the strongest attacks' figures.
