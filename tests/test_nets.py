"Whole nets by name: every net at every duty, small and with random weights; what a weights file may ask for; weights of others"
import json, math, os, signal, sys
from pathlib import Path
import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.callback.progress import CSVLogger
import transformers as t
from pipa import checkpoints as ck, cli
from pipa.data import folder, uda_dls
from pipa.export import export_net, load_graph
from pipa.infer import predict
from pipa.labels import space
from pipa.learner import uda_learner
from pipa.models import adapt, as_map, run_with
from pipa.nets import others
from pipa.nets.named import build, make_net, nets
from pipa.nets.others import deciding, plain_config, quiet
from pipa.ranks import on_ranks
from pipa.runs.resume import Checkpoint
from pipa.weights.convert import sha256
from pipa.widgets import PatchConsistency, PixelEmbeddingExplorer
from tiny import Watch, city, scene, seed

pytestmark = [pytest.mark.usefixtures('cache_home'), pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore:enable_nested_tensor')]
size,K = (64,96),11
vit = dict(hidden_size=24, num_hidden_layers=4, num_attention_heads=2, image_size=32)
small = dict(segformer=t.SegformerConfig(hidden_sizes=[8,16,24,32], depths=[1]*4, num_attention_heads=[1,1,2,2], decoder_hidden_size=16, num_labels=7),
    upernet=t.UperNetConfig(backbone_config=t.ConvNextConfig(hidden_sizes=[8,16,24,32], depths=[1]*4, out_features=[f'stage{i}' for i in (1,2,3,4)]),
                            hidden_size=16, auxiliary_in_channels=24, auxiliary_channels=8, num_labels=7),
    dpt=t.DPTConfig(**dict(vit, image_size=64), intermediate_size=32, backbone_out_indices=[0,1,2,3], neck_hidden_sizes=[8]*4, fusion_hidden_size=16, num_labels=7),
    dinov2=t.Dinov2Config(**vit, patch_size=14, mlp_ratio=2), swin=t.SwinConfig(embed_dim=8, depths=[1]*4, num_heads=[1]*4, window_size=4))
made = dict(segformer='SegformerForSemanticSegmentation', upernet='UperNetForSemanticSegmentation', dpt='DPTForSemanticSegmentation', dinov2='Dinov2Model', swin='SwinModel')
whole = dict(unet='smp:Unet/mobilenet_v2', fpn='smp:FPN/tu-convnext_atto', lraspp='torchvision:lraspp_mobilenet_v3_large')
every = pytest.mark.parametrize('name', [*whole, *small])
def slow(*o): return pytest.param(*o, marks=pytest.mark.slow)
some = pytest.mark.parametrize('name', ['unet', *map(slow, ('fpn', 'lraspp', *small))])

@pytest.fixture(scope='module')
def hub(tmp_path_factory):
    "Folders as Hugging Face has them"
    root = tmp_path_factory.mktemp('hub')
    for k,c in small.items():
        torch.manual_seed(1)
        with quiet(): getattr(t, made[k])(c).save_pretrained(root/k)
    (root/'dinov2/preprocessor_config.json').write_text(json.dumps(dict(image_mean=[.5]*3, image_std=[.25]*3)))
    return root

@pytest.fixture(scope='module')
def home(tmp_path_factory): return city(tmp_path_factory.mktemp('city'), n=4, size=size)

def named(name, hub): return whole.get(name) or f'hf:{hub/name}'

def get(name, hub, n=K, **kw):
    torch.manual_seed(0)
    return make_net(named(name, hub), n, **kw)

def picture(b=2, hw=size): return torch.randn(b, 3, *hw, generator=torch.Generator().manual_seed(3))

def learner(home, net, method='pipa', path='.', *cbs, bs=2, n=2, s=0, val=(0,1), **kw):
    seed(s)
    g,r = [folder(home/d/'images', home/d/'masks', 'minicity') for d in ('game', 'real')]
    dls = uda_dls(g, r.unlabelled(), r.take([*val]), bs=bs, size=size, n=n, device='cpu', seed=3)
    kw = dict(hidden=8, crop=(32,32), thresh=.05, things=(5,), patch=dict(thresh=.02), pixel=dict(min_pixels=4)) | kw
    return uda_learner(dls, net, method, path=path, cbs=list(cbs), **kw)

def fit(learn, n=1, **kw):
    with learn.no_bar(), learn.no_logging(): learn.fit_poly(n, 1e-3, **kw)
    return learn

# --- net × duty -------------------------------------------------------------------------------------------------------------------------
@every
def test_shapes_gradients_and_file(name, hub, tmp_path):
    "The agreement of all nets; gradients reach both halves; a file gives the same logits, without the folder"
    net,x = get(name, hub),picture()
    z,f = net(x)
    assert z.shape[:2]==(2,K) and f.fused.shape[1]==net.fused_dim and [m.shape[1] for m in f.maps]==list(net.widths)
    assert all(abs(m.shape[2]/m.shape[3]-size[0]/size[1])<.1 for m in (z, f.fused))
    (z.square().mean()+f.maps[-1].square().mean()).backward()
    body = {k for k,_ in net.named_parameters() if k.startswith((f'net.{net.deep.partition(":")[0]}.' if hasattr(net, 'deep') else 'backbone.'))}
    got = {k for k,p in net.named_parameters() if p.grad is not None and p.grad.abs().sum()>0}
    assert got&body and got-body and len(got)>.8*len([*net.parameters()])
    file = ck.save(tmp_path/'w.safetensors', net, space('minicity'), size=size)
    spec = json.dumps(ck.read(file)[1]['spec'])
    assert str(hub) not in spec and len(spec)<5000
    state = torch.get_rng_state()
    again,meta = ck.load(file)
    assert torch.equal(torch.get_rng_state(), state) and meta['codes']==space('minicity').codes
    net.eval()
    for hw in (size, (50,75), (20,130)):
        with torch.no_grad(): assert torch.equal(again(picture(1, hw)), net(picture(1, hw))) and net(picture(1, hw)).shape==(1,K,*hw)
    twice = ck.load(ck.save(tmp_path/'v.safetensors', again, space('minicity')))[0]
    with torch.no_grad(): assert torch.equal(twice(x), again(x))

@pytest.mark.parametrize('method', ['pipa', slow('mic+pipa'), slow('daformer+pipa'), slow('minent'), slow('fda+patch')])
@every
def test_a_step(name, method, hub, home, tmp_path):
    net = get(name, hub)
    learn = learner(home, net, method, tmp_path)
    before = {k:v.clone() for k,v in net.named_parameters()}
    fit(learn)
    moved = {k.split('.')[1 if k.startswith('net.') else 0] for k,v in net.named_parameters() if not torch.equal(v, before[k])}
    assert len(moved)>=2 and np.isfinite([float(o) for o in learn.recorder.losses]).all()
    if 'pipa' in method: assert learn.pixel_contrast.n>0 and learn.patch_contrast.n>0 and 'proj_head' in moved
    if 'daformer' in method:
        d = learn.feature_distance
        assert d.f.shape[1]==net.widths[-1] and d.f0.shape==d.f.shape, "the encoder's last map"

@some
def test_lean_is_the_same(name, hub, home, tmp_path):
    "Without dropout, that is: random numbers are drawn in another order"
    def still(net):
        for m in net.modules():
            for k in ('p', 'drop_prob'):
                if isinstance(getattr(m, k, None), float): setattr(m, k, 0.)
        return net
    a,b = (fit(learner(home, still(get(name, hub)), 'pipa', tmp_path, lean=o, n=2)) for o in (False, True))
    assert torch.stack(a.recorder.losses).tolist()==pytest.approx(torch.stack(b.recorder.losses).tolist(), rel=1e-3)

@some
def test_half_precision(name, hub, home, tmp_path):
    learn = learner(home, get(name, hub), 'pipa', tmp_path).to_bf16()
    fit(learn)
    assert np.isfinite(float(learn.recorder.losses[-1])) and {p.dtype for p in learn.model.parameters()}=={torch.float32}

class Stop(Callback):
    order = 500
    def after_batch(self):
        if self.training and self.train_iter==3: os.kill(os.getpid(), signal.SIGTERM)

@pytest.mark.parametrize('name', ['segformer', slow('unet')])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(name, hub, home, tmp_path):
    def make(p, *cbs, s=0):
        (tmp_path/p).mkdir(exist_ok=True)
        seed(s)
        return learner(home, make_net(named(name, hub), K), 'pipa', tmp_path/p, CSVLogger('metrics.csv'), Checkpoint(), *cbs, n=4, s=s)
    a = fit(make('a'), 2)
    with pytest.raises(SystemExit): fit(make('b', Stop()), 2)
    b = make('b', s=9)
    b.resume(); fit(b, 2)
    for p,q in ((a.model, b.model), (a.mean_teacher.teacher, b.mean_teacher.teacher)):
        assert all(torch.equal(v, q.state_dict()[k]) for k,v in p.state_dict().items())

@some
def test_predict_and_explore(name, hub, home, tmp_path):
    net = get(name, hub)
    img = scene(0, 'real', (70,110))[0]
    assert predict(net, img).shape==(70,110) and predict(net, img, size=size).shape==(70,110)
    learn = fit(learner(home, net, 'pipa', tmp_path))
    page = PixelEmbeddingExplorer(learn, n_images=2, n=10)
    assert page.views.emb.shape[0]==4 and len(page.table)>0
    assert len(PatchConsistency(learn, n_images=1).scores())>0

@pytest.mark.slow
@pytest.mark.parametrize('name,end', [*((o, 'pt2') for o in (*whole, *small) if o!='swin'), ('fpn', 'onnx'), ('segformer', 'onnx')])
def test_graphs(name, end, hub, tmp_path, capsys):
    net,img = get(name, hub).eval(),scene(0, 'real', size)[0]
    f = export_net(tmp_path/f'n.{end}', net, space('minicity'), size)
    assert (predict(load_graph(f)[0], img)==predict(net, img)).mean()>.99

@pytest.mark.slow
def test_two_processes(hub, home, tmp_path):
    "Their losses, on average, are those of one process, and both have the same net"
    def go(bs):
        learn = learner(home, get('fpn', hub), 'self_training', tmp_path, Watch(), bs=bs, n=4)
        with learn.no_bar(): learn.fit_poly(1, 1e-3)
        return learn.watch.seen,{k:v.clone() for k,v in learn.model.state_dict().items()}
    one,two = go(2),on_ranks(go, 2, 1)
    assert [np.mean(o) for o in zip(*(o[0] for o in two))]==pytest.approx(one[0], rel=5e-3)
    assert all(torch.equal(v, two[1][1][k]) for k,v in two[0][1].items())

# --- commands ---------------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def data(home, tmp_path):
    d = tmp_path/'town'
    d.mkdir()
    for a,b in (('game','source'), ('real','target'), ('real','valid')): (d/b).symlink_to(home/a)
    (d/'codes.txt').write_text('\n'.join(space('minicity').codes))
    return d

def train(data, out, **kw):
    o = dict(data=str(data), out=str(out), epochs=1, steps=1, bs=2, size='64x96', crop='64x64', start=0, thresh=.05, unlabelled=2, workers=0)
    cli.pipa_train(**o | kw)
    return Path(out)

@pytest.mark.parametrize('name', ['segformer', slow('unet'), slow('lraspp')])
def test_all_commands(name, hub, data, tmp_path, monkeypatch, capsys):
    "Train from the folder, then everything else without it"
    monkeypatch.chdir(tmp_path)
    own = tmp_path/'folder'
    if name in small: own.symlink_to(hub/name)
    out = train(data, tmp_path/'run', net=f'hf:{own}' if name in small else whole[name], pretrained=name in small)
    if name in small: own.unlink()
    assert math.isfinite(json.loads((out/'row.json').read_text())['miou_student'])
    cli.pipa_eval(weights=str(out), data=str(data), out=str(tmp_path/'eval'))
    cli.pipa_predict(images=str(data/'target/images'), weights=str(out), out=str(tmp_path/'pred'))
    assert len([*(tmp_path/'pred').glob('*_labels.png')])==4
    cli.pipa_export(weights=str(out), out=str(tmp_path/'net.pt2'))
    f = str(out/'weights.safetensors')
    cli.pipa_convert(file=f, out=str(tmp_path/'again.safetensors'))
    a,b = (ck.load(o)[0](picture()) for o in (f, tmp_path/'again.safetensors'))
    assert torch.equal(a, b)

@pytest.mark.parametrize('name', ['segformer', 'upernet', 'unet', 'dinov2'])
def test_convert_gives_a_file_or_a_sentence(name, hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    net = get(name, hub).eval()
    f = str(ck.save('w.safetensors', net, space('minicity'), size='64x96'))
    def tried(to):
        try: cli.pipa_convert(file=f, to=to, out=f'out_{to}')
        except SystemExit as e: return str(e)+capsys.readouterr().err
    assert tried('safetensors') is None
    if name in ('segformer', 'upernet'):
        assert tried('hf') is None
        theirs = t.AutoModelForSemanticSegmentation.from_pretrained('out_hf').eval()
        x = picture(1)
        with torch.no_grad(): torch.testing.assert_close(torch.nn.functional.interpolate(theirs(x).logits, size, mode='bilinear'), net(x), atol=1e-5, rtol=0)
        assert theirs.config.id2label[0]==space('minicity').codes[0]
        assert torch.equal(make_net('hf:out_hf', K, pretrained=True).eval()(x), net(x))
    else: assert 'Traceback' not in tried('hf') and ('no net like' in tried('hf') or 'has no name' in tried('hf'))
    if name!='dinov2': assert "papers' code has no net like" in tried('official')

# --- what a weights file may ask for ----------------------------------------------------------------------------------------------------
hostile = [dict(make='os.system'), dict(make='smp:Unet/resnet18', pretrained=True), dict(make='smp:Unet/no_such'), dict(make='hf:segformer'),
    dict(make='hf:/etc'), dict(make='hf:segformer', config=dict(depths=[10**9]*4)), dict(make='hf:segformer', config='/etc/passwd'), dict(make='torchvision:os'),
    dict(make='hf:gpt2', config={}), dict(make=['hf:segformer']), dict(make='hf:segformer', config=dict(hidden_sizes=[10**8]*4)), dict(step=0), dict(step='x'),
    dict(side=10**9), dict(mean=['a']), dict(widths=[1]), dict(layer='forward'), dict(layer='__class__'), dict(deep='__dict__'), dict(n_out=10**9), dict(net='x')]

@pytest.mark.parametrize('odd', hostile, ids=str)
def test_a_header_can_only_name_nets_and_plain_values(odd, hub, tmp_path, monkeypatch):
    net = get('unet', hub)
    def no(*a, **k): raise AssertionError('the network or another folder is asked')
    monkeypatch.setattr(others, 'hf_place', no); monkeypatch.setattr(others, 'smp_pretrained', no); monkeypatch.setattr(others, 'torchvision_state', no)
    f = ck.save(tmp_path/'w.safetensors', net, spec=odd if 'make' in odd else net.spec | odd)
    with pytest.raises(ValueError, match="asks for the net|doesn't fit the net"): ck.load(f)

def test_a_configuration_can_load_nothing():
    c = plain_config(dict(small['upernet'].to_dict(), auto_map=dict(AutoModel='x--evil.Net'), quantization_config=dict(bits=4), _attn_implementation='evil/kernel',
                          attn_implementation='evil/kernel', backbone='evil/net', use_pretrained_backbone=True, _name_or_path='evil/net', trust_remote_code=True))
    text = json.dumps(c)
    assert 'evil' not in text and 'pretrained' not in text and 'bits' not in text and c['backbone_config']['model_type']=='convnext'
    for bad in (dict(hidden_sizes=[10**7]), dict(depths=[300]), dict(hidden_act='x'*200), dict(hidden_sizes=[[[[1]*300]]])):
        with pytest.raises(ValueError, match=f"`{[*bad][0]}` that can't be"): plain_config(dict(bad, model_type='segformer'))
    with pytest.raises(ValueError, match="'timm_backbone' of Hugging Face"): plain_config(dict(model_type='timm_backbone'))

def test_another_version_is_named(hub, tmp_path, monkeypatch):
    f = ck.save(tmp_path/'w.safetensors', get('segformer', hub))
    assert ck.read(f)[1]['versions']['transformers']==t.__version__
    state,meta = ck.read(f)
    state['net.renamed'] = state.pop('net.decode_head.classifier.bias')
    monkeypatch.setattr(ck, 'read', lambda *a: (state, dict(meta, versions=dict(meta['versions'], transformers='4.1'))))
    with pytest.raises(ValueError, match='written with transformers 4.1, here is'): ck.load(f)

# --- weights of others ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('name', small)
def test_weights_of_a_folder(name, hub):
    "All but the layers that are about other classes; the net's own library gives the same"
    a,net = getattr(t, made[name]).from_pretrained(hub/name).eval(),get(name, hub, pretrained=True).eval()
    mine = net.net if hasattr(net, 'net') else net.backbone.net
    theirs = {('swin.'*(name=='swin')+k):v for k,v in a.state_dict().items()}
    differ = [k for k,v in mine.state_dict().items() if k in theirs and not (v.shape==theirs[k].shape and torch.equal(v, theirs[k]))]
    heads = [k for k in differ if 'classifier' in k or k.startswith('head.head.4')]
    assert differ==heads and len([k for k in mine.state_dict() if k in theirs])>.7*len(mine.state_dict())
    other = get(name, hub)
    assert not all(torch.equal(v, other.state_dict()[k]) for k,v in net.state_dict().items())

def test_same_logits_as_the_folder(hub):
    "About as many classes as the folder, nothing is new"
    for name in ('segformer', 'upernet'):
        x,net = picture(1),get(name, hub, 7, pretrained=True).eval()
        a = getattr(t, made[name]).from_pretrained(hub/name).eval()
        with torch.no_grad(): torch.testing.assert_close(net.net(x).logits, a(x).logits)

def test_scale_of_a_folder(hub):
    net,x = get('dinov2', hub),torch.rand(1,3,28,28)
    assert net.spec['mean']==[.5]*3
    m,s = (torch.tensor(o)[:,None,None] for o in ((.485,.456,.406), (.229,.224,.225)))
    torch.testing.assert_close(net.backbone.scale((x-m)/s), (x-.5)/.25, atol=1e-5, rtol=0)

def test_weights_from_files(hub, tmp_path):
    a,f = get('unet', hub, 5),tmp_path/'w.pth'
    torch.save(a.net.state_dict(), f)
    b = get('unet', hub, 3, pretrained=str(f))
    differ = [k for k,v in b.net.state_dict().items() if v.shape!=a.net.state_dict()[k].shape or not torch.equal(v, a.net.state_dict()[k])]
    assert differ==['segmentation_head.0.weight', 'segmentation_head.0.bias']
    torch.save(a.net.encoder.state_dict(), f)
    c = make_net(whole['unet'], 3, pretrained=str(f))
    assert all(torch.equal(v, a.net.encoder.state_dict()[k]) for k,v in c.net.encoder.state_dict().items())
    torch.save(get('lraspp', hub).net.state_dict(), f)
    with pytest.raises(ValueError, match="w.pth` doesn't fit this net.*of the encoder's"): make_net(whole['unet'], 3, pretrained=str(f))
    with pytest.raises(FileNotFoundError, match='no file'): make_net(whole['lraspp'], 3, pretrained=str(tmp_path/'no.pth'))
    ours = ck.save(tmp_path/'ours.safetensors', a)
    d = make_net(whole['unet'], 3, pretrained=str(ours))
    assert torch.equal(d.net.encoder.features[0][0].weight, a.net.encoder.features[0][0].weight)

class Evil:
    def __reduce__(self): return os.system, ('touch here',)

def test_a_pickle_is_not_run(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'f').mkdir()
    (tmp_path/'f/config.json').write_text((hub/'segformer/config.json').read_text())
    torch.save(dict(w=Evil()), tmp_path/'f/pytorch_model.bin')
    for name in ('hf:f', whole['unet'], whole['lraspp']):
        with pytest.raises(ValueError, match='was not opened|not a file of weights'): make_net(name, 3, pretrained=True if name=='hf:f' else 'f/pytorch_model.bin')
    assert not (tmp_path/'here').exists()

def test_offline_it_says_what_to_get(hub, tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1'); monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    def no(*a, **k): raise OSError('no network')
    monkeypatch.setattr(torch.hub, 'download_url_to_file', no)
    for name,says in ((whole['unet'], 'huggingface.co/smp-hub/mobilenet_v2.imagenet'), (whole['fpn'], 'huggingface.co/timm/convnext_atto'),
                      ('torchvision:deeplabv3_resnet50', 'deeplabv3_resnet50_coco-cd0a2569.pth.*save it as'), ('hf:nobody/nothing', 'model.safetensors.*huggingface.co/nobody/nothing')):
        with pytest.raises(FileNotFoundError, match=says): make_net(name, 3, pretrained=True)
    with pytest.raises(ValueError, match='a kind of net and has no weights'): make_net('hf:segformer', 3, pretrained=True)

@pytest.mark.parametrize('name,module,extra', [('smp:Unet/resnet18', 'segmentation_models_pytorch', 'smp'), ('hf:segformer', 'transformers', 'hf')])
def test_a_missing_package(name, module, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r'pip install .*\['+extra): make_net(name, 3)

# --- names ------------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('name,says', [('unet', 'choose one of light, segformer, daformer, hrda, deeplabv2, smp:'), ('smp:Unett/resnet18', 'did you mean smp:Unet/resnet18'),
    ('smp:Unet/resnet19', 'did you mean smp:Unet/resnet1'), ('smp:Unet/tu-resnet10', 'smp:Unet/tu-resnet10t'), ('smp:Unet', 'names no encoder: write smp:Unet/resnet34'), ('torchvision:deeplabv3', 'torchvision:deeplabv3_'),
    ('hf:bert', 'no kind of net of that name: beit'), ('hf:/no/where', 'no folder `/no/where`'), ('hf:', 'no folder'), ('timm:resnet18', 'choose one of')])
def test_names_that_are_none(name, says):
    with pytest.raises((ValueError, FileNotFoundError), match=says): make_net(name, 3)

def test_one_table(hub):
    with torch.device('meta'): net = make_net('deeplabv2', 3)
    assert {k.split('.')[0] for k,_ in net.named_parameters()}=={'backbone', 'decode_head'}
    with pytest.raises(ValueError, match='an encoder of its own'): make_net('deeplabv2', 3, 'mit_b1')
    plan = build(net.spec, plan=True).state_dict()
    assert all(plan[k].shape==v.shape for k,v in net.state_dict().items())
    assert {*nets}=={'light', 'segformer', 'daformer', 'hrda', 'deeplabv2'}

def test_a_layer_can_be_named(hub, tmp_path):
    net = make_net(whole['fpn'], 3, layer='decoder.merge')
    assert net.layer=='decoder.merge' and ck.load(ck.save(tmp_path/'w.safetensors', net))[0].layer=='decoder.merge'
    with pytest.raises(ValueError, match='did you mean'): make_net(whole['fpn'], 3, layer='decoder.merg')

def test_auxiliary_heads_dont_count():
    "The layer is the main head's, though an auxiliary one has as many outputs and runs later"
    from torchvision.models.segmentation import fcn_resnet50
    net = fcn_resnet50(weights=None, weights_backbone=None, num_classes=5, aux_loss=True).eval()
    assert deciding(net, 5, picture(1))=='classifier.3:in'
    c = t.UperNetConfig(**dict(small['upernet'].to_dict(), backbone_config=small['upernet'].backbone_config, use_auxiliary_head=True))
    assert deciding(t.UperNetForSemanticSegmentation(c).eval(), 7, picture(1)).startswith('decode_head.')

@pytest.mark.parametrize('hw,front', [((64,96), 0), ((64,96), 1), ((50,75), 5), ((224,224), 1), ((37,91), 0)])
@pytest.mark.parametrize('p', [4, 14, 16])
def test_tokens_are_maps(hw, front, p):
    h,w = hw[0]//p,hw[1]//p
    m = torch.randn(2,6,h,w)
    rows = torch.cat([torch.randn(2,front,6), m.flatten(2).transpose(1,2)], 1)
    assert torch.equal(as_map(rows, hw), m)

def test_tokens_of_an_adapted_net(hub):
    net = adapt(get('dpt', hub).net, 'dpt.layernorm', size=(64,64))
    z,f = net(torch.randn(2,3,64,64))
    assert f.fused.shape==(2,24,4,4)
    _,emb = run_with(net.net, 'head.head.3:in', torch.randn(1,3,64,64))
    assert emb.shape[1]==16

def test_weights_that_a_whole_net_was_given_are_noted(tmp_path):
    "A file with all but the last layer: which it was, and what it didn't have"
    a = make_net('torchvision:lraspp_mobilenet_v3_large', 4)
    state = {k:v for k,v in a.net.state_dict().items() if not k.startswith('classifier.high')}
    torch.save(state, tmp_path/'w.pth')
    b = make_net('torchvision:lraspp_mobilenet_v3_large', 4, pretrained=str(tmp_path/'w.pth'))
    assert b.loaded['file']=='w.pth' and b.loaded['sha256']==sha256(tmp_path/'w.pth')
    assert {*b.loaded['missing']}=={k for k in a.net.state_dict() if k.startswith('classifier.high')}
    assert not hasattr(a, 'loaded')

def test_a_name_without_an_encoder_says_how_to_write_it():
    with pytest.raises(ValueError, match='write smp:Unet/resnet34'): make_net('smp:unet', 3)
