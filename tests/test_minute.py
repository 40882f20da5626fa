"Train a minute: steps with pauses between them, and the explorer that takes them"
import asyncio, random, signal, threading, time
import numpy as np, pytest, torch
from PIL import Image
from fastai.callback.core import Callback, CancelFitException, CancelValidException
from fastai.callback.progress import CSVLogger
from fastai.callback.schedule import ParamScheduler
from fastai.callback.tracker import SaveModelCallback
from pipa.data import folder, uda_dls
from pipa.hints.clicks import Click, write_clicks
from pipa.hints.term import Clicks
from pipa.hints.tools import hints_of
from pipa.learner import rates, uda_learner
from pipa.look.views import Snapshots, moments
from pipa.minute import OwnDraws, go_on, hands, in_turns, on_interrupt, rise_and_fall, steps_for
from pipa.models import light
from pipa.widgets import PixelEmbeddingExplorer
from tiny import city
from test_resume import Tiny

pytestmark = pytest.mark.usefixtures('cache_home')

@pytest.fixture(scope='module')
def home(tmp_path_factory): return city(tmp_path_factory.mktemp('city'), n=4, size=(64,64))

def learner(home, path, method='self_training', **kw):
    torch.manual_seed(0); np.random.seed(0); random.seed(0)
    game,real = (folder(home/o/'images', home/o/'masks', 'minicity') for o in ('game', 'real'))
    val = folder(home/'val/images', home/'val/masks', 'minicity') if (home/'val').exists() else None
    dls = uda_dls(game, real.unlabelled(), val, bs=2, size=(64,64), seed=0, device='cpu')
    return uda_learner(dls, light(Tiny(), n_out=dls.c), method, lr=1e-2, path=path, **kw)

def told(learn, path, *rows):
    "Hints of clicks: image, x, y, class"
    target = learn.dls.train.dataset.target
    write_clicks(path/'hints.csv', [Click(target.images[i].name, x, y, c, 2) for i,x,y,c in rows or ((0,30,60,'road'), (1,30,3,'sky'), (2,5,40,'building'))])
    return hints_of(target, path/'hints.csv', cache=path/'masks')

def weights(o): return {k: v.clone() for k,v in getattr(o, 'model', o).state_dict().items()}
def same(a, b): return a.keys()==b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())

# the steps

def test_it_is_the_fit_of_a_learner_that_has_the_term(home, tmp_path):
    "As many steps of fastai's own `fit`, with the same rates, draws and clicks, lead to the very same nets"
    a = learner(home, tmp_path); hints = told(a, tmp_path)
    for _ in go_on(a, hints, steps=6, seed=3, rise=2): pass
    b = learner(home, tmp_path); b.add_cb(Clicks(hints, seed=3)); b.cbs = b.cbs.filter(lambda o: type(o).__name__!='ProgressCallback')
    b.create_opt(); base = rates(b.model, b.opt.param_lists, b.lr); n = len(b.dls.train); at = iter(range(99))
    class Rate(Callback):
        order = 50
        def before_batch(self):
            if self.training: self.opt.set_hypers(lr=(base*rise_and_fall(next(at), 6, 2)).tolist())
    class NoScore(Callback):
        def before_validate(self): raise CancelValidException()
    assert 6%n==0
    with OwnDraws(3), b.no_bar(), b.no_logging():
        b.dls.loaders[0] = b.dls.train.new(seed=3)
        b.fit(6//n, cbs=[Rate(), NoScore()])
    assert same(weights(a), weights(b)) and same(weights(a.mean_teacher.teacher), weights(b.mean_teacher.teacher))

def test_nothing_of_the_learner_is_touched(home, tmp_path):
    out = tmp_path/'out'; out.mkdir()
    learn = learner(home, out, cbs=[CSVLogger(), SaveModelCallback(), Snapshots()])
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    files = {p: p.read_bytes() for p in out.rglob('*') if p.is_file()}
    opt,state,cbs = learn.opt,{k: [*map(str, v)] for k,v in learn.opt.state_dict().items()},[*learn.cbs]
    drawn,losses,snaps,t = learn.dls.train.drawn,[*learn.recorder.losses],[*learn.snapshots.states],learn.mean_teacher.t
    random_was = random.getstate(),torch.get_rng_state()
    hints = told(learn, tmp_path); n = len([*go_on(learn, hints, steps=3)])
    assert n==3 and learn.opt is opt and {k: [*map(str, v)] for k,v in opt.state_dict().items()}==state
    assert [*learn.cbs]==cbs and all(cb.learn is learn for cb in cbs) and moments(learn)==snaps
    assert (learn.dls.train.drawn, learn.recorder.losses)==(drawn, losses) and learn.mean_teacher.t==t+3
    assert {p: p.read_bytes() for p in out.rglob('*') if p.is_file()}==files
    assert random.getstate()==random_was[0] and torch.equal(torch.get_rng_state(), random_was[1])
    assert all(p.grad is None or not p.grad.any() for p in learn.model.parameters())
    with learn.no_bar(), learn.no_logging(): learn.fit(1)

@pytest.mark.parametrize('method', ['source', 'pipa', 'self_training+fda', 'advseg'])
def test_methods_go_on(home, tmp_path, method):
    kw = dict(crop=(32,32)) if method=='pipa' else {}
    learn = learner(home, tmp_path, method, **kw); was = weights(learn)
    said = [*go_on(learn, told(learn, tmp_path), steps=2)]
    assert all(np.isfinite(o.loss) for o in said) and not same(weights(learn), was)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)

@pytest.mark.parametrize('kw', [dict(lean=True), dict(guard='skip'), dict(guard=None)])
def test_whatever_has_a_hand_in_a_step(home, tmp_path, kw):
    learn,plain = learner(home, tmp_path, 'source', **kw),learner(home, tmp_path, 'source'); hints = told(learn, tmp_path)
    for o in (learn, plain): assert len([*go_on(o, hints, steps=2)])==2
    assert all(torch.allclose(v, weights(plain)[k], atol=1e-5) for k,v in weights(learn).items())

def test_who_watches_is_left_out(home, tmp_path):
    class Own(Callback):
        def after_epoch(self): raise RuntimeError('watches')
        def before_fit(self): raise RuntimeError('watches')
    learn = learner(home, tmp_path, cbs=[CSVLogger(), SaveModelCallback(), Snapshots(), Own(), ParamScheduler({})])
    assert [type(o).__name__ for o in hands(learn)]==['TrainEvalCallback', 'CastToTensor', 'Pair', 'MeanTeacher', 'Mix', 'Guard']

def test_the_term_that_is_there_gives_its_settings(home, tmp_path):
    a = learner(home, tmp_path); hints = told(a, tmp_path)
    learn = learner(home, tmp_path, hints=hints, clicks=dict(w=.3, bs=1, p_blur=0)); seen = []
    class Look(Callback):
        order = 99
        def after_pred(self): seen.append((self.learn.clicks.w, self.learn.clicks.bs, self.learn.clicks.aug, len(self.learn.clicks.hints)))
    learn.add_cb(Look()); own = learn.clicks
    for _ in go_on(learn, hints.take([1]), steps=1): pass
    assert seen==[(.3, 1, dict(p_blur=0), 1)] and learn.clicks is own and len(own.hints)==3 and own.steps==0

def test_a_number_that_is_not_finite_ends_it(home, tmp_path):
    learn = learner(home, tmp_path); hints = told(learn, tmp_path); cbs = [*learn.cbs]
    steps = go_on(learn, hints, steps=5); next(steps)
    with torch.no_grad(): next(learn.model.parameters()).fill_(float('nan'))
    with pytest.raises(FloatingPointError, match='not finite'): next(steps)
    assert [*learn.cbs]==cbs and next(steps, None) is None

def test_a_callback_may_end_it(home, tmp_path):
    class Enough(Callback):
        def after_step(self):
            if self.train_iter==2: raise CancelFitException()
    learn = learner(home, tmp_path, cbs=Enough()); assert len([*go_on(learn, told(learn, tmp_path), steps=9)])==2
    with learn.no_bar(), learn.no_logging(): learn.fit(1)

def test_time_and_steps():
    assert steps_for([1]*5, 100) is None and steps_for([5]+[1]*5, 100)==6+90 and steps_for([200], 100)==1
    assert [rise_and_fall(s, 3, 6) for s in range(3)]==[1/6, 2/6, 3/6], 'fewer steps than it rises'
    for bad in (0, -1): 
        with pytest.raises(ValueError, match='time'): next(go_on(None, None, bad))
    with pytest.raises(ValueError, match='steps'): next(go_on(None, None, steps=0))

def test_a_slow_machine_ends_in_time(home, tmp_path, monkeypatch):
    import pipa.minute as m
    clock = [0.]; monkeypatch.setattr(m, 'perf_counter', lambda: clock[0])
    learn = learner(home, tmp_path, 'source'); hints = told(learn, tmp_path); took = iter([3.]+[.5]*6+[4.]*99)
    class Slow(Callback):
        def after_step(self): clock[0] += next(took)
    learn.add_cb(Slow()); said = [*go_on(learn, hints, 20)]
    assert said[5].of==6+(20-5.5)//.5 and said[-1].secs<=25+4 and said[-1].n<said[-1].of

def test_loop_and_interrupt():
    done = []
    async def f():
        async def other():
            while True: done.append('other'); await asyncio.sleep(0)
        t = asyncio.ensure_future(other())
        await in_turns((done.append('step') for _ in range(4)), every=0, pause=.01); t.cancel()
    asyncio.run(f()); assert done.count('step')==4 and done.index('other')<len(done)-1-done[::-1].index('step')
    was,hit = signal.getsignal(signal.SIGINT),[]
    with on_interrupt(lambda: hit.append(1)): signal.raise_signal(signal.SIGINT)
    assert hit==[1] and signal.getsignal(signal.SIGINT) is was

# the explorer

@pytest.fixture(autouse=True)
def a_turn_after_each_step(monkeypatch): monkeypatch.setattr('pipa.look.pixel_explorer.in_turns', lambda steps: in_turns(steps, every=0))

def explorer(home, path, **kw): return PixelEmbeddingExplorer(kw.pop('learn', None) or learner(home, path), clicks=path/'clicks.csv', **dict(n=5, n_images=4)|kw)
def press(p, panel, x, y, c): p.surface.event(dict(type='click', panel=panel, x=x, y=y, pen=c))
def clicked(home, path, **kw):
    p = explorer(home, path, **kw)
    for i,(x,y,c) in enumerate(((30,60,3), (30,3,1), (5,40,2))): press(p, i, x, y, c)
    return p
def train(p, n, **kw):
    "As the button does, but for a number of steps"
    async def f():
        t = p.train(1e6)
        while p.minute is not None and len(p.minute.losses)<n: await asyncio.sleep(.001)
        kw.get('then', p.stop)()
        return await t
    return asyncio.run(f())
def said(p): return p.surface.said

def test_no_clicks_no_training(home, tmp_path):
    p = explorer(home, tmp_path); was = weights(p.looks.learn); p.button.click()
    assert said(p)=='There is no click to learn from: choose a class and click where you see it.'
    assert p.minute is None and p.looks.names==['now'] and same(weights(p.looks.learn), was) and p.button.description=='train a minute'

def test_a_minute_is_a_checkpoint(home, tmp_path):
    p = clicked(home, tmp_path); learn = p.looks.learn; was,maps,cbs = weights(learn),p.views.pred.copy(),[*learn.cbs]
    assert p.handles['checkpoint'].layout.display=='none'
    train(p, 4)
    assert p.looks.names==['before', 'minute 1'] and p.checkpoint==1 and [*learn.cbs]==cbs and not same(weights(learn), was)
    assert said(p).startswith('minute 1: 4 steps in ') and '3 clicks on 3 of 4 target images' in said(p) and said(p).endswith('slide back to undo')
    assert p.handles['checkpoint'].options==(('before',0), ('minute 1',1)) and p.handles['checkpoint'].value==1 and not p.handles['checkpoint'].layout.display
    assert p.button.description=='train a minute' and not p.button.disabled and not p.surface.busy and p.play.max==1
    p.checkpoint = 0; assert np.array_equal(p.views.pred[p.here], maps[p.here]) and p.handles['checkpoint'].value==0
    press(p, 3, 20, 20, 5); p.surface.event(dict(type='undo')); assert np.array_equal(p.views.pred[p.here], maps[p.here]), 'it is refitted as before'
    p.handles['checkpoint'].value = 1; assert p.checkpoint==1
    learn.model.eval()
    with learn.no_bar(), learn.no_logging(): learn.fit(1)

def test_the_slider_takes_it_back(home, tmp_path):
    "From the checkpoint that is chosen; none is lost"
    p = clicked(home, tmp_path); learn = p.looks.learn; train(p, 2); one = weights(learn)
    p.checkpoint = 0; train(p, 2)
    assert p.looks.names==['before', 'minute 1', 'minute 2'] and all(torch.equal(v, p.looks.kept['minute 1']['student'][k]) for k,v in one.items())
    assert p.looks.kept['minute 1']['t']==p.looks.kept['minute 2']['t']==learn.mean_teacher.t==2, 'there was no teacher before'
    q = clicked(home, tmp_path/'q'); train(q, 2); train(q, 2)
    assert q.looks.kept['minute 2']['t']==4 and same(q.looks.kept['minute 1']['student'], p.looks.kept['minute 1']['student'])
    p.checkpoint = 1; p.keep(); W = p.pen.nets['minute 1','student']
    assert torch.equal(learn.model.decode_head.linear_pred.weight[:,:,0,0], W.W) and torch.equal(learn.mean_teacher.teacher.state_dict()['backbone.parts.0.0.weight'], p.looks.kept['minute 1']['teacher']['backbone.parts.0.0.weight'])
    train(p, 1); assert p.looks.names[-2:]==['before 4', 'minute 3'], 'what `keep` made is no checkpoint yet, and not lost'

def test_same_clicks_same_steps_same_weights(home, tmp_path):
    a,b = clicked(home, tmp_path/'a'),clicked(home, tmp_path/'b')
    train(a, 3)
    async def f():
        t = b.train(1e6)
        while len(b.minute.losses)<3:
            torch.rand(3); b.surface.event(dict(type='hover', panel=0, x=3, y=3)); b.page = 0
            await asyncio.sleep(.001)
        b.stop(); await t
    asyncio.run(f())
    assert same(weights(a.looks.learn), weights(b.looks.learn)) and len(b.minute.losses if b.minute else ())==0

def test_clicks_meanwhile_count_from_the_next_minute(home, tmp_path):
    a,b = clicked(home, tmp_path/'a'),clicked(home, tmp_path/'b'); train(a, 2); seen = []
    async def f():
        t = b.train(1e6); press(b, 0, 50, 50, 4); seen.append(said(b)); hints = b.minute.hints
        while len(b.minute.losses)<2: await asyncio.sleep(.001)
        b.stop(); await t
        return hints
    hints = asyncio.run(f())
    assert seen[0].endswith('saved, counts from the next minute') and len(b.pen.clicks)==4 and sum(hints.clicks.values())==3
    assert same(weights(a.looks.learn), weights(b.looks.learn))
    b.begin_minute(9); assert sum(b.minute.hints.clicks.values())==4 and b.end_minute() is None

def test_maps_follow_while_it_trains(home, tmp_path):
    p = clicked(home, tmp_path); seen = []
    async def f():
        t = p.train(1e6); p.surface.busy = False
        while len(p.minute.losses)<6:
            p.minute.drawn = -1e9; seen.append((p.surface.over, said(p), p.button.description, p.handles['checkpoint'].disabled, p.surface.busy)); await asyncio.sleep(.001)
        assert p.live and np.array_equal(p.views.pred[p.here], p._says_now(p.here)[0])
        s = p._says([(0,5,5)]); assert s[0]==p.views.pred[0,5,5]
        for ev in (dict(type='accept', panel=0, x=5, y=5), dict(type='undo'), dict(type='differs'), dict(type='next')): p.surface.event(ev)
        p.over = 'changes'; p.color_by = 'prediction'; p.over = 'prediction'
        p.stop(); await t
    asyncio.run(f())
    assert len({o[0] for o in seen})>2 and {o[2] for o in seen}=={'stop'} and all(o[3] for o in seen)
    assert seen[-1][1].startswith('training: ') and ' s of 1000000, loss ' in seen[-1][1] and 'training' not in p.follow and not p.handles['checkpoint'].disabled

def test_pressed_twice_is_stop(home, tmp_path):
    p = clicked(home, tmp_path)
    async def f():
        p.button.click(); t = p.task; assert p.button.description=='stop'
        with pytest.raises(ValueError, match='already'): p.train()
        while len(p.minute.losses)<2: await asyncio.sleep(.001)
        p.button.click(); assert p.minute is None; await t
    asyncio.run(f()); assert p.looks.names==['before', 'minute 1'] and '2 steps' in said(p)

def test_stopped_before_the_first_step(home, tmp_path):
    p = clicked(home, tmp_path); was = weights(p.looks.learn)
    async def f(): p.button.click(); p.button.click(); await p.task
    asyncio.run(f()); assert said(p)=='Stopped before the first step.' and p.looks.names==['before'] and p.minute is None and not p.surface.busy

def test_the_cell_is_run_again(home, tmp_path):
    "The old explorer stops, the new one begins with what came out; two that are there at once don't train one net"
    p = clicked(home, tmp_path); learn = p.looks.learn
    async def f():
        t = p.train(1e6)
        while len(p.minute.losses)<2: await asyncio.sleep(.001)
        q = explorer(home, tmp_path, learn=learn); assert p.minute is None and p.looks.names[-1]=='minute 1'; await t
        a = q.train(1e6); p.button.click(); assert said(p)=='Another explorer trains this net: stop it there first.'
        q.stop(); await a
        return q
    q = asyncio.run(f()); assert q.pen.clicks==p.pen.clicks and q.looks.names==['before']

def test_answers_come_from_another_thread(home, tmp_path):
    "As in a JupyterLab with subshells: steps in the loop that made the explorer, messages in a thread beside it"
    async def f():
        p = clicked(home, tmp_path); errs,threads = [],set()
        class Where(Callback):
            order = 80
            def before_batch(self): threads.add(threading.current_thread())
            def after_batch(self): assert self.model.training
        p.looks.learn.add_cb(Where())
        def messages():
            try:
                p.button.click(); p.minute.drawn = -1e9; asked = len(p.minute.losses)
                for k in range(12):
                    p.surface.event(dict(type='hover', panel=k%3, x=5, y=5)); press(p, k%3, 10+3*k, 20, k%3); p.over = ('changes', 'prediction')[k%2]
                while len(p.minute.losses)<asked+3: time.sleep(.01)
                p.button.click()
            except BaseException as e: errs.append(e)
        await asyncio.get_running_loop().run_in_executor(None, messages); await asyncio.sleep(.1)
        assert not errs and threads=={threading.current_thread()}
        return p
    p = asyncio.run(f()); assert p.minute is None and p.looks.names==['before', 'minute 1'] and len(p.pen.clicks)==15

class Breaks(Callback):
    order,at = 80,3
    def after_pred(self):
        self.at -= 1
        if self.at<0: raise RuntimeError('the disk is full')

def test_an_error_is_a_sentence(home, tmp_path):
    p = clicked(home, tmp_path); learn = p.looks.learn; learn.add_cb(cb := Breaks()); cbs = [*learn.cbs]
    async def f(): 
        p.button.click()
        with pytest.raises(RuntimeError): await p.task
    asyncio.run(f())
    assert said(p)=='The training ended: the disk is full' and p.button.description=='train a minute' and p.minute is None
    assert p.looks.names==['before', 'minute 1'] and [*learn.cbs]==cbs and not p.surface.busy, 'what three steps made is not lost'
    learn.remove_cb(cb); train(p, 1); assert p.looks.names[-1]=='minute 2'

def test_an_interrupt_stops_it(home, tmp_path):
    p = clicked(home, tmp_path); was = signal.getsignal(signal.SIGINT)
    train(p, 2, then=lambda: signal.raise_signal(signal.SIGINT))
    assert p.looks.names==['before', 'minute 1'] and said(p).startswith('minute 1: ') and signal.getsignal(signal.SIGINT) is was

def test_without_a_loop_it_ends_before_it_comes_back(home, tmp_path):
    p = clicked(home, tmp_path); assert p.train(1.) is None and p.looks.names==['before', 'minute 1'] and p.minute is None

def test_a_net_that_ends_in_another_way_learns_too(home, tmp_path):
    learn = learner(home, tmp_path); head = learn.model.decode_head; c = head.linear_pred
    head.linear_pred = torch.nn.Conv2d(c.in_channels, c.out_channels, 3, padding=1)
    p = clicked(home, tmp_path, learn=learn); was = p.views.pred.copy(); train(p, 4)
    assert p.looks.names==['before', 'minute 1'] and (p.views.pred!=was).any()
    p.checkpoint = 0; assert np.array_equal(p.views.pred, was)

@pytest.mark.slow
def test_checkpoints_of_a_fit_come_first(home, tmp_path):
    "A fit from a cell in between is no checkpoint of the page, and not lost"
    learn = learner(home, tmp_path, cbs=Snapshots())
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    p = clicked(home, tmp_path, learn=learn); train(p, 1)
    assert p.looks.names==['start', 'epoch 1', 'epoch 2', 'minute 1'] and [*learn.snapshots.states]==['start', 'epoch 1', 'epoch 2']
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    mine = weights(learn); train(p, 1)
    assert p.looks.names[-2]=='before 2' and same(p.looks.kept['before 2']['student'], mine)
    for k in range(len(p.looks.names)): p.checkpoint = k
    p.who = 'teacher'; p.checkpoint = 0; p.tabs.selected_index = 0; assert len(p.measures())==len(p.looks.names)

def test_a_net_that_a_cell_has_trained(home, tmp_path):
    "Its last layer is not the one that the page has seen"
    p = clicked(home, tmp_path); learn = p.looks.learn
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    mine = weights(learn)
    p.begin_minute(9); fresh = p.pen.nets['before','student']
    assert same(p.looks.kept['before']['student'], mine) and torch.equal(fresh.W0, mine['decode_head.linear_pred.weight'][:,:,0,0])
    assert torch.equal(learn.model.decode_head.linear_pred.weight[:,:,0,0], fresh.W); p.end_minute()

def test_no_pen_no_button(home, tmp_path):
    p = PixelEmbeddingExplorer(learner(home, tmp_path), n=5, n_images=1); assert not hasattr(p, 'button')
    with pytest.raises(ValueError, match='give `clicks`'): p.train()

def test_no_file_stays(home, tmp_path, monkeypatch):
    out = tmp_path/'tmp'; out.mkdir(); monkeypatch.setattr('tempfile.tempdir', str(out)); p = clicked(home, tmp_path); train(p, 2)
    assert not [*out.iterdir()] and {o.name for o in tmp_path.iterdir()}=={'tmp', 'clicks.csv'}
