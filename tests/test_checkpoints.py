"Checkpoints: what goes in comes out, and what is broken says so"
import json, pickle, stat
from copy import deepcopy
import numpy as np, pytest, torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from pipa import checkpoints as ck
from pipa.labels import label_space, space
from pipa.models import light, segformer, daformer, adapt, ProjHead, PatchHead

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
    monkeypatch.setattr(ck.os, 'replace', full)
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
    with pytest.raises(ValueError, match="didn't write.*net="): ck.load(tmp_path/'f')
    (tmp_path/'t').write_text('hello '*100)
    with pytest.raises(ValueError, match='not a safetensors file'): ck.load(tmp_path/'t')

def test_foreign_weights_for_a_known_net(tmp_path, net):
    save_file(ck.inference_state(net), tmp_path/'f', {'format': 'pt'})
    other,meta = ck.load(tmp_path/'f', net=net_of(seed=5, heads=False))
    assert same(other.state_dict(), ck.inference_state(net)) and meta=={'format': 'pt'}

class Bomb:
    def __reduce__(self): return (pytest.fail, ('a pickle was opened',))

@pytest.mark.parametrize('protocol', range(2, 6))
def test_pickles_are_never_opened(tmp_path, protocol):
    (tmp_path/'p').write_bytes(pickle.dumps(Bomb(), protocol))
    with pytest.raises(ValueError): ck.load(tmp_path/'p')
    torch.save(Bomb(), tmp_path/'z', pickle_protocol=protocol)
    with pytest.raises(ValueError, match='is a pickle'): ck.load(tmp_path/'z')

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
