"A run that was stopped anywhere, by anything, ends bit by bit as one that was not"
import errno, json, multiprocessing as mp, os, random, resource, shutil, signal, subprocess, sys, time, warnings, zipfile
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest, torch
from torch import nn
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
import fastai.callback.all # lr_find, fit_one_cycle
from pipa import cli
from pipa.runs import plan, resume, run as runs, state
from pipa.data import PairSet, folder, uda_dls
from pipa.guard import Guard
from pipa.hrda import hrda
from pipa.labels import space
from pipa.learner import uda_learner
from pipa.models import light
from pipa.bench.memory import *
from pipa.runs.resume import *
from pipa.runs.state import *
from tiny import city, seed

fork = mp.get_context('fork')
methods = 'source minent advseg advent fda self_training daformer mic hrda pixel patch pipa oracle'.split()

class Tiny(nn.Module):
    "An encoder with all that has a state: running statistics and random numbers"
    widths,stride = (8,8,12,16),4
    def __init__(self):
        super().__init__()
        def part(i, o, s): return nn.Sequential(nn.Conv2d(i, o, s+1, s, 1), nn.BatchNorm2d(o), nn.GELU(), nn.Dropout2d(.1))
        self.parts = nn.ModuleList(part(i, o, s) for i,o,s in ((3,8,4), (8,8,2), (8,12,2), (12,16,2)))
    def forward(self, x):
        return [x := p(x) for p in self.parts]

@pytest.fixture(scope='module')
def home(tmp_path_factory): return city(tmp_path_factory.mktemp('city'), n=4, size=(64,64))

pytestmark = pytest.mark.usefixtures('cache_home')

@pytest.fixture(autouse=True)
def interruptible():
    "Ctrl-C means what it means in a terminal: a shell lets its background jobs ignore it"
    old = signal.signal(signal.SIGINT, signal.default_int_handler); yield
    signal.signal(signal.SIGINT, old)

def make(home, path, method='pipa', *cbs, s=0, n=6, workers=0, keep=dict(), val=(0,1), **kw):
    "A small learner with a Checkpoint; `s` is the seed of everything"
    seed(s); Path(path).mkdir(exist_ok=True, parents=True)
    g,r = [folder(home/d/'images', home/d/'masks', 'minicity') for d in ('game', 'real')]
    dls = uda_dls(r if method=='oracle' else g, r.unlabelled(), r.take([*val]), bs=2, size=(64,64), n=n, device='cpu', num_workers=workers)
    net = hrda(Tiny(), dls.c, crop=(32,32), dim=16) if method=='hrda' else light(Tiny(), n_out=dls.c)
    if method in ('advseg', 'advent'): kw['host'] = dict(width=4)
    small = dict(hidden=8, crop=(32,32), thresh=.1, things=(5,), patch=dict(thresh=.05), pixel=dict(min_pixels=4)) | kw
    return uda_learner(dls, net, method, path=path, cbs=[CSVLogger('metrics.csv'), Checkpoint(**keep), *cbs], **small)

def fit(learn, n=2, f='fit_poly', **kw):
    with learn.no_bar(), learn.no_logging(): getattr(learn, f)(n, 1e-3, **kw)
    return learn

def weights(learn):
    nets = dict(s=learn.model) | ({'t':learn.mean_teacher.teacher} if hasattr(learn, 'mean_teacher') else {})
    return {f'{n}.{k}':v for n,m in nets.items() for k,v in m.state_dict().items()}

def rows(learn): return pd.read_csv(learn.path/'metrics.csv').drop(columns='time')

def equal(a, b):
    wa,wb = weights(a),weights(b)
    assert wa.keys()==wb.keys() and not [k for k in wa if not torch.equal(wa[k], wb[k])]
    pd.testing.assert_frame_equal(rows(a), rows(b), check_exact=True)
    assert torch.equal(torch.stack(a.recorder.losses), torch.stack(b.recorder.losses)) and a.recorder.lrs==b.recorder.lrs
    assert a.recorder.iters==b.recorder.iters and str(a.recorder.values)==str(b.recorder.values)

class Do(Callback):
    "Do something once that many steps are done"
    order = 500
    def __init__(self, at, f): self.when,self.f = at,f
    def after_batch(self):
        if self.training and self.train_iter==self.when: self.f()

def term(): os.kill(os.getpid(), signal.SIGTERM)

def stopped(learn, n=2, code=128+signal.SIGTERM, **kw):
    with pytest.raises(SystemExit) as e: fit(learn, n, **kw)
    assert e.value.code==code
    return learn

# the same end

quick = 'advent mic pipa'.split()
def long(*o): return pytest.param(*o, marks=pytest.mark.slow)

@pytest.mark.parametrize('method', [m if m in quick else long(m) for m in methods])
def test_stopped_within_an_epoch(home, tmp_path, method):
    "Every method, with and without workers: 4 steps of 6, in two epochs, and then a learner from another seed"
    w = methods.index(method)%3
    a = fit(make(home, tmp_path/'a', method))
    stopped(make(home, tmp_path/'b', method, Do(4, term), workers=w))
    b = make(home, tmp_path/'b', method, s=9, workers=w)
    assert b.resume()==(1,1)
    equal(a, fit(b))

@pytest.mark.parametrize('at', [1,4])
def test_a_term_that_begins_later(home, tmp_path, at):
    "Patch contrast begins with step 3, whether the run was stopped before it or after"
    build = lambda p, *cbs, **kw: make(home, tmp_path/p, 'pipa', *cbs, patch=dict(start=2, thresh=0.), **kw)
    a = fit(build('a')); stopped(build('b', Do(at, term)))
    b = build('b', s=9); assert b.resume()==divmod(at, 3)
    equal(a, fit(b)); assert a.patch_contrast.n==3

@pytest.mark.slow
@pytest.mark.parametrize('workers', [0,2])
@pytest.mark.parametrize('method', [*methods, 'mic+pipa', 'advent+pixel'])
def test_two_and_two_are_four(home, tmp_path, method, workers):
    a = fit(make(home, tmp_path/'a', method, workers=workers), 4)
    with pytest.raises(ZeroDivisionError): fit(make(home, tmp_path/'b', method, Do(7, lambda: 1/0), workers=workers), 4)
    b = make(home, tmp_path/'b', method, s=9, workers=workers)
    assert b.resume()==(2,0)
    equal(a, fit(b, 4))

def test_the_random_states_are_those_of_the_uninterrupted_run(home, tmp_path):
    def draws(): return random.random(),np.random.rand(),float(torch.rand(()))
    fit(make(home, tmp_path/'a')); want = draws()
    stopped(make(home, tmp_path/'b', 'pipa', Do(2, term)))
    b = make(home, tmp_path/'b', s=3); b.resume(); fit(b)
    assert draws()==want

def test_stopped_twice_in_one_epoch(home, tmp_path):
    a = fit(make(home, tmp_path/'a', n=10))
    stopped(make(home, tmp_path/'b', 'pipa', Do(6, term), n=10))
    b = make(home, tmp_path/'b', 'pipa', Do(8, term), s=1, n=10); assert b.resume()==(1,1); stopped(b)
    c = make(home, tmp_path/'b', s=2, n=10); assert c.resume()==(1,3); fit(c)
    equal(a, c)

def test_stopped_after_each_epoch(home, tmp_path):
    "What was asked for stays what it was, though the rate is another by now"
    a = fit(make(home, tmp_path/'a', 'self_training'), 3)
    for s in (3, 6, None):
        learn = make(home, tmp_path/'b', 'self_training', *([Do(s+1, lambda: 1/0)] if s else []), s=0 if s==3 else 7)
        if s!=3: assert learn.resume()==((s or 9)//3-1,0)
        if s:
            with pytest.raises(ZeroDivisionError): fit(learn, 3)
    equal(a, fit(learn, 3))

def test_stopped_while_it_is_validated(home, tmp_path):
    class Then(Callback):
        def before_validate(self):
            if self.epoch==0: term()
    a = fit(make(home, tmp_path/'a'))
    stopped(make(home, tmp_path/'b', 'pipa', Then(), workers=1))
    b = make(home, tmp_path/'b', s=5); assert b.resume()==(0,3)
    equal(a, fit(b))

def test_an_epoch_that_is_not_a_whole_number_of_batches(home, tmp_path):
    a = fit(make(home, tmp_path/'a', n=7))
    stopped(make(home, tmp_path/'b', 'pipa', Do(2, term), n=7, workers=1))
    b = make(home, tmp_path/'b', n=7, workers=2); b.resume()
    equal(a, fit(b))

def test_kept_workers(home, tmp_path):
    def build(p, *cbs, s=0):
        l = make(home, p, 'source', *cbs, s=s, n=10); l.dls.train = l.dls.train.new(num_workers=2, persistent_workers=True); return l
    a = fit(build(tmp_path/'a'), 3)
    stopped(build(tmp_path/'b', Do(7, term)), 3)
    b = build(tmp_path/'b', s=4)
    b.dls.train.one_batch(); [*b.dls.train]   # its workers know another seed by now
    b.resume()
    equal(a, fit(b, 3))

class Scaled(MixedPrecision):
    "What fastai's MixedPrecision does, with half precision on the CPU, and a scaler that moves"
    def before_fit(self):
        self.autocast,self.scales = torch.autocast('cpu', dtype=torch.bfloat16),[]
        self.learn.scaler = torch.amp.GradScaler('cpu', init_scale=2.**20, growth_interval=2)

@pytest.mark.parametrize('cbs', [lambda: [Scaled()], lambda: [GradientAccumulation(5), GradientClip(.5)],
    lambda: [SaveModelCallback('miou'), EarlyStoppingCallback('valid_loss', patience=2), ReduceLROnPlateau('valid_loss', patience=1)]], ids=['scaler', 'accumulation', 'trackers'])
def test_callbacks_of_fastai(home, tmp_path, cbs):
    a = make(home, tmp_path/'a', 'self_training', *cbs()); fit(a, 4, 'fit')
    b = make(home, tmp_path/'b', 'self_training', *cbs(), Do(8, term)); stopped(b, 4, f='fit')
    b = make(home, tmp_path/'b', 'self_training', *cbs(), s=3); b.resume(); fit(b, 4, 'fit')
    equal(a, b)
    for t in ('save_model', 'early_stopping', 'reduce_lr_on_plateau'):
        if hasattr(a, t): assert getattr(a, t).best==getattr(b, t).best and getattr(getattr(a, t), 'wait', 0)==getattr(getattr(b, t), 'wait', 0)

def test_a_cycle(home, tmp_path):
    "Any schedule of fastai is a function of the share that is done"
    a = fit(make(home, tmp_path/'a', 'source'), f='fit_one_cycle')
    stopped(make(home, tmp_path/'b', 'source', Do(2, term)), f='fit_one_cycle')
    b = make(home, tmp_path/'b', 'source', s=3); b.resume()
    equal(a, fit(b, f='fit_one_cycle'))
    assert a.recorder.hps==b.recorder.hps

def test_a_term_with_a_state_of_its_own(home, tmp_path):
    "The discriminator and its optimizer"
    a = fit(make(home, tmp_path/'a', 'advent')); want = a.adv_ent.state_dict()
    stopped(make(home, tmp_path/'b', 'advent', Do(2, term)))
    b = make(home, tmp_path/'b', 'advent', s=3); b.resume(); fit(b)
    got = b.adv_ent.state_dict()
    assert want['steps']==got['steps']==6 and all(torch.equal(v, got['net'][k]) for k,v in want['net'].items())

def test_a_run_may_go_on_with_another_guard(home, tmp_path):
    "After a stop `--guard skip` is the natural next word; what was skipped stays counted"
    a = fit(make(home, tmp_path/'a', 'self_training'))
    first = Guard('skip'); first.total_skipped = 3
    stopped(make(home, tmp_path/'b', 'self_training', first, Do(4, term)))
    g = Guard(); b = make(home, tmp_path/'b', 'self_training', g, s=9); b.resume()
    equal(a, fit(b)); assert g.total_skipped==3

@pytest.mark.parametrize('how,head,column,guards', [('skip',None,True,'skip'), ('stop',None,False,'stop'), ('off',None,False,None),
    ('skip','epoch,miou',False,'skip'), ('stop','epoch,skipped',True,'stop'), ('off','epoch,skipped',True,'stop')])
def test_a_log_that_goes_on_keeps_its_columns(tmp_path, how, head, column, guards):
    log = tmp_path/'metrics.csv'
    if head: log.write_text(head+'\n0,1\n')
    cbs,learn = [],SimpleNamespace(metrics=[]); learn.add_cb = cbs.append
    class M(list):
        def __iadd__(self, o): self.append(o); return self
    learn.metrics = M(); runs.watch(learn, how, log)
    assert [m.name for m in learn.metrics]==['skipped']*column and [g.do for g in cbs]==[guards]*bool(guards)

# killed at any moment, in processes of their own

def say_to(file, mode='w'):
    "What this process says goes to a file"
    sys.stdout = sys.stderr = open(file, mode, buffering=1)
    for o in (1, 2): os.dup2(sys.stdout.fileno(), o)

def child(home, path, out, n, keep, workers, before=None):
    "Go on if there is something to go on from, and keep the weights at the end"
    path.parent.mkdir(parents=True, exist_ok=True)
    say_to(path.with_suffix('.log'), 'a')
    if before: before()
    learn = make(home, path, workers=workers, n=8, keep=keep, s=random.randrange(99) if checkpoints(path) else 0)
    if checkpoints(path): learn.resume()
    (path/'ready').touch()
    fit(learn, n)
    torch.save(weights(learn), out)

def attempt(home, path, n, keep=dict(steps=1), workers=0, kill=None, after=0., **kw):
    "One process; gives its exit code"
    (path/'ready').unlink(missing_ok=True)
    p = fork.Process(target=child, args=(home, path, path.with_suffix('.pt'), n, keep, workers), kwargs=kw); p.start()
    if kill:
        end = time.time()+60
        while not (path/'ready').exists() and p.is_alive() and time.time()<end: time.sleep(.01)
        time.sleep(after)
        if p.is_alive(): os.kill(p.pid, kill)
    p.join(1200)   # a machine with other work may need long; a process that hangs must not stay
    if p.is_alive(): p.kill(); p.join(); pytest.fail(f'a process ran for 20 minutes:\n{path.with_suffix(".log").read_text()[-2000:]}')
    return p.exitcode

def same_end(home, a, b, n):
    wa,wb = [torch.load(p.with_suffix('.pt')) for p in (a, b)]
    assert not [k for k in wa if not torch.equal(wa[k], wb[k])], b.with_suffix('.log').read_text()
    ra,rb = [pd.read_csv(p/'metrics.csv').drop(columns='time') for p in (a, b)]
    pd.testing.assert_frame_equal(ra, rb, check_exact=True)
    assert ra.epoch.tolist()==[*range(n)]

def sound(path):
    "What is there under its name is whole; gives the place of the newest"
    for f in checkpoints(path): assert read_state(f)[0]['pipa_checkpoint']==1
    return read_state(path)[0]['at'] if checkpoints(path) else (0,0)

def killed_again_and_again(home, tmp_path, n, kills, workers, seed):
    a,b,rng = tmp_path/'a',tmp_path/'b',random.Random(seed)
    assert attempt(home, a, n, workers=workers)==0, a.with_suffix('.log').read_text()
    at,seen = (0,0),set()
    for i in range(kills):
        sig = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT][i%3]
        code = attempt(home, b, n, workers=workers, kill=sig, after=rng.random()*1.2)
        now = sound(b)
        assert now>=at, f'{now} after {at}: something was lost'
        at = now
        if code==0: break
        seen.add(code)
        log = b.with_suffix('.log').read_text()
        if sig!=signal.SIGKILL: assert f'Stopped by {sig.name}' in log and 'learn.resume()' in log, (code, log)
    assert seen, 'it was never killed'
    if code: assert attempt(home, b, n, workers=workers)==0, b.with_suffix('.log').read_text()
    same_end(home, a, b, n)
    assert not [*b.glob('.checkpoint*')], 'what a killed process left is removed'

@pytest.mark.slow
def test_killed(home, tmp_path): killed_again_and_again(home, tmp_path, 5, 3, 1, 3)

@pytest.mark.slow
@pytest.mark.parametrize('s', range(4))
def test_killed_many_times(home, tmp_path, s): killed_again_and_again(home, tmp_path, 20, 40, s%3, s)

def test_disk_full(home, tmp_path):
    "No file may be larger than half a checkpoint, from the third epoch on: training goes on, says so, and stops without loss"
    a,b = tmp_path/'a',tmp_path/'b'
    assert attempt(home, a, 4)==0
    class Full(Callback):
        order = 600
        def before_epoch(self):
            size = checkpoints(self.path)[0].stat().st_size if self.epoch==2 else 0
            if size: resource.setrlimit(resource.RLIMIT_FSIZE, (size//2, size//2))
    def full():
        global make
        build = make
        def make(*args, **kw): return build(*args, **kw).add_cb(Full())
    assert attempt(home, b, 4, keep={}, before=full)==0, b.with_suffix('.log').read_text()
    log = b.with_suffix('.log').read_text()
    assert 'No checkpoint could be written' in log and '`'+str(b/'checkpoint_002_000000.pt')+'` stays' in log
    assert [p.name for p in checkpoints(b)]==['checkpoint_002_000000.pt', 'checkpoint_001_000000.pt'] and sound(b)==(2,0)
    same_end(home, a, b, 4)
    assert attempt(home, b, 4, keep={})==0
    same_end(home, a, b, 4)

@pytest.mark.parametrize('workers', [long(0), 1, long(2)])
def test_exception_in_a_worker(home, tmp_path, workers):
    a,b = tmp_path/'a',tmp_path/'b'
    assert attempt(home, a, 3, workers=workers)==0
    def broken():
        f = PairSet.__getitem__
        def get(self, ticket):
            if ticket[3]%7==3: raise OSError('the share with the images is away')
            return f(self, ticket)
        PairSet.__getitem__ = get
    assert attempt(home, b, 3, keep={}, workers=workers, before=broken)==1
    assert 'the share with the images is away' in b.with_suffix('.log').read_text()
    sound(b)
    assert attempt(home, b, 3, workers=workers)==0
    same_end(home, a, b, 3)

# files

@pytest.fixture(scope='module')
def two(home, tmp_path_factory):
    "A run with two checkpoints"
    learn = make(home, tmp_path_factory.mktemp('two'), 'source'); fit(learn)
    return learn

def copied(two, to):
    for f in checkpoints(two.path): (to/f.name).write_bytes(f.read_bytes())
    return checkpoints(to)

def test_names_and_number_of_checkpoints(two):
    assert [p.name for p in checkpoints(two.path)]==['checkpoint_002_000000.pt', 'checkpoint_001_000000.pt']

def flat(o, at=''):
    if isinstance(o, dict): return {k:v for n,x in o.items() for k,v in flat(x, f'{at}.{n}').items()}
    if isinstance(o, (list,tuple)): return {k:v for n,x in enumerate(o) for k,v in flat(x, f'{at}.{n}').items()}
    return {at: (o.dtype, o.shape, o.contiguous().numpy().tobytes()) if isinstance(o, torch.Tensor) else o}

def test_damaged_files_are_never_believed(two, tmp_path, capsys):
    "Cut off anywhere, or a bit turned anywhere: the one before is taken, or the content is what it was"
    new,old = copied(two, tmp_path)
    good,rng,seen = new.read_bytes(),random.Random(0),set()
    want = repr(flat(torch.load(new, weights_only=True)))
    for i in range(40):
        bad = bytearray(good)
        if i%3: bad[rng.randrange(len(bad))] ^= 1<<rng.randrange(8)
        else: bad = bad[:rng.randrange(len(bad))]
        new.write_bytes(bad)
        state,file = read_state(tmp_path)
        seen.add(file.name)
        if file==new: assert repr(flat(state))==want
        else: assert state['at']==(1,0) and 'is damaged' in capsys.readouterr().out
    assert old.name in seen

def test_both_damaged(two, tmp_path):
    for f in copied(two, tmp_path): f.write_bytes(b'x')
    with pytest.raises(ValueError, match='begin anew'): read_state(tmp_path)

def test_strangers_run_nothing(tmp_path):
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'was here'),)
    f = tmp_path/'checkpoint_001_000000.pt'; torch.save(dict(pipa_checkpoint=1, at=(1,0), x=Evil()), f)
    with pytest.raises(ValueError, match='damaged or no checkpoint'): read_state(f)
    assert not (tmp_path/'was here').exists()

def test_no_checkpoint_of_ours(tmp_path):
    torch.save(dict(w=torch.ones(2)), tmp_path/'checkpoint_001_000000.pt')
    with pytest.raises(ValueError, match='no checkpoint of this version'): read_state(tmp_path)
    with pytest.raises(FileNotFoundError, match='nothing to go on from'): read_state(tmp_path/'..'/tmp_path.parent)
    with pytest.raises(FileNotFoundError, match='check the path'): read_state(tmp_path/'nope')

def test_the_folder_may_have_any_name(two, tmp_path):
    f = write_state(tmp_path/'Läufe 🚗/x y', read_state(two.path)[0])
    assert read_state(f.parent)[0]['at']==(2,0) and [*f.parent.iterdir()]==[f]

# what differs

def test_other_settings_are_named(home, tmp_path):
    stopped(make(home, tmp_path, 'self_training', Do(2, term)))
    b = make(home, tmp_path, 'self_training', alpha=.9); b.resume()
    with pytest.raises(ValueError, match=r'mean_teacher\.alpha was 0\.999 and is 0\.9\. '): fit(b)
    for n,kw,said in ((3, {}, 'epochs was 2 and is 3'), (2, dict(warmup=.5), 'schedule of lr was'), (2, dict(lr=2e-3), 'lr was')):
        b = make(home, tmp_path, 'self_training'); b.resume()
        with pytest.raises(ValueError, match=said), b.no_bar(), b.no_logging(): b.fit_poly(n, **{'lr':1e-3, **kw})
    b = make(home, tmp_path, 'mic', n=8); b.resume()
    with pytest.raises(ValueError, match=r'steps was 3 and is 4.*mic\.w was not there and is 1|mic\.w was not there and is 1.*steps was 3 and is 4'): fit(b)

def test_differences_may_be_accepted(home, tmp_path, capsys):
    stopped(make(home, tmp_path, 'self_training', Do(2, term)))
    b = make(home, tmp_path, 'self_training', alpha=.9); b.resume(strict=False); fit(b)
    assert 'mean_teacher.alpha was 0.999 and is 0.9' in capsys.readouterr().out and len(rows(b))==2

def test_other_images_are_named(home, tmp_path):
    stopped(make(home, tmp_path/'a', 'source', Do(2, term)))
    more = city(tmp_path/'more', n=5, size=(64,64))
    b = make(more, tmp_path/'a', 'source'); b.resume()
    with pytest.raises(ValueError, match='source images was 4, from 0.png to 3.png and is 5'): fit(b)

@pytest.mark.parametrize('first', [True, False])
def test_a_compiled_net_and_a_plain_one_go_on_from_each_other(home, tmp_path, first):
    "Student, teacher, gradients: their names differ by the words of the wrapper"
    def build(p, wrap, *cbs, **kw):
        learn = make(home, tmp_path/p, 'self_training', *cbs, **kw)
        if wrap: learn.model.backbone = torch.compile(learn.model.backbone, backend='eager'); learn.model = torch.compile(learn.model, backend='eager')
        return learn
    bare = lambda learn: {k.replace('_orig_mod.', ''):v for k,v in weights(learn).items()}
    a = fit(build('a', False))
    stopped(build('b', first, Do(4, term)))
    b = build('b', not first, s=9)
    assert b.resume()==(1,1)
    fit(b)
    wa,wb = bare(a),bare(b)
    assert wa.keys()==wb.keys() and all(torch.allclose(wa[k].float(), wb[k].float(), atol=1e-5) for k in wa)

def test_another_net_is_named(home, tmp_path):
    stopped(make(home, tmp_path, 'source', Do(2, term)))
    b = make(home, tmp_path, 'pipa')
    with pytest.raises(ValueError, match='of another net: pro'): b.resume()

def test_a_finished_run(home, tmp_path, capsys):
    a = fit(make(home, tmp_path, 'source')); was = rows(a)
    b = make(home, tmp_path, 'source', s=3); b.resume(); fit(b)
    assert 'all epochs are done' in capsys.readouterr().out
    equal(a, b)
    assert {m.name:m for m in b.metrics}['miou'].value==was.miou.iloc[-1]

# what else a callback may not do

def test_only_a_fit_writes(home, tmp_path):
    l = make(home, tmp_path, 'self_training')
    with l.no_bar(), l.no_logging(): l.validate(); l.get_preds(); l.lr_find(num_it=3, show_plot=False)
    assert not checkpoints(tmp_path)
    fit(l); was = [(p.name, p.stat().st_mtime_ns) for p in checkpoints(tmp_path)]
    with l.no_bar(), l.no_logging(): l.validate()
    assert was and was==[(p.name, p.stat().st_mtime_ns) for p in checkpoints(tmp_path)]

def test_signals_mean_what_they_meant_before(home, tmp_path):
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    fit(make(home, tmp_path/'a', 'source'), 1)
    stopped(make(home, tmp_path/'b', 'source', Do(1, term)))
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]==before
    with pytest.raises(ZeroDivisionError): fit(l := make(home, tmp_path/'c', 'source', Do(1, lambda: 1/0)))
    with pytest.raises(KeyboardInterrupt): os.kill(os.getpid(), signal.SIGINT); time.sleep(1)   # outside of the fit
    l.checkpoint.let_go()
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]==before

def test_a_second_signal_is_obeyed(home, tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGINT); time.sleep(1)
        raise AssertionError('still here')
    with pytest.raises(KeyboardInterrupt) as e: fit(make(home, tmp_path, 'source', Do(2, twice)))
    assert not e.value.args and not checkpoints(tmp_path)

def test_a_signal_to_the_whole_group(home, tmp_path):
    "From a launcher or a scheduler: workers get it too, and stay, for what they load is needed to end the step"
    def all_of_us(): subprocess.run(['kill', '-TERM', '--', f'-{os.getpgrp()}'], start_new_session=True); time.sleep(1)   # not from their parent
    def go():
        os.setpgid(0, 0); say_to(tmp_path/'log')
        fit(make(home, tmp_path/'b', 'source', Do(4, all_of_us), workers=2))
    p = fork.Process(target=go); p.start(); p.join(200)
    assert p.exitcode==128+signal.SIGTERM, (tmp_path/'log').read_text()
    a = fit(make(home, tmp_path/'a', 'source'))
    b = make(home, tmp_path/'b', 'source', s=5); assert b.resume()==(1,1)
    equal(a, fit(b))

def test_workers_end_with_their_process(home, tmp_path):
    "Killed, it leaves nobody behind; and one that ends by itself can end them"
    def go(end):
        learn = make(home, tmp_path/'c', 'source', Do(1, end), workers=2, n=64)   # more than is loaded ahead: no worker is done by then
        fit(learn)
    def tell(): (tmp_path/'pids').write_text(' '.join(str(o.pid) for o in mp.active_children()))
    def killed(): tell(); os.kill(os.getpid(), signal.SIGKILL)
    def ended(): tell(); [o.terminate() for o in mp.active_children()]; [o.join(20) for o in mp.active_children()]; os._exit(7)
    for end,code in ((killed, -signal.SIGKILL), (ended, 7)):
        p = fork.Process(target=go, args=(end,)); p.start(); p.join(100); assert p.exitcode==code
        pids = [int(o) for o in (tmp_path/'pids').read_text().split()]; assert len(pids)==2
        limit = time.time()+(30 if code<0 else 5)
        while any(alive(o) for o in pids) and time.time()<limit: time.sleep(.1)
        assert not any(alive(o) for o in pids)

def alive(pid):
    try: return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0]!='Z'
    except OSError: return False

def test_a_signal_that_is_ignored_stays_ignored(home, tmp_path):
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try: fit(make(home, tmp_path, 'source', Do(1, lambda: os.kill(os.getpid(), signal.SIGHUP))), 1)
    finally: signal.signal(signal.SIGHUP, old)

def test_a_loader_without_numbers_begins_its_epoch_again(home, tmp_path, capsys):
    "Other loaders go on between epochs, where they draw the same numbers"
    from fastai.data.load import DataLoader
    from fastai.data.core import DataLoaders
    from tiny import pairs
    def build(p, *cbs, s=0):
        l = make(home, p, 'source', *cbs)
        l.dls = DataLoaders(DataLoader([*zip(*(o.repeat_interleave(4, 0) for o in pairs()))], bs=2, shuffle=True), l.dls.valid); l.dls.n_inp = 1
        seed(s+1); return l
    a = fit(build(tmp_path/'a'))
    b = build(tmp_path/'b', Do(6, term)); stopped(b)
    assert [p.name for p in checkpoints(tmp_path/'b')]==['checkpoint_001_000000.pt'] and 'epoch 1, step 2' in capsys.readouterr().err
    c = build(tmp_path/'b', s=4); assert c.resume()==(1,0); equal(a, fit(c))

def test_every_so_many_minutes(home, tmp_path):
    l = make(home, tmp_path, 'source', keep=dict(minutes=1e-6)); seen = []
    l.add_cb(Do(5, lambda: seen.extend(p.name for p in checkpoints(tmp_path)))); fit(l)
    assert seen==['checkpoint_001_000001.pt', 'checkpoint_001_000000.pt']

def test_an_earlier_fit_is_named(home, tmp_path, capsys):
    fit(make(home, tmp_path, 'source'))
    fit(make(home, tmp_path, 'source'), 1)
    assert 'is of an earlier fit' in capsys.readouterr().out and [p.name for p in checkpoints(tmp_path)]==['checkpoint_001_000000.pt']

def test_one_process_a_folder(tmp_path):
    def other(): sys.exit(3 if claimed(tmp_path) else 4)
    def claimed(p):
        try:
            with claim(p): return True
        except ValueError as e: assert 'Another process works in' in str(e)
    with claim(tmp_path): p = fork.Process(target=other); p.start(); p.join(); assert p.exitcode==4 and (tmp_path/'.lock').exists()
    assert not (tmp_path/'.lock').exists()
    p = fork.Process(target=other); p.start(); p.join(); assert p.exitcode==3

def test_a_lock_that_is_removed_meanwhile(tmp_path, monkeypatch):
    "The owner ends between our opening of the file and our lock: what we have then is no longer the file, and we take the new one"
    import fcntl
    lockf,inodes = fcntl.lockf,[]
    def late(f, how):
        inodes.append(os.fstat(f.fileno()).st_ino)
        if len(inodes)==1: (tmp_path/'.lock').unlink()
        if len(inodes)==2: (tmp_path/'.lock').rename(tmp_path/'old'); (tmp_path/'.lock').touch()   # another one made a new one
        return lockf(f, how)
    monkeypatch.setattr(fcntl, 'lockf', late)
    with claim(tmp_path): assert os.stat(tmp_path/'.lock').st_ino==inodes[-1] and len(inodes)==3
    assert not (tmp_path/'.lock').exists()

def test_a_disk_without_locks_is_no_error(tmp_path, monkeypatch):
    import fcntl
    def no(f, how): raise OSError(errno.ENOLCK, 'No locks available')
    monkeypatch.setattr(fcntl, 'lockf', no)
    with claim(tmp_path): pass
    assert not [*tmp_path.iterdir()]

@pytest.mark.slow
def test_nobody_is_ever_two(tmp_path):
    "Four processes take the folder and let it go, as fast as they can, for some seconds: nobody meets another one inside"
    def work(i, met, times):
        end = time.time()+4
        while time.time()<end:
            try:
                with claim(tmp_path/'run'):
                    with inside: n.value += 1; met.value += n.value>1; times.value += 1
                    time.sleep(random.random()*.002)
                    with inside: n.value -= 1
            except ValueError: pass
    (tmp_path/'run').mkdir()
    inside,n,met,times = fork.Lock(),fork.Value('i'),fork.Value('i'),fork.Value('i')
    ps = [fork.Process(target=work, args=(i, met, times)) for i in range(4)]
    for p in ps: p.start()
    for p in ps: p.join(); assert p.exitcode==0
    assert met.value==0 and times.value>100 and not [*(tmp_path/'run').iterdir()]

# the commands

opts = dict(epochs=2, unlabelled=2, steps=3, bs=2, size='64x64', crop='64x64', start=0, thresh=.1, recipe='off')

@pytest.fixture(scope='module')
def data(home, tmp_path_factory):
    to = tmp_path_factory.mktemp('cli')/'town'; to.mkdir()
    for a,b in (('game','source'), ('real','target'), ('real','valid')): (to/b).symlink_to(home/a)
    (to/'codes.txt').write_text('\n'.join(space('minicity').codes))
    return to

def command(data, at=None, sig=signal.SIGTERM, log='log', f=cli.pipa_train, **kw):
    "In a process of its own; gives exit code and what it said"
    def go():
        say_to(log)
        sys.argv = ['pipa_train', f'--data={data}', *(f'--{k}' if v is True else f'--{k}={v}' for k,v in kw.items())]
        if at: runs.uda_learner = partial_do(at, sig)
        f(data=str(data), **kw)
    p = fork.Process(target=go); p.start(); p.join(200)
    return p.exitcode,Path(log).read_text()

def partial_do(at, sig):
    def f(*args, cbs=(), **kw): return uda_learner(*args, cbs=[*cbs, Do(at, lambda: os.kill(os.getpid(), sig))], **kw)
    return f

@pytest.fixture(scope='module')
def through(data, tmp_path_factory):
    "The run folder of a command that nobody interrupted"
    out = tmp_path_factory.mktemp('through')/'run'
    code,said = command(data, out=str(out), log=out.with_suffix('.log'), **opts); assert not code, said
    return out

def same_folder(a, b):
    "Files and row are those of the uninterrupted run"
    names = {p.name for p in a.iterdir()}
    assert names=={p.name for p in b.iterdir()} and not [n for n in names if 'checkpoint' in n or 'lock' in n]
    for n in ('weights.safetensors', 'teacher.safetensors', 'classes.csv'): assert (a/n).read_bytes()==(b/n).read_bytes(), n
    ra,rb = [json.loads((o/'row.json').read_text()) for o in (a, b)]
    assert ra.pop('command').replace(f' --out={a}', '')==rb.pop('command').replace(f' --out={b}', '') and str(ra)==str(rb)

@pytest.mark.parametrize('sig', [signal.SIGTERM, long(signal.SIGINT)])
def test_the_command_goes_on(data, through, tmp_path, monkeypatch, sig):
    monkeypatch.chdir(tmp_path)
    code,said = command(data, at=4, sig=sig, out='b', **opts)
    assert code==128+sig and f'Stopped by {sig.name} at epoch 1, step 1 of 3' in said and '--resume' in said and 'Traceback' not in said, said
    names = {p.name for p in Path('b').iterdir()}
    assert names=={'config.json', 'metrics.csv', 'checkpoint_001_000001.pt', 'checkpoint_001_000000.pt'}, names
    code,said = command(data, out='b', resume=True); assert not code and 'epoch 1 of 2, step 1 of 3' in said, said
    same_folder(through, Path('b'))
    code,said = command(data, out='b', resume=True); assert not code and '`b` is finished, there is nothing to go on with.' in said

def test_sentences_of_the_command(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code,said = command(data, out='nowhere', resume=True)
    assert code==1 and said.strip().splitlines()[-1].startswith('pipa: `nowhere` holds no run that could go on')
    command(data, at=1, out='b', **opts)
    code,said = command(data, out='b', resume=True, bs=3, patch=.5)
    assert code==1 and 'begun with' in said and '--bs=2 and not 3' in said and '--patch=0.1 and not 0.5' in said and 'Traceback' not in said
    with claim('b'): code,said = command(data, out='b', resume=True); assert code==1 and 'Another process works in `b`' in said
    assert not Path('b/.lock').exists()

def test_killed_after_the_last_epoch(data, through, tmp_path, monkeypatch):
    "All epochs are done, but nothing is written yet"
    monkeypatch.chdir(tmp_path)
    def boom(*args, **kw): os.kill(os.getpid(), signal.SIGKILL)
    with monkeypatch.context() as m: m.setattr(runs, 'write_run', boom); assert command(data, out='b', **opts)[0]==-signal.SIGKILL
    code,said = command(data, out='b', resume=True); assert not code and 'all epochs are done' in said, said
    same_folder(through, Path('b'))

def test_a_study_finds_its_interrupted_runs(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = [f'--data={data}', *(f'--{k}={v}' for k,v in opts.items())]
    command(data, at=1, out='r/pipa_seed0', **opts)
    assert plan.interrupted(Path('r/pipa_seed0'), args)==Path('r/pipa_seed0')
    assert plan.interrupted(Path('r/pipa_seed0'), [*args, '--lr=.1']) is None and plan.interrupted(Path('r/mic_seed0'), args) is None
    def hold(q):
        with claim('r/pipa_seed0'): q.put(1); time.sleep(30)
    q = fork.Queue(); p = fork.Process(target=hold, args=(q,)); p.start(); q.get()
    try: assert plan.interrupted(Path('r/pipa_seed0'), args) is None, 'somebody works on it'
    finally: p.kill(); p.join()
    Path('r/pipa_seed0/row.json').write_text('{}')
    assert plan.interrupted(Path('r/pipa_seed0'), args) is None, 'it is finished'

# the data changed meanwhile

def other_codes(d): a,b,*more = (d/'codes.txt').read_text().split('\n'); (d/'codes.txt').write_text('\n'.join([b,a,*more]))
def other_picture(d, sub='target'): f = sorted((d/sub/'images').iterdir())[0]; f.write_bytes((d/sub/'images/1.png').read_bytes())
other = dict(classes=other_codes, target=other_picture, valid=lambda d: other_picture(d, 'valid'), more=lambda d: (d/'target/images/9.png').write_bytes((d/'target/images/1.png').read_bytes()),
    masks=lambda d: (d/'source/masks/0.png').write_bytes((d/'source/masks/1.png').read_bytes()))

@pytest.fixture
def own(data, tmp_path, monkeypatch):
    "Data of one's own, and a run of it that was stopped: within an epoch, or before its first checkpoint"
    monkeypatch.chdir(tmp_path)
    def make(at):
        shutil.copytree(data, 'd')
        if at: command('d', at=at, out='r', **opts)
        else:
            def boom(*a, **kw): os.kill(os.getpid(), signal.SIGKILL)
            with monkeypatch.context() as m: m.setattr(runs, 'plain_log', boom); command('d', out='r', **opts)
        assert bool(checkpoints('r'))==bool(at) and Path('r/config.json').exists()
    return make

@pytest.mark.parametrize('at', [4, None])
@pytest.mark.parametrize('what', other)
def test_other_data_are_refused(own, what, at):
    own(at); other[what](Path('d')); before = {p: p.read_bytes() for p in Path('r').iterdir() if p.name!='.lock'}
    code,said = command('d', out='r', resume=True)
    assert code==1 and 'begun with other data' in said and 'Traceback' not in said and {p: p.read_bytes() for p in Path('r').iterdir()}==before, said
    if what=='classes': assert 'was sky, building' in said and 'is building, sky' in said

def test_a_learner_refuses_other_data(home, tmp_path):
    shutil.copytree(home, tmp_path/'h'); stopped(make(tmp_path/'h', tmp_path/'r', 'source', Do(2, term)))
    f = tmp_path/'h/real/images/0.png'; f.write_bytes((tmp_path/'h/real/images/1.png').read_bytes())
    b = make(tmp_path/'h', tmp_path/'r', 'source'); b.resume()
    with pytest.raises(ValueError, match='not the one that was interrupted: target data was'): fit(b)

def test_a_copy_elsewhere_goes_on(own):
    "With other times and in another folder they are the same data"
    own(4); shutil.copytree('d', 'e', copy_function=shutil.copyfile); shutil.rmtree('d'); Path('d').symlink_to('e')
    code,said = command('d', out='r', resume=True); assert not code, said

# what a kill leaves

def test_nothing_stays_of_a_kill(own, monkeypatch):
    "Killed in the middle of a picture, then between the row and the end: no half file, no checkpoint"
    own(4); from pipa.draw import Fig
    def die(self, f, **kw): f.write(b'half'); f.flush(); os.kill(os.getpid(), signal.SIGKILL)
    with monkeypatch.context() as m: m.setattr(Fig, 'savefig', die); assert command('d', out='r', resume=True)[0]==-signal.SIGKILL
    assert [p for p in Path('r').iterdir() if p.name.startswith('.result.png.')]
    def boom(*a): os.kill(os.getpid(), signal.SIGKILL)
    with monkeypatch.context() as m: m.setattr(runs, 'drop_checkpoints', boom); assert command('d', out='r', resume=True)[0]==-signal.SIGKILL
    assert checkpoints('r') and Path('r/row.json').exists()
    code,said = command('d', out='r', resume=True); assert not code and 'is finished' in said
    assert not [p.name for p in Path('r').iterdir() if p.name[0]=='.' or 'checkpoint' in p.name]

def test_skipped_stays_a_column(data, tmp_path, monkeypatch):
    "Of a run with --guard skip that was killed before its first checkpoint, though a log was begun"
    monkeypatch.chdir(tmp_path)
    def boom(*a, **kw): Path('r/metrics.csv').write_text(''); os.kill(os.getpid(), signal.SIGKILL)
    with monkeypatch.context() as m: m.setattr(runs, 'plain_log', boom); command(data, out='r', guard='skip', **opts)
    code,said = command(data, out='r', resume=True); assert not code, said
    assert 'skipped' in pd.read_csv('r/metrics.csv')

def test_a_worker_that_was_killed_gets_a_sentence(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    def kill():
        kids = [int(o) for o in Path(f'/proc/{os.getpid()}/task/{os.getpid()}/children').read_text().split()]; os.kill(kids[0], signal.SIGKILL)
    def f(*args, cbs=(), **kw): return uda_learner(*args, cbs=[*cbs, Do(4, kill)], **kw)
    with monkeypatch.context() as m: m.setattr(runs, 'uda_learner', f); code,said = command(data, out='r', workers=1, **(opts | dict(steps=40)))
    last = said.strip().splitlines()[-1]; assert code==1 and last.startswith('pipa: A process that loads or draws images was killed') and '--resume' in last and 'Traceback' not in said, said
