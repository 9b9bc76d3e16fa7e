"""Two processes compute what one process does: trainings, evaluations, files and errors."""

import json
import os
import socket
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from msgspec.structs import replace
from torch import multiprocessing

from defenses.losses import PGD, TRADES
from networks import CNN
from tests.helpers.project import QUICK, ROOT
from utils.checkpoints import load_checkpoint, read_metadata
from utils.data import load_split, tensor_digest
from utils.distributed import average_statistics, from_main, gather, process_group, rank, replicated, seed_noise, share
from utils.evaluation import evaluate, evaluate_fgsm
from utils.notes import Notes
from utils.recipes import RECIPES
from utils.training import cross_entropy, train

pytestmark = pytest.mark.slow

RECIPE = replace(RECIPES["one-cycle"], epochs=2, lr=0.05, batch_size=100)
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # as torchrun sets it: several threads add numbers in another order


def on_two_ranks(function):
    """Call a function of this module, or a partial of one, in each of two processes that form a group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(_as_rank, (port, function), nprocs=2)


def _as_rank(rank, port, function):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with process_group():
        function()


@pytest.fixture
def torchrun():
    """A function that runs a script in two processes and returns the finished torchrun."""

    def run(script, *arguments, cwd=ROOT):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        return subprocess.run(
            [*command, str(ROOT / script), *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, **ONE_THREAD, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


def run(output, examples, name="cnn", recipe=RECIPE, **options):
    training, validation = load_split("digits", "train").first(examples), load_split("digits", "validation")
    return train(name, training, validation, recipe, output=output, width=4, quiet=True, **options)


def test_alone_nothing_is_shared_or_changed():
    batch, network = torch.arange(5), CNN(width=4)
    assert torch.equal(share(batch), batch)
    assert gather("a") == ["a"]
    assert from_main(lambda: "a") == "a"
    assert replicated(network) is network
    with process_group():
        assert rank() == 0


def shares():
    taken = [share(torch.arange(count)).tolist() for count in (1, 2, 5)]
    assert gather(taken) == [[[0], [0], [0, 1, 2]], [[0], [1], [3, 4]]]


def means():
    """Gradients are averaged in a backward pass, after several forward passes too; statistics only when asked."""
    torch.manual_seed(0)
    alone, network = CNN(width=4), CNN(width=4)
    network.load_state_dict(alone.state_dict())
    images, labels = torch.rand(8, 3, 32, 32), torch.arange(8)
    for defense in (PGD(0.1, steps=2), TRADES(0.1, steps=2)):
        model = replicated(network)
        defense(model, images, labels)  # without a backward pass
        for _ in range(2):  # after the first, DistributedDataParallel groups the parameters anew
            network.zero_grad()
            torch.manual_seed(rank())
            defense(model, images + 0.1 * rank(), labels).backward()
        expected = [0] * len(list(network.parameters()))
        for other in range(2):
            torch.manual_seed(other)
            alone.load_state_dict(network.state_dict())
            loss = defense(alone.train(), images + 0.1 * other, labels)
            gradients = torch.autograd.grad(loss, list(alone.parameters()))
            expected = [sum_ + gradient / 2 for sum_, gradient in zip(expected, gradients, strict=True)]
        for parameter, mean in zip(network.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, mean, rtol=1e-3, atol=1e-5)
    norm = network.features[0][2]
    norm.running_mean.fill_(1.0 + 4 * rank())
    average_statistics(network)
    assert (norm.running_mean == 3).all()


def noise():
    torch.manual_seed(3)
    seed_noise(3, epoch=1)
    first = torch.rand(1).item()
    seed_noise(3, epoch=2)
    a, b = gather((first, torch.rand(1).item()))
    assert len({*a, *b}) == 4
    torch.manual_seed(3)
    assert rank() or torch.rand(1).item() == first  # rank 0 draws what it would draw alone


def results_of_rank_0():
    assert from_main(rank) == 0
    with pytest.raises(ZeroDivisionError if rank() == 0 else SystemExit):
        from_main(lambda: 1 / 0)


def exchanges():
    for function in (shares, means, noise, results_of_rank_0):  # one after the other: starting two processes is slow
        function()


def test_what_two_ranks_exchange():
    on_two_ranks(exchanges)


def two_trainings(folder):
    plain = run(folder / "plain.safetensors", 301, "small-cnn")
    recipe = replace(RECIPE, average=0.9)
    averaged = run(folder / "averaged.safetensors", 301, recipe=recipe, defense=noisy)
    digests = gather([tensor_digest(*network.state_dict().values()) for network in (plain, averaged)])
    assert digests[0] == digests[1]


def noisy(model, images, labels):
    """A defence that draws from torch's global generator and calls the model twice."""
    with torch.no_grad():
        model(images)
    return cross_entropy(model, images + 0.1 * torch.rand_like(images), labels)


def test_training_is_that_of_one_process_but_for_rounding(tmp_path):
    """Without batch norm and noise. With them, both ranks hold the same weights. The last batch has one image."""
    on_two_ranks(partial(two_trainings, tmp_path))
    alone = run(tmp_path / "alone.safetensors", 301, "small-cnn")
    shared = load_checkpoint(tmp_path / "plain.safetensors")
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(shared.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)
    one, two = ([json.loads(x) for x in (tmp_path / f"{n}.jsonl").read_text().splitlines()] for n in ("alone", "plain"))
    assert (one[0]["processes"], two[0]["processes"]) == (1, 2)
    assert [entry["loss"] for entry in two[1:]] == pytest.approx([entry["loss"] for entry in one[1:]], rel=1e-3)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}.{ending}" for name in ("alone", "plain", "averaged") for ending in ("jsonl", "safetensors")
    }


def interrupted_and_resumed(folder):
    steps = 0

    def stops(model, images, labels):
        nonlocal steps
        steps += 1
        if steps == 5:
            raise InterruptedError
        return noisy(model, images, labels)

    stops.__name__ = "noisy"
    recipe = replace(RECIPE, average=0.9)
    run(folder / "whole.safetensors", 300, recipe=recipe, defense=noisy)
    with pytest.raises(InterruptedError):
        run(folder / "halves.safetensors", 300, recipe=recipe, defense=stops)
    torch.rand(3)
    run(folder / "halves.safetensors", 300, recipe=recipe, defense=noisy, resume=True)


def test_resumed_run_ends_bit_identical(tmp_path):
    on_two_ranks(partial(interrupted_and_resumed, tmp_path))
    assert (tmp_path / "halves.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


ATTACKS = {
    "fgsm": {},
    "pgd": {"steps": 3, "restarts": 2, "seed": 1},
    "autoattack": {"attacks": ["apgd-ce", "square"], "seed": 1, "queries": 50},
}


def evaluations(checkpoint, notes=None):
    """The results of every attack on five batches; the last batch is smaller."""
    network, split = load_checkpoint(checkpoint), load_split("digits", "test").first(45)
    results = [
        evaluate(network, split, attack, 0.005, options=options, batch_size=10, notes=notes)
        for attack, options in ATTACKS.items()
    ]
    return [
        *(result.mask.tolist() for result in results),
        *(result.correct for result in evaluate_fgsm(network, split, [0.003, 0.01], batch_size=10)),
    ]


def two_evaluations(checkpoint, folder):
    notes = from_main(lambda: Notes(folder / "notes.jsonl"))
    results = evaluations(checkpoint, notes)
    (folder / f"{rank()}.json").write_text(json.dumps(results))
    assert evaluations(checkpoint, notes) == results  # these come from the notes, except those of evaluate_fgsm


def test_every_rank_learns_the_results_of_one_process(trained, tmp_path):
    """Image by image, for every attack, because its random numbers start again in each batch."""
    on_two_ranks(partial(two_evaluations, trained("cnn"), tmp_path))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = evaluations(trained("cnn"))
    torch.set_num_threads(threads)
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [alone] * 2
    assert 0 < sum(alone[1]) < 45
    noted = Notes(tmp_path / "notes.jsonl").rows.values()  # each batch once, in the order of the split
    assert [[hit == "1" for hits, _ in rows for hit in hits] for rows in noted] == alone[: len(ATTACKS)]


def interrupted_evaluation(checkpoint, folder):
    from utils.evaluation import ATTACKS, fgsm

    network, split, calls = load_checkpoint(checkpoint), load_split("digits", "test").first(45), 0

    def counted(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return fgsm(*arguments, **options)

    whole = evaluate(network, split, "fgsm", 0.005, batch_size=10)
    ATTACKS["fgsm"] = counted
    path = folder / f"{rank()}.jsonl"  # rank 1 neither reads nor writes its file
    with pytest.raises(KeyboardInterrupt):
        evaluate(network, split, "fgsm", 0.005, batch_size=10, notes=Notes(path))
    again = evaluate(network, split, "fgsm", 0.005, batch_size=10, notes=Notes(path))
    assert torch.equal(again.mask, whole.mask)
    assert gather(calls) == [4, 3]  # five batches, of which two were noted before

    from_main(lambda: damage(path))
    again = evaluate(network, split, "fgsm", 0.005, batch_size=10, notes=Notes(path))
    assert torch.equal(again.mask, whole.mask)
    assert gather(calls) == [6, 5]  # all batches but the first: two on each rank


def damage(path):
    """The second batch's note loses some of its images."""
    lines = path.read_text().splitlines()
    key, hits, *others = json.loads(lines[1])
    lines[1] = json.dumps([key, hits[:5], *others])
    path.write_text("\n".join(lines) + "\n")


def test_interrupted_evaluation_goes_on_after_its_last_round(trained, tmp_path):
    on_two_ranks(partial(interrupted_evaluation, trained("cnn"), tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["0.jsonl"]


def test_scripts_train_and_test_as_alone(torchrun, script, tmp_path):
    """The accuracy is near that of one process, and the report has the same figures. Only rank 0 writes and prints."""
    training = ("--dataset", "digits", "--epochs", 6, "--width", 8, "--defense", "n-fgsm", "--epsilon", "0.02")
    trained = torchrun("train-cnn.py", *training, "--output", tmp_path / "two.safetensors")
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.count("validation accuracy") == 6
    assert trained.stdout.count("saved") == 1
    assert script("train-cnn.py", *training, "--output", tmp_path / "one.safetensors").returncode == 0
    one, two = (read_metadata(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert two.training == one.training
    assert two.validation_accuracy == pytest.approx(one.validation_accuracy, abs=0.06)
    assert two.choosing_accuracy == pytest.approx(one.choosing_accuracy, abs=0.1)
    again = torchrun("train-cnn.py", *training, "--output", tmp_path / "two.safetensors", "--resume")
    assert again.stdout.count("nothing to resume") == 1

    arguments = ["--checkpoint", tmp_path / "two.safetensors", "--batch-size", 40, "--examples", 90]
    arguments += ["--attack", "fgsm", "pgd", "--epsilon", 0.05, "--figures", tmp_path / "figures"]
    tested = torchrun("test-cnn.py", *arguments, "--json", tmp_path / "two.json")
    assert tested.returncode == 0, tested.stderr
    assert tested.stdout.count("pgd") == 1
    assert script("test-cnn.py", *arguments, "--json", tmp_path / "one.json", **ONE_THREAD).returncode == 0
    reports = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two")]
    for report in reports:
        for attack in report["attacks"]:
            del attack["seconds"]
    assert reports[0] == reports[1]
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".jsonl", ".json", ""}
    assert len(list(tmp_path.iterdir())) == 7


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("train-cnn.py", ["--dataset", "digits", "--output", "README.md/a.safetensors"], "cannot be written"),
        ("test-cnn.py", ["--checkpoint", "none.safetensors"], "no such checkpoint"),
    ],
)
def test_mistake_is_one_line_of_one_rank(name, arguments, message, torchrun):
    result = torchrun(name, *arguments)
    assert result.returncode != 0
    assert result.stdout == ""
    (line,) = (line for line in result.stderr.splitlines() if line.startswith(name))
    assert message in line
    assert "utils/commands/" not in result.stderr  # torchrun prints its own traceback, and no rank prints another


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("train-cnn.py", ["--epochs", "0"], "--epochs"),
        ("study", ["--dataset", "digits"], "torchrun is for train-*.py and test-*.py"),
    ],
)
def test_wrong_flag_is_one_line_of_rank_0(name, arguments, message, rank, script):
    set_by_torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    result = script(name, *arguments, **set_by_torchrun)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == (rank == "0")
    assert (message in result.stderr) == (rank == "0")


FAILS = """
from functools import partial
from utils.commands.parser import Parser, run
from utils.constants import UserError
from utils.distributed import process_group, rank
from utils.recipes import RECIPES
from utils.data import load_split
from utils.training import cross_entropy, train

def defense(model, images, labels):
    if rank() == 1:
        raise UserError("its machine is on fire")
    return cross_entropy(model, images, labels)

def command():
    with process_group():
        splits = load_split("digits", "train"), load_split("digits", "validation")
        train("cnn", *splits, RECIPES["paper"], output="a.safetensors", width=4, defense=defense)

run(Parser("fails.py", "", []), command)
"""


def test_rank_that_fails_alone_ends_the_run(torchrun, tmp_path):
    (tmp_path / "fails.py").write_text(FAILS)
    start = time.monotonic()
    result = torchrun(tmp_path / "fails.py", cwd=tmp_path)
    assert result.returncode != 0
    assert "fails.py, rank 1: error: its machine is on fire" in result.stderr
    assert time.monotonic() - start < 60
    assert {path.name for path in tmp_path.iterdir()} <= {"fails.py", ".a.safetensors.lock"}  # torchrun kills rank 0


def test_full_disk_on_rank_0_ends_every_rank(torchrun, tmp_path):
    """Only rank 0 meets the error; the other rank ends where it would have waited for rank 0."""
    output = tmp_path / "a.safetensors"
    (tmp_path / "limited.py").write_text(
        "import resource, runpy, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        f"sys.argv[0] = {str(ROOT / 'train-cnn.py')!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    result = torchrun(tmp_path / "limited.py", *QUICK, "--output", output, "--quiet")
    assert result.returncode != 0
    assert result.stderr.count("train-cnn.py: error:") == 1
    assert "File too large" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["limited.py"]
