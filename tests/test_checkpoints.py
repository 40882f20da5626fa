"Checkpoints: what goes in comes out, and what is broken says so"
import json, stat, struct
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

@pytest.mark.parametrize('spec', ['light', 3, [1], dict(make=[1]), dict(make='light', n_out=-3), dict(make='light', n_out='eleven'), dict(make='light', n_out=2.5), dict(make='light', n_out=10**30), dict(make='light', n_out=None), dict(make='light', arch=3), dict(make='light', drop_path='x'), dict(make='deepcopy', x=1), dict(make='os.system'), dict(make='light', arch='mit_b9'), dict(make='light', banana=1), dict(arch='mit_b0')])
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

# nets in wrappers

@pytest.fixture
def alone(tmp_path):
    "A group of one process"
    import torch.distributed as dist
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    yield
    dist.destroy_process_group()

def part_compiled(net): net.backbone = torch.compile(net.backbone); return net
wraps = dict(compiled=torch.compile, parallel=nn.DataParallel, both=lambda o: nn.DataParallel(torch.compile(o)), averaged=lambda o: torch.optim.swa_utils.AveragedModel(o), part=part_compiled,
             ddp=lambda o: nn.parallel.DistributedDataParallel(torch.compile(part_compiled(o))))

@pytest.mark.parametrize('wrap', list(wraps))
def test_a_net_in_a_wrapper_is_written_as_the_net(wrap, tmp_path, alone):
    net,space3 = net_of(),label_space(['sky','road','car'])
    want,bare = ck.save(tmp_path/'want', net, space3, size='64x128').read_bytes(),ck.inference_state(net)
    outer = wraps[wrap](deepcopy(net))
    assert ck.save(tmp_path/'x', outer, space3, size='64x128').read_bytes()==want and ck.read(tmp_path/'x')[1]['spec']==net.spec
    for f in (tmp_path/'x', ck.save_official(tmp_path/'y.pth', outer, space3), ck.save_hf(tmp_path/'hf', outer, space3)):
        again,meta = ck.load(f)
        assert same(again.state_dict(), bare) and ck.space_of(meta).codes==space3.codes
        new = wraps[wrap](net_of(seed=3))
        ck.load(f, net=new); assert same(ck.inference_state(new), bare)

# the same bytes

def test_the_same_net_is_the_same_bytes(net, tmp_path):
    space3 = label_space(['sky','road','ümläut'])
    bs = {ck.save(tmp_path/str(i), net, space3, **dict(list(dict(a=1, b='é', c=[1], d=None).items())[::1-2*(i%2)])).read_bytes() for i in range(6)}
    assert len(bs)==1
    n, = struct.unpack('<Q', (b := bs.pop())[:8])
    head = json.loads(b[8:8+n])
    assert n%8==0 and [*head['__metadata__']]==sorted(head['__metadata__']) and same(load_file(tmp_path/'0'), ck.inference_state(net))
    with safe_open(tmp_path/'0', 'pt') as f: assert json.loads(f.metadata()['codes'])[2]=='ümläut'

# headers that people changed

def rewrite(file, out, **meta):
    "The same weights, another header"
    with safe_open(file, 'pt') as f: head = f.metadata()
    save_file(load_file(file), out, head | {k:v if isinstance(v, str) else json.dumps(v) for k,v in meta.items()})
    return out

wrong = [('codes',3), ('codes','abc'), ('codes',['a','a','b']), ('codes',[1,2,3]), ('codes',[]), ('codes',None), ('codes',['a']*300), ('codes',dict(a=1)), ('palette',3), ('palette',[[1,2]]), ('palette',[[1,2,3]]*9), ('palette',[[300,0,0]]*3),
         ('palette',[['a','b','c']]*3), ('palette',[[1.5,0,0]]*3), ('palette',[[10**30,0,0]]*3), ('space',3), ('space',[]), ('space',dict(banana=1)), ('space',dict(ignore='x')), ('space',dict(ignore=1)), ('space',dict(ids=[1])), ('space',dict(ids={'x':1})),
         ('space',dict(ids={'1':77})), ('space',dict(things='abc')), ('space',dict(things=[9])), ('space',dict(subsets=3)), ('space',dict(subsets=dict(a=[9])))]

@pytest.mark.parametrize('field,v', wrong, ids=str)
def test_wrong_classes_in_a_header(field, v, file, tmp_path):
    f = rewrite(file, tmp_path/'x', **{field:json.dumps(v)})
    with pytest.raises(ValueError, match=f'has a `{field}` in its header that can.t be') as e: ck.load(f)
    assert str(f) in str(e.value) and '\n' not in str(e.value) and 'checkpoints.save' in str(e.value)

@pytest.mark.parametrize('kw,word', [(dict(pipa_format='"1"'), "has format '1'"), (dict(pipa_format=2), 'update pipa'), (dict(pipa_format=[]), 'update pipa'), (dict(codes='"["'), 'a `codes` in its header'), (dict(codes='['), 'damaged'), (dict(codes='['*9999), 'damaged'),
    (dict(versions=3, spec=dict(make='no')), r'written by pipa \?'), (dict(crc=7), 'not those that were written'), (dict(spec=None), 'give it as `net=`'), (dict(spec=dict(make='segformer', n_out=4, dim=128)), 'of another shape')], ids=str)
def test_wrong_values_in_a_header(kw, word, file, tmp_path):
    with pytest.raises(ValueError, match=word) as e: ck.load(rewrite(file, tmp_path/'x', **kw))
    assert str(tmp_path/'x') in str(e.value) and '\n' not in str(e.value)

def test_a_space_may_say_little(file, tmp_path):
    _,meta = ck.load(rewrite(file, tmp_path/'x', space={}, palette='null'))
    assert ck.space_of(meta).codes==['sky','road','car']

said = [(dict(id2label=v), w) for v,w in ((['a','b'], None), (['a'], '1 names, and the net 2 classes'), (3, 'not a name for each'), ('ab', 'not a name for each'), ({'a':'x', 'b':'y'}, 'not a name for each'), ({'0':'x', '2':'y'}, 'not a name for each'),
    ({'0':'x', '1':3}, 'not a name for each'), ({'0':'x', '1':None}, 'not a name for each'), ({'0':'x', '1':' '}, 'not a name for each'), ({'0':'LABEL_0', '1':'LABEL_1'}, 'numbers for names'), ({'0':'x', '1':'x'}, 'the name `x` twice'),
    ({'0':'x'}, '1 names, and the net 2 classes'), ({str(i):f'c{i}' for i in range(300)}, '300 names'), ({'0':'x', '1':'y'}, None))]

@pytest.mark.parametrize('config,word', said, ids=str)
def test_what_hugging_face_says_of_classes(config, word, tmp_path):
    d = ck.save_hf(tmp_path/'hf', segformer('mit_b0', 2, 16))
    (d/'config.json').write_text(json.dumps(config))
    net,meta = ck.load(d)
    assert (ck.space_of(meta) is None)==(word is not None) and net.n_out==2
    assert word is None and 'no_classes' not in meta or word in meta['no_classes'] and '`id2label` of `config.json`' in meta['no_classes']
    assert 'no_classes' not in ck.load(ck.save(tmp_path/'x', net, label_space(['a','b']), **{k:v for k,v in meta.items() if k in ('which', 'no_classes')}))[1]

@pytest.mark.parametrize('text', ['[1]', '3', '"x"', 'null', '{', '', '['*10**5, '\xff'])
def test_a_config_that_is_no_config(text, tmp_path):
    d = ck.save_hf(tmp_path/'hf', segformer('mit_b0', 2, 16))
    (d/'config.json').write_bytes(text.encode('latin1'))
    with pytest.raises(ValueError, match='config.json.*copy it again, or delete it') as e: ck.load(d)
    assert str(d) in str(e.value) and '\n' not in str(e.value)

@pytest.mark.parametrize('meta', [3, 'x', [1], dict(CLASSES=3), dict(CLASSES='ab'), dict(CLASSES=(1,2)), dict(CLASSES=torch.ones(2)), dict(CLASSES={'a':1}), dict(CLASSES=('a','a')), dict(CLASSES=('a',)), dict(dataset_meta=3), dict(dataset_meta=dict(classes=[['a'],['b']])),
    dict(CLASSES=('a','b'), PALETTE=[[300,0,0]]*2), dict(CLASSES=('a','b'), PALETTE=torch.ones(2)), dict(CLASSES=('a','b'), PALETTE=[[1],[2,3]])], ids=str)
def test_what_mmseg_says_of_classes(meta, tmp_path):
    torch.save(dict(state_dict=segformer('mit_b0', 2, 16).state_dict(), meta=meta), tmp_path/'x.pth')
    _,m = ck.load(tmp_path/'x.pth')
    if 'PALETTE' in (meta if isinstance(meta, dict) else {}): assert ck.space_of(m).codes==['a','b'] and ck.space_of(m).palette.max()>0
    else: assert ck.space_of(m) is None and ('no_classes' in m)==(isinstance(meta, dict) and meta!=dict(dataset_meta=3))
