"A city of a few scenes, as folders that a user could have, and the smallest learner that has everything"
import random
from functools import cache
import numpy as np, torch
from PIL import Image
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.torch_core import to_float
from pipa.models import add_heads
from pipa.learner import SegLoss
from pipa.minicity import scene
from pipa.labels import space
from pipa.models import light
from pipa.test_utils import fit, narrow

scene = cache(scene)   # the files of a test draw the same scenes again and again

def city(root, n=6, size=(64,128)):
    "Folders `game` and `real` with `images` and `masks`"
    for domain in ('game', 'real'):
        for sub in ('images', 'masks'): (root/domain/sub).mkdir(parents=True)
        for i in range(n):
            for a,sub in zip(scene(i, domain, size), ('images', 'masks')): Image.fromarray(a).save(root/domain/sub/f'{i}.png')
    return root

def own_data(root, n=3, size=(64,128)):
    "A folder as for `pipa_train --data`: the last image of the target is for validation"
    home = city(root/'city', n, size)
    for a,b in (('game','source'), ('real','target')): (home/a).rename(home/b)
    for sub in ('images', 'masks'):
        (home/'valid'/sub).mkdir(parents=True)
        (home/'target'/sub/f'{n-1}.png').rename(home/'valid'/sub/'v.png')
    (home/'codes.txt').write_text('\n'.join(space('minicity').codes))
    return home

def seed(s=0): torch.manual_seed(s); np.random.seed(s); random.seed(s)

def pairs(n=2, k=3, side=64):
    "Random images with a floor and a box for labels"
    y = torch.zeros(n, side, side).long(); y[:,side//3:] = 1; y[:,side//2:side*3//4,side//3:side*2//3] = k-1
    x_s,x_t = [torch.randn(n, 3, side, side)+y[:,None]*s for s in (1,.7)]
    return x_s,y,x_t

def toy(cbs, n=2, k=3, bs=2, y=None, net=None, **kwargs):
    "A learner over random pairs"
    seed()
    x_s,y_s,x_t = pairs(n, k)
    y_s = y_s if y is None else y.expand(n, -1, -1)
    dls = DataLoaders(DataLoader([*zip(x_s, y_s, x_t)], bs=bs), DataLoader([*zip(x_t, y_s)], bs=bs))
    dls.n_inp = 1
    return Learner(dls, add_heads(net or light('mit_b0', n_out=k, **narrow), hidden=32), SegLoss(), lr=1e-3, cbs=cbs, train_bn=False, **kwargs)

class HalfOnCPU(Callback):
    "What fastai's `MixedPrecision` does, for a machine without GPU"
    order = MixedPrecision.order
    def before_batch(self): self.ac = torch.autocast('cpu', dtype=torch.bfloat16); self.ac.__enter__()
    def after_pred(self): self.learn.pred = to_float(self.pred)
    def after_loss(self): self.ac.__exit__(None, None, None)

class Watch(Callback):
    "Keep the loss of each step, as this process has it"
    order = 70
    def before_fit(self): self.seen = []
    def after_batch(self):
        if self.training: self.seen.append(self.learn.loss.item())
