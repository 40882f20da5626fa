"Properties that hold for any input, and readers that no bytes can crash; `pytest -m slow tests/test_properties.py` looks longer"
import io, json, os, pickle, random, warnings
from pathlib import Path
import numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from pipa import checkpoints as ck, infer
from pipa.weights import files
from pipa.data import PairDL, rare_class_probs, read_image, read_mask, view_box
from pipa.sets.pictures import read_numbers
from pipa.guard import probe, random_state, set_random_state
from pipa.labels import LabelSpace, label_space
from pipa.losses import pixel_contrast, sup_contrast, weighted_ce
from pipa.metrics import confusion
from pipa.mix import class_mask, class_mix, two_crops
from pipa.models import light

quick = settings(max_examples=15, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
long = settings(quick, max_examples=600)
seeds,sides = st.integers(0, 2**32-1),st.integers(1, 40)
def gen(seed): return torch.Generator().manual_seed(seed)

# --- properties -------------------------------------------------------------------------------------------------------------------------
def cross_entropy_forgets_ignored(seed, k, h, w, share):
    g = gen(seed); z,y = torch.randn(2, k, h, w, generator=g),torch.randint(0, k, (2,h,w), generator=g)
    y[torch.rand(2, h, w, generator=g)<share] = 255
    other = torch.where((y==255)[:,None], torch.randn(z.shape, generator=g)*1e3, z)
    a,b = weighted_ce(z, y),weighted_ce(other, y)
    torch.testing.assert_close(a, b); assert a>=0 and a.isfinite()
    want = F.cross_entropy(z.double(), y, ignore_index=255, reduction='sum')/y.numel() if (y!=255).any() else 0.
    assert abs(float(a)-float(want))<1e-4*max(1, float(want))

def contrast_has_no_order(seed, n, k, d):
    g = gen(seed); e,y = F.normalize(torch.randn(n, d, generator=g), dim=1),torch.randint(0, k, (n,), generator=g)
    p = torch.randperm(n, generator=g); q = torch.linalg.qr(torch.randn(d, d, generator=g))[0]
    a,b,c = sup_contrast(e, y),sup_contrast(e[p], y[p]),sup_contrast(e@q, (y+1)%k)
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4); torch.testing.assert_close(a, c, rtol=1e-3, atol=1e-3); assert a.isfinite()

def pixel_contrast_is_finite(seed, k, h, w, share):
    g = gen(seed); e = F.normalize(torch.randn(1, 8, h, w, generator=g), dim=1).requires_grad_(); y = torch.randint(0, k, (1,h,w), generator=g)
    y[torch.rand(1, h, w, generator=g)<share] = 255
    l = pixel_contrast(e, y, torch.randint(0, k, (1,h,w), generator=g), min_pixels=2)
    l.backward(); assert l.isfinite() and e.grad.isfinite().all() and not e.grad[:,:,(y[0]==255)].any()

def mixing_takes_whole_pixels(seed, k, h, w):
    torch.manual_seed(seed); x_s,x_t = torch.rand(2, 2, 3, h, w); y_s,y_t = torch.randint(0, k, (2,2,h,w)); w_t = torch.rand(2, h, w)
    m = class_mask(y_s); x,y,v = class_mix(x_s, y_s, x_t, y_t, w_t, m)
    m = m.reshape(2, h, w).bool()
    assert torch.equal(x, torch.where(m[:,None], x_s, x_t)) and torch.equal(y, torch.where(m, y_s, y_t)) and torch.equal(v, torch.where(m, torch.ones_like(w_t), w_t))
    for i in range(2): assert all(len(m[i][y_s[i]==c].unique())==1 for c in y_s[i].unique()), 'a class is pasted whole or not at all'

def crops_see_one_place(seed, h, w, lo):
    torch.manual_seed(seed); H,W = 64+8*h,64+8*w
    at = torch.stack(torch.meshgrid(torch.arange(H), torch.arange(W), indexing='ij'))[None].float()
    c = two_crops(torch.cat([at, at[:,:1]], 1), (64,64), 8, (lo,1.))
    a,b = [x.flip(-1) if f else x for x,f in ((c.x_1[0], c.flip_1[0]), (c.x_2[0], c.flip_2[0]))]
    (t1,l1,b1,r1),(t2,l2,b2,r2) = c.box_1[0].tolist(),c.box_2[0].tolist()
    assert torch.equal(a[:,t1:b1,l1:r1], b[:,t2:b2,l2:r2]) and (b1-t1)*(r1-l1)>0

def shards_share_everything_once(n, k, count):
    dls = [PairDL.numbers(type('o', (), dict(n=n, shard=(i,count)))(), k) for i in range(count)]
    assert sorted(o for d in dls for o in d)==[*range(k, k+n*count)]

def boxes_stay_inside(seed, h, w, zoom):
    rng = np.random.default_rng(seed)
    x0,y0,x1,y1 = view_box((h,w), (32,64), rng, (1., zoom))
    assert -1e-9<=x0<x1<=w+1e-6 and -1e-9<=y0<y1<=h+1e-6

def label_maps_are_lookups(ids, seed, dtype):
    n = 5; table = {k%(2**15):v%n for k,v in ids.items()}
    sp = LabelSpace('x', [*'abcde'], ids=table)
    y = np.random.default_rng(seed).choice([*table, 0, 3, 254], (7,9)).astype(dtype)
    assert (sp.encode(y)==np.vectorize(lambda o: table.get(int(o), 255))(y)).all()

def windows_cover(H, W, h, w, sh, sw):
    h,w = min(h,H),min(w,W); sh,sw = min(sh,h),min(sw,w)
    seen = np.zeros((H,W), int)
    for t,l in infer.windows((H,W), (h,w), (sh,sw)): assert 0<=t<=H-h and 0<=l<=W-w; seen[t:t+h,l:l+w] += 1
    assert seen.min()>0

def sliding_an_identity_is_one(seed, H, W, stride, bs):
    x = torch.randn(1, 3, 32+H, 32+W, generator=gen(seed))
    got = infer.slide(torch.nn.Identity(), x, 32, min(stride, 32), bs)
    torch.testing.assert_close(got, x, rtol=1e-5, atol=2e-5)   # a pixel is the mean of up to 1024 windows

def tensors_survive_files(seed, shapes, kind):
    g,dtypes = gen(seed),[torch.float32, torch.float16, torch.int64, torch.bool, torch.uint8]
    want = {f'n.{i}': (torch.randn(s, generator=g)*9).to(dtypes[i%5]) for i,s in enumerate(shapes)}
    f = Path('t'); torch.save(dict(state_dict=want), f) if kind else f.write_bytes(ck.to_bytes(want))
    got,_ = files.read(f)
    assert got.keys()==want.keys() and all(torch.equal(v, got[k]) and v.dtype==got[k].dtype for k,v in want.items())

def rare_classes_come_more(freq, temp):
    if not sum(freq): return
    p = rare_class_probs(freq, temp); o = np.argsort(freq)
    assert abs(p.sum()-1)<1e-9 and all(v==0 for v,f in zip(p, freq) if f==0) and (np.diff([p[i] for i in o if freq[i]>0])<=1e-12).all()

def confusion_counts_pixels(seed, k, h, w):
    g = gen(seed); p,y = torch.randint(0, k, (2,h*w), generator=g); y[torch.rand(h*w, generator=g)<.3] = 255
    cm = confusion(p, y, k, 255)
    assert cm.sum()==(y!=255).sum() and all(cm[i,j]==((y==i)&(p==j)).sum() for i in range(k) for j in range(k))

def chance_comes_again(seed):
    torch.manual_seed(seed); np.random.seed(seed); random.seed(seed)
    t,p = random_state(); draw = lambda: (torch.randn(3).tolist(), np.random.normal(), random.gauss(0, 1))
    a = draw(); set_random_state(t, json.loads(json.dumps(p, default=np.ndarray.tolist))); assert draw()==a

def probe_sees_any(seed, at, bad):
    xs = [torch.randn(3, 4, generator=gen(seed)) for _ in range(3)]
    assert probe(*xs[:2], grads=xs[2:]).isfinite()
    xs[at//12%3].view(-1)[at%12] = bad; assert not probe(*xs[:2], grads=xs[2:]).isfinite()

ks,share = st.integers(2, 6),st.floats(0, 1)
properties = {
    cross_entropy_forgets_ignored: (seeds, ks, sides, sides, share), contrast_has_no_order: (seeds, st.integers(2, 40), ks, st.integers(2, 9)),
    pixel_contrast_is_finite: (seeds, ks, sides, sides, share), mixing_takes_whole_pixels: (seeds, ks, sides, sides), crops_see_one_place: (seeds, st.integers(0, 6), st.integers(0, 6), st.sampled_from([.1, .5, .9])),
    shards_share_everything_once: (sides, seeds, st.integers(1, 7)), boxes_stay_inside: (seeds, st.integers(32, 300), st.integers(32, 300), st.floats(1, 8)),
    label_maps_are_lookups: (st.dictionaries(st.integers(0, 2**15), st.integers(0, 99), min_size=1), seeds, st.sampled_from([np.uint8, np.int32, np.uint16, np.int64])),
    windows_cover: (*[sides]*6,), sliding_an_identity_is_one: (seeds, sides, sides, sides, st.integers(1, 5)),
    tensors_survive_files: (seeds, st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=6), st.booleans()),
    rare_classes_come_more: (st.lists(st.integers(0, 10**9), min_size=1, max_size=30), st.floats(.005, 10)), confusion_counts_pixels: (seeds, ks, sides, sides), chance_comes_again: (seeds,),
    probe_sees_any: (seeds, st.integers(0, 35), st.sampled_from([float('nan'), float('inf'), -float('inf')]))}

@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path); monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 10**5)

@pytest.mark.parametrize('f', properties, ids=lambda f: f.__name__)
def test_property(f): quick(given(*properties[f])(f))()

@pytest.mark.slow
@pytest.mark.parametrize('f', properties, ids=lambda f: f.__name__)
def test_property_at_length(f): long(given(*properties[f])(f))()

# --- bytes ------------------------------------------------------------------------------------------------------------------------------
class Bomb:
    def __init__(self, how=(os.system, ('touch boom',))): self.how = how
    def __reduce__(self): return self.how

def saved(o, **kw): torch.save(o, b := io.BytesIO(), **kw); return b.getvalue()
def pictured(kind, a=None, **kw):
    a = np.random.default_rng(0).integers(0, 3, (16,24), dtype=np.uint8) if a is None else a
    Image.fromarray(a).save(b := io.BytesIO(), kind, **kw); return b.getvalue()
w = {'a.weight': torch.arange(12.).reshape(3,4), 'a.bias': torch.ones(3)}
bad = dict(w, x=Bomb())
weights = dict(safetensors=ck.to_bytes(w), zip=saved(w), nested=saved(dict(state_dict=w, meta=dict(CLASSES=('a',)))), legacy=saved(w, _use_new_zipfile_serialization=False), bomb=saved(bad),
               bomb_legacy=saved(bad, _use_new_zipfile_serialization=False), bare=pickle.dumps(Bomb()), code=pickle.dumps(Bomb((exec, ("open('boom','w')",))), 0))
rgb = np.random.default_rng(0).integers(0, 256, (16,24,3), dtype=np.uint8)
pictures = dict(png=pictured('png'), png_rgb=pictured('png', rgb), jpeg=pictured('jpeg', rgb), webp=pictured('webp', rgb), tiff=pictured('tiff', rgb, compression='tiff_lzw'), bmp=pictured('bmp', rgb),
                png16=pictured('png', np.arange(384, dtype=np.uint16).reshape(16,24)))

changes = st.one_of(st.tuples(st.just('cut'), st.floats(0, 1)), st.tuples(st.just('flip'), st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=4)),
                    st.tuples(st.just('insert'), st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=20))), st.tuples(st.just('random'), st.binary(max_size=200)))
def changed(b, change):
    kind,o = change
    if kind=='cut': return b[:int(o*len(b))]
    if kind=='insert': i = int(o[0]*len(b)); return b[:i]+o[1]+b[i:]
    if kind=='random': return o
    b = bytearray(b)
    for at,v in o: b[int(at*len(b))] ^= v
    return bytes(b)

def outcome(f, file):
    "What a reader gives, or None if it says a sentence with the file's name; anything else is a fault"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: r = f(file)
        except ValueError as e:
            assert str(file) in str(e) and '\n' not in str(e), str(e)
            r = None
    assert not Path('boom').exists(), 'something was run'
    return r

def weights_reader(name, change):
    f = Path('weights file'); f.write_bytes(changed(weights[name], change))
    r = outcome(files.read, f)
    assert r is None or all(type(v) is torch.Tensor for v in r[0].values())

def own_checkpoint(data, change):
    f = Path('own'); f.write_bytes(changed(data[0], change))
    r = outcome(ck.load, f)
    assert r is None or all(torch.equal(v, data[1][k]) for k,v in r[0].state_dict().items()), 'another net than was written'

def picture_reader(name, change):
    f = Path('picture.x'); f.write_bytes(changed(pictures[name], change))
    im,y = outcome(read_image, f),outcome(read_numbers, f)
    outcome(lambda f: read_mask(f, label_space(['a','b','c'])), f)
    assert im is None or im.mode=='RGB'; assert y is None or isinstance(y, np.ndarray) and y.ndim in (2,3)

fuzzers = {weights_reader: (st.sampled_from([*weights]), changes), picture_reader: (st.sampled_from([*pictures]), changes)}

@pytest.mark.parametrize('f', fuzzers, ids=lambda f: f.__name__)
def test_no_bytes_crash(f): settings(quick, max_examples=150)(given(*fuzzers[f])(f))()

@pytest.mark.slow
@pytest.mark.parametrize('f', fuzzers, ids=lambda f: f.__name__)
def test_no_bytes_crash_at_length(f): settings(quick, max_examples=5000)(given(*fuzzers[f])(f))()

@pytest.mark.parametrize('n', [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_own_checkpoint_is_itself_or_refused(n):
    torch.manual_seed(0); net = light('mit_b0', n_out=2)
    ck.save('w', net, label_space(['a','b'])); data = Path('w').read_bytes(),net.state_dict()
    settings(quick, max_examples=n)(given(changes)(lambda c: own_checkpoint(data, c)))()

@pytest.mark.parametrize('name', ['bomb', 'bomb_legacy', 'bare', 'code'])
def test_whole_bombs_are_refused(name):
    f = Path('b'); f.write_bytes(weights[name]); assert outcome(files.read, f) is None
