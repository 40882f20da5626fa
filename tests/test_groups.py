"Who learns how fast: groups, rates from block to block and what is frozen, of nets from here and from elsewhere; and what was loaded"
import hashlib, json, pickle, re
from copy import deepcopy
from functools import partial
import numpy as np, pytest, torch
from torch import nn
from fastai.callback.core import Callback
from pipa.encoders import TimmEncoder, by_block, encoder, freeze, lite_file
from pipa.learner import adamw, encoder_of, freeze_encoder, group_table, heads_alone, in_encoder, make_net, param_groups, rates, uda_learner
from pipa.models import adapt, add_heads, bare_names, light, segformer
from pipa.runs import run as runs
from pipa.runs.options import learn_args, options, possible
from pipa.runs.record import changes, read_config
from pipa.weights.convert import load_pretrained, sha256
from fastcore.basics import AttrDict
from test_resume import Do, equal, fit, make, stopped, term
from tiny import city, seed

pytestmark = pytest.mark.usefixtures('cache_home')

@pytest.fixture(scope='module')
def home(tmp_path_factory): return city(tmp_path_factory.mktemp('city'), n=4, size=(64,64))

# nets of other packages

def deeplab():
    from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large
    return deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5),'classifier.0.project'
def fcn():
    from torchvision.models.segmentation import fcn_resnet50
    return fcn_resnet50(weights=None, weights_backbone=None, num_classes=5),'classifier.2'
def smp(arch, name):
    s = pytest.importorskip('segmentation_models_pytorch')
    return s.create_model(arch, name, encoder_weights=None, classes=5),'decoder'
def hf(name):
    t = pytest.importorskip('transformers')
    vit = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, image_size=64, patch_size=16, num_labels=5)
    if name=='segformer': return t.SegformerForSemanticSegmentation(t.SegformerConfig(hidden_sizes=[8,8,16,16], depths=[1,1,1,1], decoder_hidden_size=16, num_labels=5)),'decode_head'
    if name=='dpt': return t.DPTForSemanticSegmentation(t.DPTConfig(**vit, backbone_out_indices=[0,1,2,3], neck_hidden_sizes=[8]*4, fusion_hidden_size=8)),'neck'
    if name=='beit': return t.BeitForSemanticSegmentation(t.BeitConfig(**vit, out_indices=[1,2,3,4])),'decode_head'
    body = t.ConvNextConfig(hidden_sizes=[8]*4, depths=[1]*4, out_features=[f'stage{i}' for i in range(1,5)])
    return t.UperNetForSemanticSegmentation(t.UperNetConfig(backbone_config=body, hidden_size=16, num_labels=5)),'decode_head'

others = dict(deeplab=(deeplab, 'backbone', 17), fcn=(fcn, 'backbone', 6), unet=(partial(smp, 'Unet', 'resnet18'), 'encoder', 6), smp_mit=(partial(smp, 'Segformer', 'mit_b0'), 'encoder', 4),
              smp_timm=(partial(smp, 'Unet', 'tu-convnext_atto'), 'encoder', 6), smp_vit=(partial(smp, 'DPT', 'tu-vit_tiny_patch16_224'), 'encoder', 12),
              smp_eff=(partial(smp, 'Unet', 'efficientnet-b0'), 'encoder', 16), segformer=(partial(hf, 'segformer'), 'segformer', 4), dpt=(partial(hf, 'dpt'), 'dpt', 4),
              beit=(partial(hf, 'beit'), 'beit', 4), upernet=(partial(hf, 'upernet'), 'backbone', 4))

@pytest.mark.parametrize('name', others)
def test_heads_of_any_net_learn_at_their_own_rate(name):
    "What lies below the net's own word for its encoder, and nothing else, has the encoder's rate; the first convolution is in the first block"
    make,word,n = others[name]
    net,layer = make()
    net = add_heads(adapt(net, layer, 8, 5), hidden=8)
    groups = param_groups(net)
    rate = {id(p):r for g,r in zip(groups, rates(net, groups, 1e-3, 7.)) for p in g}
    assert len(rate)==len([*net.parameters()])
    for k,p in net.named_parameters(): assert rate[id(p)]==pytest.approx(1e-3*(1 if k.startswith(f'net.{word}.') else 7)), k
    blocks = by_block(encoder_of(net))
    assert len(blocks)==n
    inside = [id(p) for ps in blocks for p in ps]
    assert len(inside)==len({*inside}) and {*inside}=={id(p) for k,p in net.named_parameters() if k.startswith(f'net.{word}.')}
    t = group_table(net, 1e-3, 7., .5)
    assert t.group.iloc[-1]=='heads' and t.parameters.sum()==sum(p.numel() for p in net.parameters())
    assert t.times.tolist()[:-1]==sorted(t.times[:-1]) and t.times.iloc[-2]==1 and t.times.iloc[0]==.5**(n-1)
    first = next(p for m in net.net.modules() if isinstance(m, nn.Conv2d) and m.in_channels==3 for p in m.parameters())
    assert any(p is first for p in blocks[0])

def test_a_decoder_with_an_encoder_inside_is_a_head():
    names = [f'net.{k}' for k in 'backbone.a backbone.head.b decoder.encoder.c decode_head.backbone.d head.e classifier.f'.split()] + ['proj_head.g']
    assert in_encoder(names)=={'net.backbone.a', 'net.backbone.head.b'}

def test_the_pyramid_of_a_vit_starts_from_nothing():
    net = light('timm:vit_tiny_patch16_224', n_out=3)
    *_,heads = param_groups(net)
    assert {id(p) for p in heads}=={id(p) for m in (net.backbone.pyramid, net.decode_head) for p in m.parameters()} and heads_alone(net, heads)

# blocks

def block_by_name(arch, k):
    "The block of a parameter, read from its name"
    if arch=='mit_b0': return int(re.search(r'\d', k)[0])-1
    if arch=='lite0': return int(m[1]) if (m := re.match(r'net\.blocks\.(\d+)', k)) else 0
    if 'vit' in arch: return int(m[1]) if (m := re.search(r'\.blocks\.(\d+)', k)) else 11 if re.search(r'model\.norm\.', k) else 0
    if 'convnext' in arch: return int(re.search(r'\d', k)[0]) + 2*('stages' in k)

@pytest.mark.parametrize('arch,n', [('mit_b0', 4), ('lite0', 7), ('timm:vit_tiny_patch16_224', 12), ('timm:convnext_atto', 6)])
def test_each_block_learns_so_many_times_slower_than_the_next(arch, n):
    net = light(arch, n_out=3)
    groups = param_groups(net, .8)
    rate = {id(p):r for g,r in zip(groups, rates(net, groups, .1, 5., .8)) for p in g}
    opt = adamw(groups, .1, .02)
    wd = {id(p):h['wd'] for g,h in zip(opt.param_lists, opt.hypers) for p in g}
    norms = {id(p) for m in net.backbone.modules() if 'Norm' in type(m).__name__ for p in m.parameters(recurse=False)}
    assert len(rate)==len([*net.parameters()])
    for k,p in net.named_parameters():
        body = k.startswith('backbone.') and '.pyramid.' not in k
        want = .1*.8**(n-1-block_by_name(arch, k.removeprefix('backbone.'))) if body else .5
        assert rate[id(p)]==pytest.approx(want), k
        assert wd[id(p)]==(0 if body and id(p) in norms else .02), k

def test_without_decay_the_groups_are_as_ever_and_a_split_changes_no_step():
    def steps(decay):
        seed()
        net = light('mit_b0', n_out=3, drop_path=0.)
        opt = adamw(param_groups(net, decay), 1e-2)
        for _ in range(3):
            net(torch.randn(2,3,64,64))[0].square().mean().backward(); opt.step(); opt.zero_grad()
        return len(opt.hypers),net.state_dict()
    (a,x),(b,y) = steps(1.),steps(.5)
    assert (a,b)==(3,9) and all(torch.equal(x[k], y[k]) for k in x)

class Rates(Callback):
    order = 99
    def before_fit(self): self.seen = []
    def before_step(self): self.seen.append([h['lr'] for h in self.opt.hypers])

def test_fit_poly_takes_the_decay_of_the_learner(home, tmp_path):
    learn = make(home, tmp_path, 'source', r := Rates(), layer_decay=.5)
    fit(learn, 1, head_mult=7., warmup=0.)
    assert len(r.seen[1])==9
    np.testing.assert_allclose(np.array(r.seen[1])/r.seen[1][6], [.125,.125,.25,.25,.5,.5,1,1,7], rtol=1e-9)

@pytest.mark.parametrize('kw', [dict(layer_decay=.7), dict(layer_decay=.7, frozen=2), dict(frozen='norms')])
def test_a_run_with_more_groups_goes_on_bit_by_bit(home, tmp_path, kw):
    a = fit(make(home, tmp_path/'a', 'self_training', **kw))
    stopped(make(home, tmp_path/'b', 'self_training', Do(4, term), **kw))
    b = make(home, tmp_path/'b', 'self_training', s=9, **kw); b.resume()
    equal(a, fit(b))

def test_another_decay_is_another_run(home, tmp_path):
    stopped(make(home, tmp_path, 'source', Do(2, term), layer_decay=.7))
    b = make(home, tmp_path, 'source', layer_decay=.6); b.resume()
    with pytest.raises(ValueError, match='was .* and is'): fit(b)

def test_what_has_no_blocks_says_so():
    net = adapt(nn.Sequential(nn.Conv2d(3, 5, 1)), '0', 5, 5)
    assert len(param_groups(net))==1
    with pytest.raises(ValueError, match='has no blocks in a row'): param_groups(net, .5)
    with pytest.raises(ValueError, match='Nothing would learn: all of this net'): freeze_encoder(net)
    with pytest.raises(ValueError, match='A Linear has no part called backbone'): freeze_encoder(nn.Linear(2, 2))

def test_wrapped_nets_have_the_same_blocks():
    net = light('mit_b0', n_out=3)
    want = [[id(p) for p in g] for g in param_groups(net, .5)]
    for o in (nn.DataParallel(net), torch.compile(net)): assert [[id(p) for p in g] for g in param_groups(o, .5)]==want
    net.backbone = torch.compile(net.backbone)
    assert [[id(p) for p in g] for g in param_groups(net, .5)]==want

# frozen

def moved(learn, before): return {k for k,v in learn.model.state_dict().items() if not torch.equal(v, before[k])}

@pytest.mark.parametrize('frozen,still', [(True, 'backbone.'), (2, ('backbone.patch_embed1', 'backbone.block1', 'backbone.norm1', 'backbone.patch_embed2', 'backbone.block2', 'backbone.norm2')), (False, 'nothing')])
def test_a_mix_transformer_can_be_frozen(home, tmp_path, frozen, still):
    learn = make(home, tmp_path, 'self_training')
    net = segformer('mit_b0', n_out=learn.dls.c, dim=16)
    learn = uda_learner(learn.dls, net, 'self_training', frozen=frozen, lr=1e-3, path=tmp_path)
    before = {k:v.clone() for k,v in net.state_dict().items()}
    with learn.no_bar(), learn.no_logging(): learn.fit_poly(1, warmup=0.)
    body = {k for k,_ in net.named_parameters() if k.startswith('backbone.')}
    assert moved(learn, before)&body=={k for k in body if not k.startswith(still)}
    t = learn.mean_teacher.teacher
    assert all(torch.equal(v, before[k]) for k,v in t.state_dict().items() if k.startswith(still)), 'the teacher of what stays stays'
    assert net.spec['frozen'] is frozen and type(segformer('mit_b0', **{k:v for k,v in net.spec.items() if k not in ('make','arch')})) is type(net)

@pytest.mark.parametrize('frozen', [True, 'norms', 3])
def test_an_adapted_net_can_be_frozen(home, tmp_path, frozen):
    net = adapt(*deeplab(), 8, 11)
    net.net.classifier[-1] = nn.Conv2d(256, 11, 1)
    dls = make(home, tmp_path, 'source').dls
    learn = uda_learner(dls, net, 'source', frozen=frozen, lr=1e-3, path=tmp_path)
    before = {k:v.clone() for k,v in net.state_dict().items()}
    with learn.no_bar(), learn.no_logging(): learn.fit_poly(1, warmup=0.)
    got,params = moved(learn, before),dict(net.named_parameters())
    of = {k:int(k.split('.')[2]) for k in before if k.startswith('net.backbone.')}
    stays = {k for k in of if frozen is True or frozen==3 and of[k]<3 or frozen=='norms' and k not in params}
    assert not got&stays and {k for k in of if k in params}-stays <= got
    assert any('running_mean' in k for k in got&{*of})==(frozen==3) and any(k.startswith('net.classifier') for k in got)
    if frozen is True: assert param_groups(net)[-1] and len(param_groups(net))==1
    learn.summary()

def test_frozen_is_undone_copied_and_pickled():
    enc = encoder('mit_b0', frozen=2).train()
    assert [o.training for o in (enc, enc.block2[0], enc.block3[0])]==[True, False, True]
    for o in (deepcopy(enc), pickle.loads(pickle.dumps(enc))):
        o.eval().train()
        assert not o.block2[0].training and o.block3[0].training and o.stay.enc[0] is o
        assert o.state_dict().keys()==encoder('mit_b0').state_dict().keys()
    freeze(enc, False)
    assert all(p.requires_grad for p in enc.parameters()) and all(m.training for m in enc.modules())
    with pytest.raises(ValueError, match='of 4 blocks'): freeze(enc, 5)

def test_the_table_is_what_the_optimizer_does():
    net = make_net('light', 3, 'lite0', pretrained=True)
    freeze_encoder(net, 2)
    t = group_table(net, 2e-4, 3., .5, wd=.04)
    opt = adamw(param_groups(net, .5), 2e-4, .04)
    opt.set_hypers(lr=rates(net, opt.param_lists, 2e-4, 3., .5).tolist())
    assert t.rate.tolist()[:-1]==[h['lr'] for h in opt.hypers] and t.weight_decay.tolist()[:-1]==[h['wd'] for h in opt.hypers]
    assert t.tensors.tolist()[:-1]==[*map(len, opt.param_lists)]
    assert t.group.tolist()==[f'block {i} of 7{o}' for i in range(3,8) for o in ('', ', norms')]+['heads', 'frozen'] and t.frozen.iloc[-1]=='weights'
    assert t.parameters.sum()==sum(p.numel() for p in net.parameters())
    assert group_table(make_net('light', 3, 'lite0', pretrained=True)).frozen.tolist()==['', 'statistics', '']

# options, and the record

@pytest.mark.parametrize('kw,says', [(dict(frozen='half'), 'choose one of none, norms, all, or a number'), (dict(frozen='9', arch='lite0'), 'of 7 blocks` is 9'),
    (dict(frozen='norms'), '`--frozen norms` would do nothing'), (dict(frozen='all', decay=.5), '`--decay 0.5` would do nothing'), (dict(decay=1.5), '`--decay` is 1.5'), (dict(decay=0.), '`--decay` is 0')])
def test_options_that_mean_nothing_are_refused(kw, says):
    with pytest.raises(ValueError, match=re.escape(says)): possible(AttrDict(options(**kw)))

def test_options_become_arguments():
    got = [learn_args(AttrDict(options(frozen=o)))['frozen'] for o in (None, 'none', 'norms', 'all', '3')]
    assert got==[None, False, 'norms', True, 3] and learn_args(AttrDict(options(decay=.5)))['layer_decay']==.5

def test_a_run_keeps_what_was_loaded(home, tmp_path, capsys):
    for s,t in (('source', 'game'), ('target', 'real'), ('valid', 'real')): (tmp_path/'d').mkdir(exist_ok=True); (tmp_path/'d'/s).symlink_to(home/t)
    (tmp_path/'d/codes.txt').write_text('minicity')
    o = options(data=str(tmp_path/'d'), method='source', size='64x64', epochs=1, steps=2, bs=2, arch='lite0', pretrained=True, frozen='2', decay=.5, unlabelled=0, workers=0, out=str(tmp_path/'r'))
    runs.run(**o)
    was = read_config(tmp_path/'r')
    assert (was['frozen'], was['decay'])==('2', .5)
    assert 'frozen=2 decay=0.5' in json.loads((tmp_path/'r/row.json').read_text())['settings']
    with open(lite_file(), 'rb') as f: assert was['loaded']['sha256']==hashlib.sha256(f.read()).hexdigest()
    assert {k:was['loaded'][k] for k in ('of', 'mapped', 'missing', 'unexpected')}==dict(of='file', mapped=288, missing=[], unexpected=0)
    other = was | dict(loaded=was['loaded'] | dict(sha256='0'*64))
    said = [*changes(was, other)]
    assert len(said)==1 and said[0].startswith('loaded: was efficientnet') and [*changes(was, was)]==[]

def test_accounts_of_other_files(tmp_path):
    from torchvision.models import resnet101
    from pipa.models import deeplabv2
    from timm import create_model
    a = create_model('vit_tiny_patch16_224'); torch.save(a.state_dict(), tmp_path/'v.pth')
    got = load_pretrained(TimmEncoder('vit_tiny_patch16_224'), tmp_path/'v.pth').loaded
    enc = TimmEncoder('vit_tiny_patch16_224')
    assert (got['mapped'], got['kept'], got['missing'], got['sha256'])==(len(enc.net.state_dict()), [f'pyramid.{k}' for k in enc.pyramid.state_dict()], [], hashlib.sha256((tmp_path/'v.pth').read_bytes()).hexdigest())
    net = light('mit_b0', n_out=3); state = net.backbone.state_dict(); torch.save({**state, 'head.weight':torch.zeros(3,3)}, tmp_path/'m.pth')
    assert load_pretrained(light('mit_b0', n_out=5), tmp_path/'m.pth').backbone.loaded['left']==1
    x,y = sha256(state),sha256(dict(reversed(state.items())))
    assert x==y!=sha256({**state, 'norm1.bias':state['norm1.bias']+1})
    torch.save(resnet101(weights=None).state_dict(), tmp_path/'resnet101.pth')
    got = load_pretrained(deeplabv2(n_out=3), tmp_path/'resnet101.pth').backbone.loaded
    assert got['kept'] and all(k.startswith('stem.') for k in got['kept']) and got['missing']==[], 'the deep stem stays random, and the record says so'
