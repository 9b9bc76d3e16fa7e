import sys, json, torch
from dataclasses import replace
sys.path.insert(0,'/tmp/w/train')
from utils.recipes import RECIPES
from utils.training import train
from utils.data import load_split
from utils.adversarial import adversarial_set, AugmentedSplit
from utils.evaluation import evaluate_fgsm
from utils.paper import EPSILONS
import utils.data as D
_f = D.flip_and_shift
D.flip_and_shift = lambda i, f, s: _f(i, f, 4 * s)
tag, eps, epochs, changes = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
net = changes.pop("net","cnn")
tr, va = (load_split("cifar10", s, "/work/shared/data") for s in ("train","validation"))
src = f"models/{net}.safetensors"
s = adversarial_set(src, tr); v = adversarial_set(src, va)
r = replace(RECIPES["one-cycle"].with_defense(), epochs=epochs, **changes)
n = train(net, AugmentedSplit(tr, s.direction, eps, s.manifest["source_sha256"]), va, r, output=f"/tmp/w/pilots/{tag}.safetensors", quiet=True, resume=True)
res = evaluate_fgsm(n, va, EPSILONS[1:], direction=v.direction)
print(tag, net, eps, epochs, changes, [f"{100*x.accuracy:.2f}" for x in res], flush=True)
