"Callbacks: when things happen, who moves, what the teacher is, and the awkward batches"
from copy import deepcopy
import math
import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.training import GradientAccumulation
from fastai.torch_core import to_float
from PIL import Image
from timm.utils import ModelEmaV2
from torch import nn
from pipa.callbacks import *
from pipa.models import add_heads
from pipa.labels import label_space
from pipa.lean import Lean
from pipa.learner import adamw, param_groups
from pipa.losses import weighted_ce
from pipa.mix import aligned
from pipa.models import Feats, adapt, light
from pipa.sets.domains import Domain
from tiny import HalfOnCPU, fit, seed, toy

def terms():
    "All four, small enough for images of 64x64"
    return [Mix(), PixelContrast(min_pixels=4, max_views=20), PatchContrast(size=(32,32), thresh=0., n_neg=20), FeatureDistance([1,2], min_ratio=.5)]
names = ['mix', 'pixel_contrast', 'patch_contrast', 'feature_distance']

class Each(Callback):
    "Call a function at an event, behind everybody"
    order = 98
    def __init__(self, **fs):
        for k,f in fs.items(): setattr(self, k, lambda f=f: f(self))

def state(m): return {k:v.clone() for k,v in m.state_dict().items()}
def same(a, b): return a.keys()==b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())
def finite(net): return all(torch.isfinite(v).all() for v in net.state_dict().values())

# when

def test_order_of_events():
    log,cbs = [],[Pair(), MeanTeacher(), *terms()]
    def note(k):
        if cbs[0].learn.training: log.append(k)
    def watch(o, *ks):
        for k in ks:
            f = getattr(o, k)
            def g(f=f, k=k): note(f'{o.name}.{k}'); return f()
            setattr(o, k, g)
    watch(cbs[0], 'before_batch', 'after_pred'); watch(cbs[1], 'before_batch', 'after_step')
    for o in cbs[2:]: watch(o, 'prepare', 'predict', 'score')
    learn = toy(cbs[::-1])                                   # the order of the list doesn't matter
    learn.model.register_forward_hook(lambda m,i,o: log.append('student') if m.training else None)
    loss = learn.loss_func
    learn.loss_func = lambda *a: note('loss') or loss(*a)
    learn.add_cb(Each(before_backward=lambda s: note('backward')))
    fit(learn)
    at = lambda k: [i for i,o in enumerate(log) if o==k]
    rows = [['pair.before_batch'], ['mean_teacher.before_batch'], [f'{n}.prepare' for n in names], ['student'], ['pair.after_pred'],
            [f'{n}.predict' for n in names], ['loss'], [f'{n}.score' for n in names], ['backward'], ['mean_teacher.after_step']]
    first = [[at(k)[0] for k in row] for row in rows]
    for a,b in zip(first, first[1:]): assert max(a)<min(b), log
    assert all(len(at(k))==1 for row in rows for k in row if k!='student')
    s = at('student')
    assert len(s)==3, 'source, mixed image, both crops at once'
    assert s[1:]==sorted([at('mix.predict')[0]+1, at('patch_contrast.predict')[0]+1])

def test_everybody_stands_behind_mixed_precision():
    assert MixedPrecision.order < Pair.order < MeanTeacher.order < LossTerm.order
    assert all(t.order==LossTerm.order and t.run_valid is False for t in terms())

def test_pair_unpacks_and_means():
    seen = []
    def look(s):
        if s.training: seen.append((s.learn.loss.item(), len(s.learn.yb), s.learn.x_t, s.learn.feats, s.learn.pred))
    learn = toy([Pair(), Each(after_loss=look)], n=4)
    fit(learn)
    losses = [o[0] for o in seen]
    assert len(seen)==2 and math.isclose(learn.pair.mean, sum(losses)/2, rel_tol=1e-6)
    for (_,n,x_t,f,pred),i in zip(seen, (0,2)):
        assert n==1 and isinstance(f, Feats) and pred.shape==(2,3,16,16)
        assert torch.equal(x_t, torch.stack([learn.dls.train.dataset[j][2] for j in (i,i+1)]))
    assert math.isnan(Pair().mean)

# teacher

@pytest.mark.parametrize('alpha', [.999, .6])
def test_teacher_is_timms_average_buffers_included(alpha):
    "timm averages the whole state, too; only the decay is set by our schedule"
    ref,births = [],[]
    def begin(s): ref.append(ModelEmaV2(s.model)); births.append(state(s.model))
    def step(s):
        ref[0].decay = min(1-1/(s.learn.mean_teacher.t+1), alpha)
        ref[0].update(s.model)
    learn = toy([Pair(), MeanTeacher(alpha), Mix()], n=6)
    learn.add_cb(Each(before_fit=begin, after_step=step))
    # our callback has moved when `Each` comes, so its count is the number of the update
    fit(learn)
    mine,want = learn.mean_teacher.teacher.state_dict(),ref[0].module.state_dict()
    assert learn.mean_teacher.t==3 and mine.keys()==want.keys()
    moved = set()
    for k,v in mine.items():
        if not v.is_floating_point(): assert v==learn.model.state_dict()[k]; continue
        torch.testing.assert_close(v, want[k], rtol=1e-5, atol=1e-6)
        if not torch.equal(v, births[0][k]): moved.add(k)
    stats = [k for k in mine if 'running_' in k and k.startswith('decode_head')]
    assert stats and moved.issuperset(stats), 'statistics of batch normalisation move'

def test_tied_weights_move_once():
    from pipa.callbacks import ema_
    def tied(v): net = torch.nn.ModuleList([torch.nn.Linear(2,2), torch.nn.Linear(2,2)]); net[1].weight = net[0].weight; torch.nn.init.constant_(net[0].weight, v); return net
    for buffers in ('mean', 'copy'):
        t = tied(0.); ema_(t, tied(1.), .9, buffers)
        assert torch.allclose(t[0].weight, torch.tensor(.1)) and t[0].weight is t[1].weight

def test_decay():
    for t,a in ((1,1/2), (2,2/3), (998,1-1/999), (999,.999), (5000,.999)): assert math.isclose(ema_decay(t), a)

def test_integers_are_copied_and_first_state_is_a_copy():
    seed()
    a,b = [nn.Sequential(nn.Conv2d(3,4,1), nn.BatchNorm2d(4)) for _ in range(2)]
    for _ in range(3): b(torch.randn(2,3,4,4))
    ptr = {k:v.data_ptr() for k,v in a.state_dict().items()}
    ema_(a, b, .9)
    assert a[1].num_batches_tracked==3 and {k:v.data_ptr() for k,v in a.state_dict().items()}==ptr
    ema_(a, b, 0.)
    assert all(torch.allclose(v, b.state_dict()[k]) for k,v in a.state_dict().items())

def test_nobody_trains_the_teacher(tmp_path):
    learn = toy([Pair(), MeanTeacher(), *terms()], n=2, path=tmp_path)
    fit(learn)
    mt = learn.mean_teacher; t,before = mt.teacher,state(mt.teacher)
    shared = {p.data_ptr() for p in learn.model.state_dict().values()} & {p.data_ptr() for p in t.state_dict().values()}
    assert not shared and all(p.grad is None and not p.requires_grad for p in t.parameters()) and not any(m.training for m in t.modules())
    ours = {id(p) for g in learn.opt.param_lists for p in g}
    assert not ours & {id(p) for p in t.parameters()}
    with learn.no_bar():
        learn.validate(); learn.get_preds()
    assert mt.teacher is t and same(state(t), before) and mt.t==1
    student,steps,bank = state(learn.model),[c.steps for c in learn.cbs if isinstance(c, LossTerm)],learn.patch_contrast.bank
    with learn.no_bar(): learn.lr_find(num_it=6, show_plot=False, stop_div=False)
    assert same(state(learn.model), student), 'fastai puts the student back'
    assert mt.teacher is t and same(state(t), before) and mt.t==1, 'and we the teacher'
    assert [c.steps for c in learn.cbs if isinstance(c, LossTerm)]==steps==[1]*4 and learn.patch_contrast.bank is bank
    fit(learn)
    assert mt.teacher is t and not same(state(t), before) and mt.t==2, 'a second fit goes on'

def test_labels_come_from_the_teacher_in_evaluation():
    got = {}
    def look(s):
        if s.training and not got: got.update(y=s.mean_teacher.labels[0].clone(), w=s.mean_teacher.labels[1].clone(), x=s.learn.x_t.clone(), p=s.mean_teacher.teacher(s.learn.x_t).softmax(1).detach())
    learn = toy([Pair(), MeanTeacher(thresh=.34, trust='pixel', margin=(5,7)), Mix(), Each(before_batch=look)])
    fit(learn)
    assert torch.equal(got['y'], got['p'].argmax(1))
    want = (got['p'].amax(1)>=.34).float(); want[:,:5] = 0; want[:,-7:] = 0
    assert torch.equal(got['w'], want) and 0<want.mean()<1

# sums

def test_loss_is_the_sum():
    cbs = [Pair(), MeanTeacher(), *terms()]
    ws = dict(zip(names, (.7, .3, .2, 5.)))
    scores,rows = {},[]
    for cb in cbs[2:]:
        cb.w = ws[cb.name]; f = cb.score
        def score(f=f, cb=cb): scores[cb.name] = f(); return scores[cb.name]
        cb.score = score
    def look(s):
        if not s.training: return
        sup = weighted_ce(s.pred.detach().double(), s.y)
        total = sup + sum(ws[k]*v[0].detach().double() for k,v in scores.items())
        gs = torch.autograd.grad(s.learn.loss_grad, s.pred, retain_graph=True)[0]
        rows.append((s.learn.loss.item(), s.learn.loss_grad.item(), total.item(), {k:v[0].item() for k,v in scores.items()}, s.learn.loss.requires_grad, gs))
    learn = toy(cbs, n=4); learn.add_cb(Each(after_loss=look))
    fit(learn)
    assert len(rows)==2 and set(scores)==set(names)
    for loss,grad,total,_,rg,gs in rows:
        assert math.isclose(loss, total, rel_tol=1e-5) and math.isclose(grad, total, rel_tol=1e-5) and gs.any()
    for k in names: assert math.isclose(getattr(learn, k).mean, np.mean([r[3][k] for r in rows]), rel_tol=1e-5)
    assert len({round(r[3][k], 9) for r in rows for k in names})>4

def test_weight_scales_the_gradient():
    def grads(w):
        got = []
        learn = toy([Pair(), PixelContrast(w=w, min_pixels=4, max_views=1000, max_samples=10**6)])   # takes all pixels: nothing random
        learn.add_cb(Each(after_backward=lambda s: got.append([p.grad.clone() for p in s.model.proj_head.parameters()])))
        fit(learn); return got[0]
    for a,b in zip(grads(.1), grads(.3)): torch.testing.assert_close(3*a, b, rtol=1e-3, atol=1e-6)

@pytest.mark.parametrize('start', [0,2])
def test_start_waits(start):
    cb = Mix(start=start); calls,losses = [],[]
    f = cb.prepare
    cb.prepare = lambda: calls.append(cb.steps) or f()
    def look(s):
        if s.training: losses.append(s.learn.loss.item()-weighted_ce(s.pred.detach(), s.y).item())
    learn = toy([Pair(), MeanTeacher(), cb, Each(after_loss=look)], n=6)
    fit(learn)
    assert calls==[*range(start, 3)] and cb.n==3-start and cb.steps==3
    assert all((abs(d)<1e-5)==(i<start) for i,d in enumerate(losses))
    fit(learn)
    assert calls==[*range(start, 6)] and cb.n==3, 'steps go on, the mean starts anew'

def test_nothing_scored_is_no_number():
    cb = Mix(start=99)
    fit(toy([Pair(), MeanTeacher(), cb]))
    assert math.isnan(cb.mean)

# who moves

def reach(cb, drop=0.):
    "Gradient of a term alone on every parameter of the student"
    got = {}
    def look(s):
        if not s.training: return
        l,n = cb.score()
        named = [*s.model.named_parameters()]
        got.update(zip([k for k,_ in named], torch.autograd.grad(l, [p for _,p in named], retain_graph=True, allow_unused=True)))
        got['loss'] = l
    learn = toy([Pair(), MeanTeacher(), cb], net=light('mit_b0', n_out=3, drop_path=drop))
    learn.add_cb(Each(after_loss=look))
    if isinstance(cb, FeatureDistance): fit(learn)          # at the first step both encoders are equal
    return fit(learn),got

@pytest.mark.parametrize('cb,parts', [
    (Mix(), {'backbone', 'decode_head'}), (PixelContrast(min_pixels=4), {'backbone', 'proj_head'}),
    (PatchContrast(size=(32,32), thresh=0.), {'backbone', 'decode_head', 'project'}), (FeatureDistance([1,2], min_ratio=.5), {'backbone'})],
    ids=lambda o: getattr(o, 'name', ''))
def test_reach(cb, parts):
    learn,got = reach(cb)
    assert {k.split('.')[0] for k,g in got.items() if k!='loss' and g is not None and g.any()}==parts
    assert all(torch.isfinite(g).all() for k,g in got.items() if k!='loss' and g is not None)
    assert all(p.grad is None for p in learn.mean_teacher.teacher.parameters())
    body = {k:g for k,g in got.items() if k.startswith('backbone.')}
    assert len(body)==176 and not [k for k,g in body.items() if g is None or not g.any()], 'every parameter of the encoder'
    if 'decode_head' in parts:
        assert (got['decode_head.linear_pred.weight'] is not None)==(cb.name=='mix'), 'the patch term looks in front of the classifier'

def test_mixing_is_the_only_way_to_the_classifier_of_the_target():
    _,got = reach(PixelContrast(min_pixels=4))
    assert all(g is None for k,g in got.items() if k.startswith(('decode_head', 'project.')))

# alone and together

@pytest.mark.parametrize('some', [[0],[1],[2],[3],[0,1,2,3],[2,0],[1,2]], ids=str)
def test_any_list_of_terms(some):
    cbs = [terms()[i] for i in some]
    if 2 in some or 0 in some: cbs = [MeanTeacher(), *cbs]
    learn = fit(toy([Pair(), *cbs]))
    assert finite(learn.model) and all(c.n==1 and math.isfinite(c.mean) for c in learn.cbs if isinstance(c, LossTerm))

@pytest.mark.parametrize('what', ['void', 'one class', 'one pixel'])
def test_awkward_masks(what):
    y = torch.full((64,64), 1 if what=='one class' else 255)
    if what=='one pixel': y[3,3] = 2
    losses = []
    def look(s):
        if s.training: losses.append(s.learn.loss.item())
    learn = toy([Pair(), MeanTeacher(), *terms(), Each(after_loss=look)], y=y)
    fit(learn)
    assert finite(learn.model) and math.isfinite(losses[0])
    assert float(learn.pixel_contrast.total)==0, 'no other class, no contrast'
    if what=='void':
        assert learn.pair.mean==0 and all(math.isnan(c.mean) for c in (learn.pixel_contrast, learn.feature_distance))

def test_all_ignored_with_the_pixel_term_alone_moves_nothing_but_by_decay():
    got = []
    learn = toy([Pair(), PixelContrast(min_pixels=4), FeatureDistance([1])], y=torch.full((64,64), 255))
    learn.add_cb(Each(after_backward=lambda s: got.append([p.grad for p in s.model.parameters()])))
    fit(learn)
    assert all(g is None or not g.any() for g in got[0])

def test_patch_with_nothing_confident():
    cb = PatchContrast(w=1., size=(32,32), thresh=1.)
    got = []
    learn = toy([Pair(), MeanTeacher(), cb])
    learn.add_cb(Each(after_backward=lambda s: got.append([p.grad for p in s.model.project.parameters()])))
    fit(learn)
    assert float(cb.total)==0 and cb.count==0 and math.isnan(cb.mean)
    assert all(g is None or not g.any() for g in got[0]) and finite(learn.model)

def test_memory_of_the_patch_term():
    cb = PatchContrast(size=(32,32), thresh=0., n_neg=7, keep=3); sizes = []
    learn = toy([Pair(), MeanTeacher(), cb], n=10)
    learn.add_cb(Each(after_loss=lambda s: s.training and sizes.append([len(f) for f,_ in cb.bank])))
    fit(learn)
    assert sizes==[[14], [14]*2, [14]*3, [14]*3, [14]*3]
    for f,y in cb.bank:
        assert not f.requires_grad and f.grad_fn is None and f.dtype==torch.float32 and y.shape==(14,)
        torch.testing.assert_close(f.norm(dim=1), torch.ones(14))

def test_memory_is_first_in_first_out_and_labels_stay_with_embeddings():
    cb = PatchContrast(n_neg=50, keep=2)
    for k in range(4):
        y = torch.arange(2*4*4).view(2,4,4)+100*k
        f = y[:,None].float().expand(-1,3,-1,-1).clone().requires_grad_()
        neg,lab = cb.negatives(f, y)
        assert (neg==lab[:,None]).all() and not neg.requires_grad
        assert sorted(lab.tolist())==[100*j+i for j in range(max(0,k-1), k+1) for i in range(32)]

def test_views_of_the_patch_term_are_one_place():
    "An image of which every place has its own colour: what is paired has equal colours"
    cb,seen = PatchContrast(size=(32,48), stride=8, scale=(1.,1.)),0
    seed(1)
    i,j = torch.meshgrid(torch.arange(64.), torch.arange(96.), indexing='ij')
    cb.learn = type('L', (), dict(x_t=torch.stack([i, j, 0*i])[None].repeat(3,1,1,1), mean_teacher=type('T', (), dict(logits=lambda s,x: x))()))()
    for _ in range(10):
        cb.prepare()
        x = torch.cat([cb.crops.x_1, cb.crops.x_2])
        a,b = aligned(*nn.functional.avg_pool2d(torch.cat([x[:,:1], x[:,1:2]], 1), 8).chunk(2), cb.crops, 8)
        assert len(a)>0; torch.testing.assert_close(a, b); seen += len(a)
        assert cb.x_c.shape==(6,3,32,48) and cb.lab.shape==cb.conf.shape==(6,4,6)
    assert seen>60

# precision

def test_bf16():
    kinds,losses = set(),[]
    def look(s):
        if s.training: losses.append((s.learn.loss, s.learn.loss_grad, s.learn.feats, s.learn.pred))
    learn = toy([Pair(), MeanTeacher(), *terms(), HalfOnCPU(), Each(after_loss=look)])
    learn.model.register_forward_hook(lambda m,i,o: kinds.add((o[0] if isinstance(o, tuple) else o).dtype))
    fit(learn)
    l,lg,f,p = losses[0]
    assert kinds=={torch.bfloat16}, 'the net did run in half precision'
    assert l.dtype==lg.dtype==p.dtype==torch.float32 and torch.isfinite(l)
    assert isinstance(f, Feats) and all(o.dtype==torch.float32 for o in (*f.maps, f.fused))
    for k in names: assert getattr(learn, k).total.dtype==torch.float32 and math.isfinite(getattr(learn, k).mean)
    assert finite(learn.model) and finite(learn.mean_teacher.teacher) and all(v.dtype!=torch.bfloat16 for v in learn.mean_teacher.teacher.state_dict().values())
    assert not torch.is_autocast_enabled('cpu')

def test_feats_is_rebuilt_by_fastai():
    f = to_float((torch.ones(1).bfloat16(), Feats([torch.ones(2).bfloat16(), torch.ones(3).bfloat16()], torch.zeros(4).bfloat16())))[1]
    assert isinstance(f, Feats) and [len(o) for o in f.maps]==[2,3] and len(f.fused)==4 and f.fused.dtype==torch.float32
    g = deepcopy(f)
    assert isinstance(g, Feats) and torch.equal(g.maps[1], f.maps[1])

# other nets

def lraspp():
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large
    return adapt(lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3), 'classifier.cbr')

def deeplab():
    from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large
    return adapt(deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3), 'classifier.3')

def unet():
    from fastai.vision.learner import create_unet_model
    from torchvision.models import resnet18
    net = create_unet_model(resnet18, 3, (64,64), pretrained=False)
    return adapt(net, f'layers.{len(net.layers)-3}')

@pytest.mark.parametrize('make', [lraspp, *(pytest.param(o, marks=pytest.mark.slow) for o in (deeplab, unet))])
def test_other_nets_with_all_terms(make):
    seed()
    learn = toy([Pair(), MeanTeacher(), *terms()], net=make())
    before = state(learn.model)
    fit(learn)
    assert finite(learn.model) and all(c.n==1 and math.isfinite(float(c.total)) for c in learn.cbs if isinstance(c, LossTerm))
    moved = [k for k,p in learn.model.named_parameters() if not torch.equal(p, before[k])]
    assert len(moved)>.9*len([*learn.model.parameters()])
    with torch.no_grad(): assert learn.mean_teacher.teacher(torch.randn(1,3,64,64)).shape==(1,3,64,64)

# pictures

def test_shows():
    learn = fit(toy([Pair(), MeanTeacher(), *terms()]))
    for cb,cols in ((learn.mean_teacher, 3), (learn.mix, 3), (learn.pixel_contrast, 3), (learn.patch_contrast, 2)):
        fig = cb.show(2)
        assert len(fig.axes)==2*cols and all(ax.images for ax in fig.axes)

def test_heads():
    net = add_heads(light('mit_b0', n_out=3), pixel_dim=7, patch_dim=5, hidden=9)
    p = net.proj_head
    assert add_heads(net).proj_head is p, 'heads that are there stay'
    _,f = net.train()(torch.randn(2,3,64,64))
    assert net.proj_head(f.maps).shape==(2,7,16,16) and net.project(f.fused).shape==(2,5,16,16)

# beyond the paper

def test_buffers_copied_is_torchs_average_of_parameters():
    "torch's `AveragedModel` without buffers averages parameters alone; what it does with ours, and the student's statistics"
    from torch.optim.swa_utils import AveragedModel
    ref = []
    def begin(s): ref.append(AveragedModel(deepcopy(s.model), avg_fn=lambda a,p,n: a.lerp(p, 1-ema_decay(s.learn.mean_teacher.t, .6)))); ref[0].n_averaged += 1
    learn = toy([Pair(), MeanTeacher(.6, buffers='copy'), Mix(), Each(before_fit=begin, after_step=lambda s: ref[0].update_parameters(s.model))], n=4)
    fit(learn)
    t,s = learn.mean_teacher.teacher,learn.model
    for a,b in zip(t.parameters(), ref[0].module.parameters()): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    stats = dict(s.named_buffers())
    assert stats and all(torch.equal(v, stats[k]) for k,v in t.named_buffers()) and not same(state(t), state(s))
    with pytest.raises(ValueError, match="'mean' or 'copy'"): ema_(t, s, .5, 'none')

class Eager(Callback):
    "Ask for the labels at once, as every step did"
    order = MeanTeacher.order+.5
    def before_batch(self):
        if self.training: self.mean_teacher.labels

class Looks(Callback):
    "How often the teacher looked at something, by step"
    order = MeanTeacher.order-.5
    def before_fit(self): self.n = []
    def before_batch(self):
        if not self.training: return
        if not self.n: self.mean_teacher.teacher.register_forward_hook(self.count)
        self.n.append(0)
    def count(self, *_): self.n[-1] += 1

@pytest.mark.parametrize('late', ['mix', 'patch'])
def test_labels_wait_until_somebody_wants_them(late):
    "Before the first term that wants them the teacher does nothing, and the run is the same to the last bit"
    def run(*more):
        end = dict(mix=lambda: [Mix(start=2), PixelContrast(min_pixels=4, max_views=20)],
                   patch=lambda: [PatchContrast(size=(32,32), thresh=0., n_neg=20, start=2)])[late]()
        learn = fit(toy([Pair(), MeanTeacher(.6), Looks(), *end, *more], n=8))
        return learn.looks.n,state(learn.model),state(learn.mean_teacher.teacher)
    lazy,eager = run(),run(Eager())
    n = 2 if late=='patch' else 1
    assert (lazy[0], eager[0])==([0,0,1,1], [1,1,n,n]), 'the patch term has labels of its own'
    assert same(lazy[1], eager[1]) and same(lazy[2], eager[2])

def test_labels_of_ones_own_stay():
    "Who sets the teacher's labels keeps them for the batch"
    mine = torch.full((2,64,64), 2),torch.ones(2,64,64)
    class Own(Callback):
        order = MeanTeacher.order+.5
        def before_batch(self):
            if self.training: self.mean_teacher.labels = mine
    got = {}
    fit(toy([Pair(), MeanTeacher(thresh=0.), Own(), Mix(), Each(after_loss=lambda s: got.update(y=s.mean_teacher.labels, m=s.mix.b[1]) if s.training else None)]))
    assert got['y'] is mine and (got['m'].flatten(1)==2).any()

def test_forms_run_and_differ():
    def total(form):
        px,pt = PixelContrast(min_pixels=4, max_views=10**4, max_samples=10**6, form=form),PatchContrast(size=(32,32), thresh=0., form=form)
        fit(toy([Pair(), MeanTeacher(), px, pt])); return float(px.total),float(pt.total),pt.count
    a,b = total('released'),total('paper')
    assert all(map(math.isfinite, a+b)) and a[0]!=b[0] and b[2]>a[2], 'every place counts, in both directions'

# Callbacks that act behind the scenes, and where what they do can be seen
unseen = dict(LossTerm='what all terms share', HalfPrecision='numbers of half the size', Ranks='other processes', Lean='the same step with less memory', Checkpoint='files', Before='a part of the picture of a run',
              Memory='a table', _Again='a part of `replay`', OwnNet='what terms with a net of their own share', StepClock='times')

def test_whoever_has_something_to_see_shows_it(tmp_path):
    "All callbacks of the package, found by looking for them: each has a `show` that draws after a fit, or a reason not to"
    import importlib, pkgutil, pipa
    mods = [importlib.import_module(m.name) for m in pkgutil.walk_packages(pipa.__path__, 'pipa.') if not m.name.split('.')[-1].startswith('_')]
    found = {c.__name__:c for m in mods for c in vars(m).values() if isinstance(c, type) and issubclass(c, Callback) and c.__module__==m.__name__}
    assert set(unseen)<=set(found) and not {n for n in unseen if hasattr(found[n], 'show')}, 'it has a `show` now: take it off the list'
    make = dict(PixelContrast=lambda c: c(min_pixels=4, max_views=20), PatchContrast=lambda c: c(size=(32,32), thresh=0., n_neg=20),
                FeatureDistance=lambda c: c([1,2], min_ratio=.5), AdvSeg=lambda c: c(width=4), AdvEnt=lambda c: c(width=4), FoundationDistance=lambda c: c(light(n_out=3).backbone),
                Clicks=lambda c: c(hints, size=(64,64), partners=True), ClickContrast=lambda c: c(min_pixels=4, max_views=20))
    for n,a in dict(x=np.zeros((64,64,3), np.uint8), y=np.full((64,64), 1, np.uint8)).items(): Image.fromarray(a).save(tmp_path/f'{n}.png')
    hints = Domain([tmp_path/'x.png'], [tmp_path/'y.png'], label_space(['floor', 'wall', 'box']))
    cbs = [make.get(n, lambda c: c())(c) for n,c in found.items() if n not in unseen]
    learn = toy(cbs); learn.dls.space = label_space(['floor', 'wall', 'box'])
    waits = [cb for cb in cbs if type(cb).__name__ not in ('Pair', 'Snapshots')]
    assert len(waits)==len(cbs)-2
    for cb in waits:
        with pytest.raises(RuntimeError, match=f'^{type(cb).__name__} has worked on no batch yet.*call `fit` first'): cb.show()
    fit(learn)
    for cb in cbs:
        fig = cb.show(1); fig.canvas.draw()
        assert fig.axes and all(ax.images for ax in fig.axes[:2]), cb.name
