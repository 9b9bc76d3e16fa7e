# %% [markdown]
# # CNN or CNN-LSTM?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/robust-networks/robust-networks/blob/main/analysis.ipynb)
#
# The study concludes that the CNN is the better of the two: more accurate, more robust, and faster to train. Here are both
# side by side, with the intervals that such a sentence needs: what they cost, how they do under attack, whether they fall to
# the same examples, and whether they err on the same images.
#
# Nothing is trained on this page. It reads `results/*.json` and the shipped checkpoints, and takes about two minutes on two
# CPU cores.

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
from sklearn.metrics import cohen_kappa_score

from attacks import fgsm
from utils import plotting, tables
from utils.evaluation import evaluate_fgsm, multiply_adds, predictions
from utils.notebooks import Notebook

notebook = Notebook(dataset, data_dir, quick, retrain)
print(notebook.welcome(minutes=2))
report = notebook.study()

# %% [markdown]
# ## What they cost
#
# At the same width the LSTM adds half as many parameters again, and few multiplications, but its sixteen steps have to wait
# for one another. Training times are those of the shipped baselines, on two CPU cores.

# %%
rows = []
for entry in tables.part(report, "study"):
    if entry["training_epsilon"] is None:
        network = notebook.network(entry["name"])
        parameters = sum(parameter.numel() for parameter in network.parameters())
        minutes = entry["training_seconds"] / 60
        clean = tables.with_interval(entry["transfer"][0])
        name = tables.TITLES[entry["network"]]
        rows.append([name, f"{parameters:,}", f"{multiply_adds(network):,}", f"{minutes:.1f}", clean])
header = ["network", "parameters", "multiply-adds an image", "training, minutes", "clean accuracy, %"]
display(Markdown(tables.markdown(header, rows)))

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
# The difference of the two, with its 95 % interval. Where the interval includes zero, the test images cannot tell the two
# apart. It covers the test images alone: from seed to seed a clean accuracy moves by about a point besides, and some of the
# attacked ones by much more ([README](README.md)).

# %%
plotting.difference_of_networks(report)
plt.show()

# %%
for setting in ("transfer", "white_box"):
    counts = tables.cells_ahead(report, setting)
    ahead = ", ".join(f"{name} {count}" for name, count in counts.items())
    print(f"{setting.replace('_', '-')}, cells ahead: {ahead}")

# %% [markdown]
# So the study's conclusion holds where the CNN's points lie above the line, and there alone. On clean images the two are
# within a point or two of each other. Under transferred examples it depends on the radius, and each faces examples of
# another baseline, so that the comparison is not quite one of like with like. White-box, all of these networks are lost, and
# which of them keeps a few per cent more is no virtue.
#
# ## Robust networks
#
# The comparison that matters is the one between networks that hold:

# %%
robustness = notebook.robustness()
if robustness:
    display(Markdown(tables.robustness_table(robustness)))
else:
    print("results/robustness.json is of CIFAR-10")

# %% [markdown]
# ## Do examples transfer?
#
# FGSM, crafted on the network of the row and shown to the network of the column. On the diagonal it is white-box.

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
part, epsilon = notebook.first(1000), notebook.radius
matrix = [
    [evaluate_fgsm(shown, part, [epsilon], source=source)[1] for shown in networks.values()]
    for source in networks.values()
]

# %%
title = f"FGSM at {plotting.pixels(epsilon)}, first {len(part):,} test images"
plotting.transfer_matrix(matrix, list(networks), title)
plt.show()

# %% [markdown]
# Examples transfer, but never as well as they do white-box: what is crafted on one baseline costs the other more than half of
# its accuracy. The study's networks withstand what either baseline makes, fall to each other, and are lost to themselves. The
# robust ones hardly mind what any of these four makes; they give way to their own examples and nearly as much to each
# other's, which are also the strongest against the study's networks, after those networks' own and each other's.
#
# ## Do they err on the same images?
#
# Cohen's kappa is 1 if two networks are right and wrong on the same images, and 0 if no more often than chance would have it.

# %%
images, labels = notebook.batch(1000)
for first, second in (("CNN", "CNN-LSTM"), ("CNN, robust", "CNN-LSTM, robust")):
    for name, source in (("clean", None), ("attacked", first)):
        shown = images if source is None else fgsm(networks[source], images, labels, epsilon=epsilon)
        right = [predictions(networks[n], shown).eq(labels).cpu() for n in (first, second)]
        both_wrong = (~right[0] & ~right[1]).sum().item()
        kappa = cohen_kappa_score(*right)
        print(f"{first + ' / ' + second:32} {name:9} both wrong: {both_wrong:4}   kappa {kappa:5.2f}")

# %% [markdown]
# (Attacked: both are shown the examples crafted on the first.) They share more of their errors than chance would have it:
# two architectures on the same data are not two opinions.
#
# ## What remains of the conclusion
#
# "The CNN wins" is a sentence about a protocol: examples crafted on the baseline, one seed, no intervals. Between networks
# that hold against their own gradient the architectures are close, and the choice between a defence and none matters far more
# than the choice between a linear layer and an LSTM.
