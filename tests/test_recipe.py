"What a run on a folder finds by itself, and labels in even shares"
import json, shlex
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pytest, torch
from PIL import Image
from fastcore.basics import AttrDict
from fastai.callback.core import Callback
from pipa import cli, recipe
from pipa.callbacks import MeanTeacher, Mix, Pair, PixelContrast
from pipa.checkpoints import load
from pipa.learner import method_cbs
from pipa.mix import even_shares, to_shares
from pipa.ranks import on_ranks, place
from pipa.recipe import advised, view_size
from pipa.runs.options import defaults, given, options, parser, settings
from pipa.runs.plan import plan, with_recipe
from pipa.runs.resume import Checkpoint
from tiny import own_data, seed, toy

@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch, own_cache): monkeypatch.chdir(tmp_path); monkeypatch.setattr('sys.argv', ['pipa_train'])

@pytest.fixture(scope='module')
def data(tmp_path_factory): return own_data(tmp_path_factory.mktemp('recipe'), size=(64,96))

def config(out): return json.loads((Path(out)/'config.json').read_text())
def state(out): return load(out)[0].state_dict()
def same(a, b): return a.keys()==b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())
small = dict(epochs=1, steps=2, bs=2, workers=0, unlabelled=0)

# --- sizes ------------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('hw', [(64,64), (65,4000), (1024,2048), (2048,1024), (100,100), (33,47), (720,1280), (1,1), (1,10**6)])
@pytest.mark.parametrize('pixels', [2**14, 2**18])
def test_every_picture_gets_a_view(hw, pixels):
    h,w = view_size(hw, pixels)
    assert h%32==w%32==0 and min(h,w)>=64
    if min(hw)>=64: assert h*w<=1.6*max(min(pixels, hw[0]*hw[1]), 64*64) or min(h,w)==64
    if .25<hw[0]/hw[1]<4 and min(hw)>=64: assert .6<(h/w)/(hw[0]/hw[1])<1.7

def test_all_of_the_recipe_is_options():
    "Each name is one, each value is what the command line would read, and a run could begin with it"
    from pipa.runs.options import possible
    for gpu in (False, True):
        for known in (False, True):
            o = {k:v for k,(v,why) in recipe.recipe((360,480), gpu, known).items() if why}
            read = vars(parser().parse_args(recipe.words_of(o, o)))
            assert {k:read[k] for k in o}==o
            possible(AttrDict(defaults() | o))

# --- runs -------------------------------------------------------------------------------------------------------------------------------
def test_a_run_finds_what_nobody_said(data, capsys):
    cli.pipa_train(data=str(data), out='a', arch='timm:resnet10t', **small)
    said,c = capsys.readouterr(),config('a')
    assert (c['size'], c['method'], c['even'], c['steps'], c['arch'], c['lr'])==('64x96', 'self_training+fda', .5, 2, 'timm:resnet10t', 2e-3)
    assert 'these were found' in said.out and '--size=64x96' in said.out and 'NO PRETRAINED WEIGHTS' in said.err
    assert not {'steps', 'arch', 'bs'} & {*c['found']} and c['start']==0, 'a third of the steps that were asked for'
    row = json.loads(Path('a/row.json').read_text())
    o = settings(row['command'])
    assert o['even']==.5 and o['size']=='64x96' and o['host']=='self_training+fda', 'the row repeats it on any machine'
    def never(*_): raise AssertionError('asked again')
    with pytest.MonkeyPatch.context() as m:
        m.setattr(recipe, 'recipe', never)
        cli.pipa_train(config='a', out='b')
    assert same(state('a'), state('b')) and config('b')['found']==c['found']

@pytest.mark.slow
def test_lite0_is_taken_where_its_weights_are(data, monkeypatch, capsys):
    cli.pipa_train(data=str(data), out='a', **small)
    c = config('a')
    assert (c['arch'], c['pretrained'], c['lr'])==('lite0', True, 3e-4) and c['loaded'] and 'NO PRETRAINED' not in capsys.readouterr().err
    monkeypatch.setattr(recipe, 'has_lite', lambda: False)
    cli.pipa_train(data=str(data), out='b', **small)
    assert config('b')['arch']=='mit_b0' and 'NO PRETRAINED' in capsys.readouterr().err

def test_zero_is_a_number(): assert recipe.words_of(dict(start=0, lean=False, even=None, pretrained=True), ('start', 'lean', 'even', 'pretrained'))==['--start=0', '--pretrained']

def test_what_was_asked_for_stays(data):
    o = vars(parser().parse_args([f'--data={data}', '--size=64x64', '--lr=1e-3', '--method=mic']))
    new = advised(o, given(o, [f'--data={data}', '--size=64x64', '--lr=1e-3', '--method=mic']))
    assert (new['size'], new['lr'], new['method'])==('64x64', 1e-3, 'mic') and new['crop']=='64x64'

@pytest.mark.parametrize('kw', [dict(data='minicity'), dict(recipe='off'), dict(preset='daformer'), dict(config='x'), dict(resume=True), dict(fromrun='x')])
def test_who_has_settings_of_its_own(data, kw):
    o = defaults() | dict(data=str(data)) | kw
    assert advised(o, ['data'])==o

def test_no_such_recipe(data, capsys):
    with pytest.raises((SystemExit, ValueError)) as e: cli.pipa_train(data=str(data), recipe='on', **small)
    assert 'choose one of auto, off' in str(e.value)+capsys.readouterr().err

def test_a_study_says_it_in_words(data):
    args = with_recipe([f'--data={data}', '--method=source'])
    assert '--size=64x96' in args and with_recipe(args)==args, 'all is said'
    assert with_recipe(['--method=source'])==['--method=source'], 'the city has its own'
    (n,a),(m,b) = plan('source,self_training', more=[f'--data={data}'])
    assert '--arch=lite0' in a and '--even=0.5' in b

# --- even shares ------------------------------------------------------------------------------------------------------------------------
def test_shares_by_hand():
    "A bonus that makes of the shares of today those that are wanted, by brute force"
    rng = np.random.default_rng(0)
    for _ in range(20):
        first,now = (torch.tensor(rng.dirichlet(np.ones(5))).float() for _ in range(2))
        for even in (0, .3, 1):
            want = np.array([f**(1-even) for f in first.double().numpy()]); want /= want.sum()
            p = now*to_shares(now, even_shares(first, even, 0), 0).exp()
            assert np.allclose(p.numpy(), want, atol=1e-5) and abs(float(p.sum())-1)<1e-5

def test_even_is_off_by_default():
    assert MeanTeacher().even is None and method_cbs('pipa')[1].even is None
    with pytest.raises(ValueError, match='`even` is 2'): method_cbs('pipa', teacher=dict(even=2))

def parts(even): return [Pair(), MeanTeacher(.9, .1, even=even), Mix()]

def test_no_bonus_changes_nothing():
    "Without `even` a run is what it was, and nothing is counted"
    res = []
    for even in (None, .5):
        seed(); learn = toy(parts(even), n=4); seed()
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        res.append((learn.mean_teacher.shares, learn.mean_teacher.source, {k:v.clone() for k,v in learn.model.state_dict().items()}))
    assert res[0][:2]==(None, None) and res[1][0][0]==len(learn.dls.train) and not same(res[0][2], res[1][2])

def test_masks_without_labels():
    "A source of which nothing is labelled has no shares; the run goes on, with numbers that are finite"
    learn = toy(parts(.5), n=2, y=torch.full((64,64), 255))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert all(v.isfinite().all() for v in learn.model.state_dict().values()) and int(learn.mean_teacher.source.sum())==0

def test_shares_go_on_where_they_were(tmp_path):
    "Stopped between two batches and resumed: the same weights, teacher and shares"
    class Stop(Callback):
        order = 90
        def after_batch(self):
            if self.training and self.learn.train_iter==3: raise KeyboardInterrupt
    def learner(path, *more):
        seed(); return toy([*parts(.5), *more, Checkpoint(minutes=1e-9)], n=4, path=path)
    def fit(learn): seed(); learn.fit(2)
    a = learner(tmp_path/'a')
    with a.no_bar(), a.no_logging(): fit(a)
    b = learner(tmp_path/'b', Stop())
    with b.no_bar(), b.no_logging(), pytest.raises(KeyboardInterrupt): fit(b)
    c = learner(tmp_path/'b')
    c.resume()
    with c.no_bar(), c.no_logging(): fit(c)
    x,y = a.mean_teacher,c.mean_teacher
    assert same(a.model.state_dict(), c.model.state_dict()) and same(x.teacher.state_dict(), y.teacher.state_dict())
    assert x.shares[0]==y.shares[0] and all(torch.equal(*o) for o in zip(x.shares[1:], y.shares[1:])) and torch.equal(x.source, y.source)

def test_lr_find_leaves_no_shares():
    learn = toy(parts(.5), n=4)
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=3, show_plot=False, suggest_funcs=None)
    assert learn.mean_teacher.shares is None and learn.mean_teacher.source is None

def part(z, y):
    "What one of several processes makes of its share of a batch"
    r,n = place()
    learn = SimpleNamespace(yb=(y[r::n],), pred=torch.zeros(1,3,2,2), training=True)
    mt = MeanTeacher(even=.5); mt.learn = learn
    out = mt.balanced(z[r::n])
    mt.after_pred()
    return mt.shares,mt.source,out,learn.pred

@pytest.mark.slow
def test_ranks_share_their_shares():
    "Two processes count what one would with the whole batch"
    torch.manual_seed(0)
    z,y = torch.randn(4,3,8,8)*3,torch.randint(0, 3, (4,8,8))
    shares,source,out,pred = part(z, y)
    for r,(s,n,o,p) in enumerate(on_ranks(part, 2, z, y)):
        assert s[0]==shares[0] and all(torch.allclose(*k, atol=1e-6) for k in zip(s[1:], shares[1:])) and torch.equal(n, source)
        assert torch.allclose(o, out[r::2], atol=1e-5) and torch.allclose(p, pred, atol=1e-5)
