"MiT encoders against the published nets' golden figures, transformers' SegFormer, and plain sums."
import json, math
from pathlib import Path
import numpy as np, pytest, torch
from torch import nn
from torchvision.ops import StochasticDepth
from golden.rules import inp, rule_load
from pipa.mit import Attention, Block, MiT, MixFFN, init_mit, mit, mit_sizes

G = Path(__file__).parent/'golden'
keys,feats = (json.loads((G/f'{o}.json').read_text()) for o in ('keys_mit','mit_features'))
vals = np.load(G/'mit_features.npz')
counts = dict(mit_b0=(3_319_392,176), mit_b1=(13_151_424,176), mit_b2=(24_196_288,332),
              mit_b3=(44_072_128,572), mit_b4=(60_842_688,832), mit_b5=(81_443_008,1052))

@pytest.mark.parametrize('arch', list(counts))
def test_counts(arch):
    with torch.device('meta'): m = mit(arch)
    assert (sum(p.numel() for p in m.parameters()), len(m.state_dict())) == counts[arch]
    assert m.widths == tuple(getattr(m, f'norm{s}').weight.numel() for s in range(1,5))

@pytest.mark.parametrize('arch', ['mit_b0','mit_b5'])
def test_keys(arch):
    with torch.device('meta'): m = mit(arch)
    assert {k:list(v.shape) for k,v in m.state_dict().items()} == keys[arch]

@pytest.mark.parametrize('arch', ['mit_b0', pytest.param('mit_b5', marks=pytest.mark.slow)])
def test_golden_maps_and_gradients(arch):
    g,m = feats['models'][arch],rule_load(mit(arch)).eval()
    maps = m(inp('img', (2,3,128,160)))
    for i,f in enumerate(maps):
        idx = torch.from_numpy(vals[f'{arch}_f{i}_idx']).long()
        assert list(f.shape) == g['features'][f'f{i}']['shape']
        np.testing.assert_allclose(f.detach().flatten()[idx], vals[f'{arch}_f{i}_val'], atol=2e-5)
    loss = sum((f*inp(f'mitgrad{i}', f.shape)).mean() for i,f in enumerate(maps))
    loss.backward()
    assert loss.item() == pytest.approx(g['grad_loss'], abs=1e-6)
    ps = dict(m.named_parameters())
    for k,v in g['grad_norms'].items(): assert ps[k].grad.norm().item() == pytest.approx(v, rel=1e-3), k


renames = dict(proj='patch_embeddings.proj', norm='patch_embeddings.layer_norm')
parts   = {'norm1':'layernorm_before', 'norm2':'layernorm_after', 'attn.q':'attention.q_proj', 'attn.proj':'attention.o_proj',
           'attn.sr':'attention.sequence_reduction.sequence_reduction', 'attn.norm':'attention.sequence_reduction.layer_norm',
           'mlp.fc1':'mlp.fc1', 'mlp.fc2':'mlp.fc2', 'mlp.dwconv.dwconv':'mlp.dwconv.dwconv'}

def to_hf(k, v):
    "transformers' (version 5) name and tensor pairs for one of our entries"
    top,*mid,leaf = k.split('.')
    s = f'stages.{int(top[-1])-1}'
    if top.startswith('norm'):  return {f'{s}.layer_norm.{leaf}':v}
    if top.startswith('patch'): return {f'{s}.{renames[mid[0]]}.{leaf}':v}
    j,part = mid[0],'.'.join(mid[1:])
    if part=='attn.kv': return {f'{s}.blocks.{j}.attention.{n}_proj.{leaf}':o for n,o in zip('kv', v.chunk(2))}
    return {f'{s}.blocks.{j}.{parts[part]}.{leaf}':v}

def hf_net(m):
    "transformers' encoder with the weights of `m` and LayerNorms of the published epsilon"
    tf = pytest.importorskip('transformers', reason='transformers is the oracle of this test')
    if int(tf.__version__.split('.')[0])<5: pytest.skip('written against the parameter names of transformers 5')
    cfg = tf.SegformerConfig(depths=list(m.depths), hidden_sizes=list(m.widths), drop_path_rate=0.)
    hf = tf.SegformerModel(cfg).eval()
    hf.load_state_dict({n:t for k,v in m.state_dict().items() for n,t in to_hf(k, v).items()})
    for n,l in hf.named_modules():
        if isinstance(l, nn.LayerNorm) and 'sequence_reduction' not in n and 'patch_embeddings' not in n: l.eps = 1e-6
    return hf

@pytest.mark.parametrize('size', [(64,96), (50,71)])
def test_equals_transformers(size):
    m = rule_load(mit('mit_b0', drop_path=0.)).train()
    hf,x = hf_net(m),inp('hf', (2,3,*size))
    ours,theirs = m(x),hf(x, output_hidden_states=True).hidden_states
    for a,b in zip(ours, theirs): torch.testing.assert_close(a, b.reshape(a.shape), atol=2e-5, rtol=0)
    ws = [torch.randn_like(o) for o in ours]
    sum((o*w).mean() for o,w in zip(ours, ws)).backward()
    sum((o.reshape(w.shape)*w).mean() for o,w in zip(theirs, ws)).backward()
    got = {n:t for k,p in m.named_parameters() for n,t in to_hf(k, p.grad).items()}
    for n,p in hf.named_parameters(): torch.testing.assert_close(got[n], p.grad, atol=2e-5, rtol=1e-3)

@pytest.mark.parametrize('heads,sr,size', [(1,1,(3,4)), (2,2,(6,4)), (4,3,(7,8))])
def test_attention_is_the_sum_it_says(heads, sr, size):
    "Nested loops in double precision, over images, heads and tokens"
    torch.manual_seed(0)
    a,x = Attention(8, heads, sr).double(),torch.randn(2,*size,8, dtype=torch.double)
    d,out = 8//heads,torch.zeros_like(x)
    for b in range(2):
        keys = a.shrink(x[b:b+1])[0].reshape(-1,8)
        k,v = (keys @ a.kv.weight.T + a.kv.bias).split(8, 1)
        for i in range(size[0]):
            for j in range(size[1]):
                q = a.q.weight @ x[b,i,j] + a.q.bias
                for h in range(heads):
                    c = slice(h*d, h*d+d)
                    e = [math.exp((q[c]@t[c]).item()/math.sqrt(d)) for t in k]
                    out[b,i,j,c] = sum(w*t[c] for w,t in zip(e, v))/sum(e)
    torch.testing.assert_close(a(x), out @ a.proj.weight.T + a.proj.bias, atol=1e-12, rtol=0)

def test_mixffn_is_linear_conv_gelu_linear():
    torch.manual_seed(0)
    f,x = MixFFN(6).double(),torch.randn(1,4,5,6, dtype=torch.double)
    h = f.fc1(x)[0]
    pad,k = nn.functional.pad(h, (0,0,1,1,1,1)),f.dwconv.dwconv
    y = torch.stack([torch.stack([sum(pad[i+u,j+v]*k.weight[:,0,u,v] for u in range(3) for v in range(3))+k.bias for j in range(5)]) for i in range(4)])
    y = y*.5*(1+torch.erf(y/2**.5))
    torch.testing.assert_close(f(x)[0], f.fc2(y), atol=1e-12, rtol=0)

@pytest.mark.parametrize('size', [(29,29), (33,64), (61,130)])
def test_odd_sizes(size):
    want = [size]
    for k,s in ((7,4),(3,2),(3,2),(3,2)): want.append(tuple((n+2*(k//2)-k)//s+1 for n in want[-1]))
    with torch.no_grad(): maps = mit()(torch.randn(1,3,*size))
    assert [tuple(o.shape[2:]) for o in maps] == want[1:]
    assert all(o.isfinite().all() for o in maps)

def test_tiny_images_are_refused():
    with pytest.raises(RuntimeError): mit()(torch.randn(1,3,16,16))

@pytest.mark.parametrize('arch', ['mit_b0','mit_b5'])
def test_drop_rates_climb(arch):
    with torch.device('meta'): m = mit(arch, drop_path=.2)
    rates = [b.drop.p for s in range(1,5) for b in getattr(m, f'block{s}')]
    np.testing.assert_allclose(rates, np.linspace(0, .2, sum(m.depths)))
    assert all(o.mode=='row' for o in m.modules() if isinstance(o, StochasticDepth))

def test_drop_path_only_in_training():
    torch.manual_seed(0)
    m,x = mit(drop_path=.9),torch.randn(2,3,64,64)
    with torch.no_grad():
        a,b = m(x)[-1],m(x)[-1]
        assert not torch.equal(a, b)
        m.eval()
        for a,b in zip(m(x), m(x)): assert torch.equal(a, b)

def test_dropped_branches_keep_their_mean():
    torch.manual_seed(0)
    b,x = Block(4, drop=.3),torch.randn(1,2,2,4)
    with torch.no_grad(): y = b.attn(b.norm1(x)); m = b.drop(y.expand(20_000,2,2,4)).mean(0)
    torch.testing.assert_close(m, y[0], atol=.02, rtol=.02)

def test_images_do_not_see_each_other():
    m,x = mit().eval(),torch.randn(3,3,64,64)
    with torch.no_grad(): a,b = m(x),m(torch.cat([x[:1], torch.randn(2,3,64,64)*9]))
    for o,p in zip(a, b): torch.testing.assert_close(o[:1], p[:1], atol=1e-5, rtol=0)
    x[1] = float('nan')
    with torch.no_grad(): c = m(x)
    for o,p in zip(a, c):
        torch.testing.assert_close(o[::2], p[::2], atol=1e-5, rtol=0)
        assert p[1].isnan().all()

def test_layout_of_the_input_does_not_matter():
    m,x = mit().eval(),torch.randn(2,3,64,96)
    with torch.no_grad():
        for a,b in zip(m(x), m(x.contiguous(memory_format=torch.channels_last))): torch.testing.assert_close(a, b, atol=1e-5, rtol=0)

def test_norm_epsilons():
    m = mit()
    for n,l in m.named_modules():
        if isinstance(l, nn.LayerNorm): assert l.eps == (1e-5 if 'attn' in n or 'patch_embed' in n else 1e-6), n

def test_start():
    torch.manual_seed(0)
    m = mit('mit_b1')
    sd = m.state_dict()
    assert sd['block4.0.mlp.fc1.weight'].std().item() == pytest.approx(.02, rel=.03)
    assert sd['patch_embed4.proj.weight'].std().item() == pytest.approx((2/(9*512))**.5, rel=.03)
    assert sd['block4.0.mlp.dwconv.dwconv.weight'].std().item() == pytest.approx((2/9)**.5, rel=.03)
    assert all((v==0).all() for k,v in sd.items() if k.endswith('bias'))
    assert all((v==1).all() for k,v in sd.items() if 'norm' in k and k.endswith('weight'))
    init_mit(nn.Conv2d(3, 4, 1, bias=False))

def test_every_parameter_gets_a_gradient():
    m = mit()
    sum(o.square().mean() for o in m(torch.randn(2,3,64,64))).backward()
    assert not [n for n,p in m.named_parameters() if p.grad is None]

def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match='mit_b7.*'+', '.join(mit_sizes)): mit('mit_b7')

def test_own_sizes():
    m = MiT((8,16), (1,1), (1,2), (4,2), n_in=1)
    assert [tuple(o.shape) for o in m(torch.randn(1,1,32,32))] == [(1,8,8,8), (1,16,4,4)]
    assert mit('mit_b0', n_in=4)(torch.randn(1,4,32,32))[0].shape[1] == 32
