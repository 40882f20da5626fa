"Guard: who went wrong is named, nothing is spoilt, the batch is kept and fails again"
import json
from pathlib import Path
import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.callback.schedule import *
from pipa.callbacks import *
from pipa.data import PairSet, folder, uda_dls
from pipa.guard import Guard, batch_files, keep_batch, replay
from pipa.labels import space
from pipa.learner import uda_learner
from pipa.basics import one_line
from pipa.models import light
from tiny import city, fit, narrow, seed, toy

nan,inf = float('nan'),float('inf')
def terms(): return [Pair(), MeanTeacher(), Mix(), PixelContrast(min_pixels=4, max_views=20), PatchContrast(size=(32,32), thresh=0., n_neg=20), FeatureDistance([1,2], min_ratio=.5)]

class At(Callback):
    "Do something to the learner at one step"
    order = -5
    def __init__(self, step=0, **fs):
        self.step = step
        for k,f in fs.items(): setattr(self, k, lambda f=f: f(self.learn) if self.train_iter==step and self.training else None)

def spoil(name, value=nan):
    "A callback that makes one thing wrong"
    def image(l): l.xb[0][0,0,3,3] = value
    def target(l): l.yb[1][1,2,5,5] = value
    def source(l): l.loss_func = lambda p,y: p[0].mean()*0+value if isinstance(p, tuple) else p.mean()*0+value
    def gradient(l): next(l.model.decode_head.parameters()).register_hook(lambda g: g*0+value)
    def weight(l):
        with torch.no_grad(): next(l.model.decode_head.parameters())[0] = value
    if name in ('image', 'target', 'source', 'gradient', 'weight'): return At(before_batch=locals()[name])
    def term(l):
        o = getattr(l, name); score = o.score
        def f(): x,n = score(); return x*0+value,n
        o.score = f
    return At(before_batch=term)

def state(l): return {k:v.clone() for k,v in l.model.state_dict().items()}
def same(a, b): return all(torch.equal(v, b[k]) for k,v in a.items())
def stopped(learn):
    with pytest.raises(FloatingPointError) as e: fit(learn)
    return one_line(e.value)

says = dict(image='source image 0 of the batch holds', target='target image 1 of the batch holds', source='the source loss is', mix='the loss of mix is', pixel_contrast='the loss of pixel_contrast is',
            patch_contrast='the loss of patch_contrast is', feature_distance='the loss of feature_distance is', gradient='the gradient of', weight='weights were not finite before the step')

@pytest.mark.parametrize('name,value', [*((k, nan) for k in says), ('image', inf), ('mix', inf)])
def test_who_it_was(name, value, tmp_path):
    learn = toy([*terms(), Guard(out=tmp_path), spoil(name, value)]); before = state(learn)
    text = stopped(learn)
    assert text.startswith('Step 0 (epoch 0, batch 0): ') and says[name] in text and 'pipa.guard.replay' in text and '\n' not in text
    assert name=='weight' or all(torch.equal(v, before[k]) for k,v in learn.model.named_parameters()), 'a weight was moved'
    assert {p.name for p in tmp_path.iterdir()}=={'step_0.safetensors', 'step_0.json'}

def test_nothing_wrong_changes_nothing():
    a,b,c = (fit(toy([*terms(), *g], n=4)) for g in ([], [Guard()], [Guard('skip')]))
    assert same(state(a), state(b)) and same(state(a), state(c)) and c.guard.total_skipped==0
    assert a.recorder.values==b.recorder.values or np.allclose(np.array(a.recorder.values), np.array(b.recorder.values), equal_nan=True)

@pytest.mark.parametrize('name', ['image', 'target', 'patch_contrast', 'gradient'])
def test_a_skipped_batch_leaves_no_trace(name, tmp_path):
    g = Guard('skip', tmp_path); learn = toy([*terms(), g, spoil(name)]); learn.metrics += g.column
    learn.create_opt(); before = state(learn)
    fit(learn)
    assert same(before, state(learn)), 'weights, or statistics of a norm'
    assert not learn.opt.state_dict()['state'] or all(not s.get('mom', torch.zeros(1)).any() if torch.is_tensor(s.get('mom', 0)) else True for s in learn.opt.state_dict()['state'])
    assert (g.mean, g.total_skipped, learn.mix.steps, learn.mean_teacher.t, learn.patch_contrast.bank)==(1, 1, 0, 0, [])
    assert learn.recorder.metric_names[-2]=='skipped' and learn.recorder.values[-1][-1]==1 and np.isfinite(learn.recorder.values[-1][0])

@pytest.mark.parametrize('do', ['skip', 'stop'])
def test_each_batch_that_is_accumulated_is_looked_at(do, tmp_path):
    "Two batches make a step, and the first of them is wrong: it is that one which is named, and no statistic of a norm or of the teacher has seen it"
    from fastai.callback.training import GradientAccumulation
    g = Guard(do, tmp_path)
    learn = toy([*terms(), GradientAccumulation(4), g, spoil('image')], n=8, bs=2)
    if do=='stop': assert stopped(learn).startswith('Step 0 (epoch 0, batch 0): source image 0'); return
    fit(learn)
    assert g.total_skipped==1 and learn.mean_teacher.t==1, 'three good batches of two: one step, and one left over'
    assert all(v.isfinite().all() for net in (learn.model, learn.mean_teacher.teacher) for v in net.state_dict().values())

def test_after_a_skipped_batch_it_goes_on(tmp_path):
    x = At(1, before_batch=lambda l: l.xb[0].fill_(nan)); g = Guard('skip', tmp_path)
    learn = fit(toy([*terms(), g, x], n=8))
    assert (g.mean, learn.mix.steps, len(learn.patch_contrast.bank))==(1, 3, 3)
    assert all(v.isfinite().all() for v in learn.model.state_dict().values() if v.is_floating_point()) and all(f.isfinite().all() for f,_ in learn.patch_contrast.bank)

def test_too_many_in_a_row(tmp_path):
    class All(Callback):
        order = -5
        def before_batch(self): self.xb[0].fill_(nan)
    text = stopped(toy([*terms(), Guard('skip', tmp_path, most=2), All()], n=12))
    assert text.startswith('Step 2') and 'So it was with 2 batches before' in text and len([*tmp_path.glob('*.json')])==3

def test_overflow_under_a_scaler_is_no_error(tmp_path):
    class Scaler:
        def is_enabled(self): return True
    seen = []
    class Step(Callback):
        order = 20
        def before_fit(self): self.learn.scaler = Scaler()
        def before_step(self): seen.append(any(not p.grad.isfinite().all() for p in self.model.parameters() if p.grad is not None))
    fit(toy([*terms(), Guard(out=tmp_path), Step(), spoil('gradient', inf)])); assert seen==[True]
    assert 'loss of mix' in stopped(toy([*terms(), Guard(out=tmp_path), Step(), spoil('mix')]))

def test_lr_find_may_explode(tmp_path):
    learn = toy([*terms(), Guard(out=tmp_path)], n=4)
    with learn.no_bar(), learn.no_logging(): learn.lr_find(start_lr=1., end_lr=1e9, num_it=8, stop_div=False, show_plot=False, suggest_funcs=None)
    assert not [*tmp_path.iterdir()]

def test_unknown(): pytest.raises(ValueError, Guard, 'stopp').match('choose one of stop, skip')

@pytest.mark.parametrize('name', ['target', 'patch_contrast'])
def test_it_fails_again(name, tmp_path):
    text = stopped(toy([*terms(), Guard(out=tmp_path), spoil(name)]))
    bad = [] if name=='target' else [spoil(name)]
    assert replay(tmp_path/'step_0.safetensors', toy([*terms(), *bad])) in text
    assert name=='target' or replay(tmp_path/'step_0.safetensors', toy(terms())) is None

def test_the_step_is_the_same_to_the_bit(tmp_path):
    "Losses of the third step, with its teacher, its memory and its chance, and those of the replay"
    class Note(Callback):
        order,seen = 4,None   # before the guard
        def before_step(self):
            if self.train_iter==self.at: self.seen = [float(self.loss), *[float(p.grad.norm()) for p in self.model.parameters() if p.grad is not None]]
    def fail(l): next(l.model.backbone.parameters()).register_hook(lambda g: g*0+nan)
    a = Note(); a.at = 2
    stopped(toy([*terms(), Guard(out=tmp_path), a, At(2, before_batch=fail)], n=8))
    b = Note(); b.at = 0
    assert replay(tmp_path/'step_2.safetensors', toy([*terms(), b], n=8)) is None
    assert a.seen[0]==b.seen[0] and sum(np.isclose(x, y, rtol=0, atol=0) for x,y in zip(a.seen[2:], b.seen[2:]))==len(b.seen)-2

@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
    home = city(tmp_path_factory.mktemp('guard')/'städte', n=5, size=(64,64))
    return [folder(home/k/'images', home/k/'masks', space('minicity')) for k in ('game', 'real')]

@pytest.mark.parametrize('kw', [{}, dict(num_workers=1), dict(num_workers=2, persistent_workers=True)])
def test_files_of_a_batch(pairs, kw, tmp_path, monkeypatch):
    "A target whose file has a mark is named for the batches that show the mark, in the second epoch, too"
    from PIL import Image
    src,tgt = pairs; tgt = tgt.unlabelled()
    dls = uda_dls(src, tgt, src, bs=2, n=6, size=(64,64), seed=3, device='cpu', rcs_temp=None, **kw)
    dl,items = dls.train,PairSet(src, tgt, (64,64))
    for _ in range(2):
        for i,b in enumerate(dl):
            files = batch_files(dl, i)
            assert len(files)==2 and all(Path(v).is_file() for o in files for v in o.values())
            k = dl.drawn-dl.n+i*2
            want = [items[dl.ticket(k+j)] for j in (0,1)]
            for j in (0,1):
                assert torch.equal(b[1][j].long(), torch.as_tensor(want[j][1]).long())
                assert str(src.images[dl.ticket(k+j)[0]])==files[j]['source'] and str(tgt.images[dl.ticket(k+j)[2]])==files[j]['target']

def test_a_learner_names_its_files(pairs, tmp_path, monkeypatch):
    src,tgt = pairs; tgt = tgt.unlabelled()
    dls = uda_dls(src, tgt, src, bs=2, n=6, size=(64,64), seed=3, device='cpu')
    x = At(1, before_batch=lambda l: l.yb[1][1].fill_(inf)); g = Guard(out=tmp_path)
    learn = uda_learner(dls, light('mit_b0', n_out=dls.c, **narrow), 'pipa', crop=(64,64), cbs=[g, x], path=tmp_path)
    text = stopped(learn); about = json.loads((tmp_path/'step_1.json').read_text(encoding='utf8'))
    assert f"target image 1 of the batch (`{about['files'][1]['target']}`) holds inf" in text and about['files'][0]['mask'] in text and 'städte' in text
    assert (about['step'], about['epoch'], about['number'])==(1, 0, 1) and about['why'] in text

# --- validation, and a disk that is full ------------------------------------------------------------------------------------------------
class Overflow(Callback):
    "The net's answer in validation is not finite, in one batch of one epoch"
    def __init__(self, epoch=0, batch=0, value=nan): self.at,self.value = (epoch, batch),value
    def after_pred(self):
        if not self.training and (self.epoch, self.iter)==self.at: self.learn.pred = self.pred*self.value

@pytest.mark.parametrize('do', ['stop', 'skip'])
@pytest.mark.parametrize('value', [nan, inf])
def test_validation_that_goes_wrong_is_said_once_and_goes_on(do, value, tmp_path, capsys):
    learn = fit(toy([*terms(), Guard(do, tmp_path), Overflow(1, 1, value)], n=4), 3); said = capsys.readouterr().err
    assert said.startswith('Validation of epoch 1: valid_loss not finite. The first batch whose loss is not finite is 1.') and said.count('\n')==1
    assert len(learn.recorder.values)==3 and not [*tmp_path.iterdir()] and np.isfinite(learn.recorder.values[2][1]) and not np.isfinite(learn.recorder.values[1][1])

def test_a_metric_that_goes_wrong_is_said(capsys):
    from fastai.metrics import AvgMetric
    learn = toy([*terms(), Guard()]); learn.metrics += AvgMetric(lambda p,y: torch.tensor(nan)); fit(learn, 2)
    assert capsys.readouterr().err.count('<lambda> not finite')==1
    fit(toy([Pair(), MeanTeacher(), Mix(start=99), Guard()]), 1); assert not capsys.readouterr().err, 'a term that has not begun is n/a, and no error'

def test_files_of_validation_are_named(pairs, tmp_path, capsys):
    src,tgt = pairs
    dls = uda_dls(src, tgt.unlabelled(), tgt, bs=2, n=2, size=(64,64), seed=3, device='cpu')
    fit(uda_learner(dls, light('mit_b0', n_out=dls.c), 'source', cbs=Overflow(0, 1), path=tmp_path))
    said = capsys.readouterr().err
    assert f'is 1: {tgt.images[2]}, {tgt.images[3]}.' in said and str(tgt.images[1]) not in said

def test_validate_and_predict_alone_are_as_ever(pairs, tmp_path, capsys):
    src,tgt = pairs
    dls = uda_dls(src, tgt.unlabelled(), tgt, bs=2, n=2, size=(64,64), seed=3, device='cpu')
    l = uda_learner(dls, light('mit_b0', n_out=dls.c), 'source', path=tmp_path)
    with l.no_bar(): assert len(l.validate())==3 and len(l.get_preds()[0])==5
    assert not capsys.readouterr().err
    with l.no_bar(), l.no_logging(): fit(l)
    capsys.readouterr()
    with l.no_bar(): l.predict(tgt.images[0]); l.get_preds(dl=l.dls.test_dl(tgt.images[:2]))
    assert not capsys.readouterr().err, 'a prediction has no score that could be odd'
    with torch.no_grad(): next(l.model.parameters()).fill_(nan)
    with l.no_bar(): l.validate()
    assert 'valid_loss' in capsys.readouterr().err, 'a validation has one'

def test_a_full_disk_does_not_hide_the_cause(tmp_path, capsys, monkeypatch):
    import errno, os
    def full(a, b): raise OSError(errno.ENOSPC, 'No space left on device', str(b))
    monkeypatch.setattr(os, 'replace', full)
    text = stopped(toy([*terms(), Guard(out=tmp_path), spoil('mix')]))
    assert 'the loss of mix is nan' in text and 'It is kept' not in text and 'The disk is full' in capsys.readouterr().err and not [*tmp_path.iterdir()]

def test_a_learner_of_names_has_a_guard(pairs, tmp_path):
    src,tgt = pairs
    dls = uda_dls(src, tgt.unlabelled(), src, bs=2, n=6, size=(64,64), seed=3, device='cpu')
    for kw,do in (({}, 'stop'), (dict(guard='skip'), 'skip')):
        l = uda_learner(dls, light('mit_b0', n_out=dls.c), 'source', path=tmp_path/do, cbs=At(1, before_batch=lambda l: l.xb[0].fill_(nan)), **kw)
        if do=='skip': fit(l); assert l.recorder.metric_names[-2]=='skipped' and l.recorder.values[-1][-1]==1
        else: assert 'source image 0 of the batch' in stopped(l) and (tmp_path/'stop/faults/step_1.json').exists()

def test_a_net_with_names_of_its_own_is_not_shadowed(tmp_path):
    "fastai warns of a callback's attribute that the net has, too; `last`, `mean` and `out` are names that nets have"
    import warnings
    net = light('mit_b0', n_out=3); net.register_buffer('mean', torch.zeros(3)); net.last = net.out = net.loss_f = 1
    with warnings.catch_warnings():
        warnings.filterwarnings('error', 'You are shadowing')
        fit(toy([Pair(), Guard('skip', tmp_path), spoil('image')], net=net, n=4))

# --- several processes ------------------------------------------------------------------------------------------------------------------
def on_two(pairs, do, out):
    "Two ranks; the second has a bad gradient in its second step, which the first can't see"
    from pipa.ranks import place
    seed(place()[0]); src,tgt = pairs
    dls = uda_dls(src, tgt.unlabelled(), src, bs=1, n=8, size=(64,64), seed=3, device='cpu')
    def once(l): h = next(l.model.decode_head.parameters()).register_hook(lambda g: (h.remove(), g*nan)[1])
    x = At(1, **(dict(before_batch=once) if place()[0] else {}))
    l = uda_learner(dls, light('mit_b0', n_out=dls.c), 'self_training', guard=do, cbs=x, path=out)
    said = stopped(l) if do=='stop' else fit(l) and ''
    return dict(said=said, skipped=l.guard.total_skipped, t=l.mean_teacher.t, net=dict(l.model.state_dict()))

def test_ranks_leave_a_batch_out_together(pairs, tmp_path):
    from pipa.ranks import on_ranks
    a,b = on_ranks(on_two, 2, pairs, 'skip', tmp_path)
    assert all(torch.equal(v, b['net'][k]) and v.isfinite().all() for k,v in a['net'].items())
    assert (a['skipped'], b['skipped'], a['t'], b['t'])==(1, 1, 3, 3) and [p.name for p in (tmp_path/'faults').glob('*.json')]==['step_1_rank1.json']

def test_ranks_stop_together(pairs, tmp_path):
    from pipa.ranks import on_ranks
    a,b = on_ranks(on_two, 2, pairs, 'stop', tmp_path)
    assert 'a number on another process is not finite' in a['said'] and 'It is kept' not in a['said'] and 'the gradient of' in b['said'] and 'step_1_rank1' in b['said']
