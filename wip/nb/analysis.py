# %% [markdown]
# # CNN or CNN-LSTM?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/robust-networks/robust-networks/blob/main/analysis.ipynb)
#
# The study concludes that the CNN is the better of the two: more accurate, more robust, and faster to train. Here are both
# side by side, with the intervals that such a sentence needs: what they cost, how they do under attack, whether they fall to
# the same examples, and whether they err on the same images.
#
# Nothing is trained on this page. It reads `results/*.json` and the shipped checkpoints.

# %% tags=["parameters"]
dataset = "cifar10"  # or "digits", which needs no download (but `make demo` first)
data_dir = None  # the folder that holds cifar-10-batches-py; None means $DATA_DIR, else data
quick = False  # fewer images, for a look
retrain = False  # no difference here: nothing is trained on this page

# %%
import sys
from pathlib import Path

if "google.colab" in sys.modules and not Path("utils").exists():  # fetch the repository first
    !git clone --quiet --depth 1 https://github.com/robust-networks/robust-networks
    %cd -q robust-networks

# %%
import matplotlib.pyplot as plt
from IPython.display import Markdown, display

from utils import plotting, tables
from utils.evaluation import agreement, evaluate, transfer_matrix
from utils.notebooks import Notebook

notebook = Notebook(dataset, data_dir, quick)
print(notebook.welcome(minutes=3))
report = notebook.study()

# %% [markdown]
# ## What they cost
#
# At the same width the LSTM adds parameters, but few multiplications; its sixteen steps have to wait for one another,
# though. Training times are those of the logs beside the checkpoints. The robust networks are wider, and not of the same
# width.

# %%
stems = {
    "CNN": "cnn",
    "CNN-LSTM": "cnn-lstm",
    "CNN, the study's": "cnn-fgsm-augment-0.2",
    "CNN-LSTM, the study's": "cnn-lstm-fgsm-augment-0.2",
    "CNN, robust": "cnn-robust",
    "CNN-LSTM, robust": "cnn-lstm-robust",
}
networks = {name: notebook.network(stem) for name, stem in stems.items()}
tested = {name: (network, notebook.log(stems[name])) for name, network in networks.items()}
display(Markdown(tables.cost_table(tested)))

# %% [markdown]
# ## Under examples crafted on the baseline
#
# The study's protocol. Each architecture has a baseline of its own, and so meets examples of its own.

# %%
plotting.networks_compared(report)
plt.show()

# %% [markdown]
# ## Who is ahead?
#
# The difference of the two, with its 95 % interval. Where the interval includes zero, this page claims nothing; it is wider
# than need be, for both saw the same images.

# %%
plotting.difference_of_networks(report)
plt.show()

# %% [markdown]
# Counted over all cells of the tables, with the largest lead in percentage points:

# %%
display(Markdown(tables.ahead_table(report)))

# %% [markdown]
# The baselines' rows among them say how strong the attack is, and not who defends. And under the white-box attack a lead
# means little: FGSM is a single step, and under PGD nothing is left of any of these networks ([cnn.ipynb](cnn.ipynb),
# [rnn.ipynb](rnn.ipynb)).
#
# How far does a figure move if only the seed is another? Three seeds of the CNN, after a short training:

# %%
display(Markdown(tables.spread_table(report)))

# %% [markdown]
# ## Robust networks
#
# The comparison that matters is the one between networks that hold against their own gradient. Accuracy in percent, with
# 95 % intervals:

# %%
robust = {name: network for name, network in networks.items() if "robust" in name}
epsilon = notebook.radius
display(Markdown(tables.attacked_table(robust, notebook.first(500), epsilon, progress=True)))

# %% [markdown]
# The strongest attacks, on more images, are in the report on robustness:

# %%
robustness = notebook.robustness()
if robustness:
    display(Markdown(tables.robustness_table(robustness)))
else:
    print("there is no such report on this data: python robustness.py makes one")

# %% [markdown]
# The two robust networks differ in width as well as in architecture, so this page cannot say which architecture is the more
# robust.
#
# ## Do examples transfer?
#
# FGSM, crafted on the network of the row and shown to the network of the column. On the diagonal it is white-box.

# %%
part = notebook.first(1000)
matrix = transfer_matrix(list(networks.values()), part, epsilon, progress=True)
title = f"FGSM at {plotting.pixels(epsilon)}, first {len(part):,} test images"
plotting.transfer_matrix(matrix, list(networks), title)
plt.show()

# %% [markdown]
# Read a row to see whom a network's examples fool, and a column to see what fools it. A network that looks robust in a
# column, but for its own cell on the diagonal, has been tested by everyone except itself.
#
# ## Do they err on the same images?
#
# Cohen's kappa is 1 if two networks are right on the same images, and 0 if they agree no more often than chance would have
# it. Attacked means that both are shown the examples crafted on the first.

# %%
def right(name, epsilon, source=None):
    return evaluate(networks[name], part, "fgsm", epsilon, source=networks.get(source)).mask


for first, second in (("CNN", "CNN-LSTM"), ("CNN, robust", "CNN-LSTM, robust")):
    for shown, radius in (("clean", 0.0), ("attacked", epsilon)):
        kappa, low, high = agreement(right(first, radius), right(second, radius, source=first))
        print(f"{first} / {second}, {shown}: kappa {kappa:.2f} ({low:.2f} to {high:.2f})")

# %% [markdown]
# Where kappa is well above zero, two architectures on the same data are not two opinions.
#
# ## What remains of the conclusion
#
# That the CNN wins is a statement about a protocol: examples crafted on the baseline, one seed, no intervals. Whether a
# network was trained against its own gradient matters far more than whether a linear layer or an LSTM reads its last map.
