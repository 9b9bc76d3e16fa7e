"""What goes wrong around a run: Ctrl-C, a second run on the same output, a closed pipe, no home, no room to write."""

import ctypes
import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks import fgsm
from tests.helpers.project import QUICK, ROOT
from utils import plotting
from utils.adversarial_sets import adversarial_set
from utils.checkpoints import load_checkpoint, save_checkpoint
from utils.commands import parser
from utils.constants import UserError
from utils.files import beside, locked, make_folder, open_file, read_bytes, write_atomically

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals and locks are those of Unix")


def started(name, *arguments, **options):
    """A script that runs meanwhile; SIGINT reaches it as it would from a terminal."""
    return subprocess.Popen(
        [sys.executable, ROOT / name, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A background job ignores it.
        **{"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler), **options},
    )


# ---- names ----


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("runs/net.safetensors", "runs/net.jsonl"),
        ("net-0.2", "net-0.2.jsonl"),
        ("net-0.2.safetensors", "net-0.2.jsonl"),
        ("net.tar.gz", "net.tar.gz.jsonl"),
        ("out.json", "out.jsonl"),
        ("out-0.3", "out-0.3.jsonl"),
        (".safetensors", ".safetensors.jsonl"),
        ("名前.1", "名前.1.jsonl"),
    ],
)
def test_a_file_beside_another_keeps_what_tells_their_names_apart(path, expected):
    assert beside(path, ".jsonl") == Path(expected)


@given(st.sets(st.from_regex(r"[a-z0-9.-]{1,8}(?<!\.json)\Z"), min_size=2))
@settings(max_examples=50, deadline=None)
def test_outputs_of_different_names_share_no_file(names):
    names -= {".", ".."}
    assert len({beside(name, ".partial.jsonl") for name in names}) == len(names)


# ---- what is written ----


def test_a_file_that_is_replaced_keeps_its_mode(tmp_path):
    path = tmp_path / "a"
    for mode in (0o600, 0o640, 0o444):
        write_atomically(path, b"1")
        path.chmod(mode)
        write_atomically(path, b"2")
        assert stat.S_IMODE(path.stat().st_mode) == mode
    assert path.read_bytes() == b"2"
    write_atomically(tmp_path / "new", b"3", like=path)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o444
    write_atomically(tmp_path / "new", b"4", like=tmp_path / "missing")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o444


def test_a_finished_file_outlasts_a_power_cut(tmp_path, monkeypatch):
    """The file is on the disk before its name is, and the name before the writer says that it is done."""
    calls, replace, sync = [], os.replace, os.fsync
    kinds = {True: "folder", False: "file"}
    monkeypatch.setattr(os, "replace", lambda *names: (calls.append("rename"), replace(*names))[1])
    monkeypatch.setattr(os, "fsync", lambda n: (calls.append(kinds[stat.S_ISDIR(os.fstat(n).st_mode)]), sync(n))[1])
    write_atomically(tmp_path / "a", b"1")
    assert calls == ["file", "rename", "folder"]
    calls.clear()
    make_folder(tmp_path / "b" / "c")
    assert calls == ["folder", "folder"]


@pytest.mark.parametrize("name", ["a.partial.safetensors", "A.PARTIAL.jsonl", ".a.tmp", ".a.lock", ".a.probe"])
def test_names_of_the_projects_own_state_are_refused(name, tmp_path):
    with pytest.raises(UserError, match="are kept for unfinished work"), locked(tmp_path / name):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_is_neither_waited_for_nor_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for action in (open_file, lambda path: read_bytes(path, 10), lambda path: write_atomically(path, b"1")):
        with pytest.raises(OSError, match="it is not a file"):
            action(pipe)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_pipe_that_takes_the_place_of_a_file_is_not_waited_for(tmp_path, monkeypatch):
    pipe, file = tmp_path / "pipe", tmp_path / "file"
    os.mkfifo(pipe)
    file.touch()
    seen = os.stat(file)
    monkeypatch.setattr(os, "stat", lambda path: seen)
    with pytest.raises(OSError, match="it is not a file"):
        open_file(pipe)


def test_a_loop_of_links_is_one_line(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="cannot be written"), locked(tmp_path / "loop" / "a"):
        pass
    with pytest.raises(OSError, match="loop"):
        write_atomically(tmp_path / "loop", b"1")


# ---- two runs on one output ----


def test_second_run_on_an_output_is_refused_and_harms_nothing(script, tmp_path):
    output = tmp_path / "a.safetensors"
    with locked(output):
        for flags in ((), ("--overwrite",), ("--resume",)):
            result = script("train-cnn.py", *QUICK, "--output", output, *flags)
            assert (result.returncode, result.stdout) == (2, "")
            assert result.stderr == (
                f"train-cnn.py: error: {output} is being written by another run: wait until it finishes, or choose "
                "another file\n"
            )
        assert [path.name for path in tmp_path.iterdir()] == [".a.safetensors.lock"]
    assert script("train-cnn.py", *QUICK, "--output", output).returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "a.safetensors"]


def test_second_test_or_study_on_a_report_is_refused(script, trained, tmp_path):
    with locked(tmp_path / "o.json"), locked(tmp_path / "study.json"), locked(tmp_path / "robustness.json"):
        for name, arguments in {
            "test-cnn.py": ("--checkpoint", trained("cnn"), "--json", tmp_path / "o.json"),
            "study": (*QUICK, "--results", tmp_path),
            "study robustness": ("--dataset", "digits", "--results", tmp_path),
        }.items():
            result = script(name, *arguments, cwd=tmp_path)
            assert (result.returncode, result.stderr.count("\n")) == (2, 1)
            assert "is being written by another run" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_lock_of_a_dead_process_does_not_block(tmp_path):
    holds = (
        f"from utils.files import locked\nwith locked({str(tmp_path / 'a')!r}):\n    print(1, flush=True)\n    input()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", holds], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ}, cwd=ROOT
    )
    process.stdout.readline()
    with pytest.raises(UserError, match=r"a is being written by another run"), locked(tmp_path / "a"):
        pass
    process.kill()
    process.communicate(timeout=60)
    with locked(tmp_path / "a"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_lock_can_be_nested(tmp_path):
    with locked(tmp_path / "a"):
        with locked(tmp_path / "a"):
            pass
        assert [path.name for path in tmp_path.iterdir()] == [".a.lock"]
        holds = f"from utils.files import locked\nwith locked({str(tmp_path / 'a')!r}):\n    pass"
        result = subprocess.run([sys.executable, "-c", holds], cwd=ROOT, capture_output=True, text=True)
        assert "is being written by another run" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_second_builder_of_an_adversarial_set_is_refused(trained, digits, tmp_path):
    source = trained("cnn")
    name = f"digits-validation-fgsm-{source.stem}.safetensors"
    holds = f"from utils.files import locked\nwith locked({str(tmp_path / name)!r}):\n    print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", holds], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    ) as process:
        process.stdout.readline()
        with pytest.raises(UserError, match="is being written by another run"):
            adversarial_set(source, digits["validation"], folder=tmp_path)
        process.communicate(b"\n", timeout=60)
    adversarial_set(source, digits["validation"], folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


# ---- odd surroundings ----


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("--help",), (*QUICK, "--epochs", 20, "--output", "a.safetensors")])
def test_closed_pipe_is_no_traceback(arguments, tmp_path):
    """As `| head -1` closes it; what was trained so far is kept."""
    process = started("train-cnn.py", *arguments, cwd=tmp_path)
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(timeout=60) == (0 if arguments == ("--help",) else 141)
    assert errors == ""


@pytest.mark.slow
def test_no_home_and_a_path_that_is_not_ascii(script, tmp_path):
    nowhere = str(ROOT / "README.md" / "home")  # not even root can make that
    environment = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"), nowhere)
    output = tmp_path / "Prüfung ß 检查" / "a.safetensors"
    result = script("train-cnn.py", *QUICK, "--output", output, cwd=tmp_path, **environment)
    assert (result.returncode, result.stderr) == (0, "")
    arguments = ("--checkpoint", output, "--examples", 20, "--figures", output.parent / "figures")
    result = script("test-cnn.py", *arguments, cwd=tmp_path, **environment)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert (output.parent / "figures" / "examples.png").exists()


@pytest.mark.slow
def test_path_that_the_terminal_cannot_show(script, tmp_path):
    output = tmp_path / "prüf.safetensors"
    result = script("train-cnn.py", *QUICK, "--output", output, PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stderr) == (0, "")
    assert "pr\\xfcf.safetensors" in result.stdout
    assert output.exists()


def test_nothing_is_left_of_a_mistake(script, tmp_path):
    """Nor are folders that were made for a report which never came."""
    result = script("test-cnn.py", "--checkpoint", "none.safetensors", "--json", tmp_path / "a" / "b" / "o.json")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert list(tmp_path.iterdir()) == []
    for name in ("n" * 300 + ".safetensors", "n" * 300 + "/a.safetensors"):
        result = script("train-cnn.py", *QUICK, "--output", tmp_path / "a" / name)
        assert (result.returncode, result.stderr.count("\n")) == (2, 1)
        assert "cannot be written" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_attack_that_cannot_follow_the_gradient_is_one_line_of_warning(trained, script, tmp_path):
    network = load_checkpoint(trained("cnn"))
    with torch.no_grad():
        for parameter in network.classifier.parameters():
            parameter *= 1e5
    metadata = {"dataset": "digits", "class_names": list("0123456789")}
    save_checkpoint(tmp_path / "sure.safetensors", network, metadata)
    arguments = ("--checkpoint", tmp_path / "sure.safetensors", "--examples", 60, "--batch-size", 20)
    result = script("test-cnn.py", *arguments, "--attack", "fgsm", "pgd", "--epsilon", 0.1)
    assert result.returncode == 0
    warned = [line for line in result.stderr.splitlines() if "warning" in line]
    assert len(warned) == 2  # one of each attack
    assert all(line.startswith("test-cnn.py: warning: the gradient of the model's loss is zero") for line in warned)


def test_full_disk_leaves_the_earlier_figure(monkeypatch, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "a.png").write_bytes(b"earlier")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*a\.png"):
        plotting.save(plotting.plt.figure(), tmp_path / "a.png")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.png", b"earlier")]


def without_privileges():
    """In a child process: root, too, may then write only where the permissions say so."""
    if os.geteuid() == 0:
        prctl = ctypes.CDLL(None, use_errno=True).prctl
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            if prctl(24, capability, 0, 0, 0):  # PR_CAPBSET_DROP
                raise OSError(ctypes.get_errno(), "a capability cannot be dropped")


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are those of Linux")
def test_read_only_output_is_one_line(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o555)
    process = started("train-cnn.py", *QUICK, "--output", folder / "a.safetensors", preexec_fn=without_privileges)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors.count("\n")) == (2, "", 1)
    assert "a.safetensors cannot be written: Permission denied" in errors


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are those of Linux")
def test_read_only_repository_serves(tmp_path):
    """From another folder, into which everything goes; what would go into the repository is refused in a line."""
    repository, here = tmp_path / "repository", tmp_path / "here"
    here.mkdir()
    repository.mkdir()
    for name in ("attacks", "networks", "defenses", "utils"):
        shutil.copytree(ROOT / name, repository / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train-cnn.py", "test-cnn.py"):
        shutil.copy(ROOT / name, repository)
    before = sorted(repository.rglob("*"))
    for path in (*before, repository):
        path.chmod(0o555 if path.is_dir() else 0o444)

    def run(name, *arguments, cwd=here):
        process = started(repository / name, *arguments, cwd=cwd, preexec_fn=without_privileges)
        return process, *process.communicate(timeout=60)

    process, _, errors = run("train-cnn.py", *QUICK, "--output", "a.safetensors")
    assert (process.returncode, errors) == (0, "")
    process, _, errors = run("test-cnn.py", "--checkpoint", "a.safetensors", "--examples", 20, "--json", "a.json")
    assert (process.returncode, errors) == (0, "")
    process, _, errors = run("train-cnn.py", *QUICK, cwd=repository)
    assert (process.returncode, errors.count("\n")) == (2, 1)
    assert "cannot be written" in errors
    assert sorted(repository.rglob("*")) == before
    assert sorted(path.name for path in here.iterdir()) == ["a.json", "a.jsonl", "a.safetensors"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_output_that_cannot_be_printed_is_one_line(tmp_path):
    with open("/dev/full", "w") as full:
        command = [sys.executable, ROOT / "train-cnn.py", *map(str, QUICK), "--output", "a.safetensors"]
        result = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "No space left on device" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["1", "2"])
def test_closed_streams_do_no_harm(closed, tmp_path):
    command = f'"{sys.executable}" "{ROOT / "train-cnn.py"}" {" ".join(map(str, QUICK))} --output a.safetensors'
    result = subprocess.run(f"{command} {closed}>&-", shell=True, cwd=tmp_path, capture_output=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, b"")
    load_checkpoint(tmp_path / "a.safetensors")


def test_network_that_no_attack_can_follow_is_one_line(capsys):
    """And any other ValueError is a mistake of ours."""
    images, labels = torch.rand(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64)

    def attack():
        fgsm(lambda x: x.flatten(1) * float("nan"), images, labels, epsilon=0.1)

    with pytest.raises(SystemExit) as end:
        parser.run(parser.Parser("test.py", "", []), attack)
    assert end.value.code == 2
    assert capsys.readouterr().err == "test.py: error: the model's logits hold NaN: they classify nothing\n"
    with pytest.raises(ValueError, match="invalid literal"):
        parser.run(parser.Parser("test.py", "", []), lambda: int("a"))
