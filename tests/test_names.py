"Names of other people's weights: against transformers itself, torchvision, and the published lists of keys"
import json, re
from pathlib import Path
import pytest, torch, torch.nn.functional as F
from torch import nn
from golden.rules import inp, rule_load, rule_tensor
from pipa.weights import names as nm
from pipa.checkpoints import from_hf, to_hf
from pipa.mit import mit, mit_sizes
from pipa.models import DAFormerHead, SegFormerHead, daformer, deeplabv2, light, resize, segformer

G = Path(__file__).parent/'golden'
mit_keys,daf_keys,hrda_keys = (json.loads((G/f'keys_{o}.json').read_text()) for o in ('mit','daformer','hrda'))

def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)

# --- the table

@pytest.mark.parametrize('arch', ['mit_b0','mit_b5'])
@pytest.mark.parametrize('col', [1,2])
def test_every_published_key_has_a_name_of_its_own(arch, col):
    keys = [o for k in mit_keys[arch] for o in ([k.replace('.kv.','.k.'), k.replace('.kv.','.v.')] if '.kv.' in k else [k])]
    theirs = [nm.rename(k, 0, col) for k in keys]
    assert None not in theirs and len({*theirs})==len(keys)
    assert [nm.rename(k, col, 0) for k in theirs]==keys and [nm.rename(nm.rename(k, col, 3-col), 3-col, 0) for k in theirs]==keys

def test_the_table_as_documented():
    "Line by line the list that the issue was written from, not the code's"
    want = {'patch_embed2.proj.weight':'patch_embeddings.1.proj.weight', 'patch_embed4.norm.bias':'patch_embeddings.3.layer_norm.bias',
            'block1.1.norm1.weight':'block.0.1.layer_norm_1.weight', 'block1.1.norm2.weight':'block.0.1.layer_norm_2.weight',
            'block3.5.attn.q.bias':'block.2.5.attention.self.query.bias', 'block2.0.attn.sr.weight':'block.1.0.attention.self.sr.weight',
            'block2.0.attn.norm.weight':'block.1.0.attention.self.layer_norm.weight', 'block4.2.attn.proj.bias':'block.3.2.attention.output.dense.bias',
            'block1.0.mlp.fc1.weight':'block.0.0.mlp.dense1.weight', 'block1.0.mlp.fc2.weight':'block.0.0.mlp.dense2.weight',
            'block1.0.mlp.dwconv.dwconv.weight':'block.0.0.mlp.dwconv.dwconv.weight', 'norm3.bias':'layer_norm.2.bias'}
    assert {k:nm.rename(k, 0, 1) for k in want}=={k:f'encoder.{v}' for k,v in want.items()}

@pytest.mark.parametrize('key', ['', 'weight', 'block1.0.attn.kv.weight', 'block1.x.norm1.weight', 'patch_embed1.proj', 'xnorm1.weight', 'norm1.weight.weight'])
def test_other_names_have_none(key): assert nm.rename(key, 0, 1) is None

# --- transformers

tf = pytest.importorskip('transformers', reason='transformers is the oracle of these tests')
five = pytest.mark.skipif(int(tf.__version__.split('.')[0])<5, reason='the names in memory are those of transformers 5')
sizes = dict(depths=[2,1,3,1], hidden_sizes=[32,64,160,256], num_attention_heads=[1,2,5,8], decoder_hidden_size=24, num_labels=7, drop_path_rate=0.)

def hf_net(cls, seed=0):
    "A net of transformers from random weights, its LayerNorms with the published epsilons, its statistics stirred"
    torch.manual_seed(seed)
    net = getattr(tf, cls)(tf.SegformerConfig(**sizes)).eval()
    for n,m in net.named_modules():
        if isinstance(m, nn.LayerNorm) and not re.search('patch_embeddings|sequence_reduction|self', n): m.eps = 1e-6
        if isinstance(m, nn.BatchNorm2d): m.running_mean.uniform_(-.5, .5); m.running_var.uniform_(.5, 2)
    with torch.no_grad():
        for p in net.parameters(): p.add_(.05*torch.randn_like(p))
    return net

def ours(): return segformer('mit_b0', 7, 24, depths=(2,1,3,1), drop_path=0.).eval()

def state_of(net, how, path):
    "In memory, or as a file of the hub has it"
    if how=='memory': return net.state_dict()
    from safetensors.torch import load_file
    net.save_pretrained(path)
    return load_file(path/'model.safetensors')

@five
@pytest.mark.parametrize('how', ['memory', 'file'])
def test_whole_net_gives_the_same_logits(how, tmp_path):
    hf,net,x = hf_net('SegformerForSemanticSegmentation'),ours(),inp('names', (2,3,64,96))
    net.load_state_dict(from_hf(state_of(hf, how, tmp_path)))
    with torch.no_grad(): torch.testing.assert_close(net.decode_head(net.backbone(x)), hf(x).logits, atol=2e-5, rtol=1e-5)

@five
@pytest.mark.parametrize('how', ['memory', 'file'])
@pytest.mark.parametrize('cls', ['SegformerModel', 'SegformerForImageClassification'])
def test_encoders_give_the_same_maps(cls, how, tmp_path):
    hf,net,x = hf_net(cls),mit('mit_b0', depths=(2,1,3,1), drop_path=0.).eval(),inp('names', (1,3,64,64))
    net.load_state_dict(from_hf(state_of(hf, how, tmp_path)))
    body = getattr(hf, 'segformer', hf)
    with torch.no_grad():
        for a,b in zip(net(x), body(x, output_hidden_states=True).hidden_states): torch.testing.assert_close(a, b.reshape(a.shape), atol=2e-5, rtol=1e-5)

@five
def test_back_into_transformers():
    net,hf,x = rule_load(ours()),hf_net('SegformerForSemanticSegmentation'),inp('names', (2,3,64,96))
    hf.load_state_dict(to_hf(net.state_dict(), memory=True))
    with torch.no_grad(): torch.testing.assert_close(hf(x).logits, net.decode_head(net.backbone(x)), atol=2e-5, rtol=1e-5)
    enc = hf_net('SegformerModel'); enc.load_state_dict(to_hf(net.backbone.state_dict(), memory=True))

@pytest.mark.parametrize('memory', [False, True])
@pytest.mark.parametrize('make', [lambda: mit('mit_b0'), lambda: ours(), lambda: light('mit_b0', n_out=1)])
def test_there_and_back(make, memory):
    state = rule_load(make()).state_dict()
    assert same(from_hf(to_hf(state, memory)), state)

def test_order_of_key_and_value_and_of_the_file():
    k,v = torch.zeros(4,2),torch.ones(4,2)
    for file in ({'value':v,'key':k}, {'key':k,'value':v}):
        got = from_hf({f'encoder.block.1.3.attention.self.{o}.weight':w for o,w in file.items()} | {'encoder.patch_embeddings.0.proj.bias':k})
        assert torch.equal(got['block2.3.attn.kv.weight'], torch.cat([k,v]))

def test_what_isnt_known_stays_and_is_seen():
    got = from_hf({'segformer.encoder.patch_embeddings.0.proj.bias':torch.ones(1), 'decode_head.new.weight':torch.ones(1)})
    assert set(got)=={'backbone.patch_embed1.proj.bias', 'decode_head.new.weight'}
    with pytest.raises(ValueError, match="aren't the names of a SegFormer"): from_hf({})

@pytest.mark.parametrize('net', [lambda: daformer('mit_b0', dim=8), lambda: light('lite0') if pytest.importorskip('timm') else None])
def test_nets_that_transformers_lacks(net):
    with pytest.raises(ValueError, match='only `segformer`'): to_hf(net().state_dict())

# --- SegFormer's release

def test_release_stacks_from_coarse_to_fine():
    "Its head, computed as in its paper's code: the last map first"
    ws,d = (8,16,24,32),12
    head = rule_load(SegFormerHead(ws, 5, d)).eval()
    file = nm.to_official({f'decode_head.{k}':v for k,v in head.state_dict().items()})
    maps = [inp(f'm{i}', (2,c,16//2**i,24//2**i)) for i,c in enumerate(ws)]
    def w(k): return file[f'decode_head.{k}']
    up = [resize(F.linear(m.permute(0,2,3,1), w(f'linear_c{i}.proj.weight'), w(f'linear_c{i}.proj.bias')).permute(0,3,1,2), (16,24)) for i,m in enumerate(maps, 1)]
    z = F.conv2d(torch.cat(up[::-1], 1), w('linear_fuse.conv.weight'))
    z = F.relu(F.batch_norm(z, *(w(f'linear_fuse.bn.{o}') for o in ('running_mean','running_var','weight','bias'))))
    with torch.no_grad(): torch.testing.assert_close(F.conv2d(z, w('linear_pred.weight'), w('linear_pred.bias')), head(maps), atol=2e-5, rtol=1e-5)

def test_release_there_and_back():
    state = rule_load(segformer('mit_b0', 5, 16)).state_dict()
    file = nm.to_official(state) | {'decode_head.conv_seg.weight':torch.zeros(5,128,1,1), 'decode_head.conv_seg.bias':torch.zeros(5), 'auxiliary_head.conv_seg.bias':torch.zeros(5)}
    assert {f'decode_head.linear_c{i}.proj.weight' for i in (1,2,3,4)}<=set(file) and not any('linear_c.' in k for k in file)
    assert same(nm.gather(file, *nm.our_names(file)), state)
    assert same(nm.gather(state, *nm.our_names(state)), state)   # DAFormer's repository counts from 0 and from fine to coarse, as we do

# --- torchvision, EfficientNet

def test_torchvision_gives_all_but_the_stem():
    from torchvision.models import resnet101
    with torch.device('meta'): tv,net = resnet101(weights=None),deeplabv2()
    body = net.backbone.state_dict()
    got,flip = nm.our_names(tv.state_dict())
    assert set(got)=={k for k in body if not k.startswith('stem.')} and not flip and all(v==[k] for k,v in got.items())

def test_open_mmlab_resnet_with_the_deep_stem_fits_whole():
    with torch.device('meta'): body = deeplabv2().backbone.state_dict()
    assert set(nm.our_names([*body, 'fc.weight', 'fc.bias'])[0])==set(body)

# --- three nets in a file

@pytest.mark.parametrize('which', ['student','teacher','imnet'])
@pytest.mark.parametrize('keys', [daf_keys['pipa_daformer_mit_b0'], hrda_keys['pipa_hrda_mit_b0']])
@pytest.mark.parametrize('where', ['{}', 'module.{}', '{}.module'])
def test_each_net_of_a_published_layout(which, keys, where):
    start = dict(student='model', teacher='ema_model', imnet='imnet_model')
    file = [f'{where.format(o)}.{k}' for o in start.values() for k in keys] + ['project.0.weight', 'module.classifier.bias']
    got = nm.one_net(file, which)
    bare = [k for k in keys if not k.startswith(('cls_head','proj_head'))]
    assert got=={k:f'{where.format(start[which])}.{k}' for k in bare}
    assert list(nm.our_names(got)[0])==bare
    assert set(nm.one_net(file, which, heads=True))=={*keys, 'project.0.weight', 'classifier.bias'}

def test_a_net_that_isnt_there():
    for keys,which,word in ((['backbone.a'], 'teacher', 'holds one net'), (['model.a'], 'teacher', 'holds student'), (['ema_model.a'], 'student', 'holds teacher'), (['a'], 'best', 'called `best`')):
        with pytest.raises(ValueError, match=word): nm.one_net(keys, which)

def test_words_inside_of_names_do_no_harm():
    "The published script erases `model.` everywhere"
    assert nm.one_net(['model.a.model.b', 'ema_model.a.model.b'])=={'a.model.b':'model.a.model.b'}

# --- recognition

def meta(make, *args, **kwargs):
    with torch.device('meta'): return make(*args, **kwargs).state_dict()

@pytest.mark.parametrize('arch', list(mit_sizes))
def test_encoders_are_told_apart(arch):
    enc = meta(mit, arch)
    assert nm.looks_like(enc)==dict(make='mit', arch=arch)
    head = DAFormerHead(mit_sizes[arch][0], 3, 8).state_dict()
    whole = {f'backbone.{k}':v for k,v in enc.items()} | {f'decode_head.{k}':v for k,v in head.items()}
    assert nm.as_call(nm.looks_like(whole))==f"daformer('{arch}', n_out=3, dim=8)"

def test_heads_are_told_apart():
    pytest.importorskip('timm', reason='timm builds this encoder')
    for make,args,call in ((segformer, ('mit_b2', 150, 768), "segformer('mit_b2', n_out=150, dim=768)"), (daformer, ('mit_b5',), "daformer('mit_b5', n_out=19)"),
                           (deeplabv2, (16,), 'deeplabv2(n_out=16)'), (light, ('lite0', 11), "segformer('lite0', n_out=11, dim=128)")):
        assert nm.as_call(nm.looks_like(meta(make, *args)))==call

def test_hrda_by_its_published_keys():
    shapes = {k:torch.empty(s, device='meta') for k,s in hrda_keys['pipa_hrda_mit_b0'].items()}
    assert nm.looks_like(shapes)==dict(make='hrda', arch='mit_b0', n_out=19, dim=256)

def test_unknown_nets():
    odd = meta(mit, 'mit_b0', depths=(1,1,1,1))
    for state in ({}, {'a':torch.zeros(1)}, odd, meta(nn.Conv2d, 3, 3, 1)): assert nm.looks_like(state)=={}
    assert nm.as_call({})=='nothing that is known here'

def test_hrda_with_one_attention_for_all_classes():
    from pipa.hrda import hrda
    for kw in (dict(classwise=False), {}): assert nm.looks_like(meta(hrda, 'mit_b0', 5, dim=8, **kw))==dict(make='hrda', arch='mit_b0', n_out=5, dim=8, **kw)
