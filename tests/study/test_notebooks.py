"""The notebooks: they run from top to bottom, and what is stored in them is in order."""

import ast
import contextlib
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import papermill
import pytest
from PIL import Image

from study import notebooks, tables
from study.formats import read_robustness, read_whole_study
from study.notebooks import Notebook
from tests.helpers.project import QUICK, ROOT
from utils import plotting
from utils.constants import UserError
from utils.explorer import WIDGET

pytestmark = pytest.mark.slow

NAMES = ("main", "cnn", "rnn", "analysis")
PROJECT = ("attacks", "networks", "defenses", "utils", "study")

# What each notebook teaches, by the name that it defines, and the most lines that it may take.
TAUGHT = {
    "main": {"my_fgsm": 4, "my_pgd": 11},
    "cnn": {"MyCNN": 16, "train": 11, "transfer_and_white_box": 11, "n_fgsm": 6},
    "rnn": {"MyCNNLSTM": 12},
}


def stored(name: str) -> nbformat.NotebookNode:
    """The notebook as it is in the repository."""
    return nbformat.read(ROOT / f"{name}.ipynb", as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(notebook: nbformat.NotebookNode) -> str:
    """All text of the outputs."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return "\n".join(
        output.get("text", "") + "".join(v for k, v in output.get("data", {}).items() if k.startswith("text/"))
        for output in outputs
    )


# ---- as they are stored ----


@pytest.mark.parametrize("name", NAMES)
def test_stored_outputs_are_in_order_and_complete(name):
    notebook = stored(name)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert all(output.output_type != "error" for output in cell.outputs)
        assert all(output.get("name") != "stderr" for output in cell.outputs), "a warning"
        pictures = [output for output in cell.outputs if "image/png" in output.get("data", {})]
        assert bool(pictures) == bool(re.search(r"\b(show|explorer)\(", cell.source)), cell.source
        assert all(len(picture.metadata["image/png"]["alt"]) > 40 for picture in pictures), "no description"
        if "print(" in cell.source or "display(" in cell.source:
            assert cell.outputs, cell.source
        assert not any(WIDGET in output.get("data", {}) for output in cell.outputs), "a progress bar or a dead widget"
    assert (ROOT / f"{name}.ipynb").stat().st_size < 1.5 * 2**20
    written = text_of(notebook) + "".join(cell.source for cell in notebook.cells)
    assert not re.search(r"/(home|root|tmp|work|usr|Users)/", written)
    assert str(ROOT) not in written


def code_lines(cell: nbformat.NotebookNode) -> dict[int, list[str]]:
    """The lines of a cell that hold code, by number: the words of each."""
    lines: dict[int, list[str]] = {}
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(cell.source).readline):
        if token.type not in skipped:
            for number in range(token.start[0], token.end[0] + 1):
                lines.setdefault(number, []).append(token.string)
    return lines


def imported_from_the_project(notebook: nbformat.NotebookNode) -> set[str]:
    nodes = [node for cell in code_cells(notebook) for node in ast.walk(ast.parse(cell.source))]
    imports = [n for n in nodes if isinstance(n, ast.ImportFrom) and (n.module or "").split(".")[0] in PROJECT]
    return {"notebook", "digits", *(alias.asname or alias.name for node in imports for alias in node.names)}


@pytest.mark.parametrize("name", TAUGHT)
def test_a_third_of_the_code_is_pytorch_that_teaches(name):
    """A line counts if its cell is tagged and uses PyTorch, and if it neither prints nor uses this project."""
    notebook = stored(name)
    helpers = imported_from_the_project(notebook)
    total = teaching = 0
    for cell in code_cells(notebook):
        lines = code_lines(cell)
        total += len(lines)
        if "teaches" in cell.metadata.get("tags", []):
            assert {"torch", "nn", "F"} & {word for words in lines.values() for word in words}, cell.source
            teaching += sum(words[0] != "print" and not helpers & set(words) for words in lines.values())
    assert teaching >= total / 3, f"{teaching} of {total} lines"


@pytest.mark.parametrize(("name", "taught", "most"), [(n, t, most) for n in TAUGHT for t, most in TAUGHT[n].items()])
def test_what_is_taught_is_short_and_is_compared_with_the_library(name, taught, most):
    cells = code_cells(stored(name))
    (place,) = (i for i, c in enumerate(cells) if re.search(rf"^(def|class) {taught}\(", c.source, re.MULTILINE))
    assert "teaches" in cells[place].metadata.tags
    (node,) = (node for node in ast.parse(cells[place].source).body if getattr(node, "name", "") == taught)
    assert sum(node.lineno <= number <= node.end_lineno for number in code_lines(cells[place])) <= most
    check = next(cell.source for cell in cells[place + 1 :] if taught in cell.source)
    assert "assert " in check
    assert "teaches" not in check


@pytest.mark.parametrize("name", NAMES)
def test_set_up_and_rhythm(name):
    notebook = stored(name)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    for assignment in ('dataset = "cifar10"', "data_dir = None", "quick = False", "retrain = False"):
        assert assignment in parameters.source
    assert "git clone" not in "".join(cell.source for cell in notebook.cells)  # it runs in a clone, and fetches no code
    for cell in code_cells(notebook):
        assert cell.source.count("\n") < 25
        described = re.sub(r"^ *alt=.*$", "", cell.source, flags=re.MULTILINE)  # whose width no page needs
        assert max(map(len, described.splitlines())) <= 105
    answers = "".join(cell.source for cell in notebook.cells[-1:])
    assert answers.count("<details><summary>Answer</summary>") == answers.count("</details>") >= 2


def test_headline_numbers_are_those_of_the_results():
    study = read_whole_study(ROOT / "results" / "study.json")
    for name, architecture in (("cnn", "cnn"), ("rnn", "cnn-lstm")):
        text = text_of(stored(name))
        baseline, *_ = study.entries_of("study", architecture)
        assert f"10,000 test images: {baseline.transfer[0].accuracy:.2%} correct" in text
        assert tables.transfer_table(study, architecture) in text
    robustness, text = read_robustness(ROOT / "results" / "robustness.json"), text_of(stored("analysis"))
    for table in (tables.robustness_table(robustness), tables.conclusion_table(study, robustness)):
        assert table in text
    for table in (tables.ahead_table(study), tables.spread_table(study)):
        assert table in text


def test_stored_pictures_keep_their_colours():
    figure, axes = plt.subplots(figsize=(4, 3))
    axes.imshow(np.random.default_rng(0).random((32, 32, 3)))  # more than 256 colours
    png = plotting.png(figure, dpi=100)
    packed = notebooks._smaller(png)
    assert len(packed) <= len(png)
    before, after = (np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in (png, packed))
    assert (before == after).all()


# ---- as they run ----


def execute(name: str, folder: Path, **parameters: object) -> nbformat.NotebookNode:
    """Run the notebook, and the answers to its exercises after it, in that folder and return it."""
    output = folder / f"{name}-run.ipynb"
    notebook = stored(name)
    answers = re.findall(r"^```python\n(.*?)^```", notebook.cells[-1].source, re.MULTILINE | re.DOTALL)
    notebook.cells += [nbformat.v4.new_code_cell(answer) for answer in answers]
    nbformat.write(notebook, output)
    environment = {"PYTHONPATH": str(ROOT), "DATA_DIR": os.environ.get("DATA_DIR", ""), "MPLBACKEND": ""}
    with pytest.MonkeyPatch.context() as patch:
        for key, value in environment.items():
            patch.setenv(key, value) if value else patch.delenv(key, raising=False)
        papermill.execute_notebook(
            output,
            output,
            parameters={"quick": True, **parameters},
            cwd=folder,
            kernel_name="python3",
            progress_bar=False,
            execution_timeout=300,
        )
    return nbformat.read(output, as_version=4)


def assert_ran(notebook: nbformat.NotebookNode, *, expected: str = "a line that is never printed") -> None:
    """Every cell ran without an error or a warning, except those that hold `expected`, and there are pictures."""
    assert all(cell.execution_count for cell in code_cells(notebook))
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert all(output.output_type != "error" for output in outputs)
    errors = [output["text"] for output in outputs if output.get("name") == "stderr"]
    assert [text for text in errors if expected not in text] == []
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3


@pytest.fixture(scope="session")
def made(quick_study, script, tmp_path_factory):
    """A folder with the study on digits and the two robust networks, all quick."""
    folder = tmp_path_factory.mktemp("made") / "digits"
    shutil.copytree(quick_study, folder)
    for name in ("cnn", "cnn-lstm"):
        output = f"results/digits/{name}-robust.safetensors"
        defense = ("--defense", "n-fgsm", "--epsilon", 0.1, "--quiet", "--output", output)
        result = script(f"train-{name}.py", *QUICK, *defense, cwd=folder)
        assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_runs_on_digits(name, made):
    """`make notebooks` runs them on CIFAR-10, and the tests above read what it stores."""
    # A network that learnt for one epoch may be flat on an image, which is worth a warning.
    assert_ran(execute(name, made, dataset="digits"), expected="zero in every pixel")


def test_retrain_trains(tmp_path):
    notebook = execute("cnn", tmp_path, dataset="digits", retrain=True)
    # A network that learnt digits for one epoch may be flat on an image, which is worth a warning.
    assert_ran(notebook, expected="zero in every pixel")
    folder = tmp_path / "runs" / "notebooks" / "digits-quick"
    assert {"cnn.safetensors", "cnn-robust.safetensors", "study.json"} <= {path.name for path in folder.iterdir()}
    assert not (tmp_path / "results").exists()


def test_a_missing_file_is_named_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    for dataset, remedy in (("cifar10", "git checkout"), ("digits", "make digits")):
        for missing in (lambda notebook: notebook.network("cnn"), lambda notebook: notebook.study()):
            with pytest.raises(UserError, match=f"does not exist: .*{remedy}") as caught:
                missing(Notebook(dataset))
            assert caught.value._render_traceback_() == [f"UserError: {caught.value}"]  # a notebook shows no more
            assert str(tmp_path) not in str(caught.value)


# ---- in a browser ----

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine's PATH")


@contextlib.contextmanager
def in_browser(command: list[str], path: str, folder: Path, log: Path, **environment: str) -> Iterator[Any]:
    """A page of Chromium that shows what a server shows at this path. {port} in the command is a free port."""
    sync_api = pytest.importorskip("playwright.sync_api")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(log.parent), **environment}
    command = [sys.executable, "-m", *(part.format(port=port) for part in command)]
    with open(log, "w") as file:
        server = subprocess.Popen(
            command, env=environment, stdout=file, stderr=file, cwd=folder, start_new_session=True
        )
    try:
        for _ in range(240):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5):
                break
            assert server.poll() is None, log.read_text()
            time.sleep(0.5)
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1060, "height": 1000})
            page.goto(f"http://127.0.0.1:{port}{path}", timeout=240_000)
            yield page
            browser.close()
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def upload(page: Any, content: bytes) -> None:
    """Give the explorer a file."""
    with page.expect_file_chooser() as chooser:
        page.locator(".widget-upload").click()
    chooser.value.set_files([{"name": "mine.png", "mimeType": "image/png", "buffer": content}])


def use_the_explorer(page: Any) -> None:
    """Move the slider, upload a picture and then something else, and see the rows change."""
    first = page.locator("figure img").nth(2)
    first.wait_for(state="attached", timeout=240_000)
    first.scroll_into_view_if_needed()

    def changes(act: Callable[[], None]) -> None:
        before = page.locator(".widget-html").all_inner_texts()
        act()
        page.wait_for_function(
            "old => [...document.querySelectorAll('.widget-html')].slice(1).every((row, i) => row.innerText != old[i])",
            arg=before[1:],
            timeout=60_000,
        )

    handle = page.locator(".widget-slider .noUi-handle").first
    handle.click()
    changes(lambda: page.keyboard.press("ArrowRight"))
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 60, 3), dtype=np.uint8)).save(file, "png")
    changes(lambda: upload(page, file.getvalue()))
    page.get_by_text("Your picture, as the networks see it: 32 × 32 pixels").wait_for(timeout=60_000)
    upload(page, b"not a picture")
    page.get_by_text("the picture cannot be read as a picture").wait_for(timeout=60_000)
    upload(page, bytes(9 << 20))
    page.get_by_text("the picture has 9.0 MiB: choose one of at most 8 MiB").wait_for(timeout=60_000)


@needs_chromium
def test_explorer_in_a_browser(made, tmp_path):
    """JupyterLab on loopback: run all cells of main.ipynb, and use the explorer."""
    notebook = stored("main")
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = 'dataset, data_dir, quick, retrain = "digits", None, True, False'
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, made / "main.ipynb")
    # All cells are to be in the page, not only those in view.
    settings = tmp_path / "settings" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"windowingMode": "none"}', encoding="utf-8")
    command = ["jupyterlab", "--ServerApp.port={port}", "--ServerApp.ip=127.0.0.1", "--IdentityProvider.token="]
    command += ["--no-browser", "--allow-root", "--LabApp.expose_app_in_browser=True", f"--ServerApp.root_dir={made}"]
    folders = {"JUPYTER_CONFIG_DIR": str(tmp_path), "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings")}
    with in_browser(command, "/lab/tree/main.ipynb", made, tmp_path / "lab.log", **folders) as page:
        page.locator(".jp-Notebook").wait_for(timeout=120_000)
        page.get_by_text("| Idle").wait_for(timeout=120_000)  # the status bar: the kernel is connected
        page.evaluate("() => { jupyterapp.commands.execute('notebook:run-all-cells') }")
        use_the_explorer(page)
        assert not page.locator("[data-mime-type='application/vnd.jupyter.stderr']").count()


@needs_chromium
def test_explorer_without_a_notebook_in_a_browser(cifar10_dir, tmp_path):
    """`python -m study.explore` from any folder: it says its address, listens on loopback only, and works."""
    log, folder = tmp_path / "voila.log", tmp_path / "elsewhere"
    folder.mkdir()
    with in_browser(["study.explore", "--port={port}"], "/", folder, log, DATA_DIR=str(cifar10_dir)) as page:
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        use_the_explorer(page)
        upload(page, bytes(30 << 20))
        page.get_by_text("the picture has 30.0 MiB: choose one of at most 8 MiB").wait_for(timeout=60_000)
        port = page.url.split(":")[2].strip("/")
        assert f"http://127.0.0.1:{port}" in log.read_text()
        with pytest.raises(OSError, match=r"refused|unreachable|timed out|assign"):
            socket.create_connection(("127.0.0.2", int(port)), 5).close()  # it listens on 127.0.0.1 and not on 0.0.0.0
        assert all("127.0.0.1" in url or url.startswith(("data:", "blob:")) for url in asked)
        if file := os.environ.get("SCREENSHOT"):
            page.get_by_label("image").select_option(index=1)
            page.wait_for_timeout(3000)
            page.screenshot(path=Path(file))


@pytest.mark.parametrize("content", [b"[]", b"null", b"\xff", b"{}", b'{"cells": 1, "nbformat": 4}', None])
def test_what_is_not_a_notebook_is_refused_in_one_line(content, tmp_path):
    path = tmp_path / "a.ipynb"
    os.mkfifo(path) if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.ipynb is not a notebook") as error:
        notebooks.execute(path)
    assert "\n" not in str(error.value)


def test_the_command_runs_what_it_is_given(tmp_path):
    (tmp_path / "a.ipynb").write_text("{")
    command = [sys.executable, "-m", "study.notebooks", tmp_path / "a.ipynb"]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert refused.returncode == 2
    assert "error: " in refused.stderr
    assert refused.stderr.count("\n") == 1
