"Two processes are one: losses, nets, log and files; and the memory of a step in parts"
import json, math, os, subprocess, sys
from pathlib import Path
import pandas as pd, pytest, torch
from torch import nn
from fastai.callback.core import Callback
from fastai.callback.progress import CSVLogger
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner, Metric
from pipa import cli
from pipa.runs import run as runs
from pipa.callbacks import LossTerm, Pair
from pipa.data import folder, uda_dls
from pipa.distrib import Ranks, deal_dl
from pipa.learner import uda_learner
from pipa.lean import Kept, Lean
from pipa.ranks import on_ranks, place
from tiny import Watch, city, seed

small = dict(hidden=16, crop=(32,32), thresh=.1, patch=dict(thresh=.05), pixel=dict(min_pixels=4))

@pytest.fixture(scope='module')
def home(tmp_path_factory): return city(tmp_path_factory.mktemp('city'), n=5, size=(64,64))

pytestmark = pytest.mark.usefixtures('cache_home')

def make(home, bs, method, *cbs, n=8, s=0, **kw):
    seed(s)
    g,r = [folder(home/d/'images', home/d/'masks', 'minicity') for d in ('game', 'real')]
    dls = uda_dls(g, r.unlabelled(), r, bs=bs, size=(64,64), n=n, device='cpu', bs_valid=2, seed=3)
    return uda_learner(dls, 'light', method, cbs=[Watch(), *cbs], **{**small, **kw})

def run(home, bs, method, *cbs, epochs=1, s=None, **kw):
    "Train; what is left, as plain data. Ranks begin with different seeds, if `s` is None, to show that they agree"
    learn = make(home, bs, method, *cbs, s=place()[0] if s is None else s, **kw)
    rows = []
    with learn.no_bar():
        learn.logger = lambda o: rows.append([float('nan') if v is None else float(v) for v in o[1:-1]])
        learn.fit_poly(epochs, 1e-3)
    nets = [learn.model] + ([learn.mean_teacher.teacher] if hasattr(learn, 'mean_teacher') else [])
    bank = learn.patch_contrast.bank if hasattr(learn, 'patch_contrast') else []
    return dict(rows=rows, steps=learn.watch.seen, nets=[{k:v.clone() for k,v in o.state_dict().items()} for o in nets],
                bank=[list(o) for o in bank], classes=sorted({type(m).__name__ for o in nets for m in o.modules()}))

def same(a, b): return all(torch.equal(v, q[k]) for p,q in zip(a, b) for k,v in p.items())
def apart(a, b):
    "Norm of the difference of all weights and statistics, relative to their norm; a net that went another way is some percent off"
    pairs = [(v.float(),q[k].float()) for p,q in zip(a, b) for k,v in p.items() if v.is_floating_point()]
    return (sum((v-w).pow(2).sum() for v,w in pairs)/sum(w.pow(2).sum() for _,w in pairs)).sqrt().item()

def agree(one, ranks, tol=2e-3):
    "Steps, log and nets of several ranks are those of one process, and the nets are the same bits on all ranks"
    w = len(ranks)
    for o in ranks: assert same(o['nets'], ranks[0]['nets']) and len(o['steps'])==len(one['steps'])
    for i,l in enumerate(one['steps']): assert math.isclose(sum(o['steps'][i] for o in ranks)/w, l, rel_tol=tol), (i, l)
    assert not any(o['rows'] for o in ranks[1:])
    for a,b in zip(ranks[0]['rows'], one['rows']):
        for x,y in zip(a, b): assert math.isclose(x, y, rel_tol=10*tol, abs_tol=tol) or math.isnan(x) and math.isnan(y), (a, b)
    assert apart(ranks[0]['nets'], one['nets'])<tol, 'not nearer: AdamW moves by the sign of a gradient, also where it is noise'

# one process and two

@pytest.mark.parametrize('method', [*(pytest.param(o, marks=pytest.mark.slow) for o in ('source', 'self_training')), 'pipa'])
def test_two_ranks_are_one_process(home, method):
    one = run(home, 4, method, s=0)
    two = on_ranks(run, 2, home, 2, method)
    agree(one, two)
    assert one['classes']==two[0]['classes'], 'layers have their class back'
    for a,b in zip(one['bank'], two[1]['bank']): assert torch.equal(a[1], b[1]) and torch.allclose(a[0], b[0], atol=1e-2)

@pytest.mark.slow
@pytest.mark.parametrize('kw', [dict(patch=dict(thresh=.05, form='paper'), pixel=dict(min_pixels=4, form='paper')),
    dict(trust='pixel', start=1), dict(terms='both', method='mic'), dict(terms='pixel', method='daformer', things=(3,8))],
    ids=['paper', 'start', 'mic', 'daformer'])
def test_other_methods(home, kw):
    kw = dict(method='pipa') | kw
    agree(run(home, 4, s=0, **kw), on_ranks(lambda: run(home, 2, **kw), 2))

@pytest.mark.slow
def test_four_ranks(home): agree(run(home, 4, 'pipa', s=0), on_ranks(run, 4, home, 1, 'pipa'))

def test_discriminators_stay_the_same(home):
    def adv():
        learn = make(home, 2, 'advseg', s=place()[0], host=dict(width=4))
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
        return learn.adv_seg.own_net.state_dict()
    a,b = on_ranks(adv, 2)
    assert same([a], [b])

# ways to train

def test_accumulation_clipping_and_lean(home):
    "Two ranks, each loss on its own, clipped: still the step of one process; and ranks that accumulate send at the end only"
    def go(bs): return lambda: run(home, bs, 'pipa', GradientClip(.5), lean=True, s=0)
    agree(go(4)(), on_ranks(go(2), 2))
    acc = on_ranks(lambda: run(home, 1, 'source', GradientAccumulation(2), s=0, n=8), 2)
    assert same(acc[0]['nets'], acc[1]['nets']) and len(acc[0]['steps'])==4

def test_without_synchronised_statistics_nets_are_still_the_same(home):
    def go():
        learn = make(home, 2, 'self_training')
        learn.ranks.sync_bn = False
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
        return [dict(o.state_dict()) for o in (learn.model, learn.mean_teacher.teacher)]
    a,b = on_ranks(go, 2)
    assert same(a, b)

def test_a_second_fit_goes_on(home):
    def go(bs):
        learn = make(home, bs, 'source', n=4)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3); learn.fit(1, 1e-3)
        return learn.dls.train.drawn,list(learn.dls.train.shard),[float(o) for o in learn.validate()]
    (d,s,v),*ranks = go(4),*on_ranks(go, 2, 2)
    assert d==8 and [o[0] for o in ranks]==[8,8] and [o[1] for o in ranks]==[[0,2],[1,2]]
    for o in ranks: assert all(math.isclose(x, y, rel_tol=2e-2) or math.isnan(x) for x,y in zip(o[2], v))

def test_scores_that_cant_be_added_up(home):
    class Seen(Metric):
        def reset(self): self.n = 0
        def accumulate(self, learn): self.n += len(learn.x)
        @property
        def value(self): return self.n
    def go(): return run(home, 2, 'source', metrics=[Seen()], n=4)['rows']
    assert on_ranks(go, 2)[0][0][-1]==5, 'each rank validates all images'

def test_predictions_are_whole(home):
    def go():
        learn = make(home, 2, 'source', n=4)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3); return learn.get_preds()[0].shape[0]
    assert on_ranks(go, 2)==[5,5]

def test_one_log(home, tmp_path):
    def go():
        learn = make(home, 2, 'source', CSVLogger('log.csv'), n=4, path=tmp_path)
        with learn.no_bar(): learn.logger = lambda o: None; learn.fit(2, 1e-3)
    on_ranks(go, 2)
    assert len(pd.read_csv(tmp_path/'log.csv'))==2

def test_mistakes(home):
    def lists():
        x,y = torch.randn(4,3,32,32),torch.zeros(4,32,32).long()
        dls = DataLoaders(DataLoader([*zip(x, y, x)], bs=2, num_workers=0), DataLoader([*zip(x, y)], bs=2, num_workers=0)); dls.n_inp = 1
        return says(Learner(dls, nn.Conv2d(3,2,1), nn.CrossEntropyLoss(), cbs=[Pair(), Ranks()]))
    def says(learn):
        try:
            with learn.no_bar(), learn.no_logging(): learn.fit(1)
        except ValueError as e: return str(e)
    def few():
        return says(make(home, 2, 'source', n=3))
    assert 'is a DataLoader: use `uda_dls`' in on_ranks(lists, 2)[0]
    assert 'no batch of 2 for each of 2 processes' in on_ranks(few, 2)[1]

@pytest.mark.slow
def test_fastai_lends_its_launcher(home):
    "`distrib_ctx` of fastai, which wants accelerate: the net isn't wrapped, and the result is that of one process"
    pytest.importorskip('accelerate')
    def go():
        os.environ.update(ACCELERATE_USE_CPU='true', MASTER_ADDR='127.0.0.1', MASTER_PORT='29555')
        import fastai.distributed
        learn = make(home, 2, 'self_training')
        rows = []
        with learn.no_bar(), learn.distrib_ctx(sync_bn=True):
            learn.logger = lambda o: rows.append([float(v) for v in o[1:-1]])
            learn.fit_poly(1, 1e-3)
        assert not hasattr(learn, 'distributed_trainer') and type(learn.model).__name__!='DistributedDataParallel'
        return dict(rows=rows, steps=learn.watch.seen, nets=[dict(o.state_dict()) for o in (learn.model, learn.mean_teacher.teacher)])
    agree(run(home, 4, 'self_training', s=0), on_ranks(go, 2))

# the command

def args(home, **kw):
    from inspect import signature
    o = {k:p.default for k,p in signature(cli.pipa_train).parameters.items()}
    return o | dict(data=str(home), method='pipa', epochs=1, steps=2, size='64x64', crop='64x64', start=0, unlabelled=2, recipe='off') | kw

@pytest.fixture(scope='module')
def project(home, tmp_path_factory):
    "The city as a folder for `--data`"
    root = tmp_path_factory.mktemp('project')
    from pipa.minicity import scene
    import numpy as np, shutil
    for a,b in (('source','game'), ('target','real'), ('valid','real')): shutil.copytree(home/b, root/a)
    from pipa.labels import space
    (root/'codes.txt').write_text('\n'.join(space('minicity').codes))
    return root

@pytest.mark.slow
def test_command_on_two_ranks(project, tmp_path):
    def go(name, bs): return str(runs.run(**args(project, bs=bs, out=str(tmp_path/name))))
    one = go('one', 4)
    a,b = on_ranks(go, 2, 'two', 2)
    assert a==b==str(tmp_path/'two') and sorted(p.name for p in tmp_path.iterdir())==['one','two']
    assert sorted(p.name for p in Path(a).iterdir())==sorted(p.name for p in Path(one).iterdir())
    x,y = [pd.read_csv(Path(o)/'metrics.csv').drop(columns='time') for o in (one, a)]
    assert [*x]==[*y] and len(x)==len(y)==1
    for c in x: assert math.isclose(x[c][0], y[c][0], rel_tol=2e-2, abs_tol=2e-3) or x[c].isna()[0] and y[c].isna()[0], c
    assert json.loads((Path(a)/'config.json').read_text())['ranks']==2 and 'ranks=2' in json.loads((Path(a)/'row.json').read_text())['settings']

@pytest.mark.slow
@pytest.mark.parametrize('launcher', ['torchrun', 'accelerate'])
def test_launchers(project, tmp_path, launcher):
    if launcher=='accelerate': pytest.importorskip('accelerate')
    script = tmp_path/'pipa_train'
    script.write_text('from pipa.cli import pipa_train\nif __name__=="__main__": pipa_train()\n')
    go = dict(torchrun=['torch.distributed.run', '--standalone', '--nproc_per_node=2'],
              accelerate=['accelerate.commands.launch', '--cpu', '--num_processes=2', '--num_machines=1', '--mixed_precision=no', '--dynamo_backend=no'])[launcher]
    cmd = [sys.executable, '-m', *go, str(script), f'--data={project}', '--method=self_training', '--epochs=1', '--steps=1', '--bs=1', '--size=64x64', f'--out={tmp_path/"run"}']
    r = subprocess.run(cmd, capture_output=True, text=True, timeout=400, env=os.environ | dict(PYTHONPATH=str(Path(__file__).parents[1])))
    assert not r.returncode, r.stderr[-3000:]
    assert (tmp_path/'run/weights.safetensors').is_file() and not (tmp_path/'run_2').exists() and r.stdout.count('weights.safetensors')==1

# one graph at a time

def test_lean_gradients(home):
    class Still(Callback):
        def before_fit(self):
            for m in self.model.modules():
                if isinstance(m, nn.Dropout2d) or type(m).__name__=='StochasticDepth': m.p = 0.
    def go(lean): return run(home, 2, 'mic', Still(), terms='both', lean=lean, s=0, n=4)
    one,lean = go(False),go(True)
    assert one['steps']==pytest.approx(lean['steps'], rel=1e-3) and apart(lean['nets'], one['nets'])<2e-3
    assert one['rows'][0][2:]==pytest.approx(lean['rows'][0][2:], rel=5e-2, abs=5e-3)

def test_lean_keeps_the_largest_graph(home):
    peaks,parts = {},{}
    for k,kw in dict(source=('source',{}), joint=('pipa',{}), lean=('pipa',dict(lean=True))).items():
        learn = make(home, 2, kw[0], n=2, **kw[1])
        with learn.no_bar(), learn.no_logging(), Kept(learn.model) as o: learn.fit(1, 1e-3)
        peaks[k] = o.peak
        assert not o.now, 'nothing is kept after a step'
    assert peaks['source']<=peaks['lean']<.6*peaks['joint']

def test_lean_is_off_where_a_term_asks_not_to_wait(home):
    learn = make(home, 2, 'pipa', n=2, lean=True)
    learn.mix.alone = False
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert [c.name for c in learn.lean.terms]==['patch_contrast'] and all(c.run for c in learn.cbs)
