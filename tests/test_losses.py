"Losses against nested loops in double precision, published figures, and awkward input"
import json, math
from pathlib import Path
import numpy as np, pytest, torch, torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from golden.rules import inp, label, rs, rule_load
from pipa.losses import *
from pipa.losses import _Rivals

G = Path(__file__).parent/'golden'
gold = lambda n: json.loads((G/f'{n}.json').read_text())
unit = lambda *s, dtype=torch.float64: F.normalize(torch.randn(*s, dtype=dtype), dim=1)

@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)

def grads(l, *xs): return torch.autograd.grad(l, xs, retain_graph=True)

def same(fast, slow, *xs, tol=1e-8):               # softplus is linear above 20: 2e-9
    assert abs(fast.item()-slow.item()) < tol
    for a,b in zip(grads(fast, *xs), grads(slow, *xs)): assert (a-b).abs().max() < tol

# ---------------------------------------------------------------- cross-entropy

def loop_ce(z, y, w=None, ignore=255):
    z = F.interpolate(z, y.shape[-2:], mode='bilinear', align_corners=False)
    b,h,w_ = y.shape
    total = 0
    for n in range(b):
        for i in range(h):
            for j in range(w_):
                if y[n,i,j] == ignore: continue
                p = z[n,:,i,j].exp()
                total = total - (p[y[n,i,j].item()]/p.sum()).log()*(1 if w is None else w[n,i,j])
    return total/(b*h*w_)

@pytest.mark.parametrize('hw,HW', [((3,4),(12,16)), ((3,5),(7,11)), ((6,6),(6,6)), ((8,8),(4,4)), ((1,1),(5,3))])
@pytest.mark.parametrize('weighted', [False, True])
def test_ce_loop(hw, HW, weighted):
    z = torch.randn(2,5,*hw, dtype=torch.float64, requires_grad=True)
    y = torch.randint(0, 5, (2,*HW))
    y[torch.rand(y.shape)<.2] = 255
    w = torch.rand(2,*HW, dtype=torch.float64) if weighted else None
    same(weighted_ce(z, y, w), loop_ce(z, y, w), z)

def test_ce_options():
    z,y = torch.randn(2,5,8,8), torch.randint(0, 5, (2,8,8))
    assert torch.isclose(weighted_ce(z, y), F.cross_entropy(z, y))
    assert torch.isclose(weighted_ce(z, y, .25), weighted_ce(z, y)/4)
    w = torch.tensor([.5,1])[:,None,None]
    assert torch.isclose(weighted_ce(z, y, w), weighted_ce(z, y, w.expand(2,8,8)))
    assert torch.equal(weighted_ce(z, y.byte()), weighted_ce(z, y))
    y_ = torch.where(y==0, -1, y)
    assert torch.isclose(weighted_ce(z, y_, ignore=-1), F.cross_entropy(z, y_, ignore_index=-1, reduction='none').mean())
    with pytest.raises(ValueError, match='B x H x W'): weighted_ce(z, y, torch.ones(8))

def test_ce_void_stays_in_the_mean():
    z,y = torch.randn(1,5,8,8), torch.randint(0, 5, (1,8,8))
    half = y.clone(); half[:,4:] = 255
    assert torch.isclose(weighted_ce(z, half), F.cross_entropy(z, half, ignore_index=255)/2)

def test_ce_empty_batch_and_half():
    assert weighted_ce(torch.zeros(0,5,8,8), torch.zeros(0,8,8).long()) == 0
    z,y = torch.randn(1,5,8,8), torch.randint(0, 5, (1,32,32))
    for dt in (torch.float16, torch.bfloat16):
        l = weighted_ce(z.to(dt), y)
        assert l.dtype==torch.float32 and torch.equal(l, weighted_ce(z.to(dt).float(), y))
    with torch.autocast('cpu', dtype=torch.bfloat16): assert torch.equal(weighted_ce(z, y), weighted_ce(z.float(), y))

def test_ce_golden():
    models = pytest.importorskip('pipa.models')
    net = rule_load(models.daformer('mit_b0')).eval()
    with torch.no_grad(): z = net.decode_head(net.backbone(inp('img', (2,3,128,160))))
    y,g = label('daf', (2,128,160)), gold('daformer_b0')['loss']
    assert abs(weighted_ce(z, y).item()-g['loss_seg']) < 1e-5
    assert abs(weighted_ce(z, y, inp('daf_w', (2,128,160), 'uniform')).item()-g['loss_seg_weighted']) < 1e-5

# ---------------------------------------------------------------- feature distance

def pooled(y, f, min_ratio, k, ignore=255):
    "The recipe in the published words: one-hot with a channel for void, average pooling, argmax"
    o = F.one_hot(torch.where(y==ignore, k, y), k+1).movedim(-1, 1).float()
    r,c = F.avg_pool2d(o, f).max(1)
    return torch.where((c==k) | (r<min_ratio), ignore, c)

@pytest.mark.parametrize('f,min_ratio,shape', [(4,.75,(2,32,40)), (8,.3,(1,70,91)), (3,.5,(1,31,29)), (16,.4,(2,64,64)), (1,.75,(1,5,6))])
def test_shrink_loop(f, min_ratio, shape):
    y = torch.randint(0, 5, (shape[0], *(-(-s//3) for s in shape[1:]))).repeat_interleave(3,1).repeat_interleave(3,2)[:,:shape[1],:shape[2]]
    y[torch.rand(y.shape)<.1] = 255
    assert torch.equal(shrink_labels(y, f, min_ratio, 5), pooled(y, f, min_ratio, 5))

def test_shrink_golden():
    z,g = np.load(G/'misc.npz'), gold('misc')['feature_distance']
    s = shrink_labels(label('fd', (2,256,320), 19, 48, .05), 32)
    assert np.array_equal(s, z['fd_label_downscaled'][:,0])
    assert {str(int(k)):int(n) for k,n in zip(*s.unique(return_counts=True))} == g['hist']
    y = label('ds2', (1,70,90), 5, 7, .3)
    for f,r in ((4,.75),(8,.5),(16,.3)): assert np.array_equal(shrink_labels(y, f, r, 5), z[f'ds2_sf{f}'][:,0])

def test_shrink_strays():
    y = torch.full((1,4,4), 77)
    assert (shrink_labels(y, 4)==255).all() and (shrink_labels(y, 4, n_classes=256)==77).all()
    assert (shrink_labels(torch.full((1,4,4), -1), 4, ignore=-1)==-1).all()
    assert shrink_labels(y, 5).shape == (1,0,0)
    assert torch.equal(shrink_labels(torch.ones(1,4,4).byte(), 2), torch.ones(1,2,2).long())

def test_feat_dist_golden():
    g = gold('misc')['feature_distance']
    f = inp('fd_f1', (2,512,8,10)).requires_grad_()
    f0,y = inp('fd_f2', (2,512,8,10)), label('fd', (2,256,320), 19, 48, .05)
    assert abs(feat_dist(f, f0, y, g['thing_classes']).item()/g['masked'] - 1) < 1e-6
    (d,) = grads(feat_dist(f, f0, y, g['thing_classes']), f)
    assert (d.abs().sum(1)>0).sum() == g['n_mask']

@pytest.mark.parametrize('H,W,h,w', [(32,32,4,4), (30,32,4,4), (25,31,4,4), (8,8,1,1)])
def test_feat_dist_loop(H, W, h, w):
    f,f0 = (torch.randn(2,6,h,w, dtype=torch.float64, requires_grad=True) for _ in range(2))
    y = torch.randint(0, 3, (2,h,w)).repeat_interleave(8,1).repeat_interleave(8,2)
    y[torch.rand(y.shape)<.2] = 255
    y = y[:,:H,:W]
    full = torch.full((2,8*h,8*w), 255); full[:,:H,:W] = y
    l = []
    for b in range(2):
        for i in range(h):
            for j in range(w):
                v = full[b, 8*i:8*i+8, 8*j:8*j+8]
                if any((v==c).float().mean() >= .75 for c in (1,2)): l.append(((f[b,:,i,j]-f0[b,:,i,j].detach())**2).sum().sqrt())
    got = feat_dist(f, f0, y, (1,2))
    if l: same(got, sum(l)/len(l), f)
    assert torch.autograd.grad(got, f0, allow_unused=True)[0] is None

def test_feat_dist_padding_is_void():
    "Two rows of cells on 33 rows of pixels: the second one is nearly empty, and doesn't count"
    f = torch.tensor([[1.,2],[10,20]]).view(1,1,2,2)
    assert feat_dist(f, 0*f, torch.zeros(1,33,64).long(), [0]) == 1.5

def test_feat_dist_nothing():
    f = torch.randn(2,6,2,2, requires_grad=True)
    for y,c in ((torch.full((2,64,64), 255), [1]), (torch.zeros(2,64,64).long(), []), (torch.zeros(2,64,64).long(), (5,6))):
        l = feat_dist(f, torch.zeros(2,6,2,2), y, c)
        assert l==0 and l.dim()==0 and not grads(l, f)[0].any()
    l = feat_dist(f.half(), torch.zeros(2,6,2,2).half(), torch.zeros(2,64,64).byte(), [0])
    assert l.dtype==torch.float32 and l>0
    with pytest.raises(ValueError, match='9x2'): feat_dist(torch.zeros(1,6,9,2), torch.zeros(1,6,9,2), torch.zeros(1,32,64).long(), [0])

# ---------------------------------------------------------------- pixel contrast

def loop_contrast(e, y, temp=.1, base_temp=.07):
    rows = []
    for i in range(len(y)):
        l = []
        for j in range(len(y)):
            if i==j or y[i]!=y[j]: continue
            s = e[i]@e[j]/temp
            wrong = sum([(e[i]@e[k]/temp).exp() for k in range(len(y)) if y[k]!=y[i]], 0*s)
            l.append(-(s - (s.exp()+wrong).log()))
        if l: rows.append(sum(l)/len(l))
    return temp/base_temp*sum(rows)/len(rows) if rows else e.sum()*0

@pytest.mark.parametrize('m,k,temp,base', [(2,1,.1,.07), (13,3,.1,.07), (13,13,.5,1.), (20,2,.07,.07), (17,8,1.,.07)])
def test_contrast_loop(m, k, temp, base):
    e,y = unit(m,6).requires_grad_(), torch.randint(0, k, (m,))
    same(sup_contrast(e, y, temp, base), loop_contrast(e, y, temp, base), e)

def test_contrast_symmetries():
    e,y = unit(30,6), torch.randint(0, 4, (30,))
    l,p,q = sup_contrast(e, y), torch.randperm(30), torch.linalg.qr(torch.randn(6,6).double())[0]
    for l_ in (sup_contrast(e[p], y[p]), sup_contrast(e@q, y), sup_contrast(e, 250-y)): assert torch.isclose(l, l_)
    assert torch.isclose(sup_contrast(e, y, base_temp=.14), l/2)
    lone = sup_contrast(torch.cat([e, unit(1,6)]), torch.cat([y, torch.tensor([9])]))
    assert lone > l                                   # a lonely sample pushes, but doesn't dilute the mean

@pytest.mark.parametrize('dt', [torch.float16, torch.bfloat16, torch.float32])
def test_contrast_precision(dt):
    e,y = unit(60,16).to(dt).requires_grad_(), torch.randint(0, 4, (60,))
    l = sup_contrast(e, y)
    assert l.dtype==torch.float32 and abs(l-sup_contrast(e.double(), y)) < 1e-5
    (g,) = grads(l, e)
    assert g.dtype==dt and g.isfinite().all()
    with torch.autocast('cpu', dtype=torch.bfloat16): assert torch.equal(sup_contrast(e, y), l)

@pytest.mark.parametrize('temp', [1e-3, .01])
def test_contrast_cold(temp):
    e,y = unit(40,4, dtype=torch.float32).requires_grad_(), torch.arange(40)%3
    l = sup_contrast(e, y, temp)
    assert l.isfinite() and grads(l, e)[0].isfinite().all()

@pytest.mark.parametrize('name', 'abcd')
def test_pixel_golden(name):
    g,z = gold('pixel_contrast')[name], np.load(G/'pixel_contrast.npz')
    f = F.normalize(inp('pc_feat_'+name, g['feat_shape']), dim=1).requires_grad_()
    img,pix = (torch.as_tensor(z[f'{name}_{o}'].astype(np.int64)) for o in ('img','pix'))
    e = f.flatten(2)[img, :, pix]
    e.retain_grad()
    y = torch.as_tensor(z[f'{name}_y']).long()[:,None].expand_as(img)
    l = sup_contrast(e.flatten(0,1), y.flatten())
    l.backward()
    assert abs(l.item()-g['loss']) < 1e-5
    assert abs(f.grad.norm().item()/g['grad_norm_feats'] - 1) < 1e-3
    assert np.abs(e.grad[0].numpy()-z[f'{name}_grad_anchor_row0']).max() < 1e-6
    y_s,p_s = (torch.as_tensor(z[f'{name}_{o}'].astype(np.int64)) for o in ('label_small','pred'))
    i = sample_pixels(y_s, p_s, ignore=-1)            # the release counts void as one more class
    n = y_s.shape[1]*y_s.shape[2]
    pair = (i//n)*256 + y_s.flatten()[i]
    assert [int(o)%256 for o in pair.unique()] == g['row_labels']
    assert pair.unique(return_counts=True)[1].tolist() == [g['n_view']]*g['n_anchor_rows']
    hard = (y_s!=p_s).flatten()[i]
    assert [int(hard[pair==o].sum()) for o in pair.unique()] == g['n_hard_per_row']
    assert (y_s.flatten()[sample_pixels(y_s, p_s)]!=255).all()

def loop_counts(y, pred, max_samples, max_views, min_pixels, ignore):
    "How many hard and easy samples each (image, class) must get, by the rule in words"
    need = max_views+1 if min_pixels is None else min_pixels
    pairs = [(b,c) for b in range(len(y)) for c in y[b].unique().tolist() if c!=ignore and (y[b]==c).sum()>=need]
    out = {}
    for b,c in pairs:
        n = min(max_views, max_samples//len(pairs))
        h = int(((y[b]==c)&(pred[b]!=c)).sum()); e = int(((y[b]==c)&(pred[b]==c)).sum())
        if h+e <= n: t = h,e
        elif h>=n/2 and e>=n/2: t = n//2, n-n//2
        elif h>=n/2: t = n-e, e
        else: t = h, n-h
        if sum(t): out[b,c] = t
    return out

@pytest.mark.parametrize('ms,mv,mp', [(1024,100,None), (200,30,None), (64,50,5), (1000,10,1), (3,100,1), (7,5,0), (64,7,None)])
@pytest.mark.parametrize('shape', [(2,23,31), (1,64,32), (3,5,7)])
def test_sampler_counts(ms, mv, mp, shape):
    y = (torch.rand(shape)**3*6).long()
    y[torch.rand(shape)<.1] = 255
    pred = torch.where(torch.rand(shape)<.1*(1+y), 0, y)
    i = sample_pixels(y, pred, ms, mv, mp)
    assert len(i.unique())==len(i) and (i.diff()>0).all()
    b,c,h = i//(shape[1]*shape[2]), y.flatten()[i], (y!=pred).flatten()[i]
    got = {(int(b_),int(c_)): (int((h&(b==b_)&(c==c_)).sum()), int((~h&(b==b_)&(c==c_)).sum())) for b_,c_ in zip(b,c)}
    assert got == loop_counts(y, pred, ms, mv, mp, 255)
    assert len(i) <= ms or mp==0

def test_sampler_is_uniform():
    y,n = torch.zeros(1,6,10).long(), 1500
    hits = sum(F.one_hot(sample_pixels(y, max_views=15, min_pixels=1), 60).sum(0) for _ in range(n))
    assert (hits/n - .25).abs().max() < 5*math.sqrt(.25*.75/n)

def test_sampler_awkward():
    for y in (torch.full((2,8,8), 255), torch.zeros(0,8,8).long(), torch.zeros(2,0,8).long(), torch.zeros(1,10,10).long()):
        assert len(sample_pixels(y))==0               # exactly 100 pixels are not more than 100
    assert len(sample_pixels(torch.zeros(1,1,101).long()))==100
    assert len(sample_pixels(torch.full((1,9,9), -1), min_pixels=1, ignore=-1))==0
    assert len(sample_pixels(torch.zeros(1,20,20).byte(), torch.ones(1,20,20).byte()))==100

def test_rank_sizes():
    for n in (0,1,50):
        g = torch.randint(0, 4, (n,))
        r = random_rank(g, 6)
        for k in range(6): assert r[g==k].sort()[0].tolist() == list(range(int((g==k).sum())))

def test_pixel_equals_parts():
    emb,y = unit(2,8,20,30).requires_grad_(), torch.randint(0, 3, (2,10,15)).repeat_interleave(8,1).repeat_interleave(8,2)
    small = F.interpolate(y[:,None].float(), (20,30), mode='nearest')[:,0].long()
    torch.manual_seed(1); l,n = pixel_contrast(emb, y, max_samples=24, max_views=8, return_n=True)
    torch.manual_seed(1); i = sample_pixels(small, None, 24, 8)
    e = torch.stack([emb[j//600, :, j%600//30, j%30] for j in i.tolist()])
    assert n==len(i)==24
    same(l, loop_contrast(e, small.flatten()[i]), emb)

def test_pixel_void_and_pred_sizes():
    emb,y = unit(2,8,24,32).requires_grad_(), torch.randint(0, 2, (2,24,32))
    y[:,:5] = 255
    pred = torch.randint(0, 2, (2,24,32))
    torch.manual_seed(2); a = pixel_contrast(emb, y, pred)
    torch.manual_seed(2); b = pixel_contrast(emb, y, pred.repeat_interleave(4,1).repeat_interleave(4,2))
    assert torch.equal(a, b)
    (g,) = grads(a, emb)
    assert not g[:,:,:5].any() and g[:,:,5:].any() and g.isfinite().all()

def test_pixel_takes_the_nearest_label():
    "Published: the upper left label of each cell, never a mixture"
    y = torch.full((1,80,80), 255)
    y[:,::4,::4] = torch.arange(2).repeat_interleave(200).view(20,20)
    assert pixel_contrast(unit(1,8,20,20), y, return_n=True)[1] == 200

def test_pixel_nothing():
    emb = unit(2,8,9,11).requires_grad_()
    for y in (torch.full((2,36,44), 255), torch.randint(0, 19, (2,37,45))):
        l,n = pixel_contrast(emb, y, return_n=True)
        assert l==0 and l.dim()==0 and n==0 and not grads(l, emb)[0].any()
    l,n = pixel_contrast(emb, torch.zeros(2,9,11).long(), min_pixels=10, return_n=True)
    assert l==0 and n==198 and not grads(l, emb)[0].any()            # one class: no rivals
    assert pixel_contrast(emb.bfloat16(), torch.randint(0, 3, (2,9,11)), min_pixels=10).dtype==torch.float32

# ---------------------------------------------------------------- patch contrast

def patch_case(name, g):
    n,m,c = g['n'], g['bank'], g['C']
    nrm = lambda x: F.normalize(x, dim=1)
    f_1 = nrm(inp(f'pp_f1_{name}', (n,c)))
    f_2 = nrm(.7*f_1 + .45*nrm(inp(f'pp_f2_{name}', (n,c))))
    bank,r = nrm(inp(f'pp_bank_{name}', (m,c))), rs(f'pp_lab_{name}')
    y_1,u,v = r.randint(0, g['n_classes'], n), r.random_sample(n), r.randint(0, g['n_classes'], n)
    y_2,y_n = np.where(u<.8, y_1, v), r.randint(0, g['n_classes'], m)
    c_1,c_2 = (.5+.5*r.random_sample(n) for _ in range(2))
    t = lambda a: torch.as_tensor(a) if a.dtype!=np.float64 else torch.as_tensor(a).float()
    return f_1.requires_grad_(), f_2.requires_grad_(), *map(t, (y_1,y_2,c_1,c_2)), bank, t(y_n)

@pytest.mark.parametrize('name', ['small','two_chunks','temp05'])
def test_patch_golden(name):
    g = gold('patch_contrast')[name]
    a = patch_case(name, g)
    l,n_1,n_2 = patch_contrast(*a, temp=g['temp'], thresh=g['thr'], return_n=True)
    assert (n_1,n_2) == (g['n_pos1'],g['n_pos2'])
    assert abs(l.item()-g['loss1']-g['loss2']) < 1e-5 and abs(.1*l.item()-g['loss_unsup_w0_1']) < 1e-6
    d_1,d_2 = grads(l, *a[:2])
    for d,k in ((d_1,'grad1_norm'),(d_2,'grad2_norm')): assert abs(d.norm().item()/g[k]-1) < 1e-3
    assert np.abs(d_1.flatten()[:6].numpy()-g['grad1_head']).max() < 1e-6
    assert abs(d_1.abs().max().item()-g['grad1_maxabs']) < 1e-6

def loop_patch(f_1, f_2, y_1, y_2, c_1, c_2, neg, y_neg, temp=.1, thresh=.9):
    total = f_1.sum()*0 + f_2.sum()*0
    for f,g,y,c,d in ((f_1,f_2,y_1,c_1,c_2), (f_2,f_1,y_2,c_2,c_1)):
        l = []
        for i in range(len(f)):
            if not (d[i]>thresh and c[i]<d[i]): continue
            right = (f[i]@g[i].detach()/temp).exp()
            l.append(-(right/(right+sum([(f[i]@neg[k]/temp).exp() for k in range(len(neg)) if y_neg[k]!=y[i]], 0*right))).log())
        if l: total = total + sum(l)/len(l)
    return total

@pytest.mark.parametrize('n,m,k,temp,thresh', [(1,1,2,.1,.5), (15,11,3,.1,.7), (15,11,1,.1,.7), (15,11,11,.5,.9), (9,1,3,1.,0.), (9,7,3,.1,1.)])
def test_patch_loop(n, m, k, temp, thresh):
    f_1,f_2,neg = unit(n,5).requires_grad_(), unit(n,5).requires_grad_(), unit(m,5)
    y_1,y_2,y_n = (torch.randint(0, k, (o,)) for o in (n,n,m))
    a = f_1, f_2, y_1, y_2, torch.rand(n), torch.rand(n), neg, y_n, temp, thresh
    same(patch_contrast(*a), loop_patch(*a), f_1, f_2)

def test_patch_gradients_stay_home():
    f_1,f_2,neg = (unit(12,5).requires_grad_() for _ in range(3))
    y,hi,lo = torch.zeros(12).long(), torch.full((12,), .95), torch.full((12,), .5)
    l = patch_contrast(f_1, f_2, y, y, lo, hi, neg, y+1)
    g = torch.autograd.grad(l, (f_1,f_2,neg), allow_unused=True)
    assert g[0].any() and not g[1].any() and g[2] is None           # only the doubtful view moves
    g = torch.autograd.grad(patch_contrast(f_1, f_2, y, y, hi, lo, neg, y+1), (f_1,f_2), allow_unused=True)
    assert not g[0].any() and g[1].any()

@pytest.mark.parametrize('rows', [1,3,50,1000])
def test_rivals_chunks(rows):
    f,neg = unit(50,6).requires_grad_(), unit(31,6)
    y,y_n = torch.randint(0, 4, (50,)), torch.randint(0, 4, (31,))
    got = _Rivals.apply(f, y, neg, y_n, .1, rows)
    want = (f@neg.t()/.1).masked_fill(y[:,None]==y_n, -torch.inf).logsumexp(1)
    w = torch.randn(50).double()
    same((got*w).sum(), (want*w).sum(), f)

def test_rivals_gradcheck():
    f,neg = unit(6,4).requires_grad_(), unit(9,4)
    y,y_n = torch.tensor([0,1,2,0,7,7]), torch.arange(9)%3
    assert torch.autograd.gradcheck(lambda f: _Rivals.apply(f, y, neg, y_n, .5, 4), f)
    with torch.no_grad(): assert not _Rivals.apply(f, y, neg, y_n, .5, 4).requires_grad

@pytest.mark.parametrize('dt', [torch.float32, torch.float16, torch.bfloat16])
def test_patch_precision(dt):
    f_1,f_2,neg = (unit(40,16).to(dt).requires_grad_() for _ in range(3))
    y,y_n,c_1,c_2 = torch.randint(0, 4, (40,)), torch.randint(0, 4, (40,)), torch.rand(40), torch.rand(40)
    a = (y, y, c_1, c_2)
    l = patch_contrast(f_1, f_2, *a, neg, y_n, thresh=.3)
    assert l.dtype==torch.float32
    assert abs(l-patch_contrast(f_1.double(), f_2.double(), *a, neg.double(), y_n, thresh=.3)) < 1e-5
    for g in grads(l, f_1, f_2): assert g.dtype==dt and g.isfinite().all() and g.any()
    with torch.autocast('cpu', dtype=torch.bfloat16): assert torch.equal(patch_contrast(f_1, f_2, *a, neg, y_n, thresh=.3), l)

def test_patch_mixed_types():
    "Student in half precision, bank in single"
    f,neg = unit(8,4).bfloat16().requires_grad_(), unit(6,4).float()
    y,c = torch.zeros(8).long(), torch.linspace(0, 1, 8)
    l = patch_contrast(f, f.detach(), y, y, c, c.flip(0), neg, torch.ones(6).long(), thresh=.6)
    assert l>0 and grads(l, f)[0].any()

def test_patch_nothing():
    f_1,f_2,neg = (unit(5,4).requires_grad_() for _ in range(3))
    y,c = torch.zeros(5).long(), torch.linspace(.1, 1, 5)
    for a in ((f_1,f_2,y,y,c,c,neg,y+1), (f_1,f_2,y,y,c*0,c*0,neg,y+1), (f_1,f_2,y,y,c,c.flip(0),neg,y),
              (f_1,f_2,y,y,c,c.flip(0),neg[:0],y[:0]), (f_1[:0],f_2[:0],y[:0],y[:0],c[:0],c[:0],neg,y+1)):
        l,*n = patch_contrast(*a, return_n=True)
        assert l==0 and l.dim()==0
        for g in grads(l, f_1, f_2): assert not g.any()

def test_patch_cold_is_finite():
    f_1,f_2,neg = (unit(9,4).float().requires_grad_() for _ in range(3))
    y,c = torch.arange(9)%2, torch.linspace(0, 1, 9)
    l = patch_contrast(f_1, f_2, y, y, c, c.flip(0), neg, y, temp=1e-3, thresh=.5)
    assert l.isfinite() and all(g.isfinite().all() for g in grads(l, f_1, f_2))

# the paper's formulas

@pytest.mark.parametrize('temp', [.1, .5])
def test_paper_pixel_is_cross_entropy_over_all(temp):
    "torch's cross-entropy of each row against each of its partners, all samples being the classes"
    torch.manual_seed(0); y = torch.randint(0, 4, (19,)); y[3] = 77
    e = F.normalize(torch.randn(19,6).double(), dim=1).requires_grad_()
    s,rows = e@e.t()/temp,[]
    for i in range(19):
        js = [j for j in range(19) if j!=i and y[j]==y[i]]
        if js: rows.append(F.cross_entropy(s[i].expand(len(js), -1), torch.tensor(js)))
    want,got = torch.stack(rows).mean(),sup_contrast(e, y, temp, form='paper')
    torch.testing.assert_close(got, want); torch.testing.assert_close(*[torch.autograd.grad(l, e)[0] for l in (got,want)])

@pytest.mark.parametrize('n', [9, 1, 1500])
def test_paper_patch_is_symmetric_cross_entropy(n):
    "torch's cross-entropy of each place over all places of both views, its twin being the right one; 1500 places go in several pieces"
    torch.manual_seed(0)
    f_1,f_2 = (F.normalize(torch.randn(n,6).double(), dim=1).requires_grad_() for _ in range(2))
    every,y,c = torch.cat([f_1,f_2]),torch.randint(0,3,(n,)),torch.rand(n)
    way = lambda a,twin: F.cross_entropy(a@every.t()/.1, twin)
    got,n_1,n_2 = patch_contrast(f_1, f_2, y, y, c, c, every, torch.randint(0,3,(2*n,)), form='paper', return_n=True)
    want = way(f_1, torch.arange(n)+n)+way(f_2, torch.arange(n))
    torch.testing.assert_close(got, want); assert n_1==n_2==n
    for o in (f_1,f_2): torch.testing.assert_close(*[torch.autograd.grad(l, o, retain_graph=True)[0] for l in (got,want)])
    torch.testing.assert_close(got, patch_contrast(f_2, f_1, y, y, c, c, every, y.repeat(2), form='paper'))

def test_forms_are_named():
    e,y = F.normalize(torch.randn(4,3), dim=1),torch.tensor([0,0,1,1])
    for f in (lambda k: sup_contrast(e, y, form=k), lambda k: patch_contrast(e, e, y, y, e[:,0], e[:,0], e, y, form=k), lambda k: pixel_contrast(e.T[None,:,:,None], y[None,:,None], min_pixels=1, form=k)):
        assert torch.isfinite(f('paper')) and torch.isfinite(f('released'))
        with pytest.raises(ValueError, match="can be 'released' or 'paper'"): f('papers')

class Syncs(TorchDispatchMode):
    "Which calls a GPU would have to be waited for: those whose answer, or its shape, depends on data"
    def __init__(self): super().__init__(); self.names = []
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        name = f.__name__.split('.')[0]
        mask = name in ('index','index_put','index_put_') and any(o is not None and o.dtype==torch.bool for o in args[1])
        if mask or name in ('_local_scalar_dense','nonzero','bincount','masked_select','unique_dim','_unique2','is_nonzero'): self.names.append(name)
        return f(*args, **kwargs or {})

def test_host_waits_for_the_device_a_few_times_only():
    "One look for the candidates, one for the drawn, one for the pairs, one for the rows of each direction; however many classes there are"
    torch.manual_seed(0)
    got = []
    for k in (2,30):
        y,emb = torch.randint(0, k, (2,40,40)),F.normalize(torch.randn(2,8,40,40), dim=1).requires_grad_()
        f = [F.normalize(torch.randn(200, 8), dim=1).requires_grad_() for _ in range(3)]
        with Syncs() as a: l,_ = pixel_contrast(emb, y, y.flip(1), min_pixels=1, return_n=True); l.backward()
        with Syncs() as b: l,*_ = patch_contrast(*f[:2], *torch.randint(0, k, (2,200)), *torch.rand(2, 200), f[2], torch.randint(0, k, (200,)), thresh=.5, return_n=True); l.backward()
        got.append((a.names, b.names))
    assert got[0]==got[1] and sorted(got[0][0])==['index','nonzero','nonzero'] and got[0][1]==['nonzero']*2

def some_places(n=60, m=40, d=8, k=3):
    f_1,f_2,neg = (F.normalize(torch.randn(o, d).double(), dim=1).requires_grad_() for o in (n,n,m))
    return f_1, f_2, *torch.randint(0, k, (2,n)), *torch.rand(2, n), neg, torch.randint(0, k, (m,))

@pytest.mark.parametrize('form', ['released','paper'])
def test_fixed_shapes_wait_for_nothing(form):
    emb,y,a = F.normalize(torch.randn(2,8,40,40), dim=1).requires_grad_(),torch.randint(0, 9, (2,40,40)),some_places()
    with Syncs() as s:
        with same_shapes():
            l,n = pixel_contrast(emb, y, y.flip(1), min_pixels=1, form=form, return_n=True)
            m,*_ = patch_contrast(*a, thresh=.5, form=form, return_n=True)
        (l+m+feat_dist(emb, emb.detach()+1, y, [3])).backward()
    assert s.names==[] and torch.is_tensor(n)

@pytest.mark.parametrize('form', ['released','paper'])
@pytest.mark.parametrize('ms,mv,mp', [(1024,100,None), (64,50,5), (3,100,1), pytest.param(9000, 10, 1, marks=pytest.mark.slow)])
def test_fixed_draw_is_the_same_kind_of_draw(ms, mv, mp, form):
    "As many of each class of each image, hard and easy; and the loss is that of the drawn ones"
    y = (torch.rand(2,40,50)**3*6).long(); y[torch.rand(y.shape)<.1] = 255
    pred = torch.where(torch.rand(y.shape)<.3, 0, y)
    torch.manual_seed(3)
    with same_shapes(): i = sample_pixels(y, pred, ms, mv, mp)
    assert len(i)==min(ms, y.numel())
    got = i[i>=0]
    assert (got.diff()>0).all() and (i[len(got):]==-1).all()
    key = lambda i: ((i//2000)*1000 + y.flatten()[i]*2 + (pred!=y).flatten()[i]).sort()[0]
    assert torch.equal(key(got), key(sample_pixels(y, pred, ms, mv, mp)))
    emb = F.normalize(torch.randn(2,8,40,50).double(), dim=1).requires_grad_()
    torch.manual_seed(3)
    with same_shapes(): l,n = pixel_contrast(emb, y, pred, max_samples=ms, max_views=mv, min_pixels=mp, form=form, return_n=True)
    e = emb.flatten(2)[got//2000, :, got%2000]
    want = sup_contrast(e, y.flatten()[got], form=form)
    assert n==len(got) and abs(l-want)<1e-12
    assert torch.allclose(*(torch.autograd.grad(o, emb)[0] for o in (l,want)), atol=1e-14)

@pytest.mark.parametrize('form', ['released','paper'])
def test_fixed_shapes_where_nothing_counts(form):
    for y in (torch.full((2,20,20), 255), torch.zeros(1,20,20).long(), torch.arange(400).view(1,20,20)%200, torch.zeros(0,20,20).long()):
        emb = F.normalize(torch.randn(len(y),8,20,20), dim=1).requires_grad_()
        both = []
        for o in (False,True):
            torch.manual_seed(0)
            with same_shapes(o): both.append(pixel_contrast(emb, y, form=form, min_pixels=1))
        assert torch.allclose(*both, rtol=1e-5) and torch.autograd.grad(both[1], emb)[0].isfinite().all()
        assert both[1]==0 or y.unique().numel()==200 or form=='paper'
    f_1,f_2,y_1,y_2,c_1,c_2,neg,y_n = some_places()
    for c,k,m in ((c_1*0,60,40), (c_1,0,40), (c_1,60,0)):
        a = f_1[:k], f_2[:k], y_1[:k], y_2[:k], c[:k], c[:k], neg[:m], y_n[:m]
        with same_shapes(): p,*n = patch_contrast(*a, form=form, return_n=True)
        q,*o = patch_contrast(*a, form=form, return_n=True)
        assert abs(p-q)<1e-12 and [*map(int, n)]==[*map(int, o)]
        assert torch.allclose(*(torch.autograd.grad(o, f_1, allow_unused=True, materialize_grads=True)[0] for o in (p,q)), atol=1e-14)

def test_fixed_shapes_compile_whole():
    "One graph without a break; the backend is PyTorch's own, as what is asked is whether it can be traced"
    emb,y,a = F.normalize(torch.randn(2,8,20,20), dim=1),torch.randint(0, 3, (2,20,20)),some_places()
    f = lambda emb, *a: pixel_contrast(emb, y, y, max_samples=9000, max_views=400, min_pixels=1) + patch_contrast(*a, thresh=.5)
    with torch.no_grad(), same_shapes(): got = torch.compile(f, fullgraph=True, backend='eager')(emb, *a); assert abs(got-f(emb, *a)) < 1e-5
