"HRDA against golden figures of the published net, plain formulas, and pictures that say where their pixels come from."
import json, pickle
from copy import deepcopy
from itertools import product
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pytest, torch, torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.torch_core import to_float
from torch import nn
from golden.rules import inp, label, rule_load
from pipa.callbacks import *
from pipa.models import add_heads
from pipa.callbacks import with_detail
from pipa.hrda import HRDAHead, HRDANet, blend, cut, detail_box, detail_boxes, fill_up, hrda, paste, within
from pipa.infer import evaluating, slide, windows
from pipa.losses import feat_dist, pixel_contrast, weighted_ce
from pipa.mix import aligned
from pipa.mit import mit_sizes
from pipa.models import Detail, Feats, ProjHead, ResNetV1c, resize
from tiny import fit, pairs, seed, toy

G = Path(__file__).parent/'golden'
gold,keys = (json.loads((G/f'{o}.json').read_text()) for o in ('hrda_b0','keys_hrda'))
vals = np.load(G/'hrda_b0.npz')
small = dict(widths=(8,16,24,32), depths=(1,1,1,1), heads=(1,2,3,4), dim=16)

def tiny(n_out=3, crop=(64,64), lively=True, **kw):
    "A tiny net; `lively`: whose answers differ from place to place"
    seed()
    net = hrda('mit_b0', n_out, crop, **small | dict(drop_path=0.) | kw)
    if lively:
        for p in net.decode_head.parameters(): nn.init.normal_(p, std=.2)
    return net

def close_to_gold(name, t, atol=2e-5):
    assert list(t.shape)==gold[name]['shape']
    i = torch.from_numpy(vals[f'{name}_idx']).long()
    np.testing.assert_allclose(t.detach().flatten()[i], vals[f'{name}_val'], atol=atol)

# --- golden figures

@pytest.fixture(scope='module')
def pub():
    "HRDA on MiT-B0 with the golden weights and a detail of 64, and its input"
    return rule_load(hrda('mit_b0', crop=(64,64))).eval(),inp('hrda_img', (2,3,128,192))

def test_keys(pub):
    shapes = lambda net: {k:list(v.shape) for k,v in net.state_dict().items()}
    want = {k:v for k,v in keys['pipa_hrda_mit_b0'].items() if not k.startswith('cls_head.')}
    assert shapes(pub[0]) == {k:v for k,v in want.items() if not k.startswith('proj_head.')}
    net = deepcopy(pub[0]); net.proj_head = ProjHead(net.widths)
    assert shapes(net) == want

@pytest.mark.parametrize('arch', list(mit_sizes))
def test_every_size_is_built_and_counted(arch):
    body = dict(zip(mit_sizes, (3_319_392, 13_151_424, 24_196_288, 44_072_128, 60_842_688, 81_443_008)))[arch]
    n = sum(mit_sizes[arch][0])
    embed = n*256 + 4*256                                                          # a linear layer for each map
    context = 256*1024 + 3*(9*1024+256*1024) + 9*1024*256 + 2*(5*256+3*1024)   # convolutions and norms of the ASPP
    light_ = 256*1024 + 2*256
    with torch.device('meta'): net = hrda(arch)
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert (count(net.backbone), count(net.decode_head.head), count(net.decode_head.scale_attention)) == \
        (body, embed+context+257*19, embed+light_+257*19)
    if arch=='mit_b5': assert count(net)==85_685_990 and count(net.decode_head.scale_attention)==530_707

@torch.no_grad()
def test_golden_evaluation(pub):
    net,x = pub
    maps = net.backbone(net.context(x))
    a,z = net.decode_head.attention(maps),net.decode_head.head(maps)
    close_to_gold('whole_scale_attention', a)
    close_to_gold('whole_lr_seg_after_att', (1-a)*z)
    close_to_gold('whole_hr_seg', net.sharp(x))
    close_to_gold('whole_fused_os4', blend(z, net.sharp(x), a))
    close_to_gold('whole_fused_logits_fullres', net(x))
    assert detail_boxes((128,192), (64,64), (32,32)) == [tuple(o) for o in gold['hr_boxes_image_coords']]

@torch.no_grad()
def test_golden_sliding_evaluation(pub):
    net,x = pub
    close_to_gold('slide_logits', slide(net, x, crop=128, stride=64))
    close_to_gold('slide_logits_nonbatched', slide(net, x, crop=128, stride=64, bs=1))

@torch.no_grad()
@pytest.mark.parametrize('weighted', [False,True])
def test_golden_training_and_its_losses(pub, weighted):
    net,x = pub
    logits,feats = net.at_box(x, tuple(gold['train_crop_box_np_seed7']))
    d = feats.detail
    close_to_gold('train_fused', logits); close_to_gold('train_hr_seg', d.logits)
    ys = (label('hrda', (2,128,192)),) + ((inp('hrda_w', (2,128,192), 'uniform'),) if weighted else ())
    want = gold['train_losses_weighted' if weighted else 'train_losses']
    l,l_d = weighted_ce(logits, *ys),weighted_ce(d.logits, *map(d.cut, ys))
    assert .9*l.item()==pytest.approx(want['loss_seg'], abs=1e-5)
    assert .1*l_d.item()==pytest.approx(want['hr.loss_seg'], abs=1e-5)
    assert with_detail(l, weighted_ce, d, *ys).item()==pytest.approx(want['loss_seg']+want['hr.loss_seg'], abs=1e-5)
    right = lambda z,y: 100*(resize(z, y.shape[-2:]).argmax(1)==y).float().mean().item()
    assert right(logits, ys[0])==pytest.approx(want['acc_seg'], abs=5e-3)
    assert right(d.logits, d.cut(ys[0]))==pytest.approx(want['hr.acc_seg'], abs=.03)
    z = net.decode_head.head(feats.maps)
    a = within(net.decode_head.attention(feats.maps), tuple(gold['train_crop_box_np_seed7']), 8)
    close_to_gold('train_lr_seg', (1-a)*z)

# --- boxes

@pytest.mark.parametrize('last', [False,True])
@pytest.mark.parametrize('n,c', [(1024,512), (128,64), (72,64), (64,64), (40,64), (79,64), (80,64)])
def test_offsets_are_those_of_the_published_rule(n, c, last):
    "randint(0, (margin+1)//8) with an exclusive bound; no draw where there is no margin"
    torch.manual_seed(0)
    seen = {detail_box((n,n), (c,c), last=last)[::2] for _ in range(20000 if n==1024 else 1500)}
    k = (max(n-c, 0)+1)//8
    one = {0} if n<=c else {8*o for o in range(max(k, 1))}
    if last: one = set(range(0, max(n-c, 0)+1, 8))
    if n==1024: assert {o[0] for o in seen} == {o[1] for o in seen} == one
    else: assert seen == set(product(one, one))

def test_box_of_a_rectangle():
    for _ in range(50):
        t,b,l,r = detail_box((96,320), (64,128))
        assert (b-t,r-l)==(64,128) and t in (0,8,16,24) and 0<=l<=184 and l%8==0
    assert {detail_box((32,72), (64,64), last=True) for _ in range(50)} == {(0,32,0,64), (0,32,8,72)}

def test_windows_cover_and_are_those_of_sliding_inference():
    r = np.random.RandomState(0)
    for _ in range(200):
        size,crop = 8*r.randint(1, 40, 2),8*r.randint(1, 20, 2)
        step = crop//2 if r.rand()<.7 else crop
        boxes = detail_boxes(tuple(size), tuple(crop), tuple(step))
        seen = np.zeros(size, int)
        for t,b,l,rr in boxes:
            assert (b-t,rr-l)==tuple(np.minimum(crop, size)) and 0<=t<b<=size[0] and 0<=l<rr<=size[1] and not (t|l)%4
            seen[t:b,l:rr] += 1
        assert seen.min()>0
        c = tuple(np.minimum(crop, size))
        assert [(o[0],o[2]) for o in boxes]==windows(tuple(size), c, tuple(step))

def test_cut_and_paste():
    x = torch.randn(2,3,16,24, requires_grad=True)
    y = paste(cut(x, (16,48,48,80), 4), (16,48,48,80), (16,24), 4)
    want = torch.zeros(2,3,16,24); want[..., 4:12,12:20] = x.detach()[..., 4:12,12:20]
    assert torch.equal(y, want) and torch.equal(within(x, (16,48,48,80), 4), want)
    y.sum().backward()
    assert torch.equal(x.grad, (want!=0).float())

def test_blend_in_double():
    torch.manual_seed(0)
    c,d,a = [torch.randn(2,3,*s, dtype=torch.double) for s in ((5,7),(10,14),(5,7))]
    a = a.sigmoid()
    up = lambda t: F.interpolate(t, scale_factor=2, mode='bilinear', align_corners=False)
    torch.testing.assert_close(blend(c, d, a), up((1-a)*c)+up(a)*d)
    torch.testing.assert_close(blend(c, d, a*0+1), d); torch.testing.assert_close(blend(c, d, a*0), up(c))
    torch.testing.assert_close(blend(c, d, a[:,:1]), up((1-a[:,:1])*c)+up(a[:,:1])*d)

# --- evaluation

@torch.no_grad()
@pytest.mark.parametrize('overlap', [True,False])
def test_evaluation_the_slow_way(overlap):
    "One image, one window, one class at a time"
    net = tiny(crop=(64,96), overlap=overlap).eval()
    x = torch.randn(2,3,136,200)
    got = net(x)
    tops,lefts = ([0,32,64,72],[0,48,96,104]) if overlap else ([0,64,72],[0,96,104])
    for i in range(2):
        one = x[i:i+1]
        maps = net.backbone(F.avg_pool2d(one, 2))
        z,a = net.decode_head.head(maps),net.decode_head.scale_attention(maps).sigmoid()
        tot,n = torch.zeros(1,3,34,50),torch.zeros(34,50)
        for t,l in product(tops, lefts):
            tot[..., t//4:t//4+16, l//4:l//4+24] += net.decode_head.head(net.backbone(one[..., t:t+64, l:l+96]))
            n[t//4:t//4+16, l//4:l//4+24] += 1
        for k in range(3):
            up = lambda o: F.interpolate(o[:,k:k+1], scale_factor=2, mode='bilinear')
            p = up((1-a)*z) + up(a)*(tot/n)[:,k:k+1]
            p = F.interpolate(p, scale_factor=4, mode='bilinear')
            torch.testing.assert_close(got[i,k], p[0,0], atol=2e-5, rtol=0)

@torch.no_grad()
def test_batches_of_windows_are_all_the_same():
    net,x = tiny().eval(),torch.randn(3,3,128,136)
    want = net(x)
    for net.bs in (1, 3, 7, 1000): torch.testing.assert_close(net(x), want, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.cat([net(o[None]) for o in x]), want, atol=1e-5, rtol=0)

@torch.no_grad()
def test_not_more_windows_at_once_than_asked_for():
    net,seen = tiny().eval(),[]
    net.backbone.register_forward_pre_hook(lambda m,i: seen.append(tuple(i[0].shape)))
    net.bs = 4; net(torch.randn(1,3,160,160))
    assert seen==[(1,3,80,80)]+[(4,3,64,64)]*4
    seen.clear(); net(torch.randn(5,3,64,96))
    assert seen==[(5,3,32,48)]+[(5,3,64,64)]*2, 'a window of each image at least'

@torch.no_grad()
@pytest.mark.parametrize('size', [(128,192), (61,101), (1,1), (64,40), (20,300), (127,65), (200,63)])
def test_any_size_at_evaluation(size):
    net,x = tiny().eval(),torch.randn(2,3,*size)
    out = net(x)
    assert out.shape==(2,3,*size) and out.isfinite().all()
    full = fill_up(x)
    assert not any(n%8 or n<64 for n in full.shape[-2:]) and torch.equal(full[..., :size[0],:size[1]], x)
    i,j = [np.minimum(np.arange(n), s-1) for n,s in zip(full.shape[-2:], size)]
    assert np.array_equal(full.numpy(), x.numpy()[:,:,i][:,:,:,j])
    assert torch.equal(net(full)[..., :size[0],:size[1]], out)

@torch.no_grad()
@pytest.mark.parametrize('size', [(64,64), (64,96), (96,64)])
def test_detail_as_large_as_the_image(size):
    "Nothing to slide or to draw: both ways are one"
    net,x = tiny(crop=(512,512)).eval(),torch.randn(2,3,*size)
    logits,feats = net.at_box(x)
    torch.testing.assert_close(net(x), resize(logits, size), atol=1e-5, rtol=0)
    d = feats.detail
    assert d.cut(x).shape==x.shape and torch.equal(d.logits, net.decode_head.head(net.backbone(x)))
    a,z = net.decode_head.attention(feats.maps),net.decode_head.head(feats.maps)
    torch.testing.assert_close(logits, blend(z, d.logits, a))

# --- training

def test_the_agreement_in_training():
    net,x = tiny(5, crop=(64,96)),torch.randn(2,3,128,192)
    logits,f = net(x)
    assert logits.shape==(2,5,32,48) and f.fused.shape==(2,net.fused_dim,16,24) and net.n_out==5
    for maps in (f.maps, f.detail.maps): assert [tuple(m.shape[1:]) for m in maps]==[(8,16,24),(16,8,12),(24,4,6),(32,2,3)]
    assert f.detail.logits.shape==(2,5,16,24)
    assert f.finest is f.detail and f.detail.cut(x).shape==(2,3,64,96) and f.cut(x) is x
    attrs = set(vars(net)); net(x); assert set(vars(net))==attrs, 'nothing is remembered'
    assert pickle.loads(pickle.dumps(net)).crop==(64,96)

def test_boxes_are_drawn_anew_and_by_torchs_seed():
    net,x = tiny(),torch.randn(1,3,128,128)
    boxes = [tuple(net(x)[1].detail.box.tolist()) for _ in range(12)]
    assert len(set(boxes))>5
    torch.manual_seed(5); a = net(x)[1].detail.box
    torch.manual_seed(5); assert torch.equal(net(x)[1].detail.box, a)

def test_every_parameter_gets_a_gradient():
    net = tiny()
    logits,f = net(torch.randn(2,3,128,128))
    logits.square().mean().backward()
    assert not [n for n,p in net.named_parameters() if p.grad is None or not p.grad.any()]

def test_outside_the_box_attention_and_detail_say_nothing():
    net,x,box = tiny(crop=(64,64)).eval(),torch.randn(1,3,192,192),(64,128,64,128)
    with torch.no_grad():
        a = net.at_box(x, box)[0]
        for p in net.decode_head.scale_attention.parameters(): p.normal_()
        b = net.at_box(x, box)[0]
    same = torch.isclose(a, b, atol=1e-6).all(1)[0]
    out = torch.ones(48,48, dtype=torch.bool); out[15:33,15:33] = False   # doubling the size makes a rim of one cell
    assert same[out].all() and not same[16:32,16:32].all()

@pytest.mark.parametrize('size', [(100,128), (128,100), (56,64)])
def test_training_says_which_sizes_it_takes(size):
    with pytest.raises(ValueError, match=f'not {size[0]}×{size[1]}'): tiny()(torch.randn(1,3,*size))

def test_a_box_of_ones_own_is_on_the_grid():
    net,x = tiny(),torch.randn(1,3,128,128)
    assert torch.equal(net(x, (8,72,56,120))[1].detail.cut(x), x[..., 8:72,56:120])
    with pytest.raises(ValueError, match='off the grid'): net(x, (4,68,0,64))

@pytest.mark.parametrize('crop', [100, (64,60), 24, (0,64)])
def test_crop_is_checked(crop):
    with pytest.raises(ValueError, match='multiples of 8 and at least 32'): tiny(crop=crop)

def test_one_trust_for_all_classes():
    net = tiny(5, classwise=False)
    logits,f = net(torch.randn(2,3,64,128))
    assert logits.shape==(2,5,16,32) and net.eval()(torch.randn(1,3,70,70)).shape==(1,5,70,70)
    assert net.decode_head.scale_attention.conv_seg.out_channels==1

class Enc(nn.Module):
    "An encoder of somebody else, whose finest map has stride 2"
    widths = 6,8
    def __init__(self): super().__init__(); self.a,self.b = nn.Conv2d(3,6,3,2,1),nn.Conv2d(6,8,3,2,1)
    def forward(self, x): a = self.a(x); return [a,self.b(a)]

@pytest.mark.parametrize('enc,stride', [(Enc,2), (ResNetV1c,4)])
def test_other_encoders(enc, stride):
    net = hrda(enc(), 4, 64, dim=8, stride=stride)
    logits,f = net(torch.randn(2,3,72,96))
    assert logits.shape[-2:]==(72//stride, 96//stride) and f.fused.shape[-2:]==(36//stride, 48//stride)
    assert net.eval()(torch.randn(1,3,75,91)).shape==(1,4,75,91) and net.spec is None

def test_half_precision_and_fastais_rebuilding():
    net,x = tiny(),torch.randn(2,3,128,128)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        logits,f = net(x)
        with evaluating(net) as m: assert m(x).isfinite().all()
    logits,f = to_float((logits,f))
    assert isinstance(f, Feats) and isinstance(f.detail, Detail)
    assert all(o.dtype==torch.float32 for o in (logits, f.fused, *f.maps, *f.detail.maps, f.detail.logits))
    assert f.detail.cut(x).shape==(2,3,64,64) and float(f.detail.w)==pytest.approx(.1)
    d = f.detail
    plain = Feats([o.detach() for o in f.maps], f.fused.detach(), Detail([o.detach() for o in d.maps], d.logits.detach(), d.box, d.w))
    for g in (deepcopy(plain), pickle.loads(pickle.dumps(plain))):
        assert isinstance(g.detail, Detail) and torch.equal(g.detail.box, d.box) and torch.equal(g.detail.maps[1], d.maps[1])

@pytest.mark.parametrize('n', [64, 72, 1000, 4096])
def test_shares_of_a_box_are_exact(n):
    "After fastai has made them 32 bits wide, too; on labels and on logits of stride 4"
    y = torch.arange(n).expand(1, 4, n)
    for l in {*range(0, min(n-8, 400), 8), n-8}:
        d = Detail([], torch.zeros(1), torch.tensor([0, 1, l/n, (l+8)/n], dtype=torch.double).float(), torch.tensor(.1))
        assert d.cut(y)[0,0].tolist()==[*range(l, l+8)] and d.cut(y[:,::4,::4])[0,0].tolist()==[l,l+4]

def test_spec_and_checkpoint(tmp_path):
    from pipa.checkpoints import load, save
    net = tiny(5, crop=(64,96), classwise=False, last=True, w_detail=.2, overlap=False).eval()
    add_heads(net, hidden=16)
    again,meta = load(save(tmp_path/'h.safetensors', net))
    x = torch.randn(1,3,100,130)
    with torch.no_grad(): assert torch.equal(again(x), net(x))
    assert (again.crop,again.last,again.w_detail,again.overlap)==((64,96),True,.2,False)
    assert not hasattr(again, 'proj_head')
    assert json.loads(json.dumps(net.spec))['make']=='hrda'

# --- labels where they belong. In these nets nothing is learned: maps say which pixel they came from.

class See(nn.Module):
    "Every `step`-th pixel, or the mean of each square of them"
    def __init__(self, n, mean=False): super().__init__(); self.widths,self.mean = (n,),mean
    def forward(self, x): return [F.avg_pool2d(x, 4) if self.mean else x[..., ::4,::4]]

class Through(nn.Module):
    "A head that hands the map on as feature and logits, with a trust of its own for each place and class"
    def __init__(self, n): super().__init__(); self.dim = self.n_out = n
    def head(self, maps): return maps[0]
    def forward(self, maps): return maps[0],maps[0]
    def attention(self, maps): return (torch.sin(37*maps[0])+1)/2

def places(h, w, b=1):
    "An image whose pixels are their own coordinates"
    i,j = torch.meshgrid(torch.arange(float(h)), torch.arange(float(w)), indexing='ij')
    return torch.stack([i, j]).expand(b,-1,-1,-1).clone()

def labels_match(net, x, y):
    "Do embeddings, labels and predictions that `PixelContrast` pairs come from the same pixels?"
    cb,seen = PixelContrast(min_pixels=1),[]
    net.proj_head = lambda maps: maps[0]
    logits,feats = net(x)
    cb.learn = SimpleNamespace(model=net, feats=feats, x=x, y=y, pred=y[:,None,::4,::4])
    cb.predict()
    with pytest.MonkeyPatch.context() as m:
        m.setattr('pipa.callbacks.sample_pixels', lambda y,p,*_: seen.append((y,p)) or torch.zeros(1).long())
        m.setattr(torch.Tensor, 'argmax', lambda self,d: self[:,0])
        cb.score()
    ((y_,p),),e = seen,cb.emb
    want = (e[:,0]*y.shape[-1]+e[:,1]).long()                              # the label that belongs to the place
    return torch.equal(y_, want) and torch.equal(p, want)

@pytest.fixture
def squeezed(monkeypatch):
    "The release: labels of the whole image, squeezed to the size of the detail"
    def cut(self, y):
        h,w = (round(o*n) for o,n in zip((self.box[1::2]-self.box[::2]).tolist(), y.shape[-2:]))
        z = F.interpolate(y.reshape(len(y), -1, *y.shape[-2:]).float(), (h,w))
        return z.reshape(*y.shape[:-2], h, w).to(y.dtype)
    monkeypatch.setattr(Detail, 'cut', cut)

def seer(crop=(64,96), n=2, mean=False): return HRDANet(See(n, mean), Through(n), crop).train()

@pytest.mark.parametrize('size,crop', [((128,192),(64,96)), ((128,256),(64,64)), ((64,64),(64,64)), ((72,200),(64,64))])
def test_pixel_contrast_has_the_labels_of_the_detail(size, crop):
    torch.manual_seed(0)
    x = places(*size, b=2); y = (x[:,0]*size[1]+x[:,1]).long()
    for _ in range(5): assert labels_match(seer(crop), x, y)

def test_that_test_fails_with_labels_of_the_whole_image(squeezed):
    torch.manual_seed(0)
    x = places(128,192, b=2); y = (x[:,0]*192+x[:,1]).long()
    assert not any(labels_match(seer(), x, y) for _ in range(5))
    assert labels_match(seer((128,192)), x, y), 'but for a detail that is the image'

def contrast(y):
    "Pixel contrast, by the callback in a learner, of embeddings that are the labels of the image's pixels"
    net = seer((64,64), 5)
    net.proj_head = nn.Identity(); net.proj_head.forward = lambda maps: maps[0]
    cb = PixelContrast(min_pixels=4)
    cb.learn = SimpleNamespace(model=net, x=F.one_hot(y, 5).movedim(-1,1).float(), y=y)
    out = []
    for i in range(4):
        torch.manual_seed(i)
        cb.learn.pred,cb.learn.feats = net(cb.x)
        cb.predict(); out.append(cb.score()[0].item())
    return out

def test_contrast_is_small_when_embeddings_are_the_labels():
    assert max(contrast(label('see', (2,128,128), 5, 8, 0.)))<.1

def test_contrast_is_large_with_labels_of_the_whole_image(squeezed):
    assert min(contrast(label('see', (2,128,128), 5, 8, 0.)))>4

def test_void_pixels_of_the_detail_stay_void():
    y = label('void', (2,128,128), 5, 8, .3)
    net = seer((64,64), 1)
    _,f = net(y[:,None].float())
    assert torch.equal(f.finest.maps[0][:,0].long(), f.finest.cut(y)[:,::4,::4]) and (f.finest.cut(y)==255).any()

def test_fused_feature_stands_where_it_belongs():
    "Both scales of a place say where it is; so does any blend of the two, in and out of the box"
    net,x = seer((64,96), mean=True),places(128,192)
    for _ in range(5):
        _,f = net(x)
        torch.testing.assert_close(f.fused, F.avg_pool2d(x, 8), atol=1e-3, rtol=0)
        torch.testing.assert_close(f.detail.maps[0], F.avg_pool2d(f.detail.cut(x), 4))
        torch.testing.assert_close(f.maps[0], F.avg_pool2d(x, 8))

@pytest.mark.parametrize('size', [(64,96), (128,128)], ids=['no larger than the detail','larger'])
def test_patches_of_two_crops_are_one_place(size):
    cb,net,n = PatchContrast(size=size, scale=(1.,1.)),seer((64,96), 2, mean=True),0
    net.project = nn.Identity()
    x = places(192,256, b=2)
    seed(1)
    cb.learn = SimpleNamespace(model=net, x_t=torch.cat([x, x[:,:1]], 1), mean_teacher=SimpleNamespace(logits=lambda x: x))
    for _ in range(5):
        with pytest.MonkeyPatch.context() as m:
            m.setattr('pipa.callbacks.crop_augment', lambda x, of: x)
            cb.prepare()
        cb.x_c = cb.x_c[:,:2]
        cb.predict()
        a,b = aligned(*cb.f.chunk(2), cb.crops, 8)
        assert len(a)>0; torch.testing.assert_close(a, b, atol=2e-3, rtol=0); n += len(a)
    assert n>100

# --- losses

def test_detail_loss_by_hand():
    net,x = tiny(),torch.randn(2,3,128,128)
    y,w = torch.randint(0, 3, (2,128,128)),torch.rand(2,128,128)
    y[0,:40] = 255
    logits,f = net(x)
    t,b,l,r = (128*f.detail.box).long().tolist()
    def one(z, y, w):
        z = F.interpolate(z, y.shape[-2:], mode='bilinear')
        return (F.cross_entropy(z, y, ignore_index=255, reduction='none')*w).mean()
    want = .9*one(logits, y, w) + .1*one(f.detail.logits, y[:,t:b,l:r], w[:,t:b,l:r])
    torch.testing.assert_close(with_detail(weighted_ce(logits, y, w), weighted_ce, f.detail, y, w), want)

def watch(cbs, y=None, net=None, n=2):
    "A learner with an HRDA net, boxes of 64 and random pairs of 128×128"
    learn = toy(cbs, net=net or tiny(lively=False))
    x_s,y_s,x_t = pairs(n, side=128)
    if y is not None: y_s = y.expand(n, -1, -1)
    learn.dls = DataLoaders(DataLoader([*zip(x_s, y_s, x_t)], bs=2), DataLoader([*zip(x_t, y_s)], bs=2))
    learn.dls.n_inp = 1
    return learn

def test_source_and_mixed_pass_have_details_of_their_own():
    rows = []
    class Look(Callback):
        order = 98
        def after_loss(self):
            if not self.training: return
            d,m = self.feats.detail,self.mix
            sup = weighted_ce(self.pred, self.y)
            sup = .7*sup + .3*weighted_ce(d.logits, d.cut(self.y))
            mix = .7*weighted_ce(m.pred_m, *m.b[1:]) + .3*weighted_ce(m.detail.logits, *map(m.detail.cut, m.b[1:]))
            rows.append([o.item() for o in (self.learn.loss, self.learn.loss_grad, sup+mix, sup)] + [d.box, m.detail.box])
    learn = watch([Pair(), MeanTeacher(), Mix(), Look()], n=8, net=tiny(w_detail=.3))
    fit(learn)
    for loss,grad,want,*_ in rows: assert loss==pytest.approx(want, rel=1e-5) and grad==pytest.approx(want, rel=1e-5)
    assert learn.pair.mean==pytest.approx(np.mean([o[3] for o in rows]), rel=1e-5) and len(rows)==4
    assert any((o[4]!=o[5]).any() for o in rows)

def terms():
    return [Mix(), PixelContrast(min_pixels=4), PatchContrast(size=(64,64), thresh=0., n_neg=20), FeatureDistance([1,2], min_ratio=.5)]

def reach(cb, twice=False):
    "Gradient of one term alone on every parameter of the student"
    got = {}
    class Look(Callback):
        order = 98
        def after_loss(self):
            if not self.training: return
            l = cb.score()[0] if cb else with_detail(self.learn.loss_grad*0, self.loss_func, self.feats.detail, self.y)
            ks,ps = zip(*self.model.named_parameters())
            got.update(zip(ks, torch.autograd.grad(l, ps, retain_graph=True, allow_unused=True)))
    learn = watch([Pair(), MeanTeacher(), *([cb] if cb else []), Look()])
    if twice: fit(learn)
    return fit(learn),got

H,A,B = 'decode_head.head','decode_head.scale_attention','backbone'
@pytest.mark.parametrize('which,parts', [(0, {B,H,A}), (1, {B,'proj_head'}), (2, {B,H,A,'project'}), (3, {B}), (None, {B,H})],
                         ids=['mix','pixel','patch','feature distance','detail loss'])
def test_reach(which, parts):
    cb = None if which is None else terms()[which]
    learn,got = reach(cb, twice=isinstance(cb, FeatureDistance))
    moved = {k for k,g in got.items() if g is not None and g.any()}
    part = lambda k: '.'.join(k.split('.')[:2]) if k.startswith('decode_head') else k.split('.')[0]
    assert {part(k) for k in moved}==parts
    assert all(g is None or g.isfinite().all() for g in got.values())
    body = [k for k in got if k.startswith('backbone.')]
    assert not [k for k in body if k not in moved], 'every parameter of the encoder'
    assert (f'{H}.conv_seg.weight' in moved)==(which in (0,None)), 'contrast looks in front of the classifier'
    assert all(p.grad is None and not p.requires_grad for p in learn.mean_teacher.teacher.parameters())

def test_feature_distance_compares_the_half_size():
    "At the first step student and frozen encoder are one, on an image of half the size; labels shrink 64 times"
    cb,seen = FeatureDistance([1,2], min_ratio=.5),[]
    f = cb.score
    cb.score = lambda: seen.append((cb.f0, cb.feats.maps[-1], f())) or seen[-1][2]
    learn = fit(watch([Pair(), cb]))
    (f0,f1,(l,_)), = seen
    assert f0.shape==f1.shape==(2,32,2,2) and torch.equal(f0, f1) and l.item()==0
    y = torch.full((1,128,192), 5); y[:,:64,64:128] = 7
    z = torch.randn(1,4,2,3)
    assert feat_dist(z, z*0, y, [7]).item()==pytest.approx(z[0,:,0,1].norm().item(), rel=1e-6)

def test_all_terms_together_move_everything():
    learn = watch([Pair(), MeanTeacher(), *terms()], net=tiny(), n=6)
    before = {k:v.clone() for k,v in learn.model.named_parameters()}
    fit(learn)
    same = [k for k,p in learn.model.named_parameters() if torch.equal(p, before[k])]
    assert all(k.endswith('bias') for k in same) and len(same)<.1*len(before), 'a bias in front of a norm may stay'
    for m in (learn.model, learn.mean_teacher.teacher): assert all(torch.isfinite(v).all() for v in m.state_dict().values())
    assert all(c.n==3 and np.isfinite(c.mean) for c in learn.cbs if isinstance(c, LossTerm))
    assert len(learn.pixel_contrast.show(2).axes)==6 and learn.pixel_contrast.seen[0].shape==(2,3,64,64)

@pytest.mark.parametrize('what', ['void', 'one class'])
def test_awkward_masks(what):
    learn = fit(watch([Pair(), MeanTeacher(), *terms()], y=torch.full((128,128), 255 if what=='void' else 1)))
    assert all(torch.isfinite(v).all() for v in learn.model.state_dict().values())
    assert float(learn.pixel_contrast.total)==0
    if what=='void': assert learn.pair.mean==0

def test_by_name():
    from pipa.learner import make_net, nets
    assert nets['hrda'] is hrda
    net = make_net('hrda', 7, 'mit_b0', crop=(64,128), dim=16)
    assert isinstance(net, HRDANet) and net.crop==(64,128) and net.n_out==7 and net.widths==mit_sizes['mit_b0'][0]
