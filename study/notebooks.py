"""TODO: study.notebooks."""

import base64
import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from msgspec.structs import replace

from defenses.losses import NFGSM
from study.formats import read_robustness
from study.formats import read_whole_study as read_whole_report
from study.runner import Study
from utils.allocator import keep_freed_memory
from utils.checkpoints import load_checkpoint
from utils.constants import ARCHITECTURES, UserError
from utils.data import load_split
from utils.evaluation import correctly_classified
from utils.explorer import WIDGET
from utils.files import write_atomically
from utils.recipes import RECIPES
from utils.runs import read_log
from utils.training import train


@dataclass(frozen=True)
class Notebook:
    """The data and networks that a notebook works with.

    dataset, data_dir: as for `load_split`. quick: few images and epochs, and narrow networks where trained.
    retrain: train what could have been loaded.
    Shipped checkpoints and results are looked for in models/ and results/, those of digits where `make demo` puts them;
    what a notebook trains itself goes to runs/.
    """

    dataset: str = "cifar10"
    data_dir: str | None = None
    quick: bool = False
    retrain: bool = False

    def __post_init__(self):
        keep_freed_memory()
        torch.manual_seed(0)
        torch.backends.cudnn.allow_tf32 = False  # as in attacks and evaluation

    @cached_property
    def device(self):
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"

    @cached_property
    def train(self):
        return load_split(self.dataset, "train", self.data_dir)

    @cached_property
    def validation(self):
        return load_split(self.dataset, "validation", self.data_dir)

    @cached_property
    def test(self):
        return load_split(self.dataset, "test", self.data_dir).to(self.device)

    @cached_property
    def models(self):
        """The folder with the checkpoints; with `retrain`, they are trained first, or what remains of them."""
        shipped = Path("models" if self.dataset == "cifar10" else "results/demo")
        return self._retrained() if self.retrain else shipped

    @cached_property
    def results(self):
        shipped = Path("results" if self.dataset == "cifar10" else "results/demo")
        return self.models if self.retrain else shipped

    @property
    def radius(self):
        """That the robust networks are trained for: to digits, bright strokes on black, 8/255 would be little."""
        return 8 / 255 if self.dataset == "cifar10" else 0.1

    def study(self):
        """The report of the study: results/study.json, or the demo's."""
        return read_whole_report(self._made(self.results / "study.json"))

    def robustness(self):
        """The report on robustness; None if there is none, as of digits."""
        path = self.results / "robustness.json"
        return read_robustness(path) if path.exists() else None

    def log(self, stem):
        """What the log of a network's training holds: its arguments and then its epochs."""
        return read_log(self._made(self.models / f"{stem}.jsonl"))

    def batch(self, examples):
        """The first test images, so many or fewer as in `first`, in [0, 1], and their labels."""
        split = self.first(examples)
        return split.take(torch.arange(len(split), device=self.device))

    def _retrained(self):
        """As the study and the model card say; what is done already is not done again."""
        folder = Path("runs/notebooks") / (self.dataset + ("-quick" if self.quick else ""))
        folder.mkdir(parents=True, exist_ok=True)
        options = {"data_dir": self.data_dir, "device": self.device, "epochs": 1 if self.quick else None}
        options["width"] = 8 if self.quick else 32
        folders = {"models": folder, "scratch": folder, "adversarial": folder / "adversarial"}
        Study(self.dataset, report=folder / "study.json", **folders, **options).run()
        if self.dataset == "cifar10":
            recipe = replace(RECIPES["one-cycle"].with_defense(), average=0.999, epochs=30)
            widths, precision = (96, 64), "bfloat16"
        else:  # few digits are few steps, in which SGD leaves a defended CNN-LSTM at chance, and Adam does not
            recipe = replace(RECIPES["paper"].with_defense(), epochs=20)
            widths, precision = (32, 32), "float32"
        if self.quick:
            recipe, widths = replace(recipe, epochs=1), (8, 8)
        for name, width in zip(ARCHITECTURES, widths, strict=True):
            output = folder / f"{name}-robust.safetensors"
            if not output.exists():
                options = {"output": output, "device": self.device, "resume": True, "precision": precision}
                options["defense"] = NFGSM(self.radius)
                train(name, self.train, self.validation, recipe, width=width, **options)
        return folder

    def first(self, examples):
        """The first test images: so many, or a tenth of them where it has to be quick."""
        return self.test.first(max(20, examples // 10) if self.quick else examples)

    def network(self, stem):
        """The shipped (of digits: the demo's) network of that name, on the device."""
        return load_checkpoint(self._made(self.models / f"{stem}.safetensors"), self.device)

    def _made(self, path):
        if not path.exists() and self.dataset == "digits":
            raise UserError(f"{path} is not there: make demo makes it, in a few minutes")
        return path

    def trained(self, name, epochs):
        """A network of that name, trained anew for so many epochs on clean images; its checkpoint goes to runs/."""
        epochs = 1 if self.quick else epochs
        output = Path("runs") / f"{name}-{self.dataset}-{epochs}-epochs.safetensors"
        output.parent.mkdir(exist_ok=True)
        recipe = replace(RECIPES["one-cycle"], epochs=epochs, lr=0.05)
        return train(name, self.train, self.validation, recipe, output=output, device=self.device)

    def correct_image(self, network):
        """The first test image that the network classifies correctly, (1, 3, H, W), and its label, (1,)."""
        images, labels = self.test.take(torch.arange(200, device=self.device))
        first = correctly_classified(network, images, labels).nonzero()[0]
        return images[first], labels[first]

    def welcome(self, minutes):
        """What is said first: which device, and about how long all of it takes."""
        device = torch.cuda.get_device_name() if self.device == "cuda" else self.device.upper()
        threads = f", {torch.get_num_threads()} threads" if self.device == "cpu" else ""
        images = f"{self.dataset}, {len(self.test):,} test images"
        small = self.quick or self.dataset == "digits"
        lasts = f"about {1 if small else minutes} min on two CPU cores"
        if self.retrain:
            lasts += ", and minutes for the trainings" if small else ", and hours for the trainings"
        return f"{device}{threads}; {images}. All of it takes {lasts}."


def execute(path):
    """Run the notebook and store its outputs in it, pictures with 256 colours, so that the file stays small."""
    import nbclient
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=None, resources={"metadata": {"path": "."}}).execute()
    notebook.metadata.pop("widgets", None)  # they live only while the notebook runs
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when each cell was run
        for output in list(cell.get("outputs", [])):
            data = output.get("data", {})
            if picture := data.get("image/png"):
                data["image/png"] = base64.b64encode(_fewer_colours(base64.b64decode(picture))).decode()
            if data.pop(WIDGET, None) and "image/png" not in data:
                cell.outputs.remove(output)  # a progress bar
    write_atomically(path, (nbformat.writes(notebook) + "\n").encode())


def _fewer_colours(png):
    from PIL import Image

    buffer = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(
        buffer, "png", optimize=True
    )
    return min(png, buffer.getvalue(), key=len)
