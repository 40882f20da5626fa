"One way to read a picture, for training, validation, evaluation, prediction and the check"
import os, warnings
import numpy as np, pytest, torch
from PIL import Image
from fastcore.test import test_eq as eq
from pipa import check
from pipa.data import PairSet, cityscapes, eval_dl, folder, gta, read_image, read_mask, uda_dls
from pipa.draw import as_image
from pipa.infer import evaluate, find_images, predict
from pipa.labels import label_space
from pipa.sets import pictures as P
from pipa.sets.pictures import files_below, image_size, intact, orientation, pictures, turned
from pipa.sets.rare import class_counts, pairs_that_fit

colours = np.array([[90,150,220], [110,100,110], [200,40,40]], np.uint8)
space = label_space(['sky', 'road', 'car'])

def scene(h=64, w=96):
    y = np.zeros((h,w), np.uint8)
    y[h//2:] = 1
    y[h//2:h//2+12,8:30] = 2
    return colours[y],y

def put(a, file, **kw):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(a)).save(file, **kw)
    return file

def stored(k):
    "How a camera stores an upright picture under the tag k: what `turned` undoes"
    back = {6:8, 8:6}
    return lambda a: turned(a, back.get(k, k))

class Nearest(torch.nn.Module):
    "Knows the colours of the classes"
    def forward(self, x):
        m,s = (torch.tensor(o)[:,None,None] for o in ([.485,.456,.406], [.229,.224,.225]))
        return -((x*s+m)[:,None]-torch.tensor(colours/255).float()[None,:,:,None,None]).abs().sum(2)

@pytest.mark.parametrize('k', range(1, 9))
@pytest.mark.parametrize('ext', ['png', 'webp', 'tif', 'jpg'])
def test_a_picture_is_upright_everywhere(k, ext, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    x,y = scene()
    e = Image.Exif()
    e[0x112] = k
    kw = dict(quality=95) if ext=='jpg' else dict(lossless=True) if ext=='webp' else {}
    for a,b in ((stored(k)(x), 'own'), (x, 'plain')):
        put(a, tmp_path/b/'images'/f'a.{ext}', **kw, **(dict(exif=e) if b=='own' else {}))
        put(y, tmp_path/b/'masks/a.png')
    doms = {b: folder(tmp_path/b/'images', tmp_path/b/'masks', space) for b in ('own', 'plain')}
    image,plain = (doms[b].images[0] for b in doms)
    near = lambda a,b: np.abs(np.asarray(a).astype(int)-np.asarray(b)).mean()<(6 if ext=='jpg' else 1e-9)
    assert image_size(image)==intact(image)==y.shape
    for f in (read_image, as_image): assert near(f(image), x)
    assert (predict(Nearest(), image)==y).mean()>.97
    for d in doms.values():
        cm = evaluate(Nearest(), d, progress=False)
        assert cm.diag().sum()/cm.sum()>.97
    got = [PairSet(d, d, y.shape)[0,None,0,7] for d in doms.values()]
    assert all(near(*o) for o in zip(*got))
    got = [PairSet(d, d, (32,48), resize=(32,48), draft=True)[0,None,0,7] for d in doms.values()]
    assert all(near(*o) for o in zip(*got))
    copied = PairSet(doms['own'], doms['own'], y.shape, copies=tmp_path/'copies')
    assert all(near(a, b) for a,b in zip(copied[0,None,0,7], PairSet(doms['plain'], doms['plain'], y.shape)[0,None,0,7]))
    vs = [eval_dl(d, y.shape, 1).one_batch() for d in doms.values()]
    assert all(torch.allclose(a, b, atol=.5 if ext=='jpg' else 1e-6) for a,b in zip(*vs))

@pytest.mark.parametrize('k', [5, 6, 7, 8])
def test_a_mask_on_its_side_is_turned_with_its_photograph(k, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    x,y = scene()
    e = Image.Exif()
    e[0x112] = k
    put(stored(k)(x), tmp_path/'images/a.png', exif=e)
    put(stored(k)(y), tmp_path/'masks/a.png')
    d = folder(tmp_path/'images', tmp_path/'masks', space)
    with pytest.warns(UserWarning, match='lie on their side'): cm = evaluate(Nearest(), d, progress=False)
    assert cm.diag().sum()==y.size
    xs,ys,_ = PairSet(d, d, y.shape)[0,None,0,7]
    eq((Nearest()((xs[None].float()/255-torch.tensor([.485,.456,.406])[:,None,None])/torch.tensor([.229,.224,.225])[:,None,None]).argmax(1)[0]==ys).all(), True)

def test_sixteen_bits_are_the_same_picture_everywhere(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    g = np.random.default_rng(0).integers(0, 256, (64,96)).astype(np.uint8)
    for n,a in (('eight', g), ('sixteen', g.astype(np.uint16)*257)):
        put(a, tmp_path/n/'images/a.png')
        put(scene()[1], tmp_path/n/'masks/a.png')
    a,b = (folder(tmp_path/n/'images', tmp_path/n/'masks', space) for n in ('eight', 'sixteen'))
    for f in (read_image, as_image): eq(np.array(f(a.images[0])), np.array(f(b.images[0])))
    eq(np.array(as_image(Image.open(b.images[0]))), np.array(read_image(a.images[0])))
    for make in (lambda d: PairSet(d, d, (64,64))[0,None,0,3], lambda d: eval_dl(d, (64,96), 1).one_batch()):
        assert all((p==q).all() for p,q in zip(make(a), make(b)))
    eq(evaluate(Nearest(), a, progress=False), evaluate(Nearest(), b, progress=False))

@pytest.mark.parametrize('a,says', [(np.full((64,96), 70000, np.int32), 'numbers of 32 bits'), (np.full((64,96), .5, np.float32), 'fractions')])
def test_a_picture_without_a_white_is_refused_before_training(a, says, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    x,y = scene()
    for i in range(3): put(x, tmp_path/f's/images/{i}.png'); put(y, tmp_path/f's/masks/{i}.png')
    bad = put(a, tmp_path/'t/images/b.tif')
    s,t = folder(tmp_path/'s/images', tmp_path/'s/masks', space),folder(tmp_path/'t/images')
    with pytest.raises(ValueError, match=says) as e: uda_dls(s, t, s, bs=1, size=(32,32), device='cpu')
    assert str(bad) in str(e.value)
    for f in (read_image, as_image, lambda f: predict(Nearest(), f)):
        with pytest.raises(ValueError, match=says): f(bad)
    p = check.problems(t, check.inspect(t, n_workers=0))
    assert says in p.what[0] and p.level[0]=='wrong'

def test_a_picture_of_twelve_bits_in_sixteen_is_named_once(tmp_path, monkeypatch):
    monkeypatch.setattr(P, '_told', [])
    for i in range(3): put((np.arange(64*96)%4096).astype(np.uint16).reshape(64,96), tmp_path/f'{i}.png')
    with pytest.warns(UserWarning, match='0.png` has 16 bits a channel, but no number above 4095') as said:
        for i in range(3): read_image(tmp_path/f'{i}.png')
    eq(len(said), 1)
    d = folder(tmp_path)
    p = check.problems(d, check.inspect(d, n_workers=0))
    assert p.level[0]=='strange' and '3 of 3 pictures' in p.what[0] and 'no number above 4095' in p.what[0]

def test_one_list_of_files(tmp_path):
    d,x = tmp_path/'d',scene()[0]
    for f in ('1.png', 'town/2.JPG', '.hidden/3.png', '.4.png', 'town/.ipynb_checkpoints/2.png', 'a.b/5.c.png'): put(x, d/f, format='png')
    put(x, tmp_path/'disk/6.png')
    (d/'linked').symlink_to(tmp_path/'disk', target_is_directory=True)
    for loop in ('town/up', 'linked2'): (d/loop).symlink_to(d, target_is_directory=True)
    want = ['1', 'a.b/5.c', 'linked/6', 'town/2']
    eq([*pictures(d)], want)
    eq([*find_images(d)], want)
    eq(len(folder(d)), 4)
    assert all(p.is_file() for p in files_below(d))

def test_the_published_layouts_follow_links_too(tmp_path):
    x,y = scene()
    for i in (1,2): put(x, tmp_path/f'disk/images/{i:05}.png'); put(np.full_like(y, 7), tmp_path/f'disk/labels/{i:05}.png')
    for k in ('images', 'labels'):
        (tmp_path/'gta'/k).mkdir(parents=True)
        (tmp_path/'gta'/k/'part').symlink_to(tmp_path/'disk'/k, target_is_directory=True)
        put(x, tmp_path/f'gta/{k}/.ipynb_checkpoints/00001.png')
    eq(len(gta(tmp_path/'gta')), 2)

def test_names_in_two_unicode_forms_are_one(tmp_path):
    x,y = scene()
    put(x, tmp_path/'images/caf\u00e9.png')
    put(y, tmp_path/'masks/cafe\u0301.png')
    d = folder(tmp_path/'images', tmp_path/'masks', space)
    eq(read_mask(d.masks[0], space), y)

@pytest.mark.parametrize('names', [('1.jpg', '1.png'), ('caf\u00e9.png', 'cafe\u0301.png')])
def test_two_files_of_one_name_are_named(names, tmp_path):
    for n in names: put(scene()[0], tmp_path/n)
    with pytest.raises(ValueError, match='the same name but for the ending') as e: folder(tmp_path)
    assert all(n in str(e.value) for n in names)
    eq(len(find_images(tmp_path)), 2)     # results are kept apart there

@pytest.mark.skipif(os.name!='posix' or os.getuid()==0, reason='root may read everything')
def test_a_folder_that_may_not_be_read_is_named(tmp_path):
    put(scene()[0], tmp_path/'1.png')
    (tmp_path/'shut').mkdir()
    (tmp_path/'shut').chmod(0)
    try:
        for f in (pictures, find_images):
            with pytest.raises(OSError, match="shut` can't be looked into"): f(tmp_path)
    finally: (tmp_path/'shut').chmod(0o700)

@pytest.mark.skipif(os.name!='posix', reason='named pipes')
def test_a_pipe_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    put(scene()[0], tmp_path/'d/1.png')
    os.mkfifo(tmp_path/'d/2.png')
    d = folder(tmp_path/'d')
    for f in (read_image, image_size, intact, as_image):
        with pytest.raises(ValueError, match='2.png` is no file but a pipe'): f(tmp_path/'d/2.png')
    assert 'is no file but a pipe' in ' '.join(check.problems(d, check.inspect(d, n_workers=0)).what)

def town(home, odd):
    "A game of eight pairs, of which the mask of the fourth has another size, and a tiny Cityscapes"
    rng = np.random.default_rng(0)
    def mask(h, w):
        y = np.full((h,w), 7, np.uint8)
        y[:h//2] = 23
        return y
    for i in range(8):
        put(rng.integers(0, 255, (64,128,3)).astype(np.uint8), home/f'gta/images/{i:05}.png')
        put(mask(*odd) if i==3 else mask(64, 128), home/f'gta/labels/{i:05}.png')
    for s in ('train', 'val'): put(rng.integers(0, 255, (64,128,3)).astype(np.uint8), home/f'city/leftImg8bit/{s}/a/a_leftImg8bit.png'); put(mask(64, 128), home/f'city/gtFine/{s}/a/a_gtFine_labelIds.png')
    return gta(home/'gta'),cityscapes(home/'city'),cityscapes(home/'city', 'val')

@pytest.mark.parametrize('odd,n,says', [((60,120), 8, 'brought to them'), ((60,100), 7, 'left out')])
def test_one_odd_pair_of_a_published_set_stops_nothing(odd, n, says, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    s,t,v = town(tmp_path, odd)
    with pytest.warns(UserWarning, match=f'1 of 8 masks of `GTA`.*{says}.*00003.png'): dls = uda_dls(s, t, v, bs=2, size=(64,128), n=8, device='cpu')
    eq((len(dls.counts), len(dls.train.dataset)), (n, n))
    for b in dls.train: eq(b[1].shape[-2:], (64,128))
    if n==8: eq({*PairSet(s, t, (64,128))[3,None,0,0][1].unique().tolist()}, {0,10})     # road and sky, and nothing in between

def test_an_odd_pair_of_ones_own_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    x,y = scene()
    for i in range(3): put(x, tmp_path/f'images/{i}.png'); put(y[:,:50] if i==1 else y, tmp_path/f'masks/{i}.png')
    d = folder(tmp_path/'images', tmp_path/'masks', space)
    for f in (lambda: uda_dls(d, d, d, bs=1, size=(32,32), device='cpu'), lambda: evaluate(Nearest(), d, progress=False), lambda: class_counts(d), lambda: pairs_that_fit(d)):
        with pytest.raises(ValueError, match='1.png` is 64x96, but its mask .*1.png` is 64x50'): f()

@pytest.mark.parametrize('ext,kw', [('jpg', {}), ('webp', {}), ('tif', dict(compression='jpeg'))])
def test_a_mask_that_lost_something_is_refused_by_its_format(ext, kw, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    x,y = scene()
    put(x, tmp_path/'images/a.png')
    m = put(y, tmp_path/f'masks/a.{ext}', **kw)
    d = folder(tmp_path/'images', tmp_path/'masks', space)
    for f in (lambda: read_mask(m, space), lambda: class_counts(d), lambda: evaluate(Nearest(), d, progress=False)):
        with pytest.raises(ValueError, match='mixed along every outline'): f()
    p = check.problems(d, check.inspect(d, n_workers=0))
    assert p.level[0]=='wrong' and 'mixed along every outline' in p.what[0]
