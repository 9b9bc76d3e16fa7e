# %% [markdown]
# # The CNN, without and with adversarial training
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/robust-networks/robust-networks/blob/main/cnn.ipynb)
#
# What the network is and how well it does, how FGSM breaks it, what the study did about that, why it looked as if it
# worked, and what does work. [main.ipynb](main.ipynb) says what FGSM is; [rnn.ipynb](rnn.ipynb) is this page for the
# CNN-LSTM.
#
# The shipped checkpoints are loaded, so that all of it takes about three minutes on two CPU cores. With
# `retrain = True` the whole study is done again, which takes hours.

# %% tags=["parameters"]
dataset = "cifar10"  # or "digits", which needs no download (but `make demo` first)
data_dir = None  # the folder that holds cifar-10-batches-py; None means $DATA_DIR, else data
quick = False  # fewer images, for a look
retrain = False  # train all networks of this page instead of loading them

# %%
import sys

if "google.colab" in sys.modules:  # there, the repository has to be fetched first
    !git clone --quiet --depth 1 https://github.com/robust-networks/robust-networks
    %cd -q robust-networks
    %pip install -q -r requirements.txt

# %%
import matplotlib.pyplot as plt
from IPython.display import Markdown, display

from attacks import fgsm
from utils import plotting, tables
from utils.evaluation import evaluate, evaluate_fgsm, predictions
from utils.notebooks import Notebook

notebook = Notebook(dataset, data_dir, quick, retrain)
print(notebook.welcome(minutes=3))

# %% [markdown]
# ## The data
#
# The networks learn from the training images, flipped and shifted at random. The last 5,000 training images are held out:
# whatever was chosen, was chosen on them. The test images chose nothing.

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
# What is taken for what? Clean on the left: cats and dogs, mostly. Attacked on the right: every class has others that it is
# pushed into.

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
# that for four radii, and tested all of its networks on FGSM examples crafted on the baseline. These are our networks, the
# study's figures in the second line of each cell:

# %%
report = notebook.study()
display(Markdown(tables.transfer_table(report, "cnn")))

# %%
plotting.transfer_accuracy(report, "cnn")
plt.show()

# %% [markdown]
# The network retrained on 0.2 is about as accurate on attacked images as on clean ones, however strong the attack. It looks
# as if the problem were solved.
#
# ## The surprise
#
# But nobody has attacked *that* network yet. Its examples were crafted on another one. This is what happens when the
# attacker follows the gradient of the network that he attacks:

# %%
plotting.transfer_and_white_box(report, "cnn")
plt.show()

# %%
retrained = notebook.network("cnn-fgsm-augment-0.2")
part = notebook.first(1000)
_, transferred = evaluate_fgsm(retrained, part, [0.1], source=baseline)
_, white_box = evaluate_fgsm(retrained, part, [0.1])
print(f"retrained on 0.2, under FGSM at 0.1 on {len(part):,} images:")
print(f"crafted on the baseline {transferred.accuracy:.1%}, on itself {white_box.accuracy:.1%}")

# %%
title = "CNN baseline, and retrained on its examples at 0.2"
plotting.side_by_side(baseline, retrained, test, 0.1, title)
plt.show()

# %% [markdown]
# It never had to learn what a cat looks like under attack. It was enough to recognise the baseline's perturbations, and they
# even give the label away: they were computed from it. That is why attacked images are *easier* for this network than clean
# ones, which is called label leaking.
#
# ## What works
#
# Craft the examples on the network itself, anew in every step of its training. N-FGSM
# ([de Jorge et al., 2022](https://arxiv.org/abs/2202.01181)) does so with one step from a noisy image.

# %%
robust = notebook.network("cnn-robust")
plotting.training_curve(notebook.log("cnn-robust"), "Adversarial training with N-FGSM")
plt.show()

# %% [markdown]
# The same three networks under PGD, which takes twenty small steps where FGSM takes a large one:

# %%
part = notebook.first(500)
networks = {"baseline": baseline, "retrained on 0.2": retrained, "robust": robust}
print(f"{len(part)} test images     clean   FGSM  PGD-20")
for name, network in networks.items():
    clean, one_step = evaluate_fgsm(network, part, [epsilon])
    steps = evaluate(network, part, "pgd", epsilon)
    print(f"{name:20}", *(f"{result.accuracy:6.1%}" for result in (clean, one_step, steps)))

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
# - Adversarial training holds, and costs clean accuracy. [README](README.md) has the strongest attacks' figures.
