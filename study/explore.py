"""The explorer as a page of its own: `python -m study.explore` serves it with Voilà, to this machine only."""

import utils.commands.interrupts  # noqa: F401, because it comes first

# isort: split
import contextlib
import os
import subprocess
import sys

from study.notebooks import Notebook
from utils.constants import ROOT, UserError
from utils.explorer import Explorer
from utils.tables import bold

NETWORKS = {"baseline": "cnn", "study's defence": "cnn-fgsm-augment-0.2", "ours": "cnn-robust"}
LARGEST_MESSAGE = 2**28  # bytes that the page sends at once; a picture above utils.images.LARGEST_UPLOAD is refused
FOLDER = "EXPLORE_FOLDER"  # the environment variable with the folder in which the page was started


def explorer(notebook: Notebook) -> Explorer:
    """The explorer with three networks: without a defence, with the study's, and with ours."""
    networks = {name: notebook.network(stem) for name, stem in NETWORKS.items()}
    return Explorer(notebook.test, networks, largest=round(2 * 255 * notebook.radius), start=1)


def page() -> None:
    """Show the page. Voilà runs this file in a kernel for each visitor. DATASET chooses cifar10 (default) or digits."""
    from IPython.display import Markdown, display

    os.chdir(os.environ.get(FOLDER, "."))
    display(Markdown("# One picture, three networks\n\nMove a slider, or upload a picture of your own."))
    try:
        display(explorer(Notebook(os.environ.get("DATASET", "cifar10"))).box)
    except UserError as error:
        display(Markdown(bold(str(error))))


def serve() -> None:
    """Serve the page until Ctrl-C. Voilà prints its address. Further arguments go to Voilà, such as --port=8000.

    Ends with Voilà's status: where Voilà cannot start, it says why.
    """
    command = [sys.executable, "-m", "voila", __file__, "--no-browser", "--Voila.ip=127.0.0.1"]
    command += ["--VoilaConfiguration.extension_language_mapping={'.py': 'python'}"]
    # A message above the limit would end the connection, and the page would freeze without a word.
    if not any(argument.startswith("--Voila.tornado_settings") for argument in sys.argv):
        command += [f"--Voila.tornado_settings={{'websocket_max_message_size': {LARGEST_MESSAGE}}}"]
    command += sys.argv[1:]
    with contextlib.suppress(KeyboardInterrupt):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), FOLDER: os.getcwd()}
        sys.exit(subprocess.run(command, env=environment, check=False).returncode)


if __name__ == "__main__":
    if "ipykernel" in sys.modules:
        page()
    else:
        serve()
