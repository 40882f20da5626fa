"The city must be the same everywhere, its labels exact, its cache honest"
import errno, hashlib, math, os, re, signal, sys, time
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from pipa import minicity as mc
from pipa.minicity import Camera, Canvas, Dice, GAME, REAL, STYLES, cache, scene

def digest(*xs): return hashlib.sha256(b''.join(x.tobytes() for x in xs)).hexdigest()[:16]

PINNED = {
    (0, 'game', (128, 256)): 'a21b82ac6487e6fd',
    (0, 'real', (128, 256)): '2aa009a362fb7222',
    (1, 'real', (128, 256)): 'e5c1d700bd0593dc',
    (1000007, 'real', (64, 128)): '2edd91dd492c29e6',
    (7, 'game', (65, 97)): '9bfad1e5b7a50d2b',
}
DICE = [80, 80, 51, 28, 5, 38]

@pytest.mark.parametrize('seed,domain,size', list(PINNED))
def test_same_bytes_everywhere(seed, domain, size): assert digest(*scene(seed, domain, size)) == PINNED[seed,domain,size]

def test_raw_words_of_the_dice():
    d = Dice(5)
    assert [d.n(0,99) for _ in range(6)] == DICE
    assert d.bytes(3,5).shape == (3,5) and d.bytes(0).size == 0

def test_only_exact_arithmetic():
    "Functions whose last bit depends on the library would change bytes from one machine to another"
    bad = r'np\.(exp|log|sin|cos|tan|power|dot|matmul|einsum|linalg|random\.(?!PCG64)|mean|var|std|hypot|fft)|\*\*\s*\.|math\.(?!ceil)|ImageDraw|ImageFilter| @ '
    assert not re.findall(bad, Path(mc.__file__).read_text())

def inside(pts, x, y):
    "Is a point in the convex polygon? By the signs of its cross products"
    s = [(bx-ax)*(y-ay)-(by-ay)*(x-ax) for (ax,ay),(bx,by) in zip(pts, pts[1:]+pts[:1])]
    return all(v>0 for v in s) or all(v<0 for v in s)

def painted(spans, h=19, w=23):
    m = np.zeros((h,w), bool)
    for k,(l,r) in enumerate(zip(*spans[1:])): m[spans[0]+k,l:r] = True
    return m

def pixels(f, h=19, w=23): return np.array([[f(j+.5, i+.5) for j in range(w)] for i in range(h)])

@pytest.mark.parametrize('seed', range(25))
def test_polygons_against_cross_products(seed):
    d = Dice(seed, 77)
    t = sorted(d.u(0,2*math.pi) for _ in range(d.n(3,7)))
    cx,cy,r = d.u(-4,27),d.u(-4,23),d.u(2,25)
    pts = [(cx+r*math.cos(a), cy+r*math.sin(a)) for a in t]
    assert (painted(mc.spans(pts, 19, 23)) == pixels(lambda x,y: inside(pts, x, y))).all()

@pytest.mark.parametrize('x,y,rx,ry', [(9,8,5,3), (-2,4,6,6), (30,4,3,3), (9.3,18.9,.2,.2), (11,9,99,99), (9,-8,5,3)])
def test_ellipses_against_their_equation(x, y, rx, ry):
    want = pixels(lambda a,b: ((a-x)/rx)**2+((b-y)/ry)**2 < 1)
    assert (painted(mc.disk_spans(x, y, rx, ry, 19, 23)) == want).all()

@pytest.mark.parametrize('x,y', [((-9,-2),(3,5)), ((25,40),(3,5)), ((3,5),(-9,-2)), ((3,5),(25,30)), ((-5,40),(-5,40)), ((4,4),(2,9))])
def test_rectangles_off_the_picture(x, y):
    want = pixels(lambda a,b: x[0]<a<x[1] and y[0]<b<y[1])
    assert (painted(mc.rect_spans(x, y, 19, 23)) == want).all()

def test_neighbours_share_an_edge_without_a_crack():
    p,q,r,s = (1.3,0),(15.7,1.2),(22,17),(4.1,18)
    a,b = painted(mc.spans([p,q,s], 19, 23)),painted(mc.spans([q,r,s], 19, 23))
    assert not (a&b).any() and ((a|b) == pixels(lambda x,y: inside([p,q,r,s], x, y))).all()

def test_near_hides_far():
    c = Canvas(Camera(20, 1.5, 10, 10), 20, 20)
    c.rect(-9, 0, 9, 9, 30., mc.BUILDING, (1,1,1))
    before = c.ids.copy()
    c.rect(-1, 0, 1, 2, 10., mc.PEDESTRIAN, (2,2,2))
    assert ((c.ids==before) | (c.ids==2)).all() and (c.ids==2).any()

def test_metres_invert_the_camera():
    c = Canvas(Camera(200, 1.5, 130, 60), 128, 256)
    c.poly([(-9,0,1), (-9,0,300), (9,0,300), (9,0,1)], mc.ROAD, (0,0,0))
    c.poly([(5,0,2), (5,8,2), (5,8,40), (5,0,40)], mc.BUILDING, (0,0,0))
    u,v,z = mc.world(c, c.ids)
    for i,j,k in ((100,60,1), (90,100,1), (20,220,2), (64,255,2)):
        U,V = float(u[i,j]),float(v[i,j])
        assert c.ids[i,j] == k
        assert np.allclose(c.cam(*((U,0,V) if k==1 else (5,V,U))), (j+.5, i+.5), atol=1e-2)

@pytest.mark.parametrize('domain', STYLES)
def test_every_class_is_common_and_no_other_id(domain):
    seen = np.zeros(11)
    for i in range(20):
        x,y = scene(i, domain, (64,128))
        assert x.shape==(64,128,3) and y.shape==(64,128) and x.dtype==y.dtype==np.uint8 and y.max()<=10
        seen += np.bincount(y.ravel(), minlength=11) > 4
    assert (seen >= 13).all(), dict(zip(mc.CLASSES, seen))

@pytest.mark.parametrize('size', [(128,256), (65,97), (33,200), (180,240), (256,512), (8,8), (3,5)])
def test_any_size(size):
    x,y = scene(2, 'real', size)
    assert x.shape==(*size,3) and y.shape==size

def test_large_is_the_same_street():
    assert (scene(4, 'real')[1] == scene(4, 'real', (256,512))[1][::2,::2]).mean() > .93

def test_weather_never_touches_labels():
    clear = replace(REAL, weather={}, grain=0.)
    for i in range(3): assert (scene(i, REAL)[1]==scene(i, clear)[1]).all()

def test_severity_makes_the_gap():
    "Low severity looks like the clear street, high severity does not: there are easy images and hard ones"
    clear = [scene(i, replace(REAL, weather={}), severity=0.)[0].astype(int) for i in range(4)]
    far = [np.mean([np.abs(scene(i, REAL, severity=s)[0]-x).mean() for i,x in enumerate(clear)]) for s in (0.,.3,1.)]
    assert far[0] < 4 < far[1] < .7*far[2], far

def test_domains_differ_in_colour_texture_and_layout():
    x,y = ({k: np.stack(a) for k,a in zip(STYLES, c)} for c in zip(*[zip(*[scene(i, k, (64,128)) for i in range(30)]) for k in STYLES]))
    x = {k: a.astype(float) for k,a in x.items()}
    sat = {k: (a.max(-1)-a.min(-1)).mean() for k,a in x.items()}
    rough = {k: np.median(np.abs(np.diff(a.mean(-1), axis=2))[y[k][:,:,1:]==mc.ROAD]) for k,a in x.items()}
    f = {k: np.bincount(a.ravel(), minlength=11)/a.size for k,a in y.items()}
    assert sat['game'] > 1.7*sat['real'] and rough['real'] > 1.5*rough['game'], (sat, rough)
    assert f['real'][mc.PEDESTRIAN] > 1.2*f['game'][mc.PEDESTRIAN] and f['real'][mc.FENCE] > 1.2*f['game'][mc.FENCE]

def test_hadamard_is_the_matrix():
    H = np.array([[1]])
    for _ in range(3): H = np.block([[H,H],[H,-H]])
    x = np.arange(2*3*8*2*8).reshape(2,3,8,2,8)
    assert (mc.hadamard(x, 2) == np.einsum('ij,abjcd->abicd', H, x)).all()
    assert (mc.hadamard(x, 4) == np.einsum('ij,abcdj->abcdi', H, x)).all()

def test_one_colour_in_one_place():
    pink = replace(GAME, palette=dict(GAME.palette, road=[(255,0,255)]), grain=0.)
    x,y = scene(0, pink)
    assert np.median(x[y==mc.ROAD], axis=0).tolist() == [255,0,255]

def test_unknown_names():
    with pytest.raises(ValueError, match="no domain 'moon'"): scene(0, 'moon')
    with pytest.raises(ValueError, match="no domain 'moon'"): cache('.', 'moon')
    with pytest.raises(ValueError, match="no split 'test'"): cache('.', 'game', 'test')

tiny = partial(cache, n=3, size=(16,32), progress=False)

def test_cache_holds_the_scenes(tmp_path):
    for dom,split,first in (('game','train',0), ('game','val',10**6), ('real','val',10**6)):
        xs,ys = tiny(tmp_path, dom, split)
        for i,(p,q) in enumerate(zip(xs, ys)):
            x,y = scene(first+i, dom, (16,32))
            assert (np.array(Image.open(p))==x).all() and (np.array(Image.open(q))==y).all()
            assert p.name==q.name==f'{i:05d}.png' and p.parts[-5:-1]==('16x32',f'{dom}-{mc.style_id(STYLES[dom])}',split,'images')

def test_target_labels_only_for_the_oracle(tmp_path):
    xs,ys = tiny(tmp_path, 'real')
    assert ys is None and not list((tmp_path/'minicity').rglob('*mask*'))
    xs2,ys2 = tiny(tmp_path, 'real', oracle=True)
    assert xs2==xs and {p.parent.name for p in ys2}=={'oracle_masks'} and all(p.exists() for p in ys2)
    assert tiny(tmp_path, 'real')[1] is None

def test_cache_reuses_resumes_and_renews(tmp_path, monkeypatch):
    xs,_ = tiny(tmp_path)
    t = [p.stat().st_mtime_ns for p in xs]
    tiny(tmp_path)
    assert t == [p.stat().st_mtime_ns for p in xs]
    xs[1].unlink()
    tiny(tmp_path, n=5)
    assert xs[1].exists() and xs[0].stat().st_mtime_ns==t[0] and len(list(xs[0].parent.iterdir()))==5
    old = xs[0].read_bytes()
    monkeypatch.setitem(STYLES, 'game', replace(GAME, grain=.9))
    new,_ = tiny(tmp_path)
    assert new[0].read_bytes()!=old==xs[0].read_bytes() and len(list(new[0].parent.iterdir()))==3

def test_runs_that_start_at_once_draw_once_and_lose_nothing(tmp_path):
    "Each draws while the others draw and read: no file is missing or torn at any time"
    def run():
        for _ in range(3):
            xs,ys = cache(tmp_path, n=6, size=(16,32), workers=0, progress=False)
            for p in xs+ys: Image.open(p).load()
    ps = [get_context('fork').Process(target=run) for _ in range(4)]
    for p in ps: p.start()
    for p in ps: p.join()
    assert [p.exitcode for p in ps]==[0]*4 and len(list(tmp_path.rglob('*.png')))==12

def test_a_new_weather_renews(monkeypatch):
    was = mc.style_id(REAL)
    monkeypatch.setitem(mc.LENS_WEATHER, 'haze', lambda x,a,g: x*.5)
    assert mc.style_id(REAL) != was

def test_a_broken_write_leaves_no_image(tmp_path, monkeypatch):
    def fail(*a): raise OSError('disk full')
    with monkeypatch.context() as m:
        m.setattr(mc.os, 'replace', fail)
        with pytest.raises(OSError): tiny(tmp_path)
    assert not list(tmp_path.rglob('*.png'))
    assert all(p.exists() for p in tiny(tmp_path)[0])

def test_processes_draw_the_same(tmp_path):
    a,b = (cache(tmp_path/str(k), 'real', 'val', n=18, size=(16,32), workers=k, progress=False) for k in (2,0))
    for p,q in zip(a[0]+a[1], b[0]+b[1]): assert p.read_bytes()==q.read_bytes()

def test_no_images(tmp_path): assert cache(tmp_path, n=0, progress=False) == ([], [])

@pytest.mark.parametrize('damage', [lambda b: b'', lambda b: b[:-1], lambda b: b[:40], lambda b: b'x'*500])
def test_a_damaged_picture_is_drawn_again(tmp_path, damage):
    xs,ys = tiny(tmp_path); old = [p.read_bytes() for p in (xs[1], ys[2])]
    for p in (xs[1], ys[2]): p.write_bytes(damage(p.read_bytes()))
    tiny(tmp_path); assert [p.read_bytes() for p in (xs[1], ys[2])]==old

@pytest.mark.parametrize('n', [3, 20])
def test_a_full_disk_names_the_place(tmp_path, monkeypatch, n):
    "In this process and in others; nothing half-written stays"
    def full(self, f, format): f.write(b'half'); raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(Image.Image, 'save', full)
    with pytest.raises(OSError) as e: cache(tmp_path, n=n, size=(16,32), workers=2, progress=False)
    assert e.value.filename.startswith(str(tmp_path)) and e.value.filename.endswith('.png') and not [p for p in tmp_path.rglob('*') if p.is_file()]

@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='draws in one process')
def test_nobody_draws_for_a_process_that_is_gone(tmp_path):
    def go(): cache(tmp_path/'c', n=4000, size=(128,256), workers=2, progress=False)
    def kids(pid): return Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
    p = get_context('fork').Process(target=go); p.start(); end = time.time()+20
    while len(ks := kids(p.pid))<2 and time.time()<end: time.sleep(.05)
    p.kill(); p.join()
    while (left := [k for k in ks if Path(f'/proc/{k}').exists() and ') Z' not in Path(f'/proc/{k}/stat').read_text()]) and time.time()<end: time.sleep(.1)
    assert ks and not left
