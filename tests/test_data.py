"Data: pairs of files, sentences for mistakes, sampling, views, and no look at the target's masks"
import json, math, os, shutil
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from pipa.sets import rare as R
from pipa.basics import write_file
from pipa.data import *
from pipa.labels import label_space, space
from pipa.learner import uda_learner
from tiny import city, fit, seed

golden = Path(__file__).parent/'golden'
abc = ['sky', 'road', 'car']

@pytest.fixture(scope='module')
def home(tmp_path_factory): return city(tmp_path_factory.mktemp('city'))

pytestmark = pytest.mark.usefixtures('own_cache')

def write(path, a):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(a, np.uint8)).save(path)
    return path

def pics(root, masks, size=(40,56)):
    "A folder of grey images with the given masks (name → array)"
    for k,y in masks.items(): write(root/f'images/{k}.png', np.full((*np.shape(y)[:2], 3), 99)); write(root/f'masks/{k}.png', y)
    return root/'images',root/'masks'

def bands(h=40, w=56, car=True):
    y = np.zeros((h,w), np.uint8); y[h//2:] = 1
    if car: y[h//2:h//2+6,4:12] = 2
    return y

def game(home, **kw): return folder(home/'game/images', home/'game/masks', 'minicity', **kw)
def real(home): return folder(home/'real/images', home/'real/masks', 'minicity')
def loaders(home, s=0, **kw):
    seed(s)
    return uda_dls(game(home), real(home).unlabelled(), real(home), **{**dict(bs=2, size=(64,64), n=4, device='cpu'), **kw})

# folders

def test_pairs_by_path_below_the_folder(tmp_path):
    y = bands()
    for k in ('a/1', 'b/1', 'top'): write(tmp_path/f'images/{k}.jpg', np.full((40,56,3), 9)); write(tmp_path/f'masks/{k}.png', y)
    write(tmp_path/'masks/extra.png', y)
    (tmp_path/'images/notes.txt').write_text('no picture'); (tmp_path/'images/.hidden.png').write_bytes(b'')
    d = folder(tmp_path/'images', tmp_path/'masks', abc)
    below = lambda p,sub: Path(p).relative_to(tmp_path/sub).with_suffix('').as_posix()
    assert [below(p, 'images') for p in d.images]==[below(p, 'masks') for p in d.masks]
    assert sorted(below(p, 'images') for p in d.images)==['a/1', 'b/1', 'top']
    assert d.name==tmp_path.name and d.unlabelled().masks is None and d.masks is not None
    assert d.take([2,0]).images==[d.images[2], d.images[0]] and d.take([2,0]).masks==[d.masks[2], d.masks[0]]
    assert d.unlabelled().take([1]).masks is None

def test_codes_in_every_form(tmp_path):
    (tmp_path/'codes.txt').write_text('sky\n\n road \ncar\n', encoding='utf8')
    sp = label_space(abc)
    for o in (tmp_path/'codes.txt', str(tmp_path/'codes.txt'), abc, tuple(abc), sp): assert codes_space(o).codes==abc
    assert codes_space('minicity').codes==space('minicity').codes
    assert (codes_space(space('camvid').codes).palette==space('camvid').palette).all()
    with pytest.raises(KeyError, match='no label space'): codes_space('citiscapes')

# sentences

def test_folders_that_are_not_right(tmp_path):
    im,ms = pics(tmp_path, {'1':bands(), '2':bands(), '3':bands()})
    (ms/'2.png').unlink()
    with pytest.raises(FileNotFoundError, match=r'1 of 3 images have no mask.*2\.png'): folder(im, ms, abc)
    with pytest.raises(FileNotFoundError, match='is not a folder'): folder(tmp_path/'nowhere')
    (tmp_path/'empty').mkdir()
    with pytest.raises(FileNotFoundError, match='No picture'): folder(tmp_path/'empty')
    with pytest.raises(FileNotFoundError, match='No picture'): folder(im, tmp_path/'empty', abc)
    with pytest.raises(FileNotFoundError): read_mask(tmp_path/'gone.png', label_space(abc))
    with pytest.raises(FileNotFoundError): read_image(tmp_path/'gone.png')

@pytest.mark.parametrize('y,what', [
    (np.zeros((8,8,3)), 'saved in colour'), (np.zeros((8,8,4)), 'saved in colour'), (np.full((8,8), 7), 'holds the value 7'),
    (np.full((8,8), 254), 'holds the value 254')])
def test_masks_that_are_not_right(tmp_path, y, what):
    f = write(tmp_path/'odd.png', y)
    with pytest.raises(ValueError, match=what) as e: read_mask(f, label_space(abc))
    assert 'odd.png' in str(e.value)

def test_a_bad_mask_stops_before_training(tmp_path):
    im,ms = pics(tmp_path, {'1':bands(), '2':bands()})
    write(ms/'2.png', np.full((40,56), 9))
    with pytest.raises(ValueError, match=r'2\.png.*holds the value 9'): uda_dls(folder(im, ms, abc), folder(im), bs=2, size=(32,32), device='cpu')
    with pytest.raises(ValueError, match=r'2\.png.*holds the value 9'): class_counts(folder(im, ms, abc))
    (ms/'2.png').write_bytes(b'')
    with pytest.raises(ValueError, match=r"2\.png.*can't be read"): class_counts(folder(im, ms, abc))
    write(ms/'2.png', bands())
    assert len(class_counts(folder(im, ms, abc)))==2

def test_masks_of_0_and_255(tmp_path):
    y = np.where(bands(car=False)==1, 255, 0)
    im,ms = pics(tmp_path, {'1':np.zeros((40,56)), '2':y})
    with pytest.raises(ValueError, match=r'nothing but 0 and 255.*2\.png.*divide'): class_counts(folder(im, ms, ['road', 'crack']))
    write(ms/'1.png', bands(car=False))
    assert class_counts(folder(im, ms, ['road', 'crack'])).sum(0).tolist()==[20*56*2, 20*56], 'beside a right mask it is one with void'
    assert class_counts(folder(*pics(tmp_path/'one', {'1':y}), ['road'])).tolist()==[[20*56]], 'a single class may look like this'

@pytest.mark.parametrize('ext,keep', [('png', .5), ('png', .02), ('jpg', .5)])
def test_files_that_are_cut_off(tmp_path, ext, keep):
    a = np.random.default_rng(0).integers(0, 3, (40,56))
    f = write(tmp_path/f'cut.{ext}', np.stack([a*80]*3, -1) if ext=='jpg' else a)
    f.write_bytes(f.read_bytes()[:int(f.stat().st_size*keep)])
    with pytest.raises(ValueError, match=rf"cut\.{ext}.*can't be read as a picture"): read_image(f)
    why = 'is a JPEG' if ext=='jpg' and keep else "can't be read as a mask"
    with pytest.raises(ValueError, match=rf"cut\.{ext}.*{why}"): read_mask(f, label_space(abc))

def test_domains_that_do_not_fit(home, tmp_path):
    own = folder(*pics(tmp_path, {'1':bands(), '2':bands()}), abc)
    g,t = game(home),real(home)
    with pytest.raises(ValueError, match='has no masks: adaptation starts'): uda_dls(g.unlabelled(), t)
    with pytest.raises(ValueError, match='name different classes'): uda_dls(g, t, own)
    with pytest.raises(ValueError, match='needs? them'): uda_dls(g, t, t.unlabelled(), device='cpu')
    with pytest.raises(ValueError, match='has no masks'): class_counts(t.unlabelled())
    with pytest.raises(ValueError, match='no batch of 8'): uda_dls(g, t, bs=8, device='cpu')
    assert len(uda_dls(g, t, bs=8, n=16, device='cpu').train)==2

def test_image_and_mask_of_different_sizes(tmp_path):
    im,ms = pics(tmp_path, {'1':bands(), '2':bands()})
    for k in '12': write(ms/f'{k}.png', bands(20, 28))
    with pytest.raises(ValueError, match='40x56.*its mask.*20x28'): uda_dls(folder(im, ms, abc), folder(im), bs=2, size=(32,32), device='cpu')
    for k in '12': write(ms/f'{k}.png', bands())
    dls = uda_dls(folder(im, ms, abc), folder(im), bs=2, size=(32,32), device='cpu')
    for k in '12': write(ms/f'{k}.png', bands(20, 28))
    with pytest.raises(ValueError, match='40x56.*its mask.*20x28'): dls.train.one_batch()

def test_void_only(tmp_path):
    d = folder(*pics(tmp_path, {'1':np.full((8,8), 255), '2':np.full((8,8), 255)}), ['one'])
    with pytest.raises(ValueError, match='No class has a pixel'): uda_dls(d, d, bs=2, size=(32,32), device='cpu')

# statistics

def count(d):
    n = np.zeros((len(d), d.space.n), int)
    for i,m in enumerate(d.masks):
        for v in np.array(Image.open(m)).ravel().tolist():
            if v<d.space.n: n[i,v] += 1
    return n

def test_counts_against_loops(home, tmp_path):
    g = game(home)
    want = count(g)
    assert (class_counts(g)==want).all() and (class_counts(g, tmp_path/'other', n_workers=2)==want).all()

def test_counts_are_remembered_until_a_mask_changes(tmp_path, monkeypatch):
    im,ms = pics(tmp_path, {'1':bands(), '2':bands()})
    d,reads,read = folder(im, ms, abc),[],R.read_numbers
    monkeypatch.setattr(R, 'read_numbers', lambda *a: reads.append(a) or read(*a))
    first = class_counts(d)
    assert len(reads)==2 and (class_counts(d)==first).all() and len(reads)==2
    old = os.stat(ms/'2.png')
    write(ms/'2.png', np.where(bands()==2, 1, bands()))
    (ms/'2.png').write_bytes((ms/'2.png').read_bytes().ljust(old.st_size, b' '))   # same size; the moment differs
    assert (ms/'2.png').stat().st_size==old.st_size
    os.utime(ms/'2.png', ns=(old.st_atime_ns, old.st_mtime_ns+1))
    new = class_counts(d)
    assert len(reads)==4 and new[1].tolist()==[20*56, 20*56, 0] and (new[0]==first[0]).all()
    assert class_counts(folder(im, ms, abc+['bus'])).shape==(2,4)
    assert len(reads)==4, 'the raw numbers are remembered, so other classes need no other reading'

def test_rare_class_probs_against_golden():
    g = json.loads((golden/'misc.json').read_text())['rcs']
    n = np.array([g['pixel_counts_per_class'][str(c)] for c in range(19)])
    assert len(g['probs_by_temperature'])==4
    for temp,o in g['probs_by_temperature'].items():
        p = rare_class_probs(n, float(temp))
        np.testing.assert_allclose(p[o['classes']], o['prob'], rtol=2e-5, atol=1e-12)
        np.testing.assert_allclose(rare_class_probs(n/n.sum(), float(temp)), p)

@pytest.mark.parametrize('temp', [.01, .5, 1e-4])
def test_rare_class_probs_by_hand(temp):
    f = [.7, 0, .2, .1]
    p = rare_class_probs(f, temp)
    assert p[1]==0 and math.isclose(p.sum(), 1) and np.isfinite(p).all()
    assert math.isclose(p[2]/p[3], math.exp((.1-.2)/temp), rel_tol=1e-6)

def test_images_with_against_loops():
    n = np.random.default_rng(0).integers(0, 100, (20,5)); n[:,3] = 0; n[:,4] = 0; n[7,4] = 1; n[11] = 0
    for share in (0, .0015, .2, .9):
        for c,got in enumerate(images_with(n, share)):
            some = [i for i in range(20) if n[i].sum() and n[i,c]/n[i].sum()>share]
            assert got.tolist()==(some or [i for i in range(20) if n[i,c]])

# sampling

def test_frequencies(home):
    dl = loaders(home, n=6000, rcs_temp=.3).train
    i,c,j,s = (np.array(o) for o in zip(*map(dl.ticket, dl.get_idxs())))
    def fits(seen, p): # chi-square, five standard deviations wide
        p = np.asarray(p); e = p[p>0]*len(seen)
        assert not np.isin(seen, np.flatnonzero(p==0)).any()
        x = ((np.bincount(seen, minlength=len(p))[p>0]-e)**2/e).sum()
        assert x < len(e)-1 + 5*math.sqrt(2*max(len(e)-1, 1)), x
    fits(c, rare_class_probs(class_counts(game(home)).sum(0), .3))
    fits(j, np.full(6, 1/6))
    assert len(set(s.tolist()))==len(s)
    for k,have in enumerate(images_with(class_counts(game(home)), .0015)):
        if (c==k).sum()>50: fits(i[c==k], np.isin(np.arange(6), have)/len(have))

def test_even_sampling(home):
    i,c,*_ = zip(*map(loaders(home, n=3000, rcs_temp=None).train.ticket, range(3000)))
    assert set(c)=={None} and (abs(np.bincount(i, minlength=6)/3000-1/6)<.03).all()

def test_successive_batches_differ(home):
    dls = loaders(home, n=6)
    seen = [b[0] for _ in range(2) for b in dls.train]
    assert len(seen)==6
    for a in range(6):
        for b in range(a): assert not torch.equal(seen[a], seen[b])

def test_workers_do_not_matter(home):
    got = []
    for w in (0,2):
        dls = loaders(home, s=3, n=6, zoom=(1.,2.), num_workers=w)
        got.append([b for _ in range(2) for b in dls.train])
    assert len(got[0])==len(got[1])==6
    for a,b in zip(*got):
        for u,v in zip(a, b): assert torch.equal(u, v)

def all_batches(home, epochs=2, **kw):
    dl = loaders(home, s=3, n=6, zoom=(1.,2.), seed=7, **kw).train
    return [b for _ in range(epochs) for b in dl]

def assert_equal(a, b):
    assert len(a)==len(b)
    for p,q in zip(a, b):
        for u,v in zip(p, q): assert torch.equal(u, v)

def test_workers_that_stay(home):
    "The same batches, from the same processes, also after an epoch that was left in the middle or looked into"
    want,dl = all_batches(home, 4),loaders(home, s=3, n=6, zoom=(1.,2.), seed=7, num_workers=2, persistent_workers=True).train
    assert_equal(want[:3], [b for b in dl])
    pids = [w.pid for w in dl.pool._workers]
    for b in dl: break
    assert torch.equal(b[0], want[3][0])
    assert_equal(want[6:9], [b for b in dl])
    assert torch.equal(dl.one_batch()[0], want[9][0]) and [w.pid for w in dl.pool._workers]==pids
    dl.drawn = 0
    assert_equal(want[:3], [b for b in dl])

def test_resumed_by_one_number(home):
    want,dl = all_batches(home, 3),loaders(home, n=6, zoom=(1.,2.), seed=7).train
    dl.drawn = 6
    assert_equal(want[3:], [b for _ in range(2) for b in dl])

def test_pair_is_a_function_of_seed_and_number(home):
    a,b = (loaders(home, s=s, n=6, seed=7).train for s in (0,1))
    assert [a.ticket(k) for k in range(50)]==[b.ticket(k) for k in reversed(range(50))][::-1]
    assert len({a.ticket(k) for k in range(500)})==500 and a.ticket(3)!=loaders(home, seed=8).train.ticket(3)

@pytest.mark.parametrize('world', [pytest.param(2, marks=pytest.mark.slow), 3])
def test_processes_share_the_pairs(home, world):
    one = loaders(home, n=12, bs=1, seed=7).train
    whole = [b for _ in range(2) for b in one]
    for r in range(world):
        dl = loaders(home, n=12, bs=1, seed=7, shard=(r,world), num_workers=r%2).train
        assert_equal([b for _ in range(2) for b in dl], whole[r::world])

def test_pairs_that_do_not_divide(home):
    dls = [loaders(home, n=11, bs=2, seed=7, shard=(r,2)).train for r in range(2)]
    assert [len(d) for d in dls]==[2,2] and [len([b for b in d]) for d in dls]==[2,2]
    assert not {*dls[0].get_idxs()}&{*dls[1].get_idxs()}
    with pytest.raises(ValueError, match='no batch of 4'): loaders(home, n=6, bs=4, shard=(0,2))

def test_fastai_shares_the_pairs(home):
    pytest.importorskip('accelerate')
    from fastai.distributed import DistributedDL
    whole,got = all_batches(home),[]
    for r in range(2):
        dl = DistributedDL(loaders(home, s=r, n=6, bs=1, zoom=(1.,2.), seed=7).train, r, 2)
        dl._broadcast = lambda t, rank: torch.LongTensor(t).tolist()   # alone here: nobody to agree with
        got.append([b for b in dl])
    pairs = [o for b in whole[:3] for o in zip(*b)]
    assert_equal([tuple(o[0] for o in b) for b in got[0]+got[1]], pairs)

def _rank(rank, world, port, home, out):
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.distributed.init_process_group('gloo', rank=rank, world_size=world)
    dl = loaders(home, s=rank, n=8, bs=2, seed=7, shard=(torch.distributed.get_rank(), world)).train
    mine = torch.cat([b[0] for b in dl]).contiguous()
    all_ = [torch.zeros_like(mine) for _ in range(world)]
    torch.distributed.all_gather(all_, torch.Tensor(mine))
    if rank==0: torch.save([torch.Tensor(o) for o in all_], out)
    torch.distributed.destroy_process_group()

@pytest.mark.slow
def test_two_processes(home, tmp_path):
    import socket, torch.multiprocessing as mp
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    mp.spawn(_rank, args=(2, port, home, tmp_path/'all.pt'), nprocs=2)
    a,b = torch.load(tmp_path/'all.pt', weights_only=True)
    one = torch.cat([b[0] for b in loaders(home, n=8, bs=2, seed=7).train])
    assert torch.equal(a, one[::2]) and torch.equal(b, one[1::2])

def test_counting_in_several_processes_at_once(home, tmp_path):
    "Ranks that start together may all count: the cache is whole and right"
    import multiprocessing as mp
    g = game(home)
    with mp.get_context('fork').Pool(4) as pool: got = pool.starmap(class_counts, [(g, tmp_path/'c', 0)]*8)
    assert all((o==count(g)).all() for o in got)
    files = [*(tmp_path/'c').rglob('*')]
    assert len([f for f in files if f.is_file()])==1 and (class_counts(g, tmp_path/'c')==count(g)).all()

def test_counting_goes_on_where_it_stopped(home, tmp_path, monkeypatch):
    g,read,seen = game(home),R.look,[]
    def look(x, y):
        if len(seen)==4: raise KeyboardInterrupt
        seen.append(y); return read(x, y)
    items = [*zip(g.images, g.masks)]
    with pytest.raises(KeyboardInterrupt): R.remember(look, items, tmp_path, 0, size=2)
    seen.append(None)
    assert R.remember(look, items, tmp_path, 0, size=2)==[read(*o) for o in items] and len(seen)==7

def test_seed_decides(home):
    a,b,c = [loaders(home, s=s).train.one_batch() for s in (1,1,2)]
    assert all(torch.equal(u, v) for u,v in zip(a, b)) and not torch.equal(a[0], c[0])

def test_wanted_class_is_in_the_view(home):
    "Where rare class sampling asked for it, and the image has enough of it"
    dl = loaders(home, n=60, zoom=(2.,2.), rcs_temp=.3).train
    ts = [dl.ticket(k) for k in range(60)]
    hits = [int((dl.dataset[t][1]==t[1]).sum())>0 for t in ts]
    free = [int((dl.dataset[(t[0], None, *t[2:])][1]==t[1]).sum())>0 for t in ts]
    assert np.mean(hits) > np.mean(free) and np.mean(hits)>.8

def test_batch_is_what_the_nets_expect(home):
    x_s,y_s,x_t = loaders(home).train.one_batch()
    assert x_s.shape==x_t.shape==(2,3,64,64) and y_s.shape==(2,64,64) and y_s.dtype==torch.int64
    dl = loaders(home).train
    raw = dl.dataset[dl.ticket(0)]
    mean,std = [torch.tensor(o)[:,None,None] for o in ((.485,.456,.406), (.229,.224,.225))]
    x = dl.after_batch(tuple(o[None] for o in raw))[0][0]
    torch.testing.assert_close(torch.Tensor(x), (torch.Tensor(raw[0].float())/255-mean)/std)

# rules of the crop, against the paper's loops

def test_redraws(monkeypatch):
    "Up to ten redraws for each of up to ten redraws, the last taken unseen"
    from pipa import data
    y,n = np.zeros((64,64), np.uint8),[0]
    box = data.view_box
    monkeypatch.setattr(data, 'view_box', lambda *a: n.__setitem__(0, n[0]+1) or box(*a))
    def draws(y, **kw): n[0] = 0; data.source_view(Image.fromarray(np.zeros((64,64,3), np.uint8)), y, (32,32), np.random.default_rng(0), (2,2), **kw); return n[0]
    assert draws(y)==11 and draws(y, want=3)==121          # one class only
    half = y.copy(); half[::2] = 1
    assert draws(half)==1 and draws(half, want=3)==11 and draws(half, want=1)==1
    assert draws(half, want=1, min_crop=.5)==11            # exactly half is not more than half
    quarter = y.copy(); quarter[::2,::2] = 1
    assert draws(quarter)==11 and draws(quarter, max_ratio=.76)==1     # three quarters are too many
    void = np.full_like(y, 255); void[::2] = 1
    assert draws(void)==11                                 # void is no second class

def test_numbers_of_the_papers(home):
    from pipa.data import preset
    own = dict(preset('daformer'), bs=2, n=4, device='cpu', size=(64,64), resize=(64,128), resize_t=(64,128))
    dls = uda_dls(game(home), real(home), min_share=9, **own)
    assert dls.train.dataset.min_crop==1500/64**2 and len(dls.train.one_batch())==4
    p = preset('daformer'); assert p['min_crop_ratio']*p['min_pixels']==1500
    p = preset('hrda'); assert p['min_crop_ratio']*p['min_pixels']==6000
    for paper,hw in dict(daformer=(512,1024), pipa_daformer=(640,1280), hrda=(1024,2048)).items():
        o = preset(paper)
        assert resized((1024,2048), o['resize_t'])==hw and o['size'][0]==hw[0]

@pytest.mark.parametrize('paper,hw,rows,cols', [('daformer', (1024,2048), (15,120), (0,0)), ('pipa_daformer', (1024,2048), (15,120), (0,0)),
                                                ('hrda', (1024,2048), (30,240), (30,30))])
def test_margins_of_the_papers(paper, hw, rows, cols):
    from pipa.data import preset
    o = preset(paper)
    h,w = resized(hw, o['resize_t'])
    v = trusted((0,0,hw[1],hw[0]), hw, (h,w), o['margin'])
    want = np.zeros((h,w), int); want[rows[0]:h-rows[1],cols[0]:w-cols[1]] = 1
    assert (v==want).all()
    x = 100*hw[1]/w
    assert (trusted((x,0,x+h*hw[1]/w,hw[0]), hw, (h,h), o['margin'])==want[:,100:100+h]).all()

def test_margin_reaches_the_trust(home):
    "A pseudo-label in a margin has no weight, also when the view is mirrored"
    seed(0)
    dls = uda_dls(game(home), real(home), real(home), bs=2, size=(64,64), resize=(64,128), n=8, margin=(.25,0,.5,0), device='cpu')
    learn = uda_learner(dls, 'light', 'self_training', hidden=16, thresh=.01)
    seen = []
    from fastai.callback.core import Callback
    class Look(Callback):
        order = 50
        def after_pred(self):
            if self.training: seen.append((self.mean_teacher.labels[1].clone(), self.v_t.clone()))
    learn.add_cb(Look()); fit(learn)
    assert len(seen)==4 and all((w[v==0]==0).all() and (w[v==1]>0).all() for w,v in seen)
    assert all((v[:,:16]==0).all() for _,v in seen) and len({tuple(v[i,40].tolist()) for _,v in seen for i in range(2)})>3

# the same pixels on every way

@pytest.mark.parametrize('hw,to', [((1052,1914),(720,1280)), ((760,1280),(760,1280)), ((1024,2048),(512,1024)), ((1024,2048),(640,1280)), ((360,480),(256,512))])
def test_cut_of_resized_is_resized_cut(hw, to):
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (hw[0]//8,hw[1]//8,3), dtype=np.uint8)
    pic = Image.fromarray(small).resize(hw[::-1], Image.BICUBIC)
    y = Image.fromarray(rng.integers(0, 19, hw, dtype=np.uint8))
    h,w = resized(hw, to)
    big,ids = np.array(pic.resize((w,h), Image.BILINEAR)),np.asarray(y)[[[int((2*i+1)*hw[0]//(2*h))] for i in range(h)], [int((2*j+1)*hw[1]//(2*w)) for j in range(w)]]
    size,worst = (256,256),0
    for _ in range(6):
        box = view_box(hw, size, rng, resize=to)
        i,j = round(box[1]*h/hw[0]),round(box[0]*w/hw[1])
        worst = max(worst, abs(cut_view(pic, box, size).astype(int)-big[i:i+256,j:j+256]).max())
        assert (cut_view(y, box, size, mask=True)==ids[i:i+256,j:j+256]).all()
        assert (cut_view(big, view_box((h,w), size, np.random.default_rng(1), resize=to), size)==cut_view(Image.fromarray(big), view_box((h,w), size, np.random.default_rng(1), resize=to), size)).all()
    assert worst<=1

@pytest.mark.parametrize('resize', [(48,96), (64,128), (40,80)])
def test_copies_give_the_same_pairs(home, tmp_path, resize):
    kw = dict(resize=resize, n=6, size=(48,48), seed=7)
    a,b,c = ([b for b in loaders(home, **kw, copies=o).train] for o in (None, tmp_path/'copies', tmp_path/'copies'))
    for p,q,r in zip(a, b, c):
        assert torch.equal(p[1], q[1]) and all(torch.equal(u, v) for u,v in zip(q, r))
        for u,v in zip((p[0], p[2]), (q[0], q[2])):
            assert (u-v).abs().max()<.018      # one grey level
    n = len([*(tmp_path/'copies').glob('*.npy')])
    assert 0<n<=18 and sum(f.stat().st_size for f in (tmp_path/'copies').glob('*.npy'))<=18*(np.prod(resized((64,128), resize))*3+128)

def test_copies_follow_their_originals(home, tmp_path):
    import shutil
    root = tmp_path/'city'; shutil.copytree(home, root)
    def first(): return loaders(root, n=4, resize=(64,128), copies=tmp_path/'copies', seed=7).train.one_batch()
    a = first()
    for f in (root/'game/images').iterdir(): write(f, np.full((64,128,3), 200))
    b = first()
    assert torch.equal(a[1], b[1]) and torch.equal(a[2], b[2]) and len(b[0][:,0].unique())==1

def test_no_room_for_copies(home, tmp_path, monkeypatch):
    import shutil
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: type('U', (), dict(free=1000))())
    with pytest.raises(ValueError, match='GB more, but .*copies=None'): loaders(home, resize=(64,128), copies=tmp_path/'copies')

def test_padding_is_zero_and_void(home):
    for b in loaders(home, n=8, size=(64,96), resize=(40,80)).train:
        for x in (b[0], b[2]): assert (x[:,:,40:]==0).all() and (x[...,80:]==0).all() and (x[:,:,:40,:80]!=0).any()
        assert (b[1][:,40:]==255).all() and (b[1][...,80:]==255).all() and (b[1][:,:40,:80]<255).any()

def test_draft_is_close(tmp_path):
    "A JPEG at half the size: other pixels than the whole one shrunk, but not by much"
    rng = np.random.default_rng(0)
    a = Image.fromarray(rng.integers(0, 256, (24,48,3), dtype=np.uint8)).resize((768,384), Image.BICUBIC)
    for i in range(4): write(tmp_path/f's/images/{i}.png', np.array(a)[::4,::4]); write(tmp_path/f's/masks/{i}.png', bands(96, 192)); a.save((tmp_path/'t').mkdir(exist_ok=True) or tmp_path/f't/{i}.jpg', quality=95)
    s,t = folder(tmp_path/'s/images', tmp_path/'s/masks', abc),folder(tmp_path/'t')
    p,q = (PairSet(s, t, (64,64), resize=(96,192), draft=o)[0,None,0,5][2].float() for o in (False, True))
    assert 0<(p-q).abs().mean()<2

# no leak

def trained(home, labelled):
    seed(5)
    t = real(home) if labelled=='listed' else folder(home/'real/images', None, 'minicity')
    dls = uda_dls(game(home), t, game(home).take([0]), bs=2, size=(64,64), n=4, device='cpu')
    batches = [b for b in dls.train]
    seed(6)
    learn = fit(uda_learner(dls, 'light', 'pipa', hidden=16, crop=(32,32), thresh=.1, patch=dict(thresh=.05), pixel=dict(min_pixels=4)))
    return batches,learn.model.state_dict()

def test_target_masks_are_never_read(home, tmp_path):
    copy = tmp_path/'city'; shutil.copytree(home, copy)
    whole = trained(copy, 'listed')
    for i,f in enumerate(sorted((copy/'real/masks').iterdir())):
        f.write_bytes(b'not a picture') if i%2 else write(f, np.full((64,128), 3))
    assert_same(whole, trained(copy, 'listed'))
    shutil.rmtree(copy/'real/masks')
    assert_same(whole, trained(copy, 'gone'))

def assert_same(a, b):
    for u,v in zip(a[0], b[0]):
        for p,q in zip(u, v): assert torch.equal(p, q)
    assert a[1].keys()==b[1].keys() and all(torch.equal(v, b[1][k]) for k,v in a[1].items())

def test_training_set_holds_no_target_masks(home):
    dls = uda_dls(game(home), real(home), bs=2, size=(64,64), device='cpu')
    assert dls.train.dataset.target.masks is None

# views

def coordinates(h, w):
    "An image whose pixels say where they are, and a mask of blocks of 5 pixels"
    i,j = np.mgrid[:h,:w]
    return np.stack([j, i, 0*i], -1).astype(np.uint8), ((i//5)*7+(j//5)*3).astype(np.uint8)%11

@pytest.mark.parametrize('hw,size,zoom', [((64,128),(64,128),(1,1)), ((65,97),(64,96),(1,1)), ((120,90),(32,64),(1,1)), ((101,203),(33,47),(1,3)),
                                          ((20,30),(64,64),(1,2)), ((200,201),(64,32),(2,2))])
def test_image_and_mask_stay_together(hw, size, zoom):
    (H,W),(h,w) = hw,size
    x,y = coordinates(H, W)
    flips = 0
    for s in range(12):
        v,m = source_view(Image.fromarray(x), y, size, np.random.default_rng(s), zoom, max_ratio=1)
        rng = np.random.default_rng(s)
        x0,y0,x1,y1 = view_box(hw, size, rng, zoom); flip = rng.random()<.5; flips += flip
        assert v.shape==(h,w,3) and m.shape==(h,w) and v.dtype==m.dtype==np.uint8
        assert x0>=0 and y0>=0 and x1<=W+1e-9 and y1<=H+1e-9
        assert math.isclose((x1-x0)/(y1-y0), w/h, rel_tol=1e-6), 'no distortion'
        for i in range(0, h, 5):
            for j in range(0, w, 5):
                jj = w-1-j if flip else j
                px,py = x0+(jj+.5)*(x1-x0)/w, y0+(i+.5)*(y1-y0)/h
                if 5<px<W-5 and 5<py<H-5: assert abs(v[i,j,0]-(px-.5))<=1.01 and abs(v[i,j,1]-(py-.5))<=1.01
                near = {int(y[min(int(py+d), H-1), min(int(px+e), W-1)]) for d in (-1e-3,1e-3) for e in (-1e-3,1e-3)}
                assert m[i,j] in near
    assert 0<flips<12

def test_zoom_and_place():
    rng,(H,W) = np.random.default_rng(0),(100,300)
    boxes = np.array([view_box((H,W), (50,100), rng, (1.,2.)) for _ in range(300)])
    z = 200/(boxes[:,2]-boxes[:,0])
    assert 1<=z.min()<1.1 and 1.9<z.max()<=2 and abs(z.mean()-1.5)<.05
    assert boxes[:,0].min()<10 and boxes[:,2].max()>290

def test_view_in_which_one_class_fills_all():
    "Nothing better can be found: after ten draws the last one is taken"
    x,y = coordinates(40, 56)
    v,m = source_view(Image.fromarray(x), 0*y, (32,32), np.random.default_rng(0), (1,2), want=3)
    assert (m==0).all()
    v,m = source_view(Image.fromarray(x), np.full_like(y, 255), (32,32), np.random.default_rng(0))
    assert (m==255).all()

def test_odd_sizes_through_the_loader(tmp_path):
    for i,hw in enumerate([(65,97), (40,200), (131,63), (64,64)]):
        write(tmp_path/f'images/{i}.png', np.full((*hw,3), 50)); write(tmp_path/f'masks/{i}.png', bands(*hw))
    d = folder(tmp_path/'images', tmp_path/'masks', abc)
    dls = uda_dls(d, d, bs=2, size=(32,64), n=8, bs_valid=1, device='cpu')
    for b in dls.train: assert b[0].shape==b[2].shape==(2,3,32,64)
    for (x,y),hw in zip(dls.valid, [(65,97), (40,200), (131,63), (64,64)]):
        assert y.shape[1:]==hw and not any(o%32 for o in x.shape[-2:]) and x.shape[-2]>=32 and x.shape[-1]>=64

def test_eval_masks_keep_their_resolution(tmp_path):
    x,y = coordinates(75, 150); y = y%3
    write(tmp_path/'images/1.png', x); write(tmp_path/'masks/1.png', y)
    x_,y_ = eval_dl(folder(tmp_path/'images', tmp_path/'masks', abc), (32,64), bs=1, device='cpu').one_batch()
    assert (y_[0].numpy()==y).all() and x_.shape==(1,3,32,64)
    with pytest.raises(ValueError, match='a score needs them'): eval_dl(folder(tmp_path/'images'), (32,64))

def test_test_dl_of_other_sizes(home, tmp_path):
    dls = loaders(home)
    f = write(tmp_path/'new.png', np.full((100,150,3), 7))
    b = dls.test_dl([f]).one_batch()
    assert b[0].shape==(1,3,64,96) and len(b)==1

# files

def test_write_file_whole_or_not_at_all(tmp_path):
    f = tmp_path/'a/b.txt'
    write_file(f, lambda o: o.write(b'old'))
    def broken(o): o.write(b'half'); o.flush(); raise RuntimeError('power cut')
    with pytest.raises(RuntimeError): write_file(f, broken)
    assert f.read_bytes()==b'old' and [p.name for p in f.parent.iterdir()]==['b.txt']
    write_file(f, lambda o: o.write(b'new'))
    assert f.read_bytes()==b'new'

def test_minicity_keeps_target_labels_back(tmp_path, monkeypatch):
    monkeypatch.setenv('PIPA_DATA', str(tmp_path))
    t = minicity('real', 'train', n=2, size=(64,128))
    assert t.masks is None and not [*tmp_path.rglob('*mask*/*.png')]
    assert len(minicity('real', 'val', n=2, size=(64,128)).masks)==2==len(minicity('game', 'train', n=2, size=(64,128)).masks)
    o = minicity('real', 'train', n=2, size=(64,128), labels=True)
    assert o.images==t.images and len(o.masks)==2
