"""Data, training, evaluation, diagnosis, files, plots and the command line, for any image classifier.

    from utils import evaluate, diagnose

The names in `__all__` can be imported from here. torch is imported when one of them is used, and not before, so that
`--help` is answered at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from networks.folding import Normalize
    from utils.diagnosis import diagnose
    from utils.evaluation import evaluate
    from utils.frames import to_frame
    from utils.images import as_split, read_images
    from utils.models import load_model
    from utils.saving import load_images, save_images

__all__ = [
    "Normalize",
    "as_split",
    "diagnose",
    "evaluate",
    "load_images",
    "load_model",
    "read_images",
    "save_images",
    "to_frame",
]

_HOMES = {
    "networks.folding": ("Normalize",),
    "utils.diagnosis": ("diagnose",),
    "utils.evaluation": ("evaluate",),
    "utils.frames": ("to_frame",),
    "utils.images": ("as_split", "read_images"),
    "utils.models": ("load_model",),
    "utils.saving": ("load_images", "save_images"),
}


def __getattr__(name: str) -> Any:
    """Import a name of `__all__` when it is first used."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
