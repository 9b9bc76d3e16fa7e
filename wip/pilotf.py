"""bf16 pilots. args: tag eps epochs changes-json; changes may hold net, unit (shift multiple), cutout"""
import sys, json, torch
from dataclasses import replace
sys.path.insert(0,'/tmp/w/train')
import torch.nn.functional as F
from utils.recipes import RECIPES
from utils.training import train
from utils.data import load_split
from utils.adversarial import adversarial_set, AugmentedSplit
from utils.evaluation import evaluate_fgsm
from utils.paper import EPSILONS
import utils.data as D
tag, eps, epochs, changes = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
shown = dict(changes)
net = changes.pop("net","cnn"); unit = changes.pop("unit",1); cutout = changes.pop("cutout",0); seed = changes.pop("seed",0); noise = changes.pop("noise",0); contrast = changes.pop("contrast",1)
_f = D.flip_and_shift
gridflip = changes.pop("gridflip", False)
def moved(i, f, s):
    s = unit * s
    if gridflip: s = s + torch.stack([torch.zeros_like(f), f], 1).long()   # flipped about column 16, not 15.5
    return _f(i, f, s)
D.flip_and_shift = moved
gen = torch.Generator().manual_seed(1)
import copy
emas = {}
DECAYS = (.001, .0004, .00015)
def loss(model, images, labels):
    with torch.no_grad():
        for d in DECAYS:
            if d not in emas: emas[d] = copy.deepcopy(model); emas[d].n = 0
            emas[d].n += 1; w = max(d, 1/(1+emas[d].n))
            for a, b in zip(emas[d].state_dict().values(), model.state_dict().values()):
                if a.is_floating_point(): a.lerp_(b, w)
    if cutout:
        n = len(images); c = torch.randint(0, 32, (n, 2), generator=gen); r = torch.arange(32)
        m = ((r - c[:, :1]).abs() < cutout/2)[:, :, None] & ((r - c[:, 1:]).abs() < cutout/2)[:, None, :]
        images = torch.where(m[:, None], model.normalize.mean.expand_as(images[:1]), images)
    if contrast < 1:
        c = contrast + (1-contrast) * torch.rand(len(images),1,1,1, generator=gen)
        mean = images.mean((1,2,3), keepdim=True)
        images = (images - mean) * c + mean
    if noise: images = images + noise * torch.randn(images.shape, generator=gen)
    with torch.autocast("cpu", torch.bfloat16):
        return F.cross_entropy(model(images), labels)
tr, va = (load_split("cifar10", s, "/work/shared/data") for s in ("train","validation"))
src = f"models/{net}.safetensors"
s = adversarial_set(src, tr); v = adversarial_set(src, va)
import utils.training as T
count = 0
def watch(network, split):
    global count; count += 1
    if count % 2 and count < epochs: return 0.0
    for tagd, net in [("raw", network), *emas.items()]:
        res = evaluate_fgsm(net, va, [.02,.04,.06,.08,.1], direction=v.direction)
        print(tag, count, tagd, [f"{100*x.accuracy:.1f}" for x in res], flush=True)
    return res[0].accuracy
T.accuracy = watch
r = replace(RECIPES["one-cycle"].with_defense(), epochs=epochs, **changes)
n = train(net, AugmentedSplit(tr, s.direction, eps, s.manifest["source_sha256"]), va, r, output=f"/tmp/w/pilots/{tag}.safetensors", quiet=True, resume=True, defense=loss)
res = evaluate_fgsm(n, va, EPSILONS[1:], direction=v.direction)
print(tag, eps, epochs, shown, [f"{100*x.accuracy:.2f}" for x in res], flush=True)
