"""The data and the networks that the notebooks work with, and a function that runs a notebook."""

import argparse
import base64
import io
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from msgspec.structs import replace
from torch import Tensor, nn

from defenses.losses import NFGSM, Defense
from study.formats import RobustnessReport, WholeStudy, read_robustness, read_whole_study
from study.plan import ROBUST, Robust
from study.runner import Study
from utils.allocator import keep_freed_memory
from utils.checkpoints import load_checkpoint
from utils.constants import ARCHITECTURES, RADIUS, ROOT, UserError
from utils.data import Split, load_split, training_batches
from utils.explorer import WIDGET
from utils.files import read_bytes, write_atomically
from utils.plotting import png
from utils.quoting import one_line, printable
from utils.recipes import RECIPES
from utils.runs import Log, read_log
from utils.training import train

LONGEST = 2**28  # bytes of a notebook
LIVE = replace(RECIPES["paper"], batch_size=128)  # of the small trainings: the study's own, but faster


@dataclass(frozen=True)
class Notebook:
    """The data and networks of a notebook.

    Shipped checkpoints and results are in the project's models/ and results/; those of the digits are where
    `make digits` puts them. A file in the working directory comes first. `retrain` writes to runs/.
    """

    dataset: str = "cifar10"
    data_dir: str | None = None  # as for `load_split`
    quick: bool = False  # few images and epochs, and narrow networks, for a look
    retrain: bool = False  # train what could have been loaded

    def __post_init__(self) -> None:
        keep_freed_memory()
        torch.manual_seed(0)
        torch.backends.cudnn.allow_tf32 = False  # as in attacks and evaluation

    # ---- data ----

    @cached_property
    def device(self) -> str:
        """The fastest device of this machine."""
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"

    @cached_property
    def train(self) -> Split:
        """The training images."""
        return self._split("train")

    @cached_property
    def validation(self) -> Split:
        """The validation images."""
        return self._split("validation")

    @cached_property
    def test(self) -> Split:
        """The test images, on the device."""
        return self._split("test").to(self.device)

    def first(self, examples: int) -> Split:
        """The first test images, on the device: `examples` of them, or a tenth of that if the notebook is quick."""
        return self.test.first(max(20, examples // 10) if self.quick else examples)

    def batch(self, examples: int) -> tuple[Tensor, Tensor]:
        """The images of `first` in [0, 1], (N, 3, H, W), and their labels, (N,)."""
        split = self.first(examples)
        return split.take(torch.arange(len(split), device=self.device))

    def few(self, examples: int) -> Split:
        """The first training images, on the device: `examples` of them, or a tenth of that if the notebook is quick."""
        return self.train.first(examples // 10 if self.quick else examples).to(self.device)

    def epoch(self, split: Split) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch: images (N, 3, H, W) in [0, 1], half of them mirrored, and labels (N,).

        The order starts with the same random numbers as that of `trained`, and goes on with each call.
        """
        mirrored = split.dataset != "digits"  # a mirrored digit is not a digit
        return training_batches(split, LIVE.batch_size, self._generator, flip=mirrored, shift=0)

    @property
    def radius(self) -> float:
        """The radius that the robust networks are trained for. 8/255 is too little for digits, bright on black."""
        return RADIUS if self.dataset == "cifar10" else 0.1

    # ---- networks and results ----

    @cached_property
    def models(self) -> Path:
        """The folder with the checkpoints. With `retrain`, the networks that it still lacks are trained first."""
        return self._retrained() if self.retrain else self._shipped("models")

    @cached_property
    def results(self) -> Path:
        """The folder with the reports."""
        return self.models if self.retrain else self._shipped("results")

    def network(self, stem: str) -> nn.Module:
        """The network whose checkpoint has this name, on the device."""
        return load_checkpoint(self._made(self.models / f"{stem}.safetensors"), self.device)

    def log(self, stem: str) -> Log:
        """The log of a network's training."""
        return read_log(self._made(self.models / f"{stem}.jsonl"))

    def study(self) -> WholeStudy:
        """The report of the study."""
        return read_whole_study(self._made(self.results / "study.json"))

    def robustness(self) -> RobustnessReport | None:
        """The report on robustness; None if it has not been made, as for digits."""
        path = self.results / "robustness.json"
        return read_robustness(path) if path.exists() else None

    def trained(
        self, name: str, split: Split, *, epochs: int, width: int = 32, defense: Defense | None = None
    ) -> nn.Module:
        """A network trained now, on these images for so many epochs. name: as for utils.training.train."""
        recipe = replace(LIVE, epochs=epochs)
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "network.safetensors"
            few = self.validation.first(500)
            return train(name, split, few, recipe, output=output, width=width, device=self.device, defense=defense)

    def welcome(self, minutes: int) -> str:
        """The first line of the notebook: the device, the images, and roughly how long everything takes."""
        device = torch.cuda.get_device_name() if self.device == "cuda" else self.device.upper()
        threads = f", {torch.get_num_threads()} threads" if self.device == "cpu" else ""
        images = f"{self.dataset}, {len(self.test):,} test images"
        small = self.quick or self.dataset == "digits"
        lasts = f"about {1 if small else minutes} min on two CPU cores"
        if self.retrain:
            lasts += ", and minutes for the trainings" if small else ", and hours for the trainings"
        return f"{device}{threads}; {images}. All of it takes {lasts}."

    @cached_property
    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(0)

    def _split(self, name: str) -> Split:
        return load_split(self.dataset, name, self.data_dir or os.environ.get("DATA_DIR") or ROOT / "data")

    def _shipped(self, folder: str) -> Path:
        path = Path(folder if self.dataset == "cifar10" else "results/digits")
        return path if path.exists() else ROOT / path

    def _made(self, path: Path) -> Path:
        """The path. Raises UserError if the file is missing: it says how to get it."""
        if not path.exists():
            mended = {
                "cifar10": "it is part of the repository, and `git checkout` brings it back",
                "digits": "`make digits` makes it, in about six minutes",
            }
            raise UserError(f"{path.name} does not exist: {mended[self.dataset]}")
        return path

    def _retrained(self) -> Path:
        """Do the study and train the robust networks as the model card says; skip what is done. Returns the folder."""
        folder = Path("runs/notebooks") / (self.dataset + ("-quick" if self.quick else ""))
        folder.mkdir(parents=True, exist_ok=True)
        Study(
            self.dataset,
            models=folder,
            scratch=folder,
            report=folder / "study.json",
            adversarial=folder / "adversarial",
            data_dir=self.data_dir,
            width=8 if self.quick else 32,
            epochs=1 if self.quick else None,
            device=self.device,
        ).run()
        for architecture in ARCHITECTURES:
            output = folder / f"{architecture}-robust.safetensors"
            if not output.exists():
                self._train_robust(architecture, output)
        return folder

    def _train_robust(self, architecture: str, output: Path) -> None:
        """Train a robust network as the plan says; digits need less."""
        robust = ROBUST[architecture]
        if self.dataset == "digits":  # they are few, and in so few steps only Adam moves a CNN-LSTM away from chance
            robust = Robust(32, replace(RECIPES["paper"], epochs=20), NFGSM(self.radius))
        recipe, width = (replace(robust.recipe, epochs=1), 8) if self.quick else (robust.recipe, robust.width)
        train(
            architecture,
            self.train,
            self.validation,
            recipe,
            output=output,
            width=width,
            device=self.device,
            precision="bfloat16" if self.dataset == "cifar10" else "float32",
            defense=robust.defense,
            resume=True,
        )


def show(figure: Figure, alt: str) -> None:
    """Display a figure with a description for readers who cannot see it, and close it."""
    from IPython.display import Image, display

    display(Image(png(figure, dpi=100), format="png", alt=alt))


def execute(path: Path | str) -> None:
    """Run the notebook and store its outputs in it, pictures well packed, so that the file stays small.

    Raises UserError if the file is not a notebook.
    """
    import nbclient
    import nbformat

    try:
        notebook = nbformat.reads(read_bytes(path, LONGEST).decode(), as_version=4)
    except Exception as error:  # nbformat raises errors of many kinds
        raise UserError(f"{path} is not a notebook: {getattr(error, 'strerror', None) or one_line(error)}") from error
    nbclient.NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(Path(path).parent)}}).execute()
    notebook.metadata.pop("widgets", None)  # they live only while the notebook runs
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when each cell was run
        cell_outputs: list[Any] = cell.get("outputs", [])
        for output in list(cell_outputs):
            data = output.get("data", {})
            if picture := data.get("image/png"):
                data["image/png"] = base64.b64encode(_smaller(base64.b64decode(picture))).decode()
            if data.pop(WIDGET, None) and "image/png" not in data:
                cell_outputs.remove(output)  # a progress bar
    write_atomically(path, (nbformat.writes(notebook) + "\n").encode())


def _smaller(png: bytes) -> bytes:
    """The same picture, which hides nothing behind it, as a smaller PNG if there is one."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(buffer, "png", optimize=True)
    return min(png, buffer.getvalue(), key=len)


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m study.notebooks", description="Run notebooks and store their outputs.")
    parser.add_argument("notebooks", nargs="+")
    try:
        for name in parser.parse_args().notebooks:
            execute(name)
    except UserError as error:  # what a cell raises is shown with the cell
        parser.exit(2, f"{parser.prog}: error: {printable(str(error))}\n")
