"Guards of `pipa.mix`: golden figures of the release, loops, geometry, awkward cases"
import json, math, colorsys
from pathlib import Path
import numpy as np, pytest, torch, torch.nn.functional as F
from torch import tensor
from golden.rules import inp, label
from pipa.mix import *
from pipa.mix import _draw

GOLD = Path(__file__).parent/'golden'
misc,arrays = json.loads((GOLD/'misc.json').read_text()), np.load(GOLD/'misc.npz')

# ---- pseudo-labels and margins
def test_pseudo_weight_golden():
    logits = 6*inp('ps_logits', (2,19,32,32))
    y,w = pseudo_label(logits)
    assert (w == misc['pseudo_weight']['weight']).all()
    assert int((logits.softmax(1).amax(1) >= .968).sum()) == misc['pseudo_weight']['n_ge']
    assert (y == logits.argmax(1)).all() and y.dtype == torch.long and w.shape == y.shape

def test_pseudo_per_pixel():
    logits = 6*inp('ps_logits', (2,19,32,32))
    y,w = pseudo_label(logits, trust='pixel')
    assert torch.equal(w, (logits.softmax(1).amax(1) >= .968).float()) and int(w.sum()) == misc['pseudo_weight']['n_ge']
    assert torch.equal(y, pseudo_label(logits)[0])
    with pytest.raises(ValueError, match="'batch' or 'pixel'"): pseudo_label(logits, trust='class')

def test_pseudo_needs_no_graph_and_owns_its_memory():
    logits = torch.randn(1,3,4,4, requires_grad=True)
    y,w = pseudo_label(logits)
    w[0,0,0] = 5                                              # an expanded scalar would change everywhere
    assert not w.requires_grad and (w==5).sum() == 1

def test_pseudo_nan_is_not_certain():
    logits = torch.full((1,3,2,2), float('nan'))
    assert pseudo_label(logits)[1].sum() == 0

@pytest.mark.parametrize('m', [(0,0,0,0), (15,12,3,0), (1,0,0,7), (99,99,99,99), (0,40,0,0)])
def test_margins_loop(m):
    w = torch.rand(2,40,30); o = margins(w, *m)
    for r in range(40):
        for c in range(30):
            keep = m[0] <= r < 40-m[1] and m[2] <= c < 30-m[3]
            assert torch.equal(o[:,r,c], w[:,r,c] if keep else torch.zeros(2))

# ---- ClassMix
def test_classmix_golden():
    y = label('cm', (2,64,64), 19, 16, .03)
    gold = torch.from_numpy(arrays['cm_masks_npseed3']).view(2,64,64).bool()
    u = torch.ones(2,256)*.9
    for i,cs in enumerate(misc['classmix_chosen_npseed3']): u[i,cs] = .1
    assert torch.equal(class_mask(y, u=u), gold)
    x = class_mix(inp('cm_s',(2,3,64,64)), y, inp('cm_t',(2,3,64,64)), label('cm2',(2,64,64),19,16,0), torch.ones(2,64,64), gold)
    assert torch.equal(x[1][0], torch.from_numpy(arrays['cm_mixed_label0'])[0,0].long())
    g = misc['one_mix']
    assert x[0][0].mean().item() == pytest.approx(g['img_mean'], abs=1e-7)
    assert x[0][0].abs().mean().item() == pytest.approx(g['img_absmean'], abs=1e-6) and int(x[1][0].sum()) == g['lbl_sum']

@pytest.mark.parametrize('k', range(1,21))
def test_classmix_counts_golden(k):
    y = torch.arange(k).repeat(3,2)[:,:,None]
    n = [len(o[m].unique()) for o,m in zip(y, class_mask(y))]
    assert n == [misc['classmix_n_chosen_of_n'][str(k)]]*3

def test_classmix_batch_rule_counts_void():
    y = tensor([[0,255,255],[1,1,2]])[:,:,None]               # four classes in the batch, 255 among them
    torch.manual_seed(0)
    took = [class_mask(y) for _ in range(300)]
    share = torch.stack([m[0,1,0] for m in took]).float().mean()
    assert abs(share-.5) < .1                                 # the void is drawn as often as any other
    assert not any(class_mask(y, ignore=255)[0,1].any() for _ in range(50))

@pytest.mark.parametrize('classes,ignore', [('batch',None), ('batch',255), ('image',None), ('image',255)])
def test_class_mask_loop(classes, ignore):
    y = label('mix', (3,33,47), 11, 8, .1); u = torch.rand(3,256)
    m = class_mask(y, classes=classes, ignore=ignore, u=u)
    for i in range(3):
        here = [c for c in (y if classes=='batch' else y[i]).unique().tolist() if c != ignore]
        won = sorted(here, key=lambda c: u[i,c].item())[:math.ceil(len(here)/2)]
        assert torch.equal(m[i], torch.isin(y[i], tensor(won)))

def test_class_mask_draws_differ_between_images_and_are_uniform():
    torch.manual_seed(0)
    y = torch.arange(10).repeat(400,1)[:,:,None]
    m = class_mask(y)[...,0]
    assert (m.sum(1) == 5).all() and (m.float().mean(0)-.5).abs().max() < .1 and len(m.unique(dim=0)) > 100

def test_class_mask_awkward():
    void = torch.full((2,4,4), 255)
    assert not class_mask(void, ignore=255).any() and class_mask(void).all()
    assert not class_mask(void, n=0).any() and class_mask(label('c',(1,9,9),3,4,0), n=99).all()
    y = label('c', (2,32,32), 7, 8, .1)
    torch.manual_seed(1); a = class_mask(y)
    torch.manual_seed(1); assert torch.equal(a, class_mask(y.byte()))
    with pytest.raises(ValueError, match="'batch' or 'image'"): class_mask(y, classes='all')

def test_class_mix_trust_and_default_mask():
    y_s,y_t = label('s',(2,16,16),5,4,0), label('t',(2,16,16),5,4,0)
    x_s,x_t,w_t = torch.ones(2,3,16,16), torch.zeros(2,3,16,16), torch.full((2,16,16),.25)
    torch.manual_seed(4); m = class_mask(y_s)
    torch.manual_seed(4); x,y,w = class_mix(x_s, y_s, x_t, y_t, w_t)
    assert torch.equal(x, m[:,None].float().expand_as(x)) and torch.equal(w, m*.75+.25)
    assert torch.equal(y, torch.where(m, y_s, y_t)) and w_t.unique().tolist() == [.25] and w.dtype == torch.float32
    with pytest.raises(ValueError, match='one size'): class_mix(x_s, y_s, x_t[:1], y_t[:1], w_t[:1])

# ---- blur and colour
def test_blur_golden():
    for k,v in misc['blur_kernel_yx'].items(): assert [blur_size(int(n)) for n in k.split('x')] == v
    o = blur(inp('blur', (1,3,64,64)), .7)
    assert np.abs(o[0,0].numpy()-arrays['blur_out_ch0']).max() < 2e-6

@pytest.mark.parametrize('sigma', [.15,.6,1.15,3.])
def test_blur_full_kernel(sigma):
    "Leaving out the taps beyond six sigma changes nothing"
    x = torch.randn(1,1,60,90, dtype=torch.double); o = blur(x, sigma, 31)
    t = torch.arange(-15,16.).double(); k = (-.5*(t/sigma)**2).exp(); k = k[:,None]*k; k /= k.sum()
    full = F.conv2d(F.pad(x, (15,)*4, mode='reflect'), k[None,None])
    assert (full-o).abs().max() < 1e-6

@pytest.mark.parametrize('hw', [(1,1), (1,9), (2,3), (5,200)])
def test_blur_small(hw):
    x = torch.rand(2,3,*hw); o = blur(x, 1.1, 51)
    assert o.shape == x.shape and torch.isfinite(o).all() and o.min() >= x.min()-1e-6 and o.max() <= x.max()+1e-6
    assert torch.allclose(blur(x, 0.), x, atol=1e-6)

def test_saturate_is_hsv():
    x = torch.rand(3,5,8); x[:,0,0] = .4; x[:,0,1] = 0; x[:,0,2] = tensor([1.,0,0])
    for a in (0.,.3,1.,1.2,4.):
        o = saturate(x, a)
        for r in range(5):
            for c in range(8):
                h,s,v = colorsys.rgb_to_hsv(*x[:,r,c].tolist())
                assert o[:,r,c].tolist() == pytest.approx(colorsys.hsv_to_rgb(h, min(1,s*a), v), abs=1e-5)

def test_jitter_loop():
    "Against the four operations written out in HSV"
    x = torch.rand(3,4,5)
    for seed in range(6):
        torch.manual_seed(seed); o = jitter(x, .2)
        torch.manual_seed(seed); b,c,s,h = _draw(.2,.2,.2,.2); order = torch.randperm(4).tolist()
        for r in range(4):
            for k in range(5):
                p = x[:,r,k].tolist(); clip = lambda v: min(1.,max(0.,v))
                for i in order:
                    H,S,V = colorsys.rgb_to_hsv(*p)
                    p = [lambda: [clip(v+b) for v in p], lambda: [clip(v*(1+c)) for v in p],
                         lambda: list(colorsys.hsv_to_rgb(H, min(1,S*(1+s)), V)), lambda: list(colorsys.hsv_to_rgb((H+h)%1, S, V))][i]()
                assert o[:,r,k].tolist() == pytest.approx(p, abs=2e-5)

def test_strong_augment():
    x = (torch.rand(4,3,24,32)-.45)/.22
    keep = x.clone()
    torch.manual_seed(0)
    shared = [(strong_augment(x) != x).flatten(1).any(1) for _ in range(400)]
    assert all(len(o.unique()) == 1 for o in shared)                                    # one coin for the batch
    assert abs(torch.stack(shared).float().mean()-.9) < .05                             # 1 - .2*.5
    each = torch.stack([(strong_augment(x, per_image=True) != x).flatten(1).any(1) for _ in range(150)])
    assert len(each.unique(dim=0)) > 2 and abs(each.float().mean()-.9) < .05
    assert torch.equal(x, keep)
    o = strong_augment(x, p_jitter=1, p_blur=0)                                         # amounts differ between images
    a = strong_augment(x[:1].expand(4,3,24,32), p_jitter=1, p_blur=1)
    assert not torch.allclose(a[0], a[1], atol=1e-3) and torch.isfinite(o).all()
    m,s = (tensor(v).view(3,1,1) for v in (imagenet_mean,imagenet_std))
    assert (o*s+m).min() > -1e-5 and (o*s+m).max() < 1+1e-5

@pytest.mark.parametrize('f', [strong_augment, crop_augment])
def test_augment_small_and_odd(f):
    for hw in ((1,1), (2,3), (7,61)):
        for seed in range(8):
            torch.manual_seed(seed); o = f(torch.randn(2,3,*hw))
            assert o.shape == (2,3,*hw) and torch.isfinite(o).all()

def test_augment_other_stats():
    x = torch.rand(2,3,8,8)
    o = strong_augment(x, p_jitter=1, p_blur=0, mean=(0,)*3, std=(1,)*3)
    assert 0 <= o.min() and o.max() <= 1

def test_crop_augment_shares():
    torch.manual_seed(0)
    x = torch.randn(300,3,6,6)
    assert abs((crop_augment(x, p_jitter=0, p_gray=0) != x).flatten(1).any(1).float().mean()-.5) < .1
    assert abs((crop_augment(x, p_blur=0, p_gray=0) != x).flatten(1).any(1).float().mean()-.8) < .1
    assert abs((crop_augment(x, p_blur=0, p_jitter=0) != x).flatten(1).any(1).float().mean()-.2) < .1

# ---- crops
def coords(b, h, w): return torch.stack(torch.meshgrid(torch.arange(h)*1., torch.arange(w)*1., indexing='ij')).expand(b,2,h,w)

@pytest.mark.parametrize('hw,size', [((131,203),(64,80)), ((97,97),96), ((96,96),96), ((99,301),(96,40)), ((720,1023),(328,720))])
def test_overlap_is_the_same_place(hw, size):
    torch.manual_seed(0)
    x = coords(12, *hw); seen = set()
    for _ in range(3):
        c = two_crops(x, size)
        seen |= set(zip(c.flip_1.tolist(), c.flip_2.tolist()))
        g_1,g_2 = aligned(F.avg_pool2d(c.x_1,8), F.avg_pool2d(c.x_2,8), c)
        assert torch.equal(g_1, g_2) and len(g_1)
        rows = []                                              # which cells both windows hold, one by one
        for a,b in zip(c.at_1.tolist(), c.at_2.tolist()):
            h,w = c.x_1.shape[-2:]
            rows += [[a[0]+8*i+3.5, a[1]+8*j+3.5] for i in range(h//8) for j in range(w//8)
                     if b[0] <= a[0]+8*i < b[0]+h and b[1] <= a[1]+8*j < b[1]+w]
        assert g_1.tolist() == rows
    assert len(seen) == 4

@pytest.mark.parametrize('stride', [1,2,4,8,16])
def test_any_stride(stride):
    torch.manual_seed(stride)
    c = two_crops(coords(6,150,171), (64,96), stride=16)
    f = [F.avg_pool2d(o, stride) for o in (c.x_1,c.x_2)]
    assert torch.equal(*aligned(*f, c, stride=stride))

def test_wrong_stride_raises():
    c = two_crops(coords(2,150,171), (64,96), stride=8)
    with pytest.raises(ValueError, match="stride 8"): aligned(*(F.avg_pool2d(o,2) for o in c[:2]), c)
    c = c._replace(box_1=tensor([[8,0,64,96]]*2))
    with pytest.raises(ValueError, match="stride 16"): aligned(*(F.avg_pool2d(o,16) for o in c[:2]), c, stride=16)
    with pytest.raises(ValueError, match=r"take \(96, 64\)"): two_crops(coords(1,150,171), (100,71))

def test_bounds_and_fallback():
    torch.manual_seed(0)
    c = two_crops(coords(200,131,203), (64,80), iou=(.3,.6))
    i = [max(0,64-abs(a[0]-b[0]))*max(0,80-abs(a[1]-b[1])) for a,b in zip(c.at_1.tolist(), c.at_2.tolist())]
    v = [o/(2*64*80-o) for o in i]
    assert min(v) >= .3 and max(v) <= .6
    area = (c.box_1[:,2:]-c.box_1[:,:2]).prod(1)
    assert area.tolist() == i and area.tolist() == (c.box_2[:,2:]-c.box_2[:,:2]).prod(1).tolist()
    c = two_crops(coords(5,131,203), (64,80), iou=(.991,.992), flip=0.)
    assert torch.equal(c.x_1, c.x_2) and c.box_1.tolist() == [[0,0,64,80]]*5

def test_published_overlap():
    "720² windows of 2048×1024 images, zoomed: overlap about half a crop, the fallback never needed"
    torch.manual_seed(0)
    room = (tensor([[1024,2048]])*torch.empty(3000,1).uniform_(.8,2)).long()-720
    a,b = crop_corners(room, (720,720))
    share = (720-(a-b).abs()).clamp(min=0).prod(1)/720**2
    assert abs(share.mean()-.49) < .03 and (crop_iou(a-b, (720,720)) >= .1).all()

def test_corner_draws_cover_the_image():
    torch.manual_seed(0)
    a,b = crop_corners(tensor([[7,20]]).expand(3000,2), (32,32))
    assert a[:,0].unique().tolist() == list(range(8)) and a[:,1].unique().tolist() == list(range(21))
    assert b.min() >= 0 and b[:,1].max() <= 20

def test_padding_is_no_overlap():
    torch.manual_seed(0)
    x = coords(8,50,171)+1                                     # 0 is filling
    c = two_crops(x, (64,96))
    g_1,g_2 = aligned(F.avg_pool2d(c.x_1,8), F.avg_pool2d(c.x_2,8), c)
    assert torch.equal(g_1, g_2) and g_1[:,0].max() <= 50 and (g_1 > 0).all()
    assert (c.x_1[:,:,50:] == 0).all() and c.box_1[:,2].unique().tolist() == [48]
    c = two_crops(x[...,:5,:5], 64)                            # smaller than a cell: nothing to compare
    g_1,_ = aligned(F.avg_pool2d(c.x_1,8), F.avg_pool2d(c.x_2,8), c)
    assert g_1.shape == (0,2)

def test_zoom():
    torch.manual_seed(0)
    x = F.interpolate(torch.rand(6,3,9,13), (80,120), mode='bilinear')
    c = two_crops(x, 64, scale=(.8,2.))
    assert c.zoom.min() >= .8 and c.zoom.max() <= 2 and len(c.zoom.unique()) == 6
    assert c.x_1.min() >= x.min() and c.x_1.max() <= x.max()
    g_1,g_2 = aligned(F.avg_pool2d(c.x_1,8), F.avg_pool2d(c.x_2,8), c)
    assert torch.allclose(g_1, g_2, atol=1e-6) and len(g_1)
    assert (c.at_1 + 64 <= (tensor([80,120])*c.zoom[:,None]).round().long().clamp(min=64)).all()

def test_aligned_shapes_and_gradient():
    torch.manual_seed(0)
    c = two_crops(coords(3,131,203), (64,80))
    f = torch.randn(3,5,8,10, requires_grad=True)
    g_1,g_2 = aligned(f, f[:,0], c)
    assert g_1.shape == (len(g_2),5) and g_2.ndim == 1
    g_1.sum().backward()
    inside = torch.zeros(3,8,10)
    for o,(t,l,b,r),m in zip(inside, (c.box_1//8).tolist(), c.flip_1): o[t:b,l:r] = 1
    assert torch.equal(f.grad[:,0], unflip(inside, c.flip_1))

def test_seed_gives_the_same_crops():
    x = coords(4,131,203)
    torch.manual_seed(3); a = two_crops(x, 64, scale=(.8,2.))
    torch.manual_seed(3); b = two_crops(x, 64, scale=(.8,2.))
    assert all(torch.equal(i,j) for i,j in zip(a,b))

# ---- block mask
@pytest.mark.parametrize('k', 'abc')
def test_block_mask_golden(k):
    g = json.loads((GOLD/'mic_mask.json').read_text())[k]
    torch.manual_seed(g['torch_seed'])
    m = block_mask(tuple(g['shape']), ratio=g['mask_ratio'], block=g['block'])
    bits = np.unpackbits(np.load(GOLD/'mic_mask.npz')[k])[:m.numel()].reshape(m.shape)
    assert list(m.shape) == g['out_shape'] and (m.numpy() == bits).all()
    assert m.mean().item() == pytest.approx(g['keep_frac'], abs=1e-6)
    h,w = g['shape'][-2:]
    torch.manual_seed(g['torch_seed']); u = torch.rand(g['shape'][0], 1, round(h/g['block']), round(w/g['block']))
    assert torch.equal(m, block_mask(tuple(g['shape']), g['mask_ratio'], g['block'], u=u))

def test_block_mask_share_and_blocks():
    torch.manual_seed(0)
    m = block_mask((64,3,128,128), block=16)
    assert abs(m.mean()-.3) < .02 and len(m[:,0].flatten(1).unique(dim=0)) == 64
    cells = m.view(64,8,16,8,16)
    assert torch.equal(cells.amax((2,4)), cells.amin((2,4)))
    assert block_mask((2,9,5)).shape == (2,1,9,5)
