"""A long run, and the same run killed again and again, with the memory of process and worker: `python .ci/soak.py 3000`

Writes data/results/soak.csv, which nbs/bench/04_memory.ipynb shows. The number is that of steps; 3000 take about ten minutes on two quiet cores."""
import multiprocessing, os, random, signal, sys, tempfile, time, zlib
from pathlib import Path
for k,v in dict(OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE').items(): os.environ.setdefault(k, v)
import pandas as pd, torch
from torch import nn
from fastai.torch_basics import set_seed
from pipa import __version__
from pipa.data import minicity, uda_dls
from pipa.learner import uda_learner
from pipa.models import segformer
from pipa.bench.memory import Memory
from pipa.runs.resume import Checkpoint
from pipa.runs.state import checkpoints

root = Path(__file__).resolve().parents[1]
steps = int(sys.argv[1]) if len(sys.argv)>1 else 3000
epochs,seed,kills = 30,0,9
fork = multiprocessing.get_context('fork')

class Small(nn.Module):
    "An encoder of four convolutions, for memory is asked for here and not accuracy"
    widths,stride = (8,16,24,32),4
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(nn.Sequential(nn.Conv2d(i, o, s+1, s, 1), nn.BatchNorm2d(o), nn.GELU())
                                   for i,o,s in ((3,8,4), (8,16,2), (16,24,2), (24,32,2)))
    def forward(self, x): return [x := p(x) for p in self.parts]

def work(home, name, i):
    "One process: begin, or go on"
    os.environ['XDG_CACHE_HOME'] = str(home/'cache')
    set_seed(seed, reproducible=True)
    game,real,valid = [minicity(d, s, n=20, size=(64,64), root=home) for d,s in (('game','train'), ('real','train'), ('real','val'))]
    dls = uda_dls(game, real, valid.take([*range(4)]), bs=1, size=(64,64), n=steps//epochs, device='cpu', num_workers=1)
    learn = uda_learner(dls, segformer(Small(), dls.c, dim=32), 'pipa', hidden=16, crop=(32,32), thresh=.6, alpha=.97, pixel=dict(min_pixels=8),
                        patch=dict(thresh=.6), path=home/name, cbs=[Checkpoint(steps=max(1, steps//120)), Memory(home/f'{name}.{i}.csv', max(1, steps//150))])
    if checkpoints(learn.path): learn.resume()
    with learn.no_bar(), learn.no_logging(): learn.fit_poly(epochs, 1e-3, head_mult=2.)
    crc = 0
    for v in [*learn.model.state_dict().values(), *learn.mean_teacher.teacher.state_dict().values()]: crc = zlib.crc32(v.numpy().tobytes(), crc)
    (home/f'{name}.crc').write_text(f'{crc:08x}')

def table(home, name):
    "What its processes wrote, in their order"
    fs = sorted((f for f in home.glob(f'{name}.*.csv') if f.stat().st_size), key=lambda f: int(f.suffixes[0][1:]))
    ts = [pd.read_csv(f, names=['step', 'process', 'workers', 'loss']).assign(attempt=i) for i,f in enumerate(fs)]
    return pd.concat(ts, ignore_index=True) if ts else pd.DataFrame(dict(step=[0]))

def run(home, name, targets):
    "Processes, one after the other, killed once they are past each target"
    (home/name).mkdir()
    for i,t in enumerate([*targets, None]):
        p = fork.Process(target=work, args=(home, name, i)); p.start()
        while t and p.is_alive() and table(home, name).step.iloc[-1]<t: time.sleep(.2)
        if t and p.is_alive(): os.kill(p.pid, [signal.SIGKILL, signal.SIGTERM][i%2])
        p.join()
        print(f'{name}: process {i+1} ended with {p.exitcode} at step {table(home, name).step.iloc[-1]}', flush=True)
    assert p.exitcode==0

if __name__=='__main__':
    with tempfile.TemporaryDirectory() as d:
        home = Path(d)
        rng = random.Random(seed)
        targets = sorted(rng.randrange(steps//20, steps) for _ in range(kills))
        ps = [fork.Process(target=run, args=(home, *o)) for o in (('through', []), ('killed', targets))]
        for p in ps: p.daemon = False; p.start()
        for p in ps: p.join(); assert p.exitcode==0
        rows = []
        for name in ('through', 'killed'):
            t = table(home, name)
            rows.append(t.assign(run=name, end=(home/f'{name}.crc').read_text(), seed=seed, version=__version__, command=f'python .ci/soak.py {steps}'))
        pd.concat(rows).to_csv(root/'data/results/soak.csv', index=False)
