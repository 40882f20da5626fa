"A run on several processes that was stopped anywhere, by anything, ends bit by bit as one that was not"
import json, os, random, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from torch.multiprocessing import ProcessExitedException
from safetensors.torch import load_file
from pipa.runs import resume, state
from pipa.ranks import on_ranks, place
from pipa.runs.state import checkpoints, pack, read_state
from test_resume import data, fit, flat, interruptible, make, weights
from tiny import Watch, city

@pytest.fixture(scope='module')
def home(tmp_path_factory): return city(tmp_path_factory.mktemp('city'), n=4, size=(64,64))

pytestmark = pytest.mark.usefixtures('cache_home')

class On(Callback):
    "Signals to some ranks: `{rank: signals}`, when that many steps are done, or before a validation"
    order = 500
    def __init__(self, when, sigs): self.when,self.sigs = when,sigs
    def send(self):
        for s in self.sigs.get(place()[0], ()): os.kill(os.getpid(), s)
    def after_batch(self):
        if self.training and self.train_iter==self.when: self.send()
    def before_validate(self):
        if self.when=='validate' and self.epoch==0: self.send()

class Boom(Callback):
    "An error on all ranks, before the second epoch's first step"
    def before_batch(self):
        if self.training and self.epoch==1: 1/0

def part(home, path, method, *cbs, go_on=False, s=0, n=12, epochs=2, more=list, before=None, **kw):
    "What a rank does, and what it has at the end; ranks begin with seeds of their own"
    if before: before()
    learn = make(home, path, method, *cbs, *more(), Watch(), s=s+10*place()[0], n=n, **kw)
    at,code = learn.resume() if go_on else None,0
    try: fit(learn, epochs)
    except (SystemExit, KeyboardInterrupt) as e: code = getattr(e, 'code', 'Ctrl-C')
    except ZeroDivisionError: code = 'boom'
    draws = random.random(),float(np.random.rand()),float(torch.rand(()))
    rec = learn.recorder
    return pack(dict(code=code, at=at, weights=weights(learn), opt=learn.opt.state_dict(), bank=getattr(getattr(learn, 'patch_contrast', None), 'bank', []),
        losses=[float(o) for o in rec.losses], steps=learn.watch.seen, lrs=rec.lrs, values=str(rec.values), draws=draws, terms=[float(c.total) for c in learn.cbs if hasattr(c, 'total')]))

def equal(a, b, folders):
    "Each rank has what it has in the run without a stop, and the log is one"
    for r,(x,y) in enumerate(zip(a, b, strict=True)):
        assert x['steps'][-len(y['steps']):]==y['steps'], r
        x,y = [flat({k:v for k,v in o.items() if k not in ('at', 'steps')}) for o in (x, y)]
        assert x.keys()==y.keys() and not [k for k in x if str(x[k])!=str(y[k])], (r, [k for k in x if str(x[k])!=str(y[k])][:9])
    ra,rb = [pd.read_csv(p/'metrics.csv').drop(columns='time') for p in folders]
    pd.testing.assert_frame_equal(ra, rb, check_exact=True)

@pytest.fixture(scope='module')
def through(home, tmp_path_factory):
    "Runs without a stop, each made once"
    made = {}
    def get(method):
        if method not in made:
            path = tmp_path_factory.mktemp('through')
            made[method] = path,on_ranks(lambda: part(home, path, method), 2)
        return made[method]
    return get

term,ctrl_c = signal.SIGTERM,signal.SIGINT

@pytest.mark.parametrize('method,workers,sigs', [('self_training', 1, {1:[term]}), pytest.param('pipa', 0, {0:[term], 1:[term]*3}, marks=pytest.mark.slow), pytest.param('pipa', 1, {0:[ctrl_c]}, marks=pytest.mark.slow)])
def test_stopped_within_an_epoch(home, tmp_path, through, capfd, method, workers, sigs):
    "A signal to one of two ranks, or several to both: both stop after the fourth step of six, and others, from other seeds, go on"
    path,a = through(method)
    got = on_ranks(lambda: part(home, tmp_path, method, On(4, sigs), workers=workers), 2)
    assert [o['code'] for o in got]==(['Ctrl-C', 130] if sigs.get(0)==[ctrl_c] else [143,143])
    assert [p.name for p in checkpoints(tmp_path)]==['checkpoint_001_000001.pt', 'checkpoint_001_000000.pt']
    if sigs.get(0)!=[ctrl_c]: assert capfd.readouterr().err.count('Stopped by SIGTERM at epoch 1, step 1 of 3.')==1, 'rank 0 says it'
    b = on_ranks(lambda: part(home, tmp_path, method, go_on=True, s=5, workers=1-workers), 2)
    assert [o['at'] for o in b]==[(1,1)]*2 and capfd.readouterr().out.count('Going on from')==1
    equal(a, b, (path, tmp_path))
    assert a[0]['steps']!=a[1]['steps'] and a[0]['draws']!=a[1]['draws'], 'ranks do have something for themselves'

def test_what_is_the_same_is_there_once(home, tmp_path):
    on_ranks(lambda: part(home, tmp_path, 'pipa', On(4, {0:[term]})), 2)
    state,file = read_state(tmp_path)
    assert [len(state['ranks']), state['ranks'][0]]==[2, {}]
    own = {'.'.join(map(str, p)) for p in state['ranks'][1]}
    assert {'rng.random_state', 'rng.numpy_state', 'loaders', 'callbacks.pair.total', 'callbacks.mix.total'}<=own
    assert not [k for k in own if k.startswith(('student', 'opt', 'callbacks.mean_teacher')) or k.endswith('bank') or k=='callbacks'], own
    nets = sum(v.numel()*v.element_size() for o in (state['student'], state['callbacks']['mean_teacher']['teacher']) for v in o.values())
    torch.save(state['ranks'], tmp_path/'own'); assert (tmp_path/'own').stat().st_size<nets/2
    with pytest.raises(ValueError, match='is of a run on 2 processes, and now there is one process: start it on 2 processes'): make(home, tmp_path, 'pipa').resume()

@pytest.mark.slow
@pytest.mark.parametrize('val,where', [((0,1,2), (0,3)), ((0,), (1,0))], ids=['two and one', 'one and none'])
def test_stopped_while_it_is_validated(home, tmp_path, val, where):
    "Rank 1 has a batch less: both stop after the batches that both have"
    run = lambda p, *cbs, **kw: on_ranks(lambda: part(home, tmp_path/p, 'self_training', *cbs, val=val, more=lambda: [Bs1()], **kw), 2)
    a = run('a')
    assert [o['code'] for o in run('b', On('validate', {1:[term]}))]==[143]*2
    b = run('b', go_on=True, s=5)
    assert [o['at'] for o in b]==[where]*2
    equal(a, b, (tmp_path/'a', tmp_path/'b'))

class Bs1(Callback):
    "Validate one image at a time"
    order = -90
    def before_fit(self): self.dls.loaders[1].bs = 1

@pytest.mark.slow
def test_gradients_that_are_accumulated(home, tmp_path):
    "They are summed up over the ranks at the end only: until then each has its own"
    run = lambda p, *cbs, **kw: on_ranks(lambda: part(home, tmp_path/p, 'self_training', *cbs, more=lambda: [GradientAccumulation(4)], **kw), 2)
    a = run('a'); run('b', On(5, {1:[term]}))
    assert [p for p in read_state(tmp_path/'b')[0]['ranks'][1] if p[0]=='grads']
    b = run('b', go_on=True, s=5)
    equal(a, b, (tmp_path/'a', tmp_path/'b'))

@pytest.mark.slow
def test_stopped_at_the_end_of_an_epoch(home, tmp_path, through):
    path,a = through('self_training')
    assert [o['code'] for o in on_ranks(lambda: part(home, tmp_path, 'self_training', Boom()), 2)]==['boom']*2
    b = on_ranks(lambda: part(home, tmp_path, 'self_training', go_on=True, s=5), 2)
    assert [o['at'] for o in b]==[(1,0)]*2
    equal(a, b, (path, tmp_path))

def test_all_are_killed_while_one_writes(home, tmp_path, through):
    "Half of the third file is there; the clock says something else on each rank, and that of rank 0 counts"
    path,a = through('self_training')
    def before():
        if place()[0]: resume.time.monotonic = lambda: 0.   # never late
        pids = torch.tensor([os.getpid()]*2); torch.distributed.broadcast(pids[:1], 0); torch.distributed.broadcast(pids[1:], 1)
        save,seen = torch.save,[]
        def half(o, f):
            if isinstance(o, dict) and 'student' in o: seen.append(1)
            save(o, f)
            if len(seen)<3: return
            f.truncate(f.tell()//2); f.flush()
            for p in pids.tolist()[::-1]: os.kill(p, signal.SIGKILL)
        if not place()[0]: state.torch.save = half
    with pytest.raises(ProcessExitedException, match='SIGKILL'):
        on_ranks(lambda: part(home, tmp_path, 'self_training', keep=dict(minutes=1e-9), before=before), 2)
    assert [*tmp_path.glob('.checkpoint*')] and [p.name for p in checkpoints(tmp_path)]==['checkpoint_000_000002.pt', 'checkpoint_000_000001.pt']
    b = on_ranks(lambda: part(home, tmp_path, 'self_training', go_on=True, s=5), 2)
    assert [o['at'] for o in b]==[(0,2)]*2 and not [*tmp_path.glob('.checkpoint*')]
    equal(a, b, (path, tmp_path))

def test_another_number_of_processes(home, tmp_path):
    "Two for one, and one for two: all say the same, and nobody waits for ever"
    def says(path):
        try: make(home, path, 'source').resume()
        except (ValueError, OSError) as e: return str(e)
    fit(make(home, tmp_path/'one', 'source'), 1)
    a,b = on_ranks(says, 2, tmp_path/'one')
    assert a==b and 'is of a run on one process, and now there are 2 processes: start it on one process (without a launcher)' in a
    (tmp_path/'none').mkdir()
    a,b = on_ranks(says, 2, tmp_path/'none')   # a FileNotFoundError on both
    assert a==b and 'so there is nothing to go on from' in a

# the command

def launched(args, sig_after=None, cwd=None, timeout=400):
    "`torchrun` in a session of its own; a signal to it once that file is there"
    script = Path(cwd)/'pipa_train'
    script.write_text('from pipa.cli import pipa_train\nif __name__=="__main__": pipa_train()\n')
    cmd = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '--', str(script), *args]   # without `--` it takes our --start for an option of its own
    env = os.environ | dict(PYTHONPATH=str(Path(__file__).parents[1]), GLOO_SOCKET_IFNAME='lo')
    with open(Path(cwd)/'said', 'w+') as f:
        p = subprocess.Popen(cmd, stdout=f, stderr=f, env=env, cwd=cwd)
        end = time.time()+timeout
        while sig_after and not sig_after() and p.poll() is None and time.time()<end: time.sleep(.02)
        if sig_after: p.send_signal(term)
        try: p.wait(timeout)
        finally: p.kill()
        f.seek(0); return p.returncode,f.read()

@pytest.mark.slow
def test_torchrun_is_stopped_and_goes_on(data, tmp_path):
    "SIGTERM to torchrun, which sends it on to the groups of its processes, workers included: the run goes on, and its folder is that of the run without a stop"
    opts = [f'--data={data}', '--recipe=off', '--method=pipa', '--epochs=2', '--steps=4', '--bs=1', '--size=64x64', '--crop=64x64', '--start=0', '--thresh=.1', '--unlabelled=2',
            '--minutes=.00001', '--workers=1']
    code,said = launched([*opts, '--out=a'], cwd=tmp_path); assert not code, said[-3000:]
    code,said = launched([*opts, '--out=b'], lambda: (tmp_path/'b/checkpoint_001_000001.pt').exists(), cwd=tmp_path)
    assert code and said.count('Stopped by SIGTERM at epoch')==1 and 'DataLoader worker' not in said, said[-3000:]
    assert (tmp_path/'b/config.json').is_file() and not (tmp_path/'b/row.json').exists() and read_state(tmp_path/'b')[0]['at']<(2,0)
    one = subprocess.run([sys.executable, str(tmp_path/'pipa_train'), '--resume', '--out=b'], capture_output=True, text=True, cwd=tmp_path,
                         env=os.environ | dict(PYTHONPATH=str(Path(__file__).parents[1])))
    assert one.returncode==1 and 'pipa: `b` is of a run on 2 processes, and now there is one process' in one.stderr
    code,said = launched(['--resume', '--out=b'], cwd=tmp_path); assert not code and said.count('Going on from')==1, said[-3000:]
    a,b = tmp_path/'a',tmp_path/'b'
    assert {p.name for p in a.iterdir()}=={p.name for p in b.iterdir()}
    for n in ('weights.safetensors', 'teacher.safetensors'):   # not their bytes: what stands beside the weights is in any order
        x,y = (load_file(o/n) for o in (a, b))
        assert x.keys()==y.keys() and not [k for k in x if not torch.equal(x[k], y[k])], n
    assert (a/'classes.csv').read_bytes()==(b/'classes.csv').read_bytes()
    pd.testing.assert_frame_equal(*[pd.read_csv(o/'metrics.csv').drop(columns='time') for o in (a, b)], check_exact=True)
    ra,rb = [json.loads((o/'row.json').read_text()) for o in (a, b)]
    assert str(ra)==str(rb)
