"Checkpoints: what goes in comes out, and what is broken says so"
import json, stat
from copy import deepcopy
import numpy as np, pytest, torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from pipa import checkpoints as ck
from pipa.labels import label_space, space
from pipa.hrda import hrda
from pipa.mit import mit
from pipa.models import light, segformer, daformer, deeplabv2, adapt, ProjHead, PatchHead

def net_of(n=3, seed=0, heads=True):
    torch.manual_seed(seed)
    net = light('mit_b0', n_out=n)
    if heads: net.proj_head,net.project = ProjHead(net.widths, 16, 16),PatchHead(net.fused_dim, 16)
    for b in net.buffers():
        if b.is_floating_point(): b.uniform_(.5, 1.5)
    return net

@pytest.fixture(scope='module')
def net(): return net_of()

@pytest.fixture
def file(net, tmp_path): return ck.save(tmp_path/'a'/'b'/'model.safetensors', net, label_space(['sky','road','car']), size=(64,128), method='pipa')

def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype==b[k].dtype for k in a)

def test_round_trip_is_exact_with_buffers(net, file):
    again,meta = ck.load(file)
    assert same(ck.inference_state(again), ck.inference_state(net))
    assert any('running_var' in k for k in ck.inference_state(net)) and any('num_batches' in k for k in ck.inference_state(net))
    assert not any(m.training for m in again.modules())
    x = torch.randn(2,3,64,64)
    with torch.no_grad(): assert torch.equal(again(x), deepcopy(net).eval()(x))
    assert meta['codes']==['sky','road','car'] and meta['size']==[64,128] and meta['method']=='pipa'
    assert meta['versions']['torch']==torch.__version__ and np.shape(meta['palette'])==(3,3)

@pytest.mark.parametrize('make', [lambda: segformer('mit_b0', n_out=5, dim=32), lambda: daformer('mit_b0', n_out=5, dim=32),
                                  lambda: light('mit_b1', n_out=2, drop_path=0.)])
def test_each_factory_is_rebuilt(make, tmp_path):
    net = make()
    assert same(ck.load(ck.save(tmp_path/'x', net))[0].state_dict(), net.state_dict())

def test_header_is_json_and_heads_are_gone(net, file):
    with safe_open(file, 'pt') as f: head,names = f.metadata(),set(f.keys())
    assert {k: json.loads(v) for k,v in head.items()}['spec']==net.spec
    assert names=={k for k in net.state_dict() if not k.startswith(('proj_head.', 'project.'))} and len(names)<len(net.state_dict())
    assert all(v.is_contiguous() and v.device.type=='cpu' for v in load_file(file).values())

def test_heads_are_dropped_at_the_top_only(tmp_path):
    own = nn.ModuleDict(dict(a=nn.ModuleDict(dict(project=nn.Linear(2,2))), project=nn.Linear(2,2)))
    assert set(load_file(ck.save(tmp_path/'x', own)))=={'a.project.weight', 'a.project.bias'}

def test_tied_and_strided_weights(tmp_path):
    a,b = nn.Linear(4,4),nn.Linear(4,4); b.weight = a.weight
    c = nn.Linear(4,4); c.weight = nn.Parameter(torch.randn(4,4).t())
    net = nn.Sequential(a, b, c)
    other,_ = ck.load(ck.save(tmp_path/'x', net), net=deepcopy(net))
    assert same(other.state_dict(), net.state_dict())

def test_half_precision_and_scalars_survive(tmp_path):
    net = nn.Sequential(nn.Conv2d(3,4,1), nn.BatchNorm2d(4)).to(torch.bfloat16)
    state,_ = ck.read(ck.save(tmp_path/'x', net))
    assert same(state, dict(net.state_dict()))

def test_saving_leaves_net_and_file_apart(net, file):
    before = file.read_bytes()
    with torch.no_grad(): again = ck.load(file)[0]; [p.zero_() for p in again.parameters()]
    assert file.read_bytes()==before and ck.load(file)[0].decode_head.linear_pred.weight.abs().sum()>0

def test_label_space_survives(tmp_path):
    for sp in (space('cityscapes'), space('synthia'), space('camvid'), label_space(['a','b'], ids={7:0, 300:1}, ignore=254)):
        s = ck.space_of(ck.load(ck.save(tmp_path/'x', light(n_out=2), sp))[1])
        assert vars(s).keys()==vars(sp).keys()
        assert all(np.array_equal(vars(s)[k], v) if k=='palette' else vars(s)[k]==v for k,v in vars(sp).items())
    assert ck.space_of(ck.load(ck.save(tmp_path/'x', light(n_out=2)))[1]) is None

def test_loading_leaves_the_random_stream_alone(file):
    torch.manual_seed(3); a = torch.rand(2)
    torch.manual_seed(3); ck.load(file); b = torch.rand(2)
    assert torch.equal(a, b)

def test_overwriting_is_all_or_nothing(net, file, monkeypatch):
    before = file.read_bytes()
    def full(*a, **k): raise OSError('No space left on device')
    monkeypatch.setattr('os.replace', full)
    with pytest.raises(OSError): ck.save(file, net_of(seed=1))
    assert file.read_bytes()==before and [o.name for o in file.parent.iterdir()]==[file.name]

def test_others_may_read_the_file(file, tmp_path):
    plain = tmp_path/'plain'; plain.write_text('')
    assert stat.S_IMODE(file.stat().st_mode)==stat.S_IMODE(plain.stat().st_mode)

@pytest.mark.parametrize('v', [lambda: 1, object(), {1,2}, torch.nn.Linear(1,1)])
def test_meta_that_is_no_data_is_refused(net, tmp_path, v):
    with pytest.raises(ValueError, match='`thing` can.t be kept'): ck.save(tmp_path/'x', net, thing=v)
    assert not (tmp_path/'x').exists()

def test_meta_of_numpy_and_paths(net, tmp_path):
    _,m = ck.load(ck.save(tmp_path/'x', net, a=np.float32(.5), b=np.arange(3), c=tmp_path, d=None, e=torch.tensor([1.,2.])))
    assert (m['a'], m['b'], m['c'], m['d'], m['e'])==(.5, [0,1,2], str(tmp_path), None, [1.,2.])

# what can be wrong with a file

@pytest.mark.parametrize('n', [0, 1, 7, 8, 100, 5000, -4000, -1])
def test_cut_off(file, n):
    file.write_bytes(file.read_bytes()[:n])
    with pytest.raises(ValueError, match='damaged or cut off.*copy it again') as e: ck.load(file)
    assert str(file) in str(e.value)

@pytest.mark.parametrize('share', [.3, .6, .999])
def test_one_flipped_bit(file, share):
    b = bytearray(file.read_bytes()); b[int(len(b)*share)] ^= 4; file.write_bytes(b)
    with pytest.raises(ValueError, match='not those that were written'): ck.load(file)

def test_missing_foreign_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match='no.such'): ck.load(tmp_path/'no.such')
    with pytest.raises(FileNotFoundError): ck.load(tmp_path)
    save_file({'w': torch.zeros(2)}, tmp_path/'f', {'format': 'pt'})
    with pytest.raises(ValueError, match="didn't write.*nothing that is known.*net="): ck.load(tmp_path/'f')
    save_file(mit('mit_b0').state_dict(), tmp_path/'e')
    with pytest.raises(ValueError, match=r"look like mit\('mit_b0'\)"): ck.load(tmp_path/'e')

def test_foreign_weights_for_a_known_net(tmp_path, net):
    save_file(ck.inference_state(net), tmp_path/'f', {'format': 'pt'})
    other,meta = ck.load(tmp_path/'f', net=net_of(seed=5, heads=False))
    assert same(other.state_dict(), ck.inference_state(net)) and meta=={'spec': net.spec, 'which': 'student'}
    assert same(ck.load(tmp_path/'f')[0].state_dict(), ck.inference_state(net))

@pytest.mark.parametrize('spec', [dict(make='deepcopy', x=1), dict(make='os.system'), dict(make='light', arch='mit_b9'), dict(make='light', banana=1), dict(arch='mit_b0')])
def test_unknown_spec(net, tmp_path, spec):
    with pytest.raises(ValueError, match='asks for the net.*net='): ck.load(ck.save(tmp_path/'x', net, spec=spec))

def test_newer_format(net, tmp_path):
    with pytest.raises(ValueError, match='update pipa'): ck.load(ck.save(tmp_path/'x', net, pipa_format=2))

def test_spec_of_another_net(net, tmp_path):
    file = ck.save(tmp_path/'x', net, spec=dict(make='light', n_out=4))
    with pytest.raises(ValueError, match='of another shape') as e: ck.load(file)
    assert str(file) in str(e.value) and '\n' not in str(e.value)

def test_adapted_net(tmp_path):
    def own(): return adapt(nn.Sequential(nn.Conv2d(3,8,3,padding=1), nn.ReLU(), nn.Conv2d(8,3,1)), '1')
    a = own(); a.project = PatchHead(8, 4)
    file = ck.save(tmp_path/'x', a)
    with pytest.raises(ValueError, match='net='): ck.load(file)
    b,_ = ck.load(file, net=own())
    assert same(b.state_dict(), ck.inference_state(a))

# student and teacher

def test_folder_of_a_run(net, tmp_path):
    teacher = net_of(seed=9)
    ck.save(tmp_path/'weights.safetensors', net, which='student'); ck.save(tmp_path/'teacher.safetensors', teacher, which='teacher')
    for which,want in ((None,net), ('student',net), ('teacher',teacher)):
        assert same(ck.load(tmp_path, which=which)[0].state_dict(), ck.inference_state(want))
        if which: assert ck.load_official(tmp_path, net_of(seed=4, heads=False), which).ok
    again = net_of(seed=4, heads=False); ck.load_official(tmp_path, again, 'teacher')
    assert same(again.state_dict(), ck.inference_state(teacher))
    with pytest.raises(ValueError, match='holds the student alone'): ck.load(tmp_path/'weights.safetensors', which='teacher')
    assert ck.load(ck.save(tmp_path/'old', net), which='student')[1]['spec']==net.spec

# nets of other people

def three_nets(nets, file, **meta):
    torch.save(dict(state_dict={f'{o}.{k}':v for o,n in nets.items() for k,v in n.state_dict().items()}, meta=meta), file)
    return file

def test_a_published_file_is_rebuilt_from_its_name_alone(tmp_path):
    a,b = [daformer('mit_b0', 19, 16) for _ in range(2)]
    f = three_nets(dict(model=a, ema_model=b), tmp_path/'x.pth', CLASSES=tuple(space('cityscapes').codes), PALETTE=[[1,2,3]]*19)
    for which,want in ((None,a), ('student',a), ('teacher',b)):
        again,meta = ck.load(f, which=which)
        assert same(again.state_dict(), want.state_dict()) and not again.training and meta['which']==(which or 'student')
    sp = ck.space_of(meta)
    assert sp.name=='cityscapes' and sp.things and np.array_equal(sp.palette, space('cityscapes').palette)
    with pytest.raises(ValueError, match='There is no imnet'): ck.load(f, which='imnet')
    meta.pop('space')
    assert json.dumps({k:v for k,v in meta.items()})   # may go into a header again

@pytest.mark.parametrize('meta,codes', [({}, None), (dict(CLASSES=('a','b')), ['a','b']), (dict(dataset_meta=dict(classes=['a','b'], palette=[[1,2,3],[4,5,6]])), ['a','b']),
    (dict(CLASSES=('a','a')), None), (dict(CLASSES=('a','b','c')), None), (dict(CLASSES=('a','b'), PALETTE='red'), ['a','b']), (dict(CLASSES=None), None)])
def test_classes_that_others_wrote(meta, codes, tmp_path):
    net,m = ck.load(three_nets(dict(model=light(n_out=2)), tmp_path/'x.pth', **meta))
    sp = ck.space_of(m)
    assert (sp and sp.codes)==codes
    if 'dataset_meta' in meta: assert sp.palette.tolist()==[[1,2,3],[4,5,6]]

@pytest.mark.parametrize('make', [lambda: segformer('mit_b0', 3, 16), lambda: light('mit_b1', n_out=3), lambda: daformer('mit_b0', 3, 8), lambda: light('lite0', n_out=3), lambda: deeplabv2(3),
                                  lambda: hrda('mit_b0', 3, crop=(64,64), dim=8), lambda: hrda('lite0', 3, crop=(64,64), dim=8, classwise=False)])
def test_out_and_in_again_for_every_net(make, tmp_path):
    net = make(); space3 = label_space(['a','b','c'])
    for f in (ck.save_official(tmp_path/'d'/'x.pth', net, space3), ck.save(tmp_path/'y', net, space3)):
        again,meta = ck.load(f)
        assert same(again.state_dict(), net.state_dict()) and ck.space_of(meta).codes==['a','b','c'] and np.array_equal(ck.space_of(meta).palette, space3.palette)

def test_transformers_opens_our_folder(tmp_path):
    tf = pytest.importorskip('transformers', reason='transformers is the oracle of this test')
    net = light('mit_b0', n_out=3, drop_path=0.).eval()
    ck.save_hf(tmp_path/'hf', net, label_space(['a','b','c']))
    hf,info = tf.SegformerForSemanticSegmentation.from_pretrained(tmp_path/'hf', output_loading_info=True); hf.eval()
    assert not any(info[k] for k in ('missing_keys','unexpected_keys','mismatched_keys')) and hf.config.id2label=={0:'a', 1:'b', 2:'c'}
    for n,m in hf.named_modules():
        if isinstance(m, nn.LayerNorm) and 'patch_embeddings' not in n and 'sequence_reduction' not in n: m.eps = 1e-6
    x = torch.randn(1,3,64,96)
    with torch.no_grad(): torch.testing.assert_close(net.decode_head(net.backbone(x)), hf(x).logits, atol=2e-5, rtol=1e-5)
    hf.save_pretrained(tmp_path/'again')
    again,meta = ck.load(tmp_path/'again')
    assert same(again.state_dict(), net.state_dict()) and ck.space_of(meta).codes==['a','b','c']

def test_no_place_at_transformers(tmp_path):
    for net in (daformer('mit_b0', 3, 8), light('lite0', n_out=3)):
        with pytest.raises(ValueError, match='only `segformer`'): ck.save_hf(tmp_path/'x', net)
    assert not (tmp_path/'x').exists()

def test_half_a_write_leaves_nothing(net, tmp_path, monkeypatch):
    monkeypatch.setattr('os.replace', lambda *a: (_ for _ in ()).throw(OSError('No space left on device')))
    for f in (ck.save_official, ck.save_hf):
        with pytest.raises(OSError): f(tmp_path/'x', net_of(heads=False))
    assert not [o for o in tmp_path.rglob('*') if o.is_file()]

# load_into

def test_load_into_reports_and_changes_nothing(net):
    state = ck.inference_state(net); k = list(state)
    state['extra.weight'] = torch.zeros(1); del state[k[0]]; state[k[2]] = torch.zeros(1,2,3)
    other = net_of(seed=7); before = deepcopy(other.state_dict())
    with pytest.raises(ValueError) as e: ck.load_into(other, state)
    for o in ('missing: '+k[0], 'unexpected: extra.weight', k[2]+' ((1, 2, 3)'): assert o in str(e.value)
    assert same(other.state_dict(), before)

def test_load_into_with_heads_on_either_side(net):
    bare,full = net_of(seed=1, heads=False),net_of(seed=2)
    head = full.project[0].weight.clone()
    ck.load_into(full, ck.inference_state(net)); assert torch.equal(full.project[0].weight, head)
    ck.load_into(bare, net.state_dict()); assert same(bare.state_dict(), ck.inference_state(net))
    ck.load_into(full, net.state_dict()); assert torch.equal(full.project[0].weight, net.project[0].weight)

def test_load_into_long_lists_are_short(net):
    with pytest.raises(ValueError) as e: ck.load_into(net_of(), {})
    assert 'in all)' in str(e.value) and len(str(e.value))<400
