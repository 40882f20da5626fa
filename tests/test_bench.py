"The benchmark says what it measured; plain parts are oracles for ours"
import json, sys
import pandas as pd, pytest, torch
from pipa.bench import parts as B, plain as P, profile as G
from pipa.models import add_heads
from pipa.hrda import hrda
from pipa.models import daformer, light, segformer

tiny = dict(model='light', size=64, classes=4, samples=64, bank=64)

def test_every_part_has_ways_and_ratios():
    df = B.bench(['head','pixel','patch','ema','optimizer','augment','step'], turns=1, **tiny)
    assert df.part.unique().tolist()==['head','pixel','patch','ema','optimizer','augment','step']
    for part,o in df.groupby('part'):
        assert 'ours' in set(o.way) and o.way.is_unique
        ran = o[o.ms.notna()]
        assert (ran.note=='').all() and (o[o.ms.isna()].note.str.startswith('needs ')).all()
        if o.ms.notna().iloc[0]: assert torch.allclose(torch.tensor(ran.ratio.values), torch.tensor((ran.ms.iloc[0]/ran.ms).values)), part

def test_a_missing_package_is_a_sentence(monkeypatch):
    for k in ('transformers','segmentation_models_pytorch'): monkeypatch.setitem(sys.modules, k, None)
    ways = B.encoder_ways(B.Settings(arch='mit_b0', size=64, bs=1), False)
    assert ways['transformers']=='needs transformers' and ways['segmentation-models-pytorch']=='needs segmentation-models-pytorch'
    rows = B.part_rows('encoder', ways, 1)
    assert [bool(o['note']) for o in rows]==[False]*2+[not B.has_bf16(), False]+[True]*2 and rows[0]['ratio']==1 and rows[1]['ms']>0

def test_median_of_turns_in_turns(monkeypatch):
    t,log = [0.],[]
    monkeypatch.setattr(B, 'now', lambda: t[0])
    def way(k, *costs):
        it = iter(costs)
        def f(): log.append(k); t[0] += next(it)
        return f
    got = B.interleaved(dict(a=way('a', 9, 1, 5, 2), b=way('b', 9, 4, 4, 6)), 3)
    assert log==['a','b']*4 and got=={'a':2000, 'b':4000}, 'the first turn is left out'

@pytest.mark.parametrize('make', [daformer, segformer, light, lambda *a, **k: hrda(*a, crop=32, **k)], ids=['daformer','segformer','light','hrda'])
def test_plain_nets_agree_forward_and_backward(make):
    torch.manual_seed(0)
    net = add_heads(make('mit_b0', n_out=3, dim=16, drop_path=0.) if make is not light else make('mit_b0', n_out=3, drop_path=0.), hidden=8)
    for m in net.modules():
        if isinstance(m, torch.nn.Dropout2d): m.p = 0.
    p,x = P.plain_net(net),torch.randn(2, 3, 64, 96)
    assert any(isinstance(m, P.PlainAttention) for m in p.modules()) and not any(isinstance(m, P.PlainAttention) for m in net.modules())
    def run(m):
        torch.manual_seed(1); z,f = m(x); (z.pow(2).mean()+(m.proj_head(f.maps)[:,0]).mean()).backward()
        return z.detach(),{k:q.grad for k,q in m.named_parameters() if q.grad is not None}
    (z,g),(z_p,g_p) = run(net),run(p)
    torch.testing.assert_close(z, z_p, rtol=1e-4, atol=1e-5); assert g.keys()==g_p.keys()
    for k in g: torch.testing.assert_close(g[k], g_p[k], rtol=1e-3, atol=1e-4*float(g[k].abs().max()+1e-6)+1e-7)

def test_command_prints_a_table_or_json_and_adds_rows(tmp_path, monkeypatch, capsys):
    n = torch.get_num_threads()
    kw = dict(parts='pixel,ema', turns=1, size=64, classes=4, samples=64, model='light', out=str(tmp_path/'sub'/'b.csv'))
    (tmp_path/'sub').mkdir()
    B.pipa_bench(**kw); table = capsys.readouterr().out.splitlines()
    assert table[0].split()==['part','way','ms','ratio'] and table[1].split()[:2]==['pixel','plain'] and 'ema' in table[-1]
    B.pipa_bench(**kw, json=True); rows = json.loads(capsys.readouterr().out)
    assert {o['part'] for o in rows}=={'pixel','ema'} and all(o['threads']==1 and 'torch' in o['versions'] and o['machine'] for o in rows)
    df = pd.read_csv(kw['out']); assert len(df)==2*len(rows) and df.command.str.startswith('pipa_bench --parts pixel,ema').all()
    with pytest.raises(ValueError, match='no part foo: choose some of'): B.bench(['foo'])
    torch.set_num_threads(n)

def test_growth_finds_exponents(monkeypatch):
    t = [0.]
    monkeypatch.setattr(B, 'now', lambda: t[0])
    def made_ways(o):
        def go(k): t[0] += o.samples**k
        return dict(plain=lambda: go(2), ours=lambda: go(1), other='needs luck')
    e = G.exponents(G.growth('samples', (2,4,8), made_ways, 1)).set_index('way').exponent
    assert abs(e['plain']-2)<1e-9 and abs(e['ours']-1)<1e-9 and set(e.index)=={'plain','ours'}

def test_results_say_where_they_come_from():
    from pathlib import Path
    df = pd.read_csv(Path(__file__).resolve().parents[1]/'data/results/bench.csv')
    assert not df[['part','way','threads','machine','versions','command']].isna().any().any()
    ran = df[df.ms.notna()]
    ref = ran.groupby(['command','part'], sort=False).ms.transform('first')
    assert ((ref/ran.ms-ran.ratio).abs()<=.01*ran.ratio).all()

@pytest.mark.parametrize('method', ['daformer+pipa', *(pytest.param(o, marks=pytest.mark.slow) for o in ('mic+pipa', 'fda+pipa', 'advent+pipa'))])
def test_a_whole_step_asks_for_no_number(method, monkeypatch):
    "On the device `meta` tensors have shapes and no numbers: whoever would make Python wait for a GPU is turned away. The guard, which looks at one number a step, is off"
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, 'AdamW', lambda *a, fused=None, **kw: adamw(*a, **kw))   # no fused kernel without numbers
    with torch.device('meta'):
        net,batch = add_heads(light('mit_b0', n_out=5), hidden=16),P.block_pairs(2, (64,64), 5)
        learn,step = P.our_step(net, batch, (32,64), 0., method=method, guard=None, pixel=dict(min_pixels=1), things=(1,))
    step()
    assert all(p.grad is None and p.is_meta for p in learn.model.parameters()) and learn.loss.is_meta
