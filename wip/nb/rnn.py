# %% [markdown]
# # The CNN-LSTM, without and with adversarial training
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/robust-networks/robust-networks/blob/main/rnn.ipynb)
#
# What the network is and how well it does, how FGSM breaks it, what the study did about that, why it looked as if it
# worked, and what does work. [main.ipynb](main.ipynb) says what FGSM is; [cnn.ipynb](cnn.ipynb) is this page for the
# plain CNN.
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
# They are those of [cnn.ipynb](cnn.ipynb), split in the same way.

# %%
train, validation, test = notebook.train, notebook.validation, notebook.test
for split in (train, validation, test):
    print(f"{split.name:10} {len(split):6,} images")

# %%
plotting.class_examples(train, columns=6)
plt.show()

# %% [markdown]
# ## The network
#
# The CNN's six convolutions, and then, in place of one linear layer over everything that they have found, a three-layer LSTM
# that reads it as a sequence.

# %%
baseline = notebook.network("cnn-lstm")
plotting.layers(baseline)
plt.show()

# %% [markdown]
# ## What is the sequence?
#
# The last convolution leaves a map of 4 by 4 positions. At each position stands a vector, one number a channel. The LSTM
# reads the 16 vectors row after row, from the upper left to the lower right, and the class is read off what it remembers
# after the last. (The study reshaped the map instead of transposing it, so that a step of its sequence mixed channels and
# positions.)

# %%
images, labels = notebook.batch(1000)
positions, channels = baseline.sequence(images[:1]).shape[1:]
print(f"the sequence of one image: {positions} positions, {channels} channels")
title = f"What the LSTM reads of one image: {test.class_names[labels[0]]}"
plotting.sequence(baseline, images[:1], title)
plt.show()

# %% [markdown]
# ## Trained on clean images
#
# Cross-entropy, the images flipped and shifted at random. The curve is the training log's:

# %%
plotting.training_curve(notebook.log("cnn-lstm"), "The baseline: cross-entropy on clean images")
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
# Where does the attack act? FGSM moves almost every pixel by epsilon. How far does that move what the LSTM reads at each
# position, and what it remembers after having read it?

# %%
attacked = fgsm(baseline, images, labels, epsilon=epsilon)
plotting.positions_disturbed(baseline, images, attacked)
plt.show()

# %% [markdown]
# What is taken for what? Left: which classes are confused on clean images. Right: where the attack pushes each class.

# %%
taken = {
    "clean": predictions(baseline, images),
    f"FGSM, {plotting.pixels(epsilon)}": predictions(baseline, attacked),
}
plotting.confusion_matrices(taken, labels, test.class_names)
plt.show()

# %% [markdown]
# ## The study's defence
#
# As for the CNN: fresh networks trained on clean images together with the baseline's FGSM examples, at four radii, and
# tested on examples crafted on the baseline. On CIFAR-10, the second line of a cell has the study's figures:

# %%
report = notebook.study()
display(Markdown(tables.transfer_table(report, "cnn-lstm")))

# %%
plotting.transfer_accuracy(report, "cnn-lstm")
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
plotting.transfer_and_white_box(report, "cnn-lstm")
plt.show()

# %% [markdown]
# The same in figures, at one radius:

# %%
retrained = notebook.network("cnn-lstm-fgsm-augment-0.2")
part = notebook.first(1000)
_, transferred = evaluate_fgsm(retrained, part, [0.1], source=baseline)
_, white_box = evaluate_fgsm(retrained, part, [0.1])
print(f"retrained on 0.2, under FGSM at 0.1 on {len(part):,} images:")
print(f"crafted on the baseline {transferred.accuracy:.1%}, on itself {white_box.accuracy:.1%}")

# %% [markdown]
# And image by image, each network under attack through its own gradient:

# %%
title = "CNN-LSTM baseline, and retrained on its examples at 0.2"
plotting.side_by_side(baseline, retrained, test, 0.1, title)
plt.show()

# %% [markdown]
# The same story as with the CNN, then: the network has learnt to recognise the baseline's perturbations, and to read the
# label out of them. An LSTM in place of a linear layer changes nothing about that.
#
# ## What works
#
# Craft the examples on the network itself, anew in every step of its training. N-FGSM
# ([de Jorge et al., 2022](https://arxiv.org/abs/2202.01181)) does so with one step from a noisy image.

# %%
robust = notebook.network("cnn-lstm-robust")
count = sum(parameter.numel() for parameter in robust.parameters())
print(f"width {robust.arguments['width']}, {count:,} parameters")
plotting.training_curve(notebook.log("cnn-lstm-robust"), "Adversarial training with N-FGSM")
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
plotting.targeted_examples({"baseline": baseline, "robust": robust}, test, "CNN-LSTM")
plt.show()

# %% [markdown]
# ## What to take away
#
# - A network of high accuracy is not a robust one.
# - A defence tested on examples made for another network has not been tested.
# - Adversarial training keeps part of the accuracy under attack, and costs some on clean images. [README](README.md) has the strongest attacks' figures.
