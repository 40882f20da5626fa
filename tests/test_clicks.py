"Clicks: a few labelled pixels of the target as a loss, on top of any method"
import signal
import numpy as np, pytest, torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from fastai.callback.core import Callback
from pipa.callbacks import MeanTeacher, Mix, Pair, PatchContrast, PixelContrast
from pipa.baselines import MIC, MinEnt
from pipa.data import PairSet, cut_hints, cut_view, folder, uda_dls, view_box
from pipa.guard import Guard
from pipa.hints.clicks import Click, click_masks
from pipa.hints.simulated import simulated_clicks
from pipa.hints.term import Clicks, ClickContrast, HintViews, box_around, click_ce, draw_class, label_cells, prior_shift, with_hints
from pipa.hrda import hrda
from pipa.lean import Lean
from pipa.learner import uda_learner
from pipa.models import light
from pipa.ranks import on_ranks, place
from pipa.sets.domains import Domain, labels_of
from pipa.test_utils import narrow
from test_resume import Do, Tiny, equal, fit as fit_run, make, stopped, weights
from tiny import city, fit, seed
import pipa.test_utils as tu

pytestmark = pytest.mark.usefixtures('cache_home')

@pytest.fixture(scope='module')
def home(tmp_path_factory): return city(tmp_path_factory.mktemp('city'), n=4, size=(64,64))

@pytest.fixture(scope='module')
def real(home): return folder(home/'real/images', home/'real/masks', 'minicity')

def sparse(real, to, clicks):
    "A domain of hints with these clicks"
    to.mkdir(parents=True, exist_ok=True)
    ys,ims = [labels_of(a, b, real.space) for a,b in zip(real.images, real.masks)],sorted({i for i,*_ in clicks})
    for i in ims:
        own = [Click('', x, y, real.space.codes[c], 1) for j,x,y,c in clicks if j==i and c!=255]   # 255: an image without a label
        Image.fromarray(click_masks(own, ys[i].shape, real.space)).save(to/f'{i}.png')
    return Domain([real.images[i] for i in ims], [to/f'{i}.png' for i in ims], real.space.as_train())

@pytest.fixture(scope='module')
def hints(real, tmp_path_factory):
    ys = [labels_of(a, b, real.space) for a,b in zip(real.images, real.masks)]
    return sparse(real, tmp_path_factory.mktemp('hints'), simulated_clicks(ys, 3, 1, r=1))

# the loss

@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize('shifted', [False, True])
def test_loss_is_that_of_a_loop(weighted, shifted):
    g = torch.Generator().manual_seed(0)
    z,y = torch.randn(2, 4, 5, 7, generator=g, dtype=torch.double),torch.full((2,20,28), 255)
    y[0,3,5],y[0,19,27],y[1,0,0],y[1,10,3] = 2,0,0,3
    v,s = (torch.rand(4, generator=g, dtype=torch.double)+.1 for _ in range(2))
    up = F.interpolate(z, (20,28), mode='bilinear', align_corners=False)
    num = den = 0
    for b in range(2):
        for i in range(20):
            for j in range(28):
                if (c := int(y[b,i,j]))==255: continue
                p = [float(up[b,k,i,j]) + (float(s[k]) if shifted else 0) for k in range(4)]
                w = float(v[c]) if weighted else 1
                num,den = num + w*(np.log(np.sum(np.exp(p)))-p[c]),den + w
    l,n = click_ce(z.float(), y, v if weighted else None, s if shifted else None)
    assert abs(float(l)-num/den)<1e-5 and abs(float(n)-den)<1e-5

def test_void_alone_is_zero_with_zero_gradient():
    z = torch.randn(1, 3, 4, 4, requires_grad=True)
    for kw in ({}, dict(v=torch.ones(3))):
        l,n = click_ce(z, torch.full((1,8,8), 255), **kw); l.backward()
        assert (float(l), float(n), float(z.grad.abs().sum()))==(0, 0, 0)

def test_shift_brings_back_the_prior_of_the_street():
    "Two Gaussians, learned from as many points of each: with the shift the net is the one for nine to one, by Bayes' rule"
    g = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(4000, generator=g)-1, torch.randn(4000, generator=g)+1])[:,None]
    y = torch.arange(8000)//4000
    net,s = nn.Linear(1, 2),prior_shift(torch.tensor([.5,.5]), torch.tensor([.9,.1]))
    opt = torch.optim.LBFGS(net.parameters(), max_iter=100)
    def loss():
        opt.zero_grad()
        l,_ = click_ce(net(x)[...,None,None], y[:,None,None], shift=s); l.backward()
        return l
    opt.step(loss)
    at = torch.tensor([[-1.],[0.],[1.]])
    want = torch.softmax(torch.stack([-(at[:,0]+1)**2/2+np.log(.9), -(at[:,0]-1)**2/2+np.log(.1)], 1), 1)
    assert (net(at).softmax(1)-want).abs().max()<.02

# views

def test_every_view_has_a_labelled_pixel():
    "Photographs of any size, clicks anywhere, borders too, cut or scaled"
    rng = np.random.default_rng(0)
    for _ in range(300):
        H,W = (int(o) for o in rng.integers(40, 300, 2))
        size = int(rng.integers(16, 65)),int(rng.integers(16, 65))
        at = [int(rng.choice([0, n-1, rng.integers(n)])) for n in (H,W)]
        y = np.full((H,W), 255, np.uint8); y[*at] = 9
        for fixed in (False, True):
            box = box_around(at, (H,W), size, rng, (1.,3.), fixed)
            for flip in (False, True):
                o = cut_hints(y, box, size, flip)
                assert o.shape==size and set(np.unique(o))=={9,255}

def test_labels_move_with_the_picture():
    "A picture whose colour tells the class: they agree in every view, mirrored or not"
    rng,y = np.random.default_rng(0),np.full((120,160), 255, np.uint8)
    x = np.zeros((120,160,3), np.uint8)
    for c,(i,j) in enumerate([(20,30), (60,100), (100,140)]): y[i-4:i+5,j-4:j+5] = c; x[i-12:i+13,j-12:j+13] = 80*(c+1)
    for _ in range(60):
        i,j = rng.choice(np.argwhere(y<255))
        box,flip = box_around((i,j), y.shape, (48,64), rng, (1.,2.)),rng.random()<.5
        v,o = cut_view(x, box, (48,64), flip),cut_hints(y, box, (48,64), flip)
        assert (o<255).any() and (v[o<255,0]==80*(o[o<255].astype(int)+1)).all()

def test_boxes_lie_as_those_of_the_loader():
    "Where all is labelled, a drawn place tells nothing: boxes of both have the same spread of scales"
    rng = np.random.default_rng(0)
    a,b = ([f() for _ in range(400)] for f in (lambda: view_box((90,160), (48,64), rng, (1.,2.)), lambda: box_around((45,80), (90,160), (48,64), rng, (1.,2.))))
    wa,wb = ([o[2]-o[0] for o in k] for k in (a, b))
    assert abs(np.mean(wa)-np.mean(wb))<6 and abs(min(wa)-min(wb))<4 and abs(max(wa)-max(wb))<4

def test_classes_are_drawn_evenly(hints):
    "A class that was clicked once as often as one that was clicked in each image: chi-square of 3000 draws"
    views,rng = HintViews(hints, (64,64)),np.random.default_rng(0)
    there = views.have.any(0).nonzero()[0]
    n = np.bincount([draw_class(views.have, rng)[1] for _ in range(3000)], minlength=len(views.have[0]))
    want = 3000/len(there)
    assert set(n.nonzero()[0])==set(there) and ((n[there]-want)**2/want).sum() < 2.5*len(there)

def test_no_room_no_difference(hints):
    a,b = (HintViews(hints, (32,32), (1.,2.), room=r) for r in (2**28, 0))
    assert len(a.kept)==len(hints) and not b.kept
    for s in range(20):
        for u,v in zip(*(o.draw(np.random.default_rng(s)) for o in (a, b))): assert (u==v).all()

def test_kept_at_the_size_of_the_run(real, hints):
    "No larger than a view may want, and never enlarged"
    assert HintViews(hints, (16,16), (1.,2.))[0][0].shape==(32,32,3)
    assert HintViews(hints, (64,64), (1.,2.))[0][0].shape==(64,64,3)
    assert HintViews(hints, (16,16), resize=(48,48))[0][1].shape==(48,48)

def test_grid_keeps_each_dot():
    g = torch.Generator().manual_seed(0)
    y = torch.full((2,32,64), 255)
    for _ in range(9): y[int(torch.randint(2, (), generator=g)), int(torch.randint(32, (), generator=g)), int(torch.randint(64, (), generator=g))] = int(torch.randint(11, (), generator=g))
    want = torch.full((2,8,16), 255)
    for b,i,j in (y!=255).nonzero().tolist(): want[b,i//4,j//4] = min(want[b,i//4,j//4], y[b,i,j])
    assert torch.equal(label_cells(y, (8,16)), want)

# the term

def toy(cbs, **kw): return tu.toy(cbs, size=(64,64), **kw)

def term(hints, **kw): return Clicks(hints, size=(64,64), zoom=(1.,2.), seed=3, **kw)

def reached(cbs, of):
    learn,seen = toy(cbs),set()
    class Look(Callback):
        order = 99
        def after_loss(self):
            if not self.training: return
            ps = dict(self.model.named_parameters())
            gs = torch.autograd.grad(of().score()[0], [*ps.values()], retain_graph=True, allow_unused=True)
            seen.update(k.split('.')[0] for k,g in zip(ps, gs) if g is not None and g.any())
    learn.add_cb(Look()); fit(learn, 1)
    return seen,learn

def test_what_it_moves(hints):
    "Encoder and decoder, and as partners also the pixel head; the teacher never"
    cb = term(hints)
    seen,learn = reached([Pair(), MeanTeacher(), Mix(), cb], lambda: cb)
    assert seen=={'backbone','decode_head'} and all(p.grad is None for p in learn.mean_teacher.teacher.parameters())
    px = ClickContrast(min_pixels=10**6)   # none of the source: what is left comes from clicks alone
    seen,_ = reached([Pair(), px, term(hints, partners=True)], lambda: px)
    assert seen=={'backbone','proj_head'}

hosts = dict(source=[], minent=[MinEnt], mic=[MeanTeacher, Mix, MIC], pipa=[MeanTeacher, Mix, lambda: PixelContrast(min_pixels=5), lambda: PatchContrast(size=(32,32), thresh=0)])

@pytest.mark.parametrize('host', hosts)
def test_on_top_of_every_host(hints, host):
    kw = dict(partners=True) if host=='pipa' else {}
    learn = fit(toy(with_hints([Pair(), *(f() for f in hosts[host]), Guard('stop')], hints, **kw, size=(64,64), bs=2)), 1)
    assert learn.clicks.mean>0 and learn.clicks.per_step>=2

@pytest.mark.parametrize('prior', ['logits','weights'])
@pytest.mark.parametrize('street', ['seen','source'])
def test_against_the_tilt(hints, prior, street):
    for more in ([], [MeanTeacher()]):
        learn = fit(toy([Pair(), *more, term(hints, prior=prior, street=street)]), 1)
        assert np.isfinite(learn.clicks.mean) and torch.allclose(learn.clicks.shares.sum(1), torch.ones(2), atol=1e-5)

def test_nothing_of_it_is_a_number_of_its_own(hints):
    with pytest.raises(ValueError, match='choose one of'): Clicks(hints, prior='logit')
    with pytest.raises(ValueError, match='choose one of'): Clicks(hints, street='world')

def test_lean_computes_the_same(hints):
    "Without dropout, whose draws come in another order"
    def net(): seed(); n = light('mit_b0', n_out=11, **narrow); [setattr(m, 'p', 0.) for m in n.modules() if isinstance(m, nn.Dropout)]; [setattr(m, 'drop', 0.) for m in n.modules() if hasattr(m, 'drop') and isinstance(m.drop, float)]; return n.eval()
    got = []
    for more in ([], [Lean()]):
        learn = toy([Pair(), term(hints), *more], net=net()); learn.model.train = lambda mode=True: learn.model
        got.append(fit(learn, 1).model.state_dict())
    for k in got[0]: assert torch.allclose(got[0][k], got[1][k], atol=1e-5), k

def test_bf16(hints): assert np.isfinite(fit(toy([Pair(), term(hints)]).to_bf16(), 1).clicks.mean)

def test_two_scales(hints):
    "HRDA's closer look may show no click: then the whole has all of the loss"
    learn = fit(toy([Pair(), term(hints, prior=None)], net=hrda(Tiny(), 11, crop=(32,32), dim=16)), 1)
    cb = learn.clicks
    cb.b = cb.b[0],torch.full_like(cb.b[1], 255)
    box = cb.detail.cut(torch.arange(64*64).view(1,64,64).expand_as(cb.b[1]))[0].flatten()
    out = next(i for i in range(64*64) if i not in set(box.tolist()))
    cb.b[1][:,out//64,out%64] = 3
    l,_ = cb.score()
    assert torch.allclose(l, click_ce(cb.z, cb.b[1])[0])

def test_waits_for_its_start(hints):
    learn = fit(toy([Pair(), term(hints, start=3)]), 2)   # two steps an epoch
    assert learn.clicks.n==1 and learn.clicks.steps==4

@pytest.mark.parametrize('at', [(0,0), (63,63), (0,40)])
def test_one_click_in_all(real, tmp_path, at):
    one = sparse(real, tmp_path, [(1, at[1], at[0], 6)])
    cb = Clicks(one, size=(32,32), zoom=(1.,4.), seed=1)
    fit(toy([Pair(), cb]), 1)
    assert cb.mean>0 and cb.b[1].unique().tolist()==[6,255] and ((cb.b[1]==6).flatten(1).any(1)).all()

def test_sentences(real, hints, tmp_path):
    none = sparse(real, tmp_path/'a', [(0, 3, 3, 255)])
    for h,says in ((none, 'hold no labelled pixel'), (hints.unlabelled(), 'have no masks')):
        with pytest.raises(ValueError, match=says): fit(toy([Pair(), Clicks(h, size=(32,32))]), 1)
    with pytest.raises(ValueError, match='no pixel contrast'): with_hints([Pair()], hints, partners=True)

# runs

def run(home, path, hints, *cbs, **kw): return make(home, path, kw.pop('method', 'pipa'), *cbs, hints=hints, **kw)

@pytest.mark.parametrize('clicks', [dict(), dict(street='seen', partners=True)])
def test_resume_is_no_interruption(home, tmp_path, hints, clicks):
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    a = fit_run(run(home, tmp_path/'a', hints, clicks=clicks))
    stopped(run(home, tmp_path/'b', hints, Do(4, lambda: signal.raise_signal(signal.SIGTERM)), clicks=clicks))
    b = run(home, tmp_path/'b', hints, clicks=clicks, s=9)
    assert b.resume()==(1,1)
    equal(a, fit_run(b))
    assert a.clicks.drawn==b.clicks.drawn
    signal.signal(signal.SIGINT, old)

def test_other_clicks_are_another_run(home, tmp_path, hints):
    fit_run(run(home, tmp_path, hints, method='source'), 1)
    b = run(home, tmp_path, hints.take([0,1]), method='source')
    with pytest.raises(ValueError, match='not the one that was interrupted: clicks.labelled was'): b.resume(); fit_run(b, 1)

def test_log_has_a_column(home, tmp_path, hints):
    learn = fit_run(run(home, tmp_path, hints, method='source'), 1)
    assert learn.recorder.metric_names[3:5]==['pair', 'clicks'] and learn.clicks.views.size==(64,64)

def test_without_hints_nothing_changes(home, tmp_path, real, hints):
    "A pair has three parts, the very same with and without; nobody holds a term, and labels are the teacher's own"
    plain,told = (PairSet(real, real, (64,64), zoom=(1.,2.), hints=h) for h in (None, hints))
    for k in range(4):
        a,b = plain[k],told[k]
        assert len(a)==3 and len(b)==5 and all(torch.equal(u, v) for u,v in zip(a, b)) and b[3].min()==1
    a,b = (fit_run(make(home, tmp_path/o, 'pipa', **kw)) for o,kw in (('a', {}), ('b', dict(hints=None, clicks=dict(w=9.)))))
    assert [cb.name for cb in a.cbs]==[cb.name for cb in b.cbs] and 'clicks' not in [cb.name for cb in a.cbs]
    equal(a, b)
    assert a.mean_teacher.told is None

def test_a_click_overrules_the_teacher(home, real, hints):
    "In labels and trust, where it is, and nowhere else; with a margin, too"
    for margin in (None, (.2,.2,0,0)):
        seed()
        dls = uda_dls(folder(home/'game/images', home/'game/masks', 'minicity'), hints.unlabelled(), real, bs=2, size=(64,64), n=4, device='cpu', hints=hints, margin=margin)
        seen = []
        class Look(Callback):
            order = MeanTeacher.order+2
            def before_batch(self):
                if self.training: seen.append((self.h_t, *self.mean_teacher.labels, *self.mean_teacher.label(*self.mean_teacher.todo)))
        net = light(Tiny(), n_out=dls.c)
        fit(uda_learner(dls, net, 'self_training', hints=hints, clicks=dict(bs=1), thresh=.99, cbs=Look()), 1)
        for h,y,w,y_0,w_0 in seen:
            on = h!=255
            assert on.any() and torch.equal(y[on], h[on]) and (w[on]==1).all()
            assert torch.equal(y[~on], y_0[~on]) and torch.equal(w[~on], w_0[~on])

def _views(hints):
    learn = toy([Pair(), Clicks(hints, size=(64,64), seed=3, bs=4//place()[1], p_jitter=0, p_blur=0)])
    fit(learn, 1)
    return learn.clicks.b[1]

def test_ranks_share_the_views_out(hints):
    "Two processes draw different views, together those of one"
    one,(a,b) = on_ranks(_views, 1, hints)[0],on_ranks(_views, 2, hints)
    assert torch.equal(one[::2], a) and torch.equal(one[1::2], b) and not torch.equal(a, b)
