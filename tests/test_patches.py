"Crops where one wants them, and the loss of the training for them"
import numpy as np, pytest, torch, torch.nn.functional as F
from torch import tensor
from pipa.look import patches as P
from pipa.callbacks import MeanTeacher, Pair, PatchContrast
from pipa.models import add_heads
from pipa.mix import two_crops
from pipa.models import light
from tiny import toy, fit

def plain(x): return x.softmax(1), F.avg_pool2d(x, 8)
x = torch.randn(3,3,64,96, generator=torch.Generator().manual_seed(0))

def test_crops_are_those_of_the_sampler():
    torch.manual_seed(0); a = two_crops(x, (32,48), flip=0.)
    b = P.crops_at(x, a.at_1, a.at_2, (32,48))
    for k,u,v in zip(a._fields, a, b): assert torch.equal(u.float(), v.float()), k

@pytest.mark.parametrize('at,other,to', [((0,0),(0,0),(0,0)), ((6,3),(1,1),(9,1)), ((99,99),(1,1),(25,41)), ((-9,-9),(31,47),(7,7)), ((12,12),(0,0),(16,16))])
def test_snap(at, other, to):
    got = P.snap(at, other, (32,48), (64,96))
    assert all(0<=g<=n-s and (g-o)%8==0 for g,o,n,s in zip(got, other, (64,96), (32,48)))
    if to!=(16,16): assert got==to

def test_the_loss_is_that_of_the_callback():
    cb = PatchContrast(size=(32,32), thresh=.3, n_neg=10_000)
    learn = fit(toy([Pair(), MeanTeacher(alpha=.5), cb], bs=2))
    c = P.crops_at(x[:2,:,:64,:64], [(0,8)]*2, [(16,24)]*2, (32,32))
    l = P.pair_looks(learn.model, c, learn.mean_teacher.teacher)
    cb.bank,cb.crops = [],c
    with torch.no_grad(): p = F.avg_pool2d(cb.mean_teacher.logits(torch.cat([c.x_1, c.x_2])).softmax(1), 8)
    cb.conf,cb.lab = p.max(1)
    assert torch.equal(torch.cat(l[4:6]), cb.lab) and torch.allclose(torch.cat(l[6:8]), cb.conf)
    learn.model.eval(); learn.model.training = True # the student of `predict`, without dropout
    cb.x_c = torch.cat([c.x_1, c.x_2])
    with torch.no_grad(): cb.predict()
    assert torch.allclose(torch.cat(l[2:4]), cb.f, atol=1e-5)
    v,n = cb.score()
    got = P.patch_loss(l, c, thresh=.3)
    assert n==got[1]>0 and type(got[1]) is int and np.isclose(float(v), got[0], rtol=1e-4)

def test_scores_by_hand():
    c = P.crops_at(x, [(0,0)]*3, [(16,24)]*3, (32,48)); l = P.pair_looks(plain, c)
    for i in range(3):
        a,b = x[i,:,16:32,24:48].softmax(0),x[i,:,16:32,24:48].softmax(0)
        s = P.pair_scores(l, c, i)
        assert s['agreement']==1 and s['js']==0 and np.isclose(s['cosine'], 1) and np.isclose(s['iou'], 16*24/(2*32*48-16*24))
    l = l._replace(p_2=l.p_2.flip(1)); m = P.overlap_maps(l, c, 1)
    p,q = x[1,:,16:32,24:48].softmax(0),x[1,:,16:32,24:48].softmax(0).flip(0)
    assert torch.equal(m['same'], p.argmax(0)==q.argmax(0)) and m['js'].max()<=1
    sure = (p.amax(0)>.6) & (q.amax(0)>.6)
    s = P.pair_scores(l, c, 1, conf=.6)
    assert np.isclose(s['confident'], float(m['same'][sure].float().mean())) and np.isclose(s['share'], float(sure.float().mean()))

def test_js_bounds_and_symmetry():
    p,q = torch.rand(2,5,40).softmax(1); d = P.js_divergence(p, q)
    assert torch.allclose(d, P.js_divergence(q, p)) and (d>=0).all() and (d<=1).all()
    one = F.one_hot(tensor([0,1]), 3).float().T
    assert torch.equal(P.js_divergence(one, one.flip(0)), tensor([1.,0.]))

def test_class_agreement_is_iou():
    g = torch.Generator().manual_seed(0); a,b = torch.randint(0, 4, (2,7,9), generator=g)
    got = P.class_agreement(a, b, 5)
    for c in range(4): assert np.isclose(got[c], float(((a==c)&(b==c)).sum()/((a==c)|(b==c)).sum()))
    assert np.isnan(got[4]) and np.isnan(P.class_agreement(a[:0], b[:0], 2)).all()

def test_nothing_shared():
    c = P.crops_at(x, [(0,0)]*3, [(32,48)]*3, (32,48)); l = P.pair_looks(plain, c)
    assert P.patch_loss(l, c)==(0,0) and np.isnan(P.pair_scores(l, c)['agreement']) and P.pair_scores(l, c)['iou']==0

def test_sweep_repeats_itself_and_leaves_chance_alone():
    torch.manual_seed(3); before = torch.random.get_rng_state()
    a,b = (P.sweep(plain, x, 9, (32,48), bs=4, seed=s) for s in (0,0))
    assert torch.equal(torch.random.get_rng_state(), before) and a.equals(b) and len(a)==9 and (a.agreement==1).all()
    assert not a.equals(P.sweep(plain, x, 9, (32,48), bs=4, seed=1)) and a.iou.between(.1, 1).all()
    assert len(P.sweep_figure({'a': a, 'b': b}).axes)==3 and len(P.hardest_figure(x, a, (32,48), 2).axes)==2

def test_a_net_sees_the_same_whatever_mode_it_is_in():
    net = add_heads(light('mit_b0', n_out=3), hidden=16).train(); c = P.crops_at(x[:,:,:64,:64], [(0,0)]*3, [(8,8)]*3, (32,32))
    a = P.pair_looks(net, c); assert net.training and net.backbone.training
    for u,v in zip(a, P.pair_looks(net.eval(), c)): assert torch.equal(u, v)
