"Encoders of timm under every head: shapes, gradients, weights files, what is frozen, one step of adaptation"
import re
from copy import deepcopy
import numpy as np, pytest, torch, torch.nn.functional as F
from PIL import Image
from timm import create_model
from pipa import checkpoints as ck
from pipa.data import minicity, uda_dls
from fastai.callback.core import Callback
from pipa.encoders import Pyramid, TimmEncoder, encoder
from pipa.export import export_net, load_graph
from pipa.infer import evaluate, predict
from pipa.labels import space
from pipa.learner import make_net, param_groups, uda_learner
from pipa.look.views import see
from pipa.metrics import confusion
from pipa.minicity import scene
from pipa.mix import normed
from pipa.models import adapt

small = dict(ConvNeXt='convnext_atto', ResNet='resnet10t', MobileNet='mobilenetv4_conv_small', EfficientNet='efficientnet_b0', PVTv2='pvt_v2_b0',
             HGNetV2='hgnetv2_b0', Swin='swin_tiny_patch4_window7_224', ViT='vit_tiny_patch16_224', DINOv2='vit_small_patch14_dinov2', DINOv3='vit_small_patch16_dinov3')
families = pytest.mark.parametrize('name', small.values(), ids=small)
nets = pytest.mark.parametrize('net', ['light', 'segformer', 'daformer', 'hrda'])

def build(net, name, n_out=3, **kw):
    torch.manual_seed(0)
    more = dict(crop=(64,64), dim=32) if net=='hrda' else {} if net=='light' else dict(dim=32)
    return make_net(net, n_out, f'timm:{name}', **more, **kw)

def own(name, enc):
    "timm's own classifier with the encoder's weights"
    plain = create_model(name, **dict(dynamic_img_size=True) if enc.pyramid else dict(strict_img_size=False) if 'swin' in name else {})
    state = {re.sub(r'^(stem|stages|layers)_', r'\1.', k.removeprefix('model.')):v for k,v in enc.net.state_dict().items()}
    assert not plain.load_state_dict(state, strict=False).unexpected_keys
    return plain.eval()

@families
@pytest.mark.parametrize('hw', [(96,128), (100,150), (33,57)], ids=str)
def test_maps_have_the_strides_of_any_encoder(name, hw):
    torch.manual_seed(0)
    enc = TimmEncoder(name).eval()
    for p in enc.parameters():
        if p.ndim==1: torch.nn.init.uniform_(p, .5, 1.5)   # norms that begin at zero would hide what is before them
    x = torch.randn(1, 3, *hw, requires_grad=True)
    maps = enc(x)
    assert [tuple(m.shape) for m in maps]==[(1, c, *(-(-n//s) for n in hw)) for c,s in zip(enc.widths, (4,8,16,32))]
    sum((m*torch.randn_like(m)).sum() for m in maps).backward()
    assert torch.isfinite(x.grad).all() and x.grad.abs().sum()>0
    idle = {k for k,p in enc.named_parameters() if p.grad is None or not p.grad.any()}
    assert all(k.startswith('net.model.') for k in idle) and len(idle)<6, idle   # of a plain transformer: final norm, mask token

@families
@pytest.mark.parametrize('hw', [(96,128), (100,150)], ids=str)
def test_equal_to_timms_own_forward(name, hw):
    "An image that was normalised by hand, and enlarged where patches need it, through the classifier that timm builds"
    torch.manual_seed(0)
    enc,img = TimmEncoder(name).eval(),torch.rand(1,3,*hw)
    plain = own(name, enc)
    m,s = (torch.tensor(plain.default_cfg[k])[:,None,None] for k in ('mean','std'))
    side = 14 if 'patch14' in name else 16 if 'patch16' in name else 4 if 'swin' in name else 1
    x = F.interpolate((img-m)/s, [-(-n//side)*side for n in hw], mode='bilinear')
    with torch.no_grad(): want,got = plain.forward_intermediates(x, intermediates_only=True),enc(normed(img))
    def close(a, b): torch.testing.assert_close(a, F.interpolate(b, a.shape[-2:], mode='bilinear'), atol=1e-3, rtol=1e-3)
    if enc.pyramid: close(got[2], want[8]); close(got[3], F.avg_pool2d(want[11], 2, ceil_mode=True))
    else:
        for a,b in zip(got, want[-4:], strict=True): close(a, b)

def test_a_pyramid_by_hand():
    "Four maps of one grid: each place becomes 4×4, 2×2, itself, and a quarter"
    torch.manual_seed(0)
    p,maps = Pyramid(3),[torch.randn(1,3,5,4) for _ in range(4)]
    a,b,c,d = p(maps)
    def up(m, conv): return torch.stack([torch.einsum('chw,cokl->ohkwl', o, conv.weight).flatten(3).flatten(1, 2) for o in m])+conv.bias[:,None,None]
    torch.testing.assert_close(b, up(maps[1], p.large))
    torch.testing.assert_close(a, up(torch.nn.functional.gelu(F.group_norm(up(maps[0], p.larger[0]), 1, p.larger[1].weight, p.larger[1].bias)), p.larger[3]))
    assert c is maps[2] and [tuple(o.shape[-2:]) for o in (a,b,c,d)]==[(20,16), (10,8), (5,4), (3,2)]
    torch.testing.assert_close(d[0,:,0,0], maps[3][0,:,:2,:2].mean((1,2)))
    torch.testing.assert_close(d[0,:,2,0], maps[3][0,:,4,:2].mean(1))

@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', 'convnext_atto'])
def test_the_same_labels_wherever_the_images_come_from(name, shared, tmp_path):
    "Loader, prediction, evaluation, explorer and exported graph, against pixels that were brought to the net's own scale by hand"
    torch.manual_seed(0)
    net,hw,sp = make_net('light', 11, f'timm:{name}').eval(),(64,128),space('minicity')
    domain = minicity('real', 'val', n=3, size=hw, root=shared)
    twin = deepcopy(net)
    twin.backbone.scale.unit = {}     # takes its images as they come
    cfg = create_model(name).default_cfg
    m,s = (torch.tensor(cfg[k])[:,None,None] for k in ('mean','std'))
    bytes_ = [np.array(Image.open(o).convert('RGB')) for o in domain.images]
    with torch.no_grad(): want = [twin((torch.tensor(o).permute(2,0,1)[None]/255-m)/s)[0].argmax(0) for o in bytes_]
    assert len(torch.stack(want).unique())>2
    def agree(got): assert np.mean([(np.asarray(a)==b.numpy()).mean() for a,b in zip(got, want, strict=True)])>.9999
    dls = uda_dls(minicity('game', n=2, size=hw, root=shared), domain, domain, bs=3, size=hw, n=3, device='cpu')
    x,_ = dls.valid.one_batch()
    with torch.no_grad(): agree(net(x).argmax(1))
    agree([predict(net, o) for o in bytes_])
    agree(see(net, x, layer='encoder').pred)
    cm = sum(confusion(p.flatten(), torch.tensor(np.array(Image.open(o))).flatten().long(), 11) for p,o in zip(want, domain.masks))
    assert (evaluate(net, domain, progress=False)-cm).abs().sum()<10
    f = export_net(tmp_path/'n.pt2', net, sp, hw, 'nothing')
    graph,notes = load_graph(f)
    agree([predict(graph, o) for o in bytes_])
    inside = {} if name=='convnext_atto' else dict(mean=[.5]*3, std=[.5]*3)
    again,meta = ck.load(ck.save(tmp_path/'w.safetensors', net, sp))
    agree([predict(again, o) for o in bytes_])
    for o in (notes, meta): assert (o['mean'], o['std'], o['inside'])==([.485,.456,.406], [.229,.224,.225], inside)
    assert ('inside' in notes['image'])==bool(inside)

@nets
@pytest.mark.parametrize('name', ['convnext_atto', 'vit_tiny_patch16_224'])
def test_every_head_takes_it(net, name, tmp_path):
    model,x = build(net, name).eval(),torch.randn(1,3,64,128)
    want = model(x)
    assert want.shape==(1,3,64,128)
    again,meta = ck.load(ck.save(tmp_path/'w.safetensors', model, None, size='64x128'))
    torch.testing.assert_close(again.eval()(x), want)
    assert meta['spec']['arch']==f'timm:{name}'

@pytest.mark.parametrize('method', ['pipa', 'mic', 'hrda+pipa'])
@pytest.mark.parametrize('name', ['convnext_atto', 'vit_small_patch14_dinov2'])
def test_a_step_of_adaptation(method, name, shared, tmp_path):
    kw = dict(size=(64,128), root=shared)
    dls = uda_dls(minicity('game', n=4, **kw), minicity('real', n=4, **kw), minicity('real', 'val', n=2, **kw), bs=2, size=(64,128), n=2, device='cpu')
    learn = uda_learner(dls, 'hrda' if 'hrda' in method else 'light', method, arch=f'timm:{name}', lr=1e-4, crop=(64,64), hidden=32, n_unlabelled=0, path=tmp_path,
                        net=dict(crop=(64,64), dim=32) if 'hrda' in method else {})
    before = {k:v.clone() for k,v in learn.model.named_parameters()}
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    moved = {k for k,v in learn.model.named_parameters() if not torch.equal(v, before[k])}
    assert any(k.startswith('backbone.net.') for k in moved) and any(k.startswith('decode_head.') for k in moved)
    assert np.isfinite(learn.recorder.values[-1][0])

@pytest.mark.parametrize('frozen', [False, 'norms', True, 0, 2, 6])
def test_what_is_frozen_stays(frozen):
    enc = TimmEncoder('resnet10t', frozen=frozen).train()
    before = {k:v.clone() for k,v in enc.state_dict().items()}
    opt = torch.optim.SGD([p for p in enc.parameters() if p.requires_grad] or [torch.zeros(1, requires_grad=True)], .1)
    if frozen is not True and frozen!=6: sum(m.square().mean() for m in enc(torch.randn(2,3,64,64))).backward()
    else: enc(torch.randn(2,3,64,64))
    opt.step()
    moved = {k for k,v in enc.state_dict().items() if not torch.equal(v, before[k])}
    blocks = ['net.conv1', 'net.bn1', 'net.layer1', 'net.layer2', 'net.layer3', 'net.layer4']
    still = {True: len(blocks)}.get(frozen, frozen if isinstance(frozen, int) else 0) if frozen is not False else 0
    for i,b in enumerate(blocks): assert any(k.startswith(b) and k.endswith('weight') for k in moved)==(i>=still), b
    stats = any('running_mean' in k for k in moved)
    assert stats==(frozen in (False, 0, 2) and frozen is not True)

def test_frozen_parameters_are_in_no_group():
    net = build('light', 'convnext_atto', frozen=True)
    heads, = param_groups(net)
    assert {id(p) for p in heads}=={id(p) for p in net.decode_head.parameters()}

def test_weights_from_a_file_and_the_sentence_without_one(tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    a = create_model('convnext_atto')
    torch.save(a.state_dict(), tmp_path/'w.pth')
    net = make_net('light', 3, 'timm:convnext_atto', pretrained=str(tmp_path/'w.pth'))
    assert torch.equal(net.backbone.net.stages_3.blocks[0].mlp.fc1.weight, a.stages[3].blocks[0].mlp.fc1.weight)
    with pytest.raises(FileNotFoundError, match='timm:convnext_atto are in no cache.*huggingface.co/timm/convnext_atto.*--encoder'): make_net('light', 3, 'timm:convnext_atto', pretrained=True)
    torch.save(create_model('resnet10t').state_dict(), tmp_path/'other.pth')
    with pytest.raises(ValueError, match="other.pth` doesn't fit timm:convnext_atto"): make_net('light', 3, 'timm:convnext_atto', pretrained=str(tmp_path/'other.pth'))

@pytest.mark.parametrize('name,says', [('convnext_atto', 'timm:convnext_atto'), ('timm:convnext_ato', 'timm:convnext_atto'), ('timm:', 'choose one of mit_b0'), ('nothing', 'choose one of mit_b0')])
def test_names_that_are_none(name, says):
    with pytest.raises(ValueError, match=says): encoder(name)

def test_a_graph_of_it(tmp_path):
    net = build('light', 'convnext_atto', n_out=11).eval()
    f = export_net(tmp_path/'n.pt2', net, space('minicity'), (64,128), 'nothing')
    img = scene(0, 'real', (64,128))[0]
    assert (predict(load_graph(tmp_path/'n.pt2')[0], img)==predict(net, img)).mean()>.999

@pytest.mark.parametrize('frozen', [False, True, 3])
def test_heads_learn_at_their_own_rate(frozen, shared, tmp_path):
    kw = dict(size=(64,128), root=shared)
    dls = uda_dls(minicity('game', n=4, **kw), minicity('real', n=4, **kw), minicity('real', 'val', n=2, **kw), bs=2, size=(64,128), n=2, device='cpu')
    learn = uda_learner(dls, 'light', 'source', arch='timm:convnext_atto', lr=1e-4, n_unlabelled=0, path=tmp_path, net=dict(frozen=frozen))
    seen = []
    class Rates(Callback):
        def after_batch(self): seen.append({k:h['lr'] for k,h in zip(map(id, (g[0] for g in self.opt.param_lists)), self.opt.hypers)})
    with learn.no_bar(), learn.no_logging(): learn.fit_poly(1, head_mult=7., warmup=0., cbs=Rates())
    first = seen[0]
    of = {id(p):k for k,p in learn.model.named_parameters()}
    rates = {of[i].split('.')[0]:r for i,r in first.items()}
    assert rates['decode_head']==pytest.approx(7e-10, rel=1e-3)     # the first step of the warm-up
    if frozen is not True: assert rates['decode_head']/rates['backbone']==pytest.approx(7)

def test_an_adapted_net_has_a_decoder():
    from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large
    net = adapt(deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5), 'classifier.0.project')
    *body,heads = param_groups(net)
    assert {id(p) for p in heads}=={id(p) for k,p in net.named_parameters() if not k.startswith('net.backbone.')}
    own = adapt(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 5, 1)), '0')
    assert len(param_groups(own))==1     # no word for an encoder: all of it counts as one

@pytest.mark.parametrize('what', ['junk', 'prefixed', 'one less'])
def test_a_file_that_lacks_tensors_is_refused(what, tmp_path):
    "timm itself passes over them, and the encoder would stay as random as it was"
    state = create_model('convnext_atto').state_dict()
    if what=='junk': state = dict(a=torch.ones(3))
    if what=='prefixed': state = {f'backbone.{k}':v for k,v in state.items()}
    if what=='one less': state.pop('stages.3.blocks.0.mlp.fc1.weight')
    torch.save(state, tmp_path/'w.pth')
    with pytest.raises(ValueError, match="doesn't fit timm:convnext_atto"): make_net('light', 3, 'timm:convnext_atto', pretrained=str(tmp_path/'w.pth'))

def test_a_net_that_is_no_encoder_here_says_so():
    with pytest.raises(ValueError, match="timm:mixer_s32_224` can't be an encoder here"): encoder('timm:mixer_s32_224')
