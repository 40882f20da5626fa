"Other people's files: what is read is never run, what is broken says so, and what is loaded is reported"
import io, json, os, pickle, subprocess, sys, types, zipfile
from collections import OrderedDict
from functools import cache
from pathlib import Path
import numpy as np, pytest, torch
from torch import nn
from safetensors.torch import save_file
from golden.rules import inp, rule_load, rule_tensor
from pipa import checkpoints as ck
from pipa.weights import files as fl, convert as wt
from pipa.hrda import hrda
from pipa.mit import mit
from pipa.models import PatchHead, ProjHead, adapt, daformer, deeplabv2, light, segformer
from pipa.weights.names import to_hf, to_official

G = Path(__file__).parent/'golden'
published = {o:json.loads((G/f'keys_{o}.json').read_text())[f'pipa_{o}_mit_b0'] for o in ('daformer','hrda')}
w = {'a.weight':torch.arange(12.).reshape(3,4), 'b':torch.tensor(7)}

def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def state(net): return {k:v.clone() for k,v in net.state_dict().items()}
def zipped(obj, file, **kw): torch.save(obj, file, **kw); return file
def legacy(obj, file): return zipped(obj, file, _use_new_zipfile_serialization=False)

# --- reading what is whole

@pytest.mark.parametrize('wrap', [lambda o: o, lambda o: OrderedDict(o), lambda o: dict(state_dict=o), lambda o: dict(model=o, opt=dict(lr=1)),
                                  lambda o: dict(epoch=3, state_dict=OrderedDict(o), optimizer=dict(state={0:dict(step=torch.tensor(1))}), meta=dict(CLASSES=('a',)))])
@pytest.mark.parametrize('write', [zipped, legacy])
def test_formats_of_pytorch(write, wrap, tmp_path):
    got,meta = fl.read(write(wrap(w), tmp_path/'ümläut file.pth'))
    assert same(got, w) and 'state_dict' not in meta and 'model' not in meta

def test_safetensors_and_parameters(tmp_path):
    save_file(w, tmp_path/'noending', {'x':'y'})
    got,meta = fl.read(tmp_path/'noending'); assert same(got, w) and meta=={'x':'y'}
    got,_ = fl.read(zipped({'p':nn.Parameter(torch.ones(2))}, tmp_path/'p.pth'))
    assert not got['p'].requires_grad and type(got['p']) is torch.Tensor

def test_meta_is_there(tmp_path):
    assert fl.read(zipped(dict(state_dict=w, meta=dict(CLASSES=('a','b'), PALETTE=[[1,2,3],[4,5,6]])), tmp_path/'x'))[1]['meta']['PALETTE'][1]==[4,5,6]

def test_half_precision_is_fine(tmp_path):
    net,new = light(n_out=2),light(n_out=2)
    torch.save({k:v.half() if v.is_floating_point() else v for k,v in net.state_dict().items()}, tmp_path/'h.pth')
    wt.load_official(tmp_path/'h.pth', new)
    assert all(v.dtype==net.state_dict()[k].dtype for k,v in new.state_dict().items())
    torch.testing.assert_close(state(new), state(net), atol=1e-3, rtol=1e-3)

# --- objects of frameworks

@pytest.fixture
def fake(monkeypatch):
    "A module that exists while a file is written, and is gone when it is read"
    def make(name, code):
        mod = types.ModuleType(name); exec(code, vars(mod))
        for o in vars(mod).values():
            if isinstance(o, type): o.__module__ = name
        monkeypatch.setitem(sys.modules, name, mod)
        return mod
    return make

def gone(*names):
    for o in names: del sys.modules[o]

def test_objects_of_frameworks_are_replaced(fake, tmp_path):
    m,h = fake('mmcv', 'class Config: pass\nclass ConfigDict(dict): pass'),fake('mmengine', 'class HistoryBuffer:\n    def __init__(self): self.x = [1]')
    cfg = m.Config(); cfg.a = dict(b=1)
    meta = dict(config=cfg, d=m.ConfigDict(lr=1., sub=m.ConfigDict(z=2)), best=np.float64(.5), palette=np.eye(3), hist=[h.HistoryBuffer()], path=Path('x'), CLASSES=('a','b'))
    f = zipped(dict(state_dict=w, meta=meta), tmp_path/'f.pth'); gone('mmcv', 'mmengine')
    got,m = fl.read(f); m = m['meta']
    assert same(got, w) and m['CLASSES']==('a','b') and m['d']['sub']['z']==2
    for o in (m['config'], m['best'], m['palette'], m['hist'][0], m['path']): assert type(o) is fl.Unread and 'not read' in repr(o)
    assert 'Unread' not in str(torch.serialization.get_safe_globals())   # nothing stays allowed

def test_others_are_refused_with_a_cure_that_works(fake, tmp_path):
    m = fake('my_project', 'class Thing: pass')
    f = zipped(dict(state_dict=w, extra=m.Thing()), tmp_path/'f.pth')
    with pytest.raises(ValueError) as e: fl.read(f)
    text = str(e.value)
    assert 'my_project.Thing' in text and str(f) in text and 'weights_only' not in text and '\n' not in text
    code = text.split('python -c "')[1].split('"')[0].replace("map_location='cpu'", "map_location='cpu', weights_only=False")   # the default of old versions
    (tmp_path/'my_project.py').write_text('class Thing: pass')
    subprocess.run([sys.executable, '-c', code], cwd=tmp_path, check=True, env=dict(os.environ, PYTHONPATH=str(tmp_path)))
    assert same(fl.read(tmp_path/'weights.pth')[0], w)

class Bomb:
    def __init__(self, how): self.how = how
    def __reduce__(self): return self.how
bombs = dict(fail=(pytest.fail, ('a pickle was run',)), system=(os.system, ('touch boom',)), exec=(exec, ("open('boom','w')",)), eval=(eval, ("open('boom','w')",)),
             run=(subprocess.call, (['touch','boom'],)), open=(io.open, ('boom','w')), path=(Path.touch, (Path('boom'),)))

@pytest.mark.parametrize('kind', list(bombs))
@pytest.mark.parametrize('write', [zipped, legacy])
def test_bombs_dont_go_off(kind, write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bomb = Bomb(bombs[kind])
    for obj in (bomb, dict(state_dict=w, meta=bomb), dict(w, x=[bomb])):
        write(obj, 'f.pth')
        with pytest.raises(ValueError, match='f.pth'): fl.read('f.pth')
        with pytest.raises(ValueError): ck.load('f.pth')
        with pytest.raises(ValueError): wt.load_official('f.pth', nn.Linear(2,2))
    assert not Path('boom').exists()

@pytest.mark.parametrize('protocol', range(6))
def test_bare_pickles_dont_go_off(protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for how in bombs.values():
        Path('f').write_bytes(pickle.dumps(Bomb(how), protocol))
        with pytest.raises(ValueError): fl.read('f')
    assert not Path('boom').exists()

def test_a_bomb_under_a_known_name_is_a_dud(fake, tmp_path, monkeypatch):
    "What is named after a framework gets a stand-in, whatever it was"
    monkeypatch.chdir(tmp_path)
    m = fake('mmcv', "import os\ndef boom(x): os.system('touch boom')")
    m.boom.__module__ = 'mmcv'
    zipped(dict(state_dict=w, x=Bomb((m.boom, (1,)))), 'f.pth')
    assert type(fl.read('f.pth')[1]['x']) is fl.Unread and not Path('boom').exists()

# --- what can be wrong with a file

@pytest.mark.parametrize('write', [zipped, legacy])
@pytest.mark.parametrize('n', [0, 1, 2, 9, 60, 500, -300, -1])
def test_cut_off(write, n, tmp_path):
    big = {'a':torch.randn(60,60)}
    f = write(big, tmp_path/'f.pth'); f.write_bytes(f.read_bytes()[:n])
    with pytest.raises(ValueError, match='f.pth') as e: fl.read(f)
    assert '\n' not in str(e.value) and ('copy it again' in str(e.value) or 'holds no weights' in str(e.value))

@pytest.mark.parametrize('at', [.1, .3, .5, .8])
def test_flipped_bits_are_found(at, tmp_path):
    t = torch.randn(200,200)
    b = bytearray(zipped({'a':t}, tmp_path/'f.pth').read_bytes())
    i = b.find(t.numpy().tobytes())+int(at*t.numel()*4); assert i>100
    b[i] ^= 1; (tmp_path/'f.pth').write_bytes(b)
    assert not torch.equal(torch.load(tmp_path/'f.pth', weights_only=True)['a'], t)   # PyTorch doesn't notice
    with pytest.raises(ValueError, match='damaged or cut off'): fl.read(tmp_path/'f.pth')

@pytest.mark.parametrize('obj,word', [({}, 'holds no weights'), ([torch.ones(1)], 'holds no weights, but list'), (3, 'holds no weights, but int'), (torch.ones(2), 'holds no weights, but Tensor'),
                                      (dict(epoch=1, lr=.1), 'holds no weights, but epoch, lr'), (dict(state_dict={}), 'holds no weights'), (None, 'NoneType')])
def test_no_weights_inside(obj, word, tmp_path):
    with pytest.raises(ValueError, match=word): fl.read(zipped(obj, tmp_path/'f.pth'))

def test_not_a_file_of_weights(tmp_path):
    (tmp_path/'a.txt').write_text('hello '*100); (tmp_path/'b.png').write_bytes(b'\x89PNG\r\n\x1a\n'+bytes(200)); (tmp_path/'c.html').write_text('<html>Sign in to download</html>')
    with zipfile.ZipFile(tmp_path/'d.zip', 'w') as z: z.writestr('x.txt', 'x')
    for f in tmp_path.iterdir():
        with pytest.raises(ValueError, match='not a file of weights.*copy it again') as e: fl.read(f)
        assert str(f) in str(e.value) and '\n' not in str(e.value)
    m = torch.jit.script(nn.Linear(2,2)); m.save(str(tmp_path/'ts.pt'))
    with pytest.raises(ValueError, match='TorchScript program'): fl.read(tmp_path/'ts.pt')
    torch.save(nn.Linear(2,2), tmp_path/'whole.pt')
    with pytest.raises(ValueError, match=r'torch\.nn\.modules\.linear\.Linear'): fl.read(tmp_path/'whole.pt')

def test_missing_and_folders(tmp_path):
    for f in (tmp_path/'no.pth', tmp_path/'no'/'no.pth'):
        with pytest.raises(FileNotFoundError, match='There is no file'): fl.read(f)
    with pytest.raises(FileNotFoundError, match='has none of the files weights.safetensors, model.safetensors'): fl.read(tmp_path)
    zipped(w, tmp_path/'pytorch_model.bin'); assert same(fl.read(tmp_path)[0], w)
    (tmp_path/'config.json').write_text(json.dumps(dict(id2label={'0':'sky'}))); assert fl.read(tmp_path)[1]['config']['id2label']=={'0':'sky'}
    save_file({'s':torch.ones(1)}, tmp_path/'model.safetensors'); assert 's' in fl.read(str(tmp_path))[0]
    save_file({'t':torch.ones(1)}, tmp_path/'teacher.safetensors'); assert 't' in fl.read(tmp_path, 'teacher')[0] and 's' in fl.read(tmp_path)[0]

def test_unreadable(tmp_path):
    f = zipped(w, tmp_path/'f.pth'); f.chmod(0)
    if os.access(f, os.R_OK): pytest.skip('this user may read everything')
    with pytest.raises(OSError): fl.read(f)

# --- folders of Hugging Face in several files, and variants

def cut(state, folder, index, name, write):
    "Two files and an index, as `save_pretrained(max_shard_size=...)` leaves them"
    folder.mkdir(exist_ok=True)
    ks = sorted(state); files = {k:name.format(1+(i>=len(ks)//2)) for i,k in enumerate(ks)}
    for f in {*files.values()}: write({k:state[k] for k in ks if files[k]==f}, folder/f)
    (folder/index).write_text(json.dumps(dict(metadata=dict(total_size=1), weight_map=files)))
    return folder

shards = [('model.safetensors.index.json', 'model-0000{}-of-00002.safetensors', save_file), ('pytorch_model.bin.index.json', 'pytorch_model-0000{}-of-00002.bin', torch.save),
          ('model.safetensors.index.fp16.json', 'model.fp16-0000{}-of-00002.safetensors', save_file), ('model.safetensors.index.fp16.json', 'model-0000{}-of-00002.fp16.safetensors', save_file)]

@pytest.mark.parametrize('index,name,write', shards, ids=[o[1] for o in shards])
def test_a_net_in_several_files(index, name, write, tmp_path):
    net = segformer('mit_b0', 3, 16)
    d = cut(to_hf(state(net)), tmp_path/'hub', index, name, write)
    (d/'config.json').write_text(json.dumps(dict(id2label={'0':'sky', '1':'road', '2':'car'})))
    for path in (d, d/index):
        got,meta = ck.load(path)
        assert same(state(got), state(net)) and ck.space_of(meta).codes==['sky','road','car']
    next(d.glob('*00002-of*')).unlink()
    with pytest.raises(FileNotFoundError, match='names 2 files, and `.*00002-of.*` isn.t there'): fl.read(d)

@pytest.mark.parametrize('files,word', [(['model.fp16.safetensors'], None), (['pytorch_model.fp16.bin'], None), (['model.fp16.safetensors', 'pytorch_model.fp16.bin'], None), (['model.safetensors', 'model.fp16.safetensors'], None),
                                        (['model.fp16.safetensors', 'model.bf16.safetensors'], 'several variants, model.bf16.safetensors, model.fp16.safetensors: name the file'), (['model-00001-of-00002.safetensors'], 'has none of the files')])
def test_variants_of_precision(files, word, tmp_path):
    for i,f in enumerate(files): (save_file if f.endswith('safetensors') else torch.save)({'w':torch.full((2,), float(i)).half()}, tmp_path/f)
    if word is None: assert fl.read(tmp_path)[0]['w'].tolist()==[0,0]
    else:
        with pytest.raises(FileNotFoundError, match=word): fl.read(tmp_path)

@pytest.mark.parametrize('text,word', [('', 'not the index'), ('[]', 'not the index'), ('{}', 'not the index'), ('{"weight_map": 3}', 'not the index'), ('{"weight_map": {"a": 3}}', 'not the index'), ('['*10**5, 'not the index'),
    ('{"weight_map": {"a": "../a.safetensors"}}', 'not a file beside it'), ('{"weight_map": {"a": "/etc/passwd"}}', 'not a file beside it'), ('{"weight_map": {"a": ".."}}', 'isn.t there'),
    ('{"weight_map": {"a": "a.safetensors", "b": "a.safetensors"}}', 'the weight `b`, which is in none'), ('{"weight_map": {"a": "model.safetensors.index.json"}}', 'not a file of weights')])
def test_an_index_of_strangers(text, word, tmp_path):
    save_file({'a':torch.ones(1)}, tmp_path/'a.safetensors')
    (tmp_path/'model.safetensors.index.json').write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=word) as e: fl.read(tmp_path)
    assert str(tmp_path) in str(e.value) and '\n' not in str(e.value)

# --- files that claim more than they hold

def test_zips_that_unpack_to_a_thousand_times_their_size(tmp_path):
    b = zipped(w, tmp_path/'w.pth').read_bytes()
    for name,entry in (('pickle','x/data.pkl'), ('more','x/data/9')):
        (tmp_path/name).write_bytes(b)
        with zipfile.ZipFile(tmp_path/name, 'a', zipfile.ZIP_DEFLATED) as z: z.writestr(entry, bytes(30*10**6))
        assert (tmp_path/name).stat().st_size<10**5
        with pytest.raises(ValueError, match='would unpack to 30 MB') as e: fl.read(tmp_path/name)
        assert str(tmp_path/name) in str(e.value)

def test_a_zip_that_was_packed_again_is_fine(tmp_path):
    with zipfile.ZipFile(zipped({'a':torch.randn(99,99), 'b':torch.zeros(99,99)}, tmp_path/'a.pth')) as a, zipfile.ZipFile(tmp_path/'b.pth', 'w', zipfile.ZIP_DEFLATED) as b:
        for i in a.infolist(): b.writestr(i.filename, a.read(i))
    assert same(*[fl.read(tmp_path/o)[0] for o in ('a.pth','b.pth')])

@pytest.mark.parametrize('odd', [lambda: torch.zeros(1).expand(10**12), lambda: torch.zeros(3, 1).expand(3, 10**10), lambda: torch.zeros(9, device='meta'), lambda: torch.eye(3).to_sparse()])
@pytest.mark.parametrize('write', [zipped, legacy])
def test_tensors_that_are_larger_than_their_file(odd, write, tmp_path):
    with pytest.raises(ValueError, match='x.pth'): fl.read(write(dict(w, odd=odd()), tmp_path/'x.pth'))

def hollow(n, **more):
    "A file that says it has n classes, and has not a single number of them"
    s = segformer('mit_b0', 2, 16).state_dict()
    return s | {'decode_head.linear_pred.weight':torch.zeros(n, 0, 1, 1), 'decode_head.linear_pred.bias':torch.zeros(0)} | more

def test_a_billion_classes_take_no_memory(tmp_path):
    save_file(hollow(10**9), tmp_path/'x')
    with pytest.raises(ValueError, match="`.*x` doesn't fit this net"): ck.load(tmp_path/'x')
    net = light(n_out=2)
    for k,v in dict(n_out=10**9, dim=10**9).items():
        with pytest.raises(ValueError, match="doesn't fit the net.*of another shape|asks for the net"): ck.load(ck.save(tmp_path/'y', net, spec=dict(net.spec, **{k:v})))

@pytest.mark.parametrize('key,v', [('patch_embed1.proj.weight', torch.tensor(1.)), ('decode_head.linear_pred.weight', torch.ones(3)), ('decode_head.linear_pred.weight', torch.tensor(0.)), ('decode_head.linear_fuse.conv.weight', torch.ones(3)),
                                   ('block1.0.attn.kv.weight', torch.tensor(2.)), ('norm1.bias', torch.ones(0))])
@pytest.mark.parametrize('form', [to_official, to_hf, lambda s: s])
def test_shapes_that_no_net_has(key, v, form, tmp_path):
    s = form(segformer('mit_b0', 2, 16).state_dict())
    net = segformer('mit_b0', 2, 16)
    theirs = [k for k in s if k.endswith(key.replace('backbone.',''))] or [k for k in s if k.endswith(('classifier.weight','proj.weight'))][:1]
    torch.save(s | {theirs[0]:v}, tmp_path/'x.pth')
    for f in (lambda: ck.load(tmp_path/'x.pth'), lambda: wt.load_official(tmp_path/'x.pth', net)):
        with pytest.raises(ValueError): f()

# --- numbers that are none

@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_weights_that_are_nan_are_refused_where_they_are_used(bad, tmp_path):
    a,b,new = [segformer('mit_b0', 2, 16) for _ in range(3)]
    b.decode_head.linear_pred.bias.data[1] = bad
    f = zipped(dict(state_dict={f'{o}.{k}':v for o,n in (('model',a), ('ema_model',b)) for k,v in n.state_dict().items()}), tmp_path/'x.pth')
    assert wt.load_official(f, new).ok and ck.load(f)[0]
    before = state(new)
    for load in (lambda: wt.load_official(f, new, 'teacher'), lambda: ck.load(f, which='teacher'), lambda: ck.load(ck.save(tmp_path/'y', b)), lambda: ck.load(ck.save_hf(tmp_path/'hf', b)), lambda: ck.load(ck.save_official(tmp_path/'z.pth', b))):
        with pytest.raises(ValueError, match=r'holds NaN or infinite numbers, in 1 of its \d+ weights \(`decode_head.linear_pred.bias`') as e: load()
        assert str(tmp_path) in str(e.value)
    assert same(state(new), before)

# --- names of wrappers

wrapped = ['_orig_mod.', 'module.', 'module._orig_mod.', '_orig_mod.module.', 'model.', 'model._orig_mod.', 'model.module.', 'module.model._orig_mod.', '_fsdp_wrapped_module.']

@pytest.mark.parametrize('pre,inner', [(p, ['', '_orig_mod.', 'module._orig_mod.'][i%3]) for i,p in enumerate(wrapped)])
def test_names_of_wrappers_in_any_file(pre, inner, tmp_path):
    net = segformer('mit_b0', 2, 16); s = net.state_dict()
    forms = dict(ours=s, official=to_official(s), hub=to_hf(s))
    writers = [lambda o, f: save_file({k:v.clone() for k,v in o.items()}, f), lambda o, f: torch.save(dict(state_dict=o, epoch=1), f), lambda o, f: torch.save(dict(pipa_checkpoint=1, student=o, opt={}), f)]
    three = 'model.' in pre.replace('module.', '')   # the layout of the papers, with several nets in a file
    for i,(k,form) in enumerate(forms.items()):
        if k=='hub' and three: continue
        named = {pre+n.replace('decode_head.', f'decode_head.{inner}').replace('backbone.', f'backbone.{inner}'):v for n,v in form.items()}
        writers[(i+len(pre))%3](named, tmp_path/k)
        assert same(state(ck.load(tmp_path/k)[0]), s)
        if k=='ours' and not three: assert same(state(wt.load_into(segformer('mit_b0', 2, 16), named)), s)
    new = nn.DataParallel(segformer('mit_b0', 2, 16))
    assert wt.load_official(tmp_path/'official', new).ok and same(state(new.module), s)

def test_a_part_that_is_called_module(tmp_path):
    "A net of one's own may have such a part: it is found again, whoever wrote the file"
    def own(): return nn.ModuleDict(dict(module=nn.Linear(2,2), top=nn.ModuleDict(dict(module=nn.Linear(2,2)))))
    a,b = own(),own()
    assert same(state(ck.load(ck.save(tmp_path/'x', a), net=b)[0]), state(a))
    save_file(a.state_dict(), tmp_path/'y'); c = own()
    assert wt.load_official(tmp_path/'y', c).ok and same(state(c), state(a))
    two = nn.ModuleDict(dict(module=nn.Linear(2,2))); two.weight,two.bias = nn.Parameter(torch.ones(2,2)),nn.Parameter(torch.zeros(2))
    new = nn.ModuleDict(dict(module=nn.Linear(2,2))); new.weight,new.bias = nn.Parameter(torch.zeros(2,2)),nn.Parameter(torch.zeros(2))
    assert same(state(ck.load(ck.save(tmp_path/'z', two), net=new)[0]), state(two))   # `weight` and `module.weight` stay two

# --- matching

def test_report_names_everything():
    own = dict(a=torch.ones(2), b=torch.ones(3), c=torch.ones(1), keep_me=torch.ones(1), **{'n.num_batches_tracked':torch.tensor(0), 'project.0.weight':torch.ones(1)})
    file = dict(a=torch.ones(2), b=torch.ones(4), new=torch.ones(1), **{'proj_head.x':torch.ones(1)})
    r = wt.match(own, file, {k:f'model.{k}' for k in file}, ('keep_',), 'x.pth', ['ema_model.a'])
    assert (r.mapped, r.missing, r.unexpected, r.mismatched)==({'a':'model.a'}, ['c'], ['model.new'], {'b':((4,),(3,))})
    assert r.left==['ema_model.a','model.proj_head.x'] and r.kept==['keep_me','n.num_batches_tracked','project.0.weight'] and not r.ok
    lines = str(r).splitlines()
    assert lines[0]=='x.pth: nothing that is known here' and len(lines)==7 and repr(r)==str(r)
    for n,word in ((1,'mapped'), (1,'missing'), (1,'unexpected'), (1,'of another shape'), (2,'left out'), (3,'kept')): assert any(l.startswith(f'{n:6} {word}') for l in lines)
    assert 'b 4, net 3' in str(r) and 'model.a → a' in str(r)

def test_report_of_nothing(): assert wt.match({}, {}).ok and str(wt.match({}, {})).count('\n')==6
def test_report_groups_long_lists():
    r = wt.match({}, {f'module.ema_model.{i}':torch.ones(1) for i in range(500)})
    assert 'ema_model.* (500)' in str(r) and len(str(r))<400

# --- files of the papers

@cache
def rule(kind): return {k:torch.ones(1) if k.startswith(('cls_head','proj_head')) else rule_tensor(k, v) for k,v in published[kind].items()}

def pipa_state(kind, shift=dict(model=0, ema_model=1, imnet_model=2), start=''):
    "The published layout, by its published list of keys"
    s = {f'{start}{o}.{k}':v+d for o,d in shift.items() for k,v in rule(kind).items()}
    return s | {f'{start}project.{i}.{o}':torch.ones(1) for i in (0,2) for o in ('weight','bias')} | {f'{start}classifier.weight':torch.ones(1)}

nets = dict(daformer=lambda: daformer('mit_b0'), hrda=lambda: hrda('mit_b0', 19))

@pytest.mark.parametrize('kind', list(nets))
def test_a_checkpoint_of_pipa(kind, tmp_path):
    net,file = nets[kind](),zipped(dict(state_dict=pipa_state(kind), meta=dict(CLASSES=['a'])), tmp_path/'pipa.pth')
    bare = [k for k in published[kind] if not k.startswith(('cls_head','proj_head'))]
    for which,shift in (('student',0), ('teacher',1), ('imnet',2)):
        r = wt.load_official(file, net, which)
        assert r.ok and list(r.mapped)==bare and not r.kept and len(r.left)==3*len(published[kind])+5-len(bare)
        for k,v in net.state_dict().items(): assert torch.equal(v, rule(kind)[k]+shift), k

def test_golden_answers_through_a_checkpoint(tmp_path):
    "The published net's figures, with weights that went through a published file"
    net,x = daformer('mit_b0'),inp('img', (2,3,128,160))
    wt.load_official(zipped(dict(state_dict=pipa_state('daformer', dict(model=0), 'module.')), tmp_path/'x.pth'), net)
    vals = np.load(G/'daformer_b0.npz')
    with torch.no_grad(): z = net.eval()(x)
    np.testing.assert_allclose(z.flatten()[vals['logits_idx']], vals['logits_val'], atol=2e-5)

def test_heads_are_kept_where_the_net_has_them(tmp_path):
    net = daformer('mit_b0'); net.proj_head,net.project = ProjHead(net.widths, 8, 8),PatchHead(net.fused_dim, 4)
    s = pipa_state('daformer', dict(model=0)) | {f'model.proj_head.{k}':v for k,v in net.proj_head.state_dict().items()} | {f'project.{k}':torch.full_like(v, 3) for k,v in net.project.state_dict().items()}
    f = zipped(dict(state_dict=s), tmp_path/'x')
    before = state(net)
    r = wt.load_official(f, net)
    assert r.ok and torch.equal(net.project[0].weight, before['project.0.weight']) and 'project.0.weight' in r.kept and 'project.0.weight' in r.left
    r = wt.load_official(f, net, heads=True)
    assert r.ok and (net.project[0].weight==3).all() and r.mapped['proj_head.proj.0.bias']=='model.proj_head.proj.0.bias'
    assert not [k for k in r.left if 'proj' in k and k.startswith(('model.','project'))] and 'classifier.weight' in r.left and 'model.cls_head.3.weight' in r.left
    assert wt.load_official(f, daformer('mit_b0'), heads=True).ok   # a net without them takes the rest

def test_wrong_architecture_is_named(tmp_path):
    f = zipped(dict(state_dict=pipa_state('daformer', dict(model=0))), tmp_path/'x.pth')
    for make,mine in ((lambda: daformer('mit_b1'), "daformer('mit_b1', n_out=19)"), (lambda: daformer('mit_b0', 11), "daformer('mit_b0', n_out=11)"), (lambda: segformer('mit_b0'), "segformer('mit_b0', n_out=19)")):
        net = make(); before = state(net)
        with pytest.raises(ValueError) as e: wt.load_official(f, net)
        assert f"looks like daformer('mit_b0', n_out=19), your net like {mine}" in str(e.value) and str(f) in str(e.value) and 'mapped' in str(e.value)
        assert same(state(net), before)

def test_not_strict_loads_what_fits(tmp_path):
    net,src = daformer('mit_b0', 11),daformer('mit_b0', 19)
    own = net.decode_head.conv_seg.weight.clone()
    r = wt.load_official(zipped(src.state_dict(), tmp_path/'x'), net, strict=False)
    assert set(r.mismatched)=={'decode_head.conv_seg.weight','decode_head.conv_seg.bias'} and not r.ok
    assert torch.equal(net.decode_head.conv_seg.weight, own) and same(state(net.backbone), state(src.backbone))

def test_one_lost_and_one_strange_tensor(tmp_path):
    s = daformer('mit_b0').state_dict(); s['backbone.extra'] = s.pop('backbone.norm2.bias')
    with pytest.raises(ValueError) as e: wt.load_official(zipped(s, tmp_path/'x'), daformer('mit_b0'))
    assert 'missing          backbone.norm2.bias' in str(e.value) and 'unexpected       backbone.extra' in str(e.value)

def test_no_batch_counts_in_old_files(tmp_path):
    net = daformer('mit_b0')
    s = {k:v for k,v in net.state_dict().items() if 'num_batches' not in k}
    r = wt.load_official(zipped(s, tmp_path/'x'), daformer('mit_b0'))
    assert r.ok and all('num_batches' in k for k in r.kept) and r.kept

# --- encoders

def test_imagenet_file(tmp_path, arch='mit_b0'):
    enc = mit(arch); s = dict(enc.state_dict(), **{'head.weight':torch.ones(1000, enc.widths[-1]), 'head.bias':torch.ones(1000)})
    for write in (zipped, legacy):
        f = write(s, tmp_path/'m.pth')
        bare = mit(arch); r = wt.load_official(f, bare); assert r.ok and not r.kept and r.left==['head.weight','head.bias'] and same(state(bare), state(enc))
    net = daformer(arch, 3, 8); before = state(net.decode_head)
    r = wt.load_official(f, net)
    assert r.ok and same(state(net.backbone), state(enc)) and same(state(net.decode_head), before)
    assert len(r.kept)==len(before) and r.looks==f"mit('{arch}')"
    with pytest.raises(ValueError, match=rf"looks like mit\('{arch}'\)"): wt.load_official(f, mit('mit_b2', depths=(1,1,1,1)))

def test_part_of_an_encoder_is_not_enough(tmp_path):
    s = mit('mit_b0').state_dict(); del s['norm4.weight']
    with pytest.raises(ValueError, match='backbone.norm4.weight'): wt.load_official(zipped(s, tmp_path/'x'), light('mit_b0'))

@pytest.mark.parametrize('how', ['ours','release','hub','memory'])
def test_encoder_of_a_whole_net(how, tmp_path):
    net = rule_load(segformer('mit_b0', 5, 16)); s = net.state_dict()
    s = dict(ours=s, release=to_official(s), hub=to_hf(s), memory=to_hf(s, memory=True))[how]
    enc,new = mit('mit_b0'),segformer('mit_b0', 5, 16)
    assert wt.load_official(zipped(s, tmp_path/'x'), enc).ok and same(state(enc), state(net.backbone))
    assert wt.load_official(tmp_path/'x', new).ok and same(state(new), state(net))
    assert same(state(ck.load(tmp_path/'x')[0]), state(net))

def test_torchvision_resnet_into_deeplab(tmp_path):
    from torchvision.models import resnet101
    tv = resnet101(weights=None); f = zipped(tv.state_dict(), tmp_path/'resnet101-abc.pth')
    net = deeplabv2(3); stem = state(net.backbone.stem)
    r = wt.load_official(f, net)
    assert r.ok and same(state(net.backbone.layer3), state(tv.layer3)) and same(state(net.backbone.stem), stem)
    assert {k.split('.')[1] for k in r.kept if k.startswith('backbone.')}=={'stem'} and {k.split('.')[0] for k in r.left}=={'conv1','bn1','fc'} and r.looks=='ResNetV1c()'

def test_deeplab_net_needs_its_stem():
    net = deeplabv2(3); s = {k:v for k,v in net.state_dict().items() if 'stem.0' not in k}
    with pytest.raises(ValueError, match='backbone.stem.0.weight'): wt.load_named(net, s)
    assert wt.load_named(net, dict(net.state_dict(), **{'decode_head.conv_seg.weight':torch.ones(1), 'decode_head.conv_seg.bias':torch.ones(1)})).ok

def test_adapted_net_takes_its_own(tmp_path):
    def own(): return adapt(nn.Sequential(nn.Conv2d(3,8,3,padding=1), nn.ReLU(), nn.Conv2d(8,3,1)), '1')
    a,b = own(),own()
    assert wt.load_official(zipped(a.state_dict(), tmp_path/'x'), b).ok and same(state(a), state(b))

# --- weights to start from

@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    "An empty working folder, empty caches, and a net that must not be asked"
    monkeypatch.chdir(tmp_path)
    hub = pytest.importorskip('huggingface_hub', reason='the cache of the hub')
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path/'hub')); monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path/'torch'))
    def no(*a, **k): raise AssertionError('the network was asked')
    monkeypatch.setattr(hub, 'hf_hub_download', no)
    return hub

def test_nothing_to_be_had(nowhere):
    for arch in ('mit_b0','mit_b5'):
        with pytest.raises(FileNotFoundError) as e: wt.load_pretrained(_meta(arch))
        text = str(e.value)
        assert f'nvidia/{arch.replace("_","-")}' in text and f'pretrained/{arch}.pth' in text and "pretrained='path'" in text and 'lite0' in text and '\n' not in text
    with pytest.raises(FileNotFoundError, match='resnet101'): wt.load_pretrained(_meta('resnet101'))
    with pytest.raises(ValueError, match='No ImageNet weights are known'): wt.load_pretrained(nn.Linear(2,2))
    with pytest.raises(FileNotFoundError, match='There is no file `none.pth`'): wt.load_pretrained(light(), 'none.pth')

def _meta(arch):
    with torch.device('meta'): return deeplabv2(2) if arch=='resnet101' else light(arch)

def in_cache(tmp_path, repo, file, state):
    "As the hub's library lays it out"
    root = tmp_path/'hub'/f"models--{repo.replace('/','--')}"
    (root/'snapshots'/'abc').mkdir(parents=True); (root/'refs').mkdir(); (root/'refs'/'main').write_text('abc')
    (save_file if file.endswith('safetensors') else torch.save)(state, root/'snapshots'/'abc'/file)

@pytest.mark.parametrize('file', ['model.safetensors','pytorch_model.bin'])
def test_from_the_cache_of_the_hub(nowhere, file, tmp_path):
    enc = mit('mit_b0')
    in_cache(tmp_path, 'nvidia/mit-b0', file, {f'segformer.{k}':v for k,v in to_hf(enc.state_dict()).items()} | {'classifier.weight':torch.ones(10,256)})
    net = wt.load_pretrained(light('mit_b0'))
    assert same(state(net.backbone), state(enc))

def test_local_file_comes_first(nowhere, tmp_path):
    a,b = mit('mit_b0'),mit('mit_b0')
    in_cache(tmp_path, 'nvidia/mit-b0', 'model.safetensors', to_hf(a.state_dict()))
    Path('pretrained').mkdir(); zipped(b.state_dict(), 'pretrained/mit_b0.pth')
    assert same(state(wt.load_pretrained(mit('mit_b0'))), state(b))
    assert same(state(wt.load_pretrained(mit('mit_b0'), tmp_path/'hub/models--nvidia--mit-b0/snapshots/abc')), state(a))

def test_downloads_only_when_allowed(nowhere, tmp_path, monkeypatch):
    asked = []
    def get(repo, f):
        asked.append((repo, f))
        if f=='model.safetensors': raise OSError('404')
        return str(zipped(to_hf(mit('mit_b0').state_dict()), tmp_path/'got.bin'))
    monkeypatch.setattr(nowhere, 'hf_hub_download', get)
    with pytest.raises(FileNotFoundError): wt.load_pretrained(mit('mit_b0'))
    assert not asked
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', False)
    wt.load_pretrained(mit('mit_b0'))
    assert asked==[('nvidia/mit-b0','model.safetensors'), ('nvidia/mit-b0','pytorch_model.bin')]

def test_without_the_hubs_library(nowhere, monkeypatch):
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(FileNotFoundError, match='nvidia/mit-b0'): wt.load_pretrained(mit('mit_b0'))

def test_resnet_from_torch_hub(nowhere, tmp_path):
    file = tmp_path/'torch/checkpoints/resnet101-cd907fc2.pth'
    file.parent.mkdir(parents=True); file.touch()
    assert wt.find_pretrained('resnet101')==file
    with pytest.raises(ValueError, match='resnet101-cd907fc2.pth.*copy it again'): wt.load_pretrained(_meta('resnet101'))

def test_make_net_with_a_file(tmp_path):
    from pipa.learner import make_net
    enc = mit('mit_b0'); f = zipped(enc.state_dict(), tmp_path/'mit_b0.pth')
    for pretrained in (f, str(f)):
        net = make_net('light', 5, 'mit_b0', pretrained=pretrained)
        assert same(state(net.backbone), state(enc)) and 'pretrained' not in net.spec
    assert same(state(make_net(net, 5, pretrained=f).backbone), state(enc))
    with pytest.raises(ValueError, match="looks like mit\\('mit_b0'\\)"): make_net('light', 5, 'mit_b1', pretrained=f)

def test_a_graph_is_no_file_of_weights(tmp_path):
    from pipa.weights.files import read
    for name in ('n.pt2', 'n.onnx'):
        (tmp_path/name).write_bytes(b'whatever')
        with pytest.raises(ValueError, match='is a graph that was exported'): read(tmp_path/name)
