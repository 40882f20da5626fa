"Nets, heads and the adapter against golden figures, the slow way, transformers' head, and other people's nets."
import json, math, pickle
from copy import deepcopy
from pathlib import Path
import numpy as np, pytest, torch, torch.nn.functional as F
from torch import nn
from golden.rules import inp, rule_load, rule_tensor
from pipa.models import (Adapter, ConvBN, DAFormerHead, Feats, PatchHead, ProjHead, SegFormerHead, SegNet, SepASPP, SepConvBN,
                         adapt, daformer, deeplabv2, get_logits, light, mix_maps, resize, run_with, segformer)

G = Path(__file__).parent/'golden'
keys,gold = (json.loads((G/f'{o}.json').read_text()) for o in ('keys_daformer','daformer_b0'))
vals = np.load(G/'daformer_b0.npz')

def close_to_gold(name, t, atol=2e-5):
    assert list(t.shape) == gold[name]['shape']
    np.testing.assert_allclose(t.detach().flatten()[torch.from_numpy(vals[f'{name}_idx']).long()], vals[f'{name}_val'], atol=atol)

@pytest.fixture(scope='module')
def pub():
    "PiPa's DAFormer on MiT-B0 with the golden weights, its input, and its maps"
    net = daformer('mit_b0')
    net.proj_head = ProjHead(net.widths)
    rule_load(net).eval()
    x = inp('img', (2,3,128,160))
    with torch.no_grad(): return net,x,net.backbone(x)

def maps_of(widths=(4,6,8,10), size=(12,20), b=2, dtype=torch.double):
    return [inp(f'm{i}', (b, c, -(-size[0]//2**i), -(-size[1]//2**i))).to(dtype) for i,c in enumerate(widths)]

# --- golden figures

def test_golden_keys(pub):
    ours = {k:list(v.shape) for k,v in pub[0].state_dict().items()}
    assert ours == {k:v for k,v in keys['pipa_daformer_mit_b0'].items() if not k.startswith('cls_head.')}

def test_golden_keys_b5():
    with torch.device('meta'): net = daformer(); net.proj_head = ProjHead(net.widths)
    ours = {k:list(v.shape) for k,v in net.state_dict().items() if not k.startswith('backbone.')}
    assert ours == {k:v for k,v in keys['pipa_daformer_mit_b5_head_only'].items() if not k.startswith('cls_head.')}
    del net.proj_head
    assert sum(p.numel() for p in net.parameters()) == 85_155_283 and len(net.state_dict()) == 1110

@torch.no_grad()
def test_golden_outputs(pub):
    net,x,maps = pub
    close_to_gold('feat0', maps[0]); close_to_gold('feat3', maps[3])
    close_to_gold('fuse', net.decode_head.fuse(maps))
    close_to_gold('head_logits', net.decode_head(maps))
    close_to_gold('proj_head', net.proj_head(maps))
    logits = net(x)
    close_to_gold('logits', logits)
    assert (logits.argmax(1).numpy() == vals['argmax']).mean() > .9999

@torch.no_grad()
def test_golden_batch_statistics(pub):
    net,x,maps = pub
    head = deepcopy(net.decode_head)
    for m in head.modules(): m.training = isinstance(m, nn.BatchNorm2d)
    close_to_gold('head_logits_trainbn', head(maps))
    np.testing.assert_allclose(head.fuse_layer.bottleneck.bn.running_mean[:8], gold['bottleneck_running_mean_after_1_trainbn_first8'], atol=2e-6)

# --- mixing at each map's own size

@pytest.mark.parametrize('ac', [False,True])
@pytest.mark.parametrize('size', [(12,20), (13,7), (1,1)])
def test_mix_maps_value_and_gradient(ac, size):
    maps = [m.requires_grad_() for m in maps_of(size=size)]
    w,b = inp('w', (5,28,1,1)).double().requires_grad_(),inp('b', (5,)).double().requires_grad_()
    slow = F.conv2d(torch.cat([F.interpolate(m, size, mode='bilinear', align_corners=ac) for m in maps], 1), w, b)
    fast = mix_maps(maps, w, b, ac)
    torch.testing.assert_close(fast, slow, atol=1e-12, rtol=0)
    t = torch.randn_like(slow)
    for a,b in zip(*(torch.autograd.grad((o*t).sum(), [*maps,w,b]) for o in (fast,slow))): torch.testing.assert_close(a, b, atol=1e-11, rtol=0)

def test_resize_leaves_its_size_alone():
    x = torch.randn(1,2,3,4)
    assert resize(x, (3,4)) is x and resize(x, x.shape[-2:]) is x
    assert resize(x, torch.Size((6,8))).shape == (1,2,6,8)

@torch.no_grad()
def test_fp32_error_is_small():
    "PiPa's projector at its real widths"
    maps = maps_of((64,128,320,512), (32,32), dtype=torch.float)
    h = rule_load(ProjHead((64,128,320,512))).eval()
    slow = F.normalize(h.proj(torch.cat([resize(m, (32,32), True) for m in maps], 1)), dim=1)
    torch.testing.assert_close(h(maps), slow, atol=1e-6, rtol=0)

# --- heads

def slow_daformer(h, maps):
    "The head as its paper tells it: enlarge, stack, then convolve"
    x = torch.cat([resize(F.linear(m.permute(0,2,3,1), e.proj.weight, e.proj.bias).permute(0,3,1,2), maps[0].shape[-2:])
                   for e,m in zip(h.embed_layers, maps)], 1)
    f = h.fuse_layer
    cbr = lambda o,x,**k: F.relu(o.bn(F.conv2d(x, o.conv.weight, **k)))
    if isinstance(f, ConvBN): return cbr(f, x)
    ys = [cbr(f.aspp_modules[0], x)]
    for d,m in zip((6,12,18), f.aspp_modules[1:]):
        y = cbr(m.depthwise_conv, x, padding=d, dilation=d, groups=x.shape[1])
        ys.append(cbr(m.pointwise_conv, y))
    return cbr(f.bottleneck, torch.cat(ys, 1), padding=1)

def slow_segformer(h, maps):
    x = torch.cat([resize(e(m), maps[0].shape[-2:]) for e,m in zip(h.linear_c, maps)], 1)
    return F.relu(h.linear_fuse.bn(h.linear_fuse.conv(x)))

@pytest.mark.parametrize('train', [False,True])
@pytest.mark.parametrize('mk,slow', [(DAFormerHead,slow_daformer), (lambda *a: DAFormerHead(*a, dilations=None),slow_daformer), (SegFormerHead,slow_segformer)])
def test_heads_the_slow_way(mk, slow, train):
    torch.manual_seed(0)
    maps = [m.requires_grad_() for m in maps_of()]
    h = rule_load(mk((4,6,8,10), 5, 16)).double().train(train)
    a,b = h.fuse(maps),slow(h, maps)
    torch.testing.assert_close(a, b, atol=1e-11, rtol=0)
    ps = [*maps,*(p for n,p in h.named_parameters() if not n.startswith(('conv_seg','linear_pred')))]
    t = torch.randn_like(a)
    for p,q in zip(*(torch.autograd.grad((o*t).sum(), ps) for o in (a,b))): torch.testing.assert_close(p, q, atol=1e-9, rtol=1e-9)

@pytest.mark.parametrize('mk', [DAFormerHead, SegFormerHead])
def test_head_is_classify_of_fuse(mk):
    h,maps = mk((4,6,8,10), 5, 16).double(),maps_of()
    torch.manual_seed(1); a = h(maps)
    torch.manual_seed(1); b = h.classify(h.fuse(maps))
    assert torch.equal(a, b) and a.shape == (2,5,12,20)
    f = h.eval().fuse(maps)
    assert torch.equal(f, h.fuse(maps)) and f.shape[1] == h.dim

def test_dropout_is_in_classify_only():
    h,maps = SegFormerHead((4,6,8,10), 5, 16, drop=.5).double(),maps_of()
    assert torch.equal(h.fuse(maps), h.fuse(maps))
    f = h.fuse(maps)
    assert not torch.equal(h.classify(f), h.classify(f))

def test_segformer_head_equals_transformers():
    tf = pytest.importorskip('transformers', reason='transformers is the oracle of this test')
    if int(tf.__version__.split('.')[0])<5: pytest.skip('written against the parameter names of transformers 5')
    from transformers.models.segformer.modeling_segformer import SegformerDecodeHead
    ws = 8,16,24,32
    hf = SegformerDecodeHead(tf.SegformerConfig(hidden_sizes=list(ws), decoder_hidden_size=20, num_labels=7)).eval()
    h = rule_load(SegFormerHead(ws, 7, 20)).eval()
    sd = {k.replace('linear_c.','linear_projections.').replace('linear_fuse.bn','batch_norm').replace('linear_fuse.conv','linear_fuse')
           .replace('linear_pred','classifier'):v for k,v in h.state_dict().items()}
    sd['linear_fuse.weight'] = torch.cat(sd['linear_fuse.weight'].split(20, 1)[::-1], 1)   # theirs go from coarse to fine
    hf.load_state_dict(sd)
    maps = maps_of(ws, dtype=torch.float)
    with torch.no_grad(): torch.testing.assert_close(h(maps), hf(maps), atol=2e-5, rtol=0)

def test_segformer_keys():
    ks = set(SegFormerHead((4,6,8,10), 5, 16).state_dict())
    assert ks == {*(f'linear_c.{i}.proj.{o}' for i in range(4) for o in ('weight','bias')), 'linear_fuse.conv.weight', 'linear_pred.weight',
                  'linear_pred.bias', *(f'linear_fuse.bn.{o}' for o in ('weight','bias','running_mean','running_var','num_batches_tracked'))}

def test_hrda_attention_head_keys():
    ks = set(DAFormerHead((4,6,8,10), 5, 16, dilations=None).state_dict())
    assert {'fuse_layer.conv.weight','fuse_layer.bn.weight','conv_seg.bias','embed_layers.3.proj.weight'} <= ks and len(ks) == 16

def test_daformer_start():
    torch.manual_seed(0)
    sd = DAFormerHead((64,128,320,512)).state_dict()
    assert sd['conv_seg.weight'].std().item() == pytest.approx(.01, rel=.05) and (sd['conv_seg.bias']==0).all()
    assert sd['fuse_layer.bottleneck.conv.weight'].std().item() == pytest.approx((2/(9*256))**.5, rel=.05)

def test_proj_and_patch_heads():
    maps = maps_of()
    h = ProjHead((4,6,8,10), 6, hidden=12).double()
    assert {k.rsplit('.',1)[0] for k in h.state_dict()} == {'proj.0','proj.1.0','proj.2'} and h.proj[0].out_channels == 12
    torch.testing.assert_close(h(maps).norm(dim=1), torch.ones(2,12,20).double())
    assert not torch.equal(h.eval()(maps), rebind(h, align_corners=False)(maps))
    zero = PatchHead(8, 4)
    for p in zero.parameters(): nn.init.zeros_(p)
    assert (zero(torch.randn(1,8,3,3))==0).all()   # no direction to speak of: zero, not nan
    net = light(); net.project = PatchHead(net.fused_dim)
    assert {'project.0.weight','project.2.bias'} <= set(net.state_dict())

def rebind(m, **kw):
    m = deepcopy(m)
    for k,v in kw.items(): setattr(m, k, v)
    return m

# --- nets

@pytest.mark.parametrize('mk', [light, lambda **k: segformer(dim=32, **k), lambda **k: daformer('mit_b0', dim=16, **k)])
def test_the_agreement(mk):
    net,x = mk(n_out=7),torch.randn(2,3,61,90)
    logits,feats = net(x)
    assert isinstance(feats, Feats) and logits.shape == (2,7,16,23) and feats.fused.shape == (2,net.fused_dim,16,23)
    assert tuple(m.shape[1] for m in feats.maps) == net.widths and net.n_out == 7
    attrs = set(vars(net))
    teacher = deepcopy(net).eval()
    with torch.no_grad():
        out = net.eval()(x)
        assert out.shape == (2,7,61,90)
        torch.testing.assert_close(out, teacher(x))
        torch.testing.assert_close(out, resize(net.decode_head(net.backbone(x)), (61,90)))
    assert set(vars(net)) == attrs
    assert pickle.loads(pickle.dumps(net)).n_out == 7

def test_two_forwards_before_one_backward():
    "Source and mixed pass of one step: the gradients are those of the sum"
    torch.manual_seed(0)
    net = rule_load(light(drop_path=0.))
    for m in net.modules(): m.training = not isinstance(m, (nn.BatchNorm2d,nn.Dropout2d))
    a,b = torch.randn(2,2,3,32,32)
    (net(a)[0].square().mean()+net(b)[0].square().mean()).backward()
    both = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    for x in (a,b): net(x)[0].square().mean().backward()
    for g,p in zip(both, net.parameters()): torch.testing.assert_close(g, p.grad, atol=1e-6, rtol=1e-4)

def test_every_parameter_gets_a_gradient():
    for net in (light(), daformer('mit_b0', dim=16)):
        net(torch.randn(2,3,64,64))[0].square().mean().backward()
        assert not [n for n,p in net.named_parameters() if p.grad is None]

def test_own_encoder():
    class Enc(nn.Module):
        widths = 8,16
        def __init__(self): super().__init__(); self.a,self.b = nn.Conv2d(3,8,3,2,1),nn.Conv2d(8,16,3,2,1)
        def forward(self, x): a = self.a(x); return [a,self.b(a)]
    for mk in (segformer,daformer): assert mk(Enc(), n_out=3, dim=8).eval()(torch.randn(1,3,31,33)).shape == (1,3,31,33)

def test_half_precision_autocast():
    net = light()
    with torch.autocast('cpu', dtype=torch.bfloat16): logits,feats = net(torch.randn(2,3,64,64))
    logits.float().square().mean().backward()
    assert logits.isfinite().all() and feats.fused.shape[1] == net.fused_dim

# --- DeepLabV2

def test_deeplab_keys_and_count():
    with torch.device('meta'): net = deeplabv2()
    sd = net.state_dict()
    res = 44_549_160 - 2_049_000 - 9_408 - 128                       # torchvision's ResNet-101 without classifier and stem
    stem = 9*(3*32+32*32+32*64) + 2*(32+32+64)
    assert sum(p.numel() for p in net.parameters()) == res + stem + 2*(9*2048*19+19)
    assert list(sd['decode_head.aspp_modules.1.conv.weight'].shape) == [19,2048,3,3]
    assert {f'backbone.stem.{i}.weight' for i in (0,1,3,4,6,7)} <= set(sd)
    assert {'backbone.layer4.0.downsample.1.running_var','backbone.layer3.22.bn3.bias','decode_head.aspp_modules.0.conv.bias'} <= set(sd)
    l3,l4 = net.backbone.layer3,net.backbone.layer4
    assert [b.conv2.dilation[0] for b in l3] == [1]+[2]*22 and [b.conv2.dilation[0] for b in l4] == [2,4,4]
    assert [getattr(net.backbone, f'layer{i}')[0].conv2.stride[0] for i in range(1,5)] == [1,2,1,1]
    assert all(b.conv1.stride==(1,1) for i in range(1,5) for b in getattr(net.backbone, f'layer{i}'))

def published_deeplab(n_out=19):
    "Keys and shapes as the page of the published net tells them"
    def bn(k, c): return {f'{k}.{o}':[c] for o in ('weight','bias','running_mean','running_var')} | {f'{k}.num_batches_tracked':[]}
    want = {}
    for i,(a,b) in zip((0,3,6), ((3,32),(32,32),(32,64))):
        want |= {f'backbone.stem.{i}.weight':[b,a,3,3]} | bn(f'backbone.stem.{i+1}', b)
    c_in = 64
    for s,(n,c) in enumerate(zip((3,4,23,3), (64,128,256,512)), 1):
        for j in range(n):
            k = f'backbone.layer{s}.{j}'
            for m,(a,b,side) in enumerate(((c_in,c,1), (c,c,3), (c,4*c,1)), 1):
                want |= {f'{k}.conv{m}.weight':[b,a,side,side]} | bn(f'{k}.bn{m}', b)
            if j==0: want |= {f'{k}.downsample.0.weight':[4*c,c_in,1,1]} | bn(f'{k}.downsample.1', 4*c)
            c_in = 4*c
    for i in (0,1): want |= {f'decode_head.aspp_modules.{i}.conv.weight':[n_out,2048,3,3], f'decode_head.aspp_modules.{i}.conv.bias':[n_out]}
    return want

@pytest.mark.parametrize('n_out', [19,7])
def test_deeplab_keys_and_shapes(n_out):
    with torch.device('meta'): net = deeplabv2(n_out)
    want = published_deeplab(n_out)
    assert {k:list(v.shape) for k,v in net.state_dict().items()} == want
    learned = [v for k,v in want.items() if not k.endswith(('running_mean','running_var','num_batches_tracked'))]
    assert sum(p.numel() for p in net.parameters()) == sum(math.prod(v) for v in learned)

def slow_deeplab(sd, x):
    "The published net: strides (1,2,1,1), dilations (1,1,2,4), half of it in a stage's first block"
    def cbn(k, b, x, **kw):
        r = [sd[f'{b}.{o}'] for o in ('running_mean','running_var','weight','bias')]
        return F.batch_norm(F.conv2d(x, sd[f'{k}.weight'], **kw), *r)
    stem = 'backbone.stem'
    for i,s in zip((0,3,6), (2,1,1)): x = F.relu(cbn(f'{stem}.{i}', f'{stem}.{i+1}', x, stride=s, padding=1))
    x,maps = F.max_pool2d(x, 3, 2, 1),[]
    for l,(n,s,d) in enumerate(zip((3,4,23,3), (1,2,1,1), (1,1,2,4)), 1):
        for j in range(n):
            k,s_j,d_j = f'backbone.layer{l}.{j}',s if j==0 else 1,max(d//2, 1) if j==0 else d
            y = F.relu(cbn(f'{k}.conv1', f'{k}.bn1', x))
            y = F.relu(cbn(f'{k}.conv2', f'{k}.bn2', y, stride=s_j, padding=d_j, dilation=d_j))
            y = cbn(f'{k}.conv3', f'{k}.bn3', y)
            x = F.relu(y + (cbn(f'{k}.downsample.0', f'{k}.downsample.1', x, stride=s_j) if j==0 else x))
        maps.append(x)
    def head(i, d):
        k = f'decode_head.aspp_modules.{i}.conv'
        return F.conv2d(x, sd[f'{k}.weight'], sd[f'{k}.bias'], padding=d, dilation=d)
    return maps,head(0, 6)+head(1, 12)

@torch.no_grad()
@pytest.mark.parametrize('size', [(32,48), (43,61)])
def test_deeplab_is_the_published_net(size):
    net = rule_load(deeplabv2(5)).double().eval()
    for m in net.modules():
        if getattr(m, 'bn3', None) is not None: m.bn3.weight.mul_(.3)   # 33 blocks shall not blow up
    x = inp('deeplab', (1,3,*size)).double()
    maps,logits = slow_deeplab(net.state_dict(), x)
    for a,b,s,c in zip(net.backbone(x), maps, (4,8,8,8), (256,512,1024,2048)):
        assert tuple(a.shape)==(1,c,*(-(-n//s) for n in size)) and a.isfinite().all()
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(net.decode_head(net.backbone(x)), logits, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(net(x), resize(logits, size), atol=1e-9, rtol=1e-9)
    first = net.backbone.layer4[0].conv2
    first.dilation = first.padding = 4,4
    assert not torch.allclose(net(x), resize(logits, size), atol=1e-3), 'without contraction it is another net'

@torch.no_grad()
def test_deeplab_norms_learn_in_training():
    net = deeplabv2(3).train()
    before = net.backbone.layer4[2].bn3.running_mean.clone()
    net(torch.randn(2,3,33,49))
    assert not torch.equal(net.backbone.layer4[2].bn3.running_mean, before)
    assert all(p.requires_grad for m in net.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())

def test_deeplab_runs():
    net,x = deeplabv2(5),torch.randn(2,3,33,49)
    logits,feats = net(x)
    assert logits.shape == (2,5,5,7) and feats.fused is feats.maps[-1] and net.fused_dim == 2048
    h = net.decode_head
    want = sum(F.conv2d(feats.fused, m['conv'].weight, m['conv'].bias, padding=d, dilation=d) for d,m in zip((6,12), h.aspp_modules))
    torch.testing.assert_close(logits, want)
    assert net.eval()(x).shape == (2,5,33,49)

def test_specs():
    with torch.device('meta'): nets = light(n_out=3), daformer('mit_b0', 4, 16, drop_path=.2), segformer(dim=8), deeplabv2(2, dilations=(6,))
    for net in nets:
        spec = json.loads(json.dumps(net.spec))
        again = dict(segformer=segformer, daformer=daformer, deeplabv2=deeplabv2)[spec.pop('make')]
        with torch.device('meta'): new = again(**spec)
        assert {k:v.shape for k,v in new.state_dict().items()} == {k:v.shape for k,v in net.state_dict().items()}

# --- the adapter

def agrees(net, x, n_emb, n_out=11):
    assert (net.fused_dim, net.widths, net.n_out) == (n_emb, (n_emb,), n_out)
    net.train()
    logits,feats = net(x)
    assert logits.shape[:2] == (len(x),n_out) and feats.fused.shape[:2] == (len(x),n_emb) and feats.maps[0] is feats.fused
    (logits.square().mean()+feats.fused.square().mean()).backward()
    assert any(p.grad is not None and p.grad.abs().sum()>0 for p in net.parameters())
    teacher = deepcopy(net).eval()
    with torch.no_grad():
        a,b = net.eval()(x),teacher(x)
        assert a.shape == (len(x),n_out,*x.shape[-2:])
        torch.testing.assert_close(a, b)
        for p in net.parameters(): p.add_(1)
        torch.testing.assert_close(teacher(x), b)   # the teacher shares nothing with the student, hooks included

def test_adapt_torchvision():
    from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large
    tv = deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=11)
    net = adapt(tv, 'classifier.3')
    agrees(net, torch.randn(2,3,64,96), 256)
    assert not any(m._forward_hooks for m in tv.modules())

def test_adapt_fastai_unet():
    vl = pytest.importorskip('fastai.vision.learner', reason='fastai is the oracle of this test')
    from torchvision.models import resnet18
    unet = vl.create_unet_model(resnet18, 11, (64,64), pretrained=False)
    n = len(unet.layers)                            # … the last block, the 1×1 classifier, a cast
    net = adapt(unet, f'layers.{n-3}')
    agrees(net, torch.randn(2,3,64,64), unet.layers[n-2][0].in_channels)

def test_adapt_transformers():
    tf = pytest.importorskip('transformers', reason='transformers is the oracle of this test')
    hf = tf.SegformerForSemanticSegmentation(tf.SegformerConfig(depths=[1]*4, hidden_sizes=[8,16,24,32], num_attention_heads=[1,2,3,4],
                                                                decoder_hidden_size=20, num_labels=11))
    agrees(adapt(hf, 'decode_head.dropout'), torch.randn(2,3,64,96), 20)

def plain(): return nn.Sequential(nn.Conv2d(3,8,3,2,1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8,4,1))

def test_adapt_leaves_the_net_as_it_was():
    net = plain(); net[0].eval()
    before = deepcopy(net.state_dict())
    a = adapt(net, '2')
    assert net.training and not net[0].training and net[1].training and (a.fused_dim,a.n_out) == (8,4)
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items())

def test_adapt_told_the_numbers_needs_no_trial():
    class No(nn.Module):
        def __init__(self): super().__init__(); self.c = nn.Conv2d(3,4,1)
        def forward(self, x): raise RuntimeError('not now')
    a = adapt(No(), 'c', n_emb=4, n_out=2)
    assert (a.widths,a.n_out) == ((4,),2)
    with pytest.raises(RuntimeError, match='not now'): a(torch.zeros(1,3,8,8))
    assert not a.net.c._forward_hooks   # taken off although the pass failed
    with pytest.raises(RuntimeError, match='not now'): adapt(No(), 'c')

def test_adapt_says_what_is_wrong():
    with pytest.raises(ValueError, match='did you mean'): adapt(plain(), 'classifier')
    with pytest.raises(ValueError, match='did you mean'): adapt(plain(), '')
    class Flat(nn.Module):
        def __init__(self): super().__init__(); self.c,self.f,self.spare = nn.Conv2d(3,4,1),nn.Flatten(),nn.ReLU()
        def forward(self, x): y = self.c(x); self.f(y); return y
    with pytest.raises(ValueError, match='not a B×C×h×w map'): adapt(Flat(), 'f')
    with pytest.raises(ValueError, match='took no part'): adapt(Flat(), 'spare')
    with pytest.raises(TypeError, match='answered with a tuple'): get_logits((torch.zeros(1),))

def test_adapter_eval_hooks_nothing():
    net = adapt(plain(), '2').eval()
    net.layer = 'gone'
    assert net(torch.randn(1,3,9,9)).shape == (1,4,9,9)

def test_heads_fit_an_adapter():
    net = adapt(plain(), '2')
    feats = net(torch.randn(2,3,16,16))[1]
    assert ProjHead(net.widths, 6)(feats.maps).shape == (2,6,8,8)
    assert PatchHead(net.fused_dim, 5)(F.avg_pool2d(feats.fused, 2)).shape == (2,5,4,4)
