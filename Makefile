# `make` lists the targets. PYTHON chooses the interpreter of the environment, DATA_DIR the folder with CIFAR-10.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

.PHONY: help demo digits notebooks explore study defenses overfitting robustness diagnosis strong bfloat16 agreement benchmark benchmark-quick benchmark-gpu robust-gpu test test-all coverage torture mutants zoo lint types audit format figures constraints clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "%-15s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/installed  ## the study's story in two minutes, on scikit-learn's digits: a table and a picture
	$(RUN) -m study demo

digits: $(VENV)/installed  ## the whole study on scikit-learn's digits, and two robust networks: six minutes
	$(RUN) -m study --dataset digits
	for name in cnn cnn-lstm; do \
	  $(RUN) train-$$name.py --dataset digits --defense n-fgsm --epsilon 0.1 --recipe paper --epochs 20 --quiet \
	    --resume --output results/digits/$$name-robust.safetensors || exit; done

notebooks: $(VENV)/installed  ## run the four notebooks from top to bottom and store their outputs
	$(RUN) -m study.notebooks main.ipynb cnn.ipynb rnn.ipynb analysis.ipynb

explore: $(VENV)/installed  ## serve the explorer to your browser: attack pictures of your own (DATASET=digits: digits)
	$(RUN) -m study.explore

study: $(VENV)/installed  ## the whole study on CIFAR-10, or the rest of it: hours on two cores
	$(RUN) -m study

defenses: $(VENV)/installed  ## train the CNN with each of four defences: seven to twelve minutes each on two cores
	for run in "fgsm 20 0.999" "n-fgsm 15 0.999" "pgd 4 0.99" "trades 3 0.99"; do set -- $$run; \
	  $(RUN) train-cnn.py --defense $$1 --epochs $$2 --average $$3 --precision bfloat16 \
	    --output runs/defenses/$$1.safetensors --resume || exit; done
	mkdir -p results/defenses && cp runs/defenses/*.jsonl results/defenses/

overfitting: $(VENV)/installed  ## show FGSM's catastrophic overfitting, and N-FGSM with the same settings
	for run in "fgsm 12 32" "fgsm 12 64" "fgsm 16 32" "fgsm 16 64" "n-fgsm 16 32"; do set -- $$run; \
	  $(RUN) train-cnn.py --defense $$1 --epsilon $$2/255 --width $$3 --epochs 8 --precision bfloat16 \
	    --output runs/overfitting/$$1-$$2-$$3.safetensors --resume || exit; done
	mkdir -p results/overfitting && cp runs/overfitting/*.jsonl results/overfitting/

robustness: $(VENV)/installed  ## test eight networks under every attack, or the rest of the tests: 21 hours of one core
	$(RUN) -m study robustness

diagnosis: $(VENV)/installed  ## check whether the figures of six networks can be trusted
	for name in cnn cnn-lstm; do for defense in "" -fgsm-augment-0.2 -robust; do \
	  $(RUN) test-$$name.py --checkpoint models/$$name$$defense.safetensors --attack fgsm --epsilon 8/255 \
	    --examples 500 --diagnose --json results/diagnosis/$$name$$defense.json || exit; done; done

strong: FLAGS = --attack strong --per-image  ## a robust figure in minutes: the attack `strong` on 1,000 images, beside AutoAttack's figure
bfloat16: FLAGS = --attack pgd --precision bfloat16  ## PGD-20 with gradients in bfloat16, on 1,000 images of both robust networks
strong bfloat16: $(VENV)/installed
	for name in cnn cnn-lstm; do \
	  $(RUN) test-$$name.py --checkpoint models/$$name-robust.safetensors --epsilon 8/255 --examples 1000 $(FLAGS) \
	    --json results/$@/$$name-robust.json || exit; done

agreement: .venv-peers/installed  ## compare our attacks with torchattacks', in a separate environment
	.venv-peers/bin/python -m benchmarks.agreement

benchmark: .venv-peers/installed  ## compare our speed with that of other libraries: half an hour on two cores
	.venv-peers/bin/python -m benchmarks.run

benchmark-quick: .venv-peers/installed  ## one round of the attacks and the training alone: five minutes on two cores
	rm -rf runs/benchmark-quick  # a report of older versions could not be continued
	.venv-peers/bin/python -m benchmarks.run --rounds 1 --results runs/benchmark-quick startup attacks training

benchmark-gpu: .venv-peers/installed  ## the same on an NVIDIA GPU
	.venv-peers/bin/python -m benchmarks.run --device cuda --results results/gpu attacks training time-to-accuracy

robust-gpu: $(VENV)/installed  ## train two robust networks and test them, on an NVIDIA GPU
	$(RUN) -m benchmarks.robust_gpu

.venv-peers/installed: benchmarks/requirements.txt requirements.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --disable-pip-version-check -r benchmarks/requirements.txt
	@touch $@

test: $(VENV)/installed-dev  ## run all tests except the slow ones, on CIFAR-10 too if DATA_DIR or data/ holds it
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist worksteal -m "not slow"

test-all: $(VENV)/installed-dev  ## run all tests: kills, notebooks, benchmarks, several processes, shipped figures
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist worksteal

coverage: $(VENV)/installed-dev  ## run all tests, and list the lines that none of them reaches
	rm -f .coverage .coverage.*
	OMP_NUM_THREADS=1 COVERAGE_FILE=$(CURDIR)/.coverage $(RUN) -m coverage run -m pytest -n auto --dist worksteal --durations 30
	$(RUN) -m coverage combine --quiet
	$(RUN) -m coverage report --show-missing --skip-covered
	$(RUN) -m coverage json --quiet -o .coverage.json
	$(RUN) -m tests.helpers.floors .coverage.json

torture: $(VENV)/installed-dev  ## interrupt, starve and deceive many runs, count what is lost: half an hour on two cores
	$(RUN) -m tests.helpers.torture

mutants: $(VENV)/installed-dev  ## change the code in forty small ways, show what no test notices: twenty minutes
	$(RUN) -m tests.helpers.mutants

zoo: $(VENV)/installed-dev  ## diagnose 33 broken defences and all honest networks on CIFAR-10: 45 minutes on two cores
	$(RUN) -m tests.helpers.zoo

lint: $(VENV)/installed-dev  ## check the style of the code and the direction of its imports
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/lint-imports --no-logo --no-cache

types: $(VENV)/installed-dev  ## check the types
	$(RUN) -m mypy

audit: $(VENV)/installed-dev  ## look up known vulnerabilities of the pinned versions (SECURITY.md explains the findings)
	$(RUN) -m pip_audit --requirement constraints.txt --no-deps --disable-pip

format: $(VENV)/installed-dev  ## format the code and mend what ruff can mend
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

figures: $(VENV)/installed  ## draw the README's pictures again from the shipped checkpoints, on CIFAR-10
	$(RUN) test-cnn.py --json results/cnn.json --figures results/cnn
	$(RUN) test-cnn-lstm.py --json results/cnn-lstm.json --figures results/cnn-lstm
	$(RUN) -m study.animation

constraints: $(VENV)/installed-dev  ## pin the newest versions that requirements*.txt allow
	$(RUN) -m pip install uv
	(echo "# Pinned versions, for every Python from 3.10 on. Made by: make constraints"; \
	 $(RUN) -m uv pip compile --quiet --universal --upgrade --python-version 3.10 --no-annotate --no-header \
	 requirements-dev.txt) > constraints.txt

clean:  ## remove the environments and what was made from digits
	rm -rf $(VENV) .venv-peers results/demo results/digits data/adversarial/digits-*

$(VENV)/installed: requirements.txt constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	@echo "This downloads about 2 GB and takes 6 GB of disk. PyTorch's build for CPUs alone is a tenth of that:"
	@echo "  make PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu $(or $(MAKECMDGOALS),demo)"
	@echo "See https://pytorch.org/get-started/locally/"
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --disable-pip-version-check -r requirements.txt -c constraints.txt
	@touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(RUN) -m pip install --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	@touch $@
