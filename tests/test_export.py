"Exported files against the net they came from, asked by onnxruntime and torch without our help"
import json, sys
import numpy as np, onnx, onnxruntime as ort, pytest, torch
from fastai.learner import Learner, load_learner
from torch import nn
from pipa import export as E
from pipa.models import add_heads
from pipa.checkpoints import space_of
from pipa.data import folder, uda_dls
from pipa.infer import evaluate, predict
from pipa.labels import LabelSpace, space
from pipa.learner import uda_learner
from pipa.models import daformer, deeplabv2, light
from apart import python
from tiny import city, seed

class Small(nn.Module):
    "What a net of one's own looks like: coarse logits in a dict"
    def __init__(self, k=3): super().__init__(); self.c = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.GELU(), nn.Conv2d(8, k, 3, padding=1))
    def forward(self, x): return {'out': self.c(x)}

def number(o): return torch.tensor([o])
def small(k=3, s=0): seed(s); return Small(k)
def mine(k=3): return LabelSpace('mine', [f'Klasse {i} ü' for i in range(k)], ids={10*i+3:i for i in range(k)} | {0:255}, things=(1,), subsets=dict(two=(0,1)))
def noise(*shape): return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))

@pytest.fixture(scope='module')
def mit(tmp_path_factory):
    "A net with attention, with heads of training, and its ONNX file"
    seed()
    net = add_heads(light('mit_b0', n_out=11, depths=(1,1,1,1)), hidden=32).train()
    return net,E.export_net(tmp_path_factory.mktemp('mit')/'net.onnx', net, space('minicity'), (64,96))

@pytest.mark.slow
def test_mit_in_onnxruntime_at_any_size(mit):
    net,file = mit
    assert net.training and hasattr(net, 'proj_head'), 'the net of training is left alone'
    run = ort.InferenceSession(str(file), providers=['CPUExecutionProvider'])
    net.eval()
    try:
        for shape in ((1,3,64,64), (2,3,64,96), (3,3,160,64), (1,3,128,256)):
            x = noise(*shape)
            with torch.no_grad(): z = net(x).numpy()
            o, = run.run(None, {'image': x.numpy()})
            assert o.shape==z.shape and np.abs(o-z).max()<1e-4 and (o.argmax(1)==z.argmax(1)).mean()>.999
    finally: net.train()

@pytest.mark.slow
def test_mit_says_what_it_is(mit):
    m = onnx.load(mit[1]); onnx.checker.check_model(m)
    notes = {p.key: json.loads(p.value) for p in m.metadata_props}
    assert notes['codes']==space('minicity').codes and notes['size']=='64x96' and notes['free']=='sides' and notes['spec']['arch']=='mit_b0'
    assert notes['mean']==[.485,.456,.406] and notes['std']==[.229,.224,.225]
    assert [i.name for i in m.graph.input]==['image'] and [o.name for o in m.graph.output]==['logits']
    assert not [i.name for i in m.graph.initializer if 'proj_head' in i.name or 'project' in i.name]
    dims = [d.dim_param or d.dim_value for d in m.graph.input[0].type.tensor_type.shape.dim]
    assert dims[1]==3 and all(isinstance(dims[i], str) for i in (0,2,3))

@pytest.mark.slow
def test_mit_check(mit):
    t = E.check_export(mit[1], mit[0])
    assert len(t)==4 and t['size'].nunique()==3 and set(t.images)=={1,2,3} and t.max_diff.max()<1e-4 and t.agreement.min()>.999

@pytest.mark.slow
@pytest.mark.parametrize('make', [lambda: daformer('mit_b0'), lambda: deeplabv2(n_out=19), lambda: light('mit_b1')], ids=['daformer', 'deeplabv2', 'light_b1'])
@pytest.mark.parametrize('end', ['onnx', 'pt2'])
def test_real_nets(make, end, tmp_path):
    seed(); net = make()
    t = E.check_export(E.export_net(tmp_path/f'n.{end}', net, size=(64,96)), net)
    assert len(t)==4 and (t.max_diff/t.largest).max()<1e-4 and t.agreement.min()>.999

@pytest.mark.parametrize('end', ['onnx', 'pt2'])
def test_own_net_and_space(end, tmp_path):
    net,sp = small(),mine()
    other,meta = E.load_graph(E.export_net(tmp_path/f'ü {end}/n.{end}', net, sp, (64,64), method='none', note=[1,'ü']))
    back = space_of(meta)
    assert (back.codes, back.ids, back.void, back.things, back.subsets)==(sp.codes, sp.ids, sp.void, sp.things, sp.subsets) and (back.palette==sp.palette).all()
    assert meta['method']=='none' and meta['note']==[1,'ü'] and meta['free']=='sides'
    img = np.random.default_rng(0).integers(0, 256, (70,100,3), dtype=np.uint8)
    for kw in (dict(size=64), dict(mode='slide', crop=64, stride=20), dict(size=(64,128), flip=True)):
        assert (predict(other, img, space=back, **kw)==predict(net, img, space=back, **kw)).mean()>.999
    assert [p.name for p in (tmp_path/f'ü {end}').iterdir()]==[f'n.{end}']

def test_exported_net_is_evaluated_like_its_net(tmp_path):
    home,net = city(tmp_path/'city', n=2, size=(64,64)),small(11)
    dom = folder(home/'real/images', home/'real/masks', 'minicity')
    other,_ = E.load_graph(E.export_net(tmp_path/'n.onnx', net, size=(64,64)))
    a,b = (evaluate(o, dom, 64, progress=False) for o in (net, other))
    assert a.sum()==b.sum()>0 and (a-b).abs().sum()<=.001*a.sum()

@pytest.mark.parametrize('free,ok,bad', [('batch', [(1,3,64,96), (4,3,64,96)], [(1,3,64,64)]), ('nothing', [(1,3,64,96)], [(2,3,64,96), (1,3,96,64)])])
def test_fixed_sizes(free, ok, bad, tmp_path, capsys):
    net = small()
    f = E.export_net(tmp_path/'n.onnx', net, size=(64,96), free=free)
    assert '64×96 alone' in capsys.readouterr().out
    other,meta = E.load_graph(f)
    assert meta['free']==free
    for shape in ok:
        with torch.no_grad(): assert (other(noise(*shape))-E.Plain(net)(noise(*shape))).abs().max()<1e-5
    for shape in bad:
        with pytest.raises(ValueError, match=r"64×96 alone.*mode='slide', crop=\(64,96\)"): other(noise(*shape))
    t = E.check_export(f, net)
    assert t.max_diff.max()<1e-5 and set(t['size'])=={'64×96'}

def test_a_net_that_depends_on_sizes_gets_a_fixed_one(tmp_path, capsys):
    class Windows(Small):
        def forward(self, x): return torch.cat([self.c(x[..., i:i+32]) for i in range(0, x.shape[-1], 32)], -1)
    seed(); net = Windows()
    f = E.export_net(tmp_path/'n.pt2', net, size=(64,96))
    said = capsys.readouterr().out
    assert "can't be traced with free batch, height and width" in said and 'in batches of any size' in said
    assert E.load_graph(f)[1]['free']=='batch' and E.check_export(f, net).max_diff.max()<1e-5

def test_check_finds_other_weights(tmp_path):
    f = E.export_net(tmp_path/'n.pt2', small(), size=(64,64))
    assert E.check_export(f, small(s=1)).max_diff.min()>.01

@pytest.mark.parametrize('kw,says', [(dict(size=(64,100)), 'multiples of 32'), (dict(size=(32,64)), 'at least 64'), (dict(free='all'), 'choose one of sides, batch, nothing')])
def test_wrong_arguments(kw, says, tmp_path):
    with pytest.raises(ValueError, match=says): E.export_net(tmp_path/'n.onnx', small(), **kw)
    assert not [*tmp_path.iterdir()]

def test_wrong_files(tmp_path):
    with pytest.raises(ValueError, match='ends in neither'): E.export_net(tmp_path/'n.pth', small())
    with pytest.raises(FileNotFoundError, match='none.onnx'): E.load_graph(tmp_path/'none.onnx')
    for end in ('onnx', 'pt2'):
        (tmp_path/f'bad.{end}').write_bytes(b'nothing of use')
        with pytest.raises(ValueError, match=rf"bad\.{end}` can't be opened"): E.load_graph(tmp_path/f'bad.{end}')

def test_a_net_that_cannot_be_traced_leaves_no_file(tmp_path, capsys):
    class Odd(Small):
        def forward(self, x): return self.c(x) if x.mean().item()>0 else self.c(x)*2
    with pytest.raises(ValueError, match="can't trace this net"): E.export_net(tmp_path/'n.pt2', Odd())
    assert not [*tmp_path.iterdir()]

@pytest.mark.parametrize('name', ['onnx', 'onnxscript', 'onnxruntime'])
def test_missing_packages(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"`{name}`.*pip install .*\[onnx\]"): E.export_net(tmp_path/'n.onnx', small())
    assert not [*tmp_path.iterdir()]
    E.export_net(tmp_path/'n.pt2', small(), size=(64,64))

# learn.export

@pytest.fixture(scope='module')
def learn(tmp_path_factory):
    tmp = tmp_path_factory.mktemp('learn')
    home = city(tmp/'city', n=4, size=(64,64))
    dom = [folder(home/d/'images', home/d/'masks', 'minicity') for d in ('game', 'real')]
    dls = uda_dls(dom[0], dom[1].unlabelled(), dom[1], bs=2, size=(64,64), n=2)
    seed()
    learn = uda_learner(dls, 'light', 'pipa', hidden=32, crop=(64,64), path=tmp)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-4)
    learn.picture = dom[1].images[0]
    return learn

@pytest.mark.parametrize('teacher', [False, True])
def test_learner_goes_home_and_comes_back(learn, teacher):
    before = {k:v.clone() for k,v in learn.model.state_dict().items()}
    opt,cbs,dls = learn.opt.state_dict(),[*learn.cbs],learn.dls
    learn.export('a.pkl', teacher=teacher)
    assert learn.dls is dls and [*learn.cbs]==cbs and hasattr(learn.model, 'proj_head')
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())
    assert all(torch.equal(a['exp_avg'], b['exp_avg']) for a,b in zip(opt['state'].values(), learn.opt.state_dict()['state'].values()))
    with pytest.warns(UserWarning, match='insecure'): home = load_learner(learn.path/'a.pkl')
    net = learn.mean_teacher.teacher if teacher else learn.model
    want = {k:v for k,v in net.state_dict().items() if not k.startswith(('proj_head', 'project'))}
    got = home.model.state_dict()
    assert got.keys()==want.keys() and all(torch.equal(got[k], want[k]) for k in want)
    assert not [cb for cb in home.cbs if hasattr(cb, 'teacher')] and home.opt is None
    assert home.dls.space.codes==space('minicity').codes

def test_a_learner_at_home_predicts_the_same(learn):
    learn.export('b.pkl')
    raw = (learn.path/'b.pkl').read_bytes()
    assert b'real/images' not in raw and b'real/masks' not in raw, 'no path of a picture leaves the house'
    assert len(raw)<1.2*sum(v.numel()*v.element_size() for v in learn.model.state_dict().values())
    code = f"""
import warnings; warnings.simplefilter('ignore')
import torch
from fastai.learner import load_learner
home = load_learner({str(learn.path/'b.pkl')!r})
with home.no_bar():
    label,_,p = home.predict({str(learn.picture)!r})
    dl = home.dls.test_dl([{str(learn.picture)!r}]*3, bs=2)
    ps,_ = home.get_preds(dl=dl)
torch.save(dict(label=torch.tensor(label.numpy()), p=torch.tensor(p.numpy()), ps=torch.tensor(ps.numpy())), {str(learn.path/'out.pt')!r})"""
    (learn.path/'home.py').write_text(code); r = python(learn.path/'home.py')
    assert r.returncode==0, r.stderr
    out = torch.load(learn.path/'out.pt', weights_only=True)
    with learn.no_bar(): label,_,p = learn.predict(learn.picture)
    assert torch.equal(out['label'], torch.tensor(label.numpy())) and torch.allclose(out['p'], torch.tensor(p.numpy()), atol=1e-5)
    assert out['ps'].shape==(3,11,64,64) and torch.allclose(out['ps'][2], out['p'], atol=1e-5)

def test_training_goes_on_after_export(learn):
    learn.export('c.pkl')
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-4)
    assert np.isfinite(float(learn.recorder.losses[-1])) and learn.mean_teacher.t==2

def test_no_teacher_no_export(learn):
    other = uda_learner(learn.dls, 'light', 'source', path=learn.path)
    with pytest.raises(ValueError, match='has no teacher'): other.export('d.pkl', teacher=True)
    assert not (learn.path/'d.pkl').exists()
    fresh = uda_learner(learn.dls, 'light', 'self_training', path=learn.path)
    with pytest.raises(ValueError, match="wasn't fitted yet"): fresh.export('d.pkl', teacher=True)
    other.export('e.pkl')
    assert (learn.path/'e.pkl').exists()

def test_other_learners_export_as_fastai_does(tmp_path):
    from fastai.data.core import DataLoaders, Datasets
    ds = Datasets([1.,2.,3.,4.], tfms=[[number], [number]])
    dls = DataLoaders.from_dsets(ds, ds, bs=2)
    learn = Learner(dls, nn.Linear(1,1), nn.MSELoss(), path=tmp_path)
    learn.export('x.pkl')
    with pytest.warns(UserWarning): home = load_learner(tmp_path/'x.pkl')
    assert torch.equal(home.model.weight, learn.model.weight) and len(home.dls.train_ds)==0
