"The check of a data set: the sentences of training, what is strange, copies, tables, pictures, and a command that stops a script"
import io, re, shutil
import numpy as np, pandas as pd, pytest
from PIL import Image
from pipa import check as C, cli
from pipa.sets import rare as R
from pipa.data import folder, uda_dls
from pipa.minicity import scene
from test_layouts import mistake, mistakes, save, trees
from tiny import city

pytestmark = pytest.mark.usefixtures('own_cache')

@pytest.fixture(scope='module')
def home(tmp_path_factory): return city(tmp_path_factory.mktemp('check')/'city', n=8)

def town(home): return folder(home/'game/images', home/'game/masks', 'minicity')

@pytest.mark.parametrize('name', mistakes)
def test_wrong_as_in_training(name, tmp_path):
    d,words = mistake(tmp_path, name)
    p = C.problems(d, C.inspect(d))
    with pytest.raises(ValueError) as e: uda_dls(d, d, bs=2, size=(32,32), device='cpu')
    first = p[p.level=='wrong'].iloc[0]
    assert first.what==str(e.value) and re.search(words, first.what) and first.file in {*map(str, d.masks)}
    found = C.report([d], tmp_path/'out')
    assert {o.name for o in (tmp_path/'out').iterdir()}=={'problems.csv', 'classes.csv', 'classes.png', f'sheet_{d.name}.png'}
    assert len(pd.read_csv(tmp_path/'out/problems.csv'))==len(found)>0

@pytest.mark.parametrize('name', trees)
def test_published_sets_are_right(name, tmp_path):
    d = trees[name](tmp_path/name)()
    p = C.problems(d, C.inspect(d))
    assert not (p.level=='wrong').any()
    assert not p.what.str.contains('sizes').any()

def test_masks_of_other_pictures(home, tmp_path):
    shutil.copytree(home/'game', tmp_path/'game')
    d = folder(tmp_path/'game/images', tmp_path/'game/masks', 'minicity')
    assert not len(C.problems(d, C.inspect(d)))
    ms = [m.read_bytes() for m in d.masks]
    for m,b in zip(d.masks, ms[1:]+ms[:1]): m.write_bytes(b)
    p = C.problems(d, C.inspect(d))
    assert len(p) and {*p.level}=={'strange'} and p.what.str.contains('follow their pictures no better').any()
    for m,b in zip(d.masks, ms): m.write_bytes(b)
    d.masks[2].write_bytes(ms[5])
    p = C.problems(d, C.inspect(d))
    assert p.what.str.contains('is the same mask as').sum()==1

def test_pictures_without_masks(home, tmp_path):
    d = folder(home/'real/images')
    assert not len(C.problems(d, C.inspect(d)))
    save(tmp_path/'i/a.png', np.eye(9, dtype=np.uint8)[...,None].repeat(3, 2)); save(tmp_path/'i/b.png', np.random.default_rng(0).integers(0, 256, (9,19,3)).astype(np.uint8))
    d = folder(tmp_path/'i')
    assert 'Images have 2 sizes' in C.problems(d, C.inspect(d)).what[0]
    (tmp_path/'i/b.png').write_bytes((tmp_path/'i/b.png').read_bytes()[:-100])
    p = C.problems(d, C.inspect(d))
    assert [*p.level]==['wrong'] and 'cut off' in p.what[0] and 'b.png' in p.file[0]
    assert C.contact_sheet(d, p.file)._repr_png_()[:4]==b'\x89PNG'

def test_remembered_and_continued(home, monkeypatch):
    d,seen,one = town(home),[],C.read_image
    monkeypatch.setattr(C, 'read_image', lambda *a: seen.append(a) or one(*a))
    a = C.inspect(d, n_workers=0)
    assert len(seen)==8 and C.inspect(d, n_workers=0)==a and len(seen)==8

def test_classes_against_loops(home):
    d = town(home)
    t = C.class_table(d, C.inspect(d))
    ys = [np.array(Image.open(m)) for m in d.masks]
    for c in range(11):
        assert t.images[c]==sum((y==c).any() for y in ys) and np.isclose(t.share[c], np.mean([y==c for y in ys]))
    assert t.share[11]==0 and t.name[11]=='(void)'

def test_outline_fit():
    img,y = scene(3, 'game', (96,192))
    assert C.outline_fit(Image.fromarray(img), y) > 1.3 > 1.2 > C.outline_fit(Image.fromarray(np.random.default_rng(0).integers(0, 256, img.shape).astype(np.uint8)), y)
    assert C.outline_fit(Image.fromarray(0*img), y)==0

def test_what_a_user_means(home, tmp_path, monkeypatch):
    trees['cityscapes'](tmp_path/'root/cityscapes'); trees['gta'](tmp_path/'root/gta')
    monkeypatch.setenv('PIPA_DATA', str(tmp_path/'root'))
    assert [d.name for d in C.domains_of('cityscapes:train')]==['Cityscapes train'] and len(C.domains_of('gta'))==1
    assert [d.name for d in C.domains_of('gta', root=tmp_path/'root/gta')]==['GTA']
    for a,b in (('game','source'), ('real','target')): shutil.copytree(home/a, tmp_path/'own'/b)
    (tmp_path/'own/codes.txt').write_text('minicity')
    assert [d.name for d in C.domains_of(str(tmp_path/'own'))]==['source', 'target']
    assert C.domains_of(str(home/'game/images'), str(home/'game/masks'), 'minicity')[0].space.n==11
    assert C.domains_of(str(home/'game/images'))[0].masks is None

def test_command(home, tmp_path, capsys, placed):
    args = dict(masks=str(home/'game/masks'), codes='minicity', out=str(tmp_path/'out'), workers=0)
    cli.pipa_check(str(home/'game/images'), **args)
    assert {*(tmp_path/'out').iterdir()}<=placed and len(placed)>3
    out = capsys.readouterr().out
    assert '8 images, masks of minicity; sizes 64x128 (8)' in out and 'classes.png' in out and 'wrong' not in out
    d,_ = mistake(tmp_path/'bad', 'rgb')
    with pytest.raises(SystemExit, match='training would refuse'): cli.pipa_check(str(tmp_path/'bad/images'), **{**args, 'masks':str(tmp_path/'bad/masks'), 'codes':'cityscapes'})
    assert 'saved in colour' in capsys.readouterr().out
    with pytest.raises(SystemExit, match='pipa: .*is not a folder'): cli.pipa_check(str(tmp_path/'nowhere'), **args)

# --- pictures that occur twice, and those of the validation that are in the training ----------------------------------------------------
def pics(n, hw=(64,128), first=0): return [Image.fromarray(scene(first+i, 'game', hw)[0]) for i in range(n)]
def again(img, kind='JPEG', **kw): f = io.BytesIO(); img.save(f, kind, **kw); return Image.open(f).convert('RGB')

def lay(home, **parts):
    "Domains of a folder for each part: name=pictures, or pictures and masks"
    res = []
    for name,o in parts.items():
        xs,ys = o if isinstance(o, tuple) else (o, None)
        for i,x in enumerate(xs): (home/name/'images').mkdir(parents=True, exist_ok=True); x.save(home/name/f'images/{i:03d}.png')
        for i,y in enumerate(ys or ()): save(home/name/f'masks/{i:03d}.png', y)
        res.append(folder(home/name/'images', home/name/'masks' if ys else None, 'minicity', name))
    return res

def told(ds): return [(d.split('/')[-3]+'/'+d[-7:-4], w) for _,d,w,_ in C.repeats(ds, [C.inspect(d, n_workers=0) for d in ds]).values]

@pytest.mark.parametrize('change,same', [
    (lambda o: again(o, 'PNG'), True), (lambda o: again(o, 'BMP'), True), (lambda o: again(o, 'WEBP', lossless=True), True),
    (lambda o: again(o, quality=75), None), (lambda o: o.resize((256,128), Image.BICUBIC), None), (lambda o: o.resize((96,48), Image.BICUBIC), None),
    (lambda o: Image.fromarray(np.roll(np.array(o), 2, 1)), False), (lambda o: o.transpose(Image.FLIP_LEFT_RIGHT), False),
    (lambda o: o.rotate(180), False), (lambda o: Image.blend(o, Image.new('RGB', o.size), .5).rotate(90), False)])
def test_what_is_a_copy(change, same):
    "True: the same; None: nearly; False: another picture"
    for x in pics(3):
        a,b = C.picture_key(x),C.picture_key(change(x))
        assert (a['pixels']==b['pixels'])==(same is True) and C.alike(a, b)==(same is not False)

def test_metadata_and_names_do_not_count(tmp_path):
    from PIL.PngImagePlugin import PngInfo
    x,info = pics(1)[0],PngInfo(); info.add_text('Author', 'somebody')
    x.save(tmp_path/'a.png'); x.save(tmp_path/'b.png', pnginfo=info, compress_level=1); x.save(tmp_path/'c.tiff')
    assert (tmp_path/'a.png').read_bytes()!=(tmp_path/'b.png').read_bytes()
    d = folder(tmp_path)
    assert [o[-5:] for o in C.repeats([d], [C.inspect(d, n_workers=0)]).file]==['b.png', '.tiff']

def test_a_name_knows_the_shape():
    a = np.random.default_rng(0).integers(0, 256, (8,8,3)).astype(np.uint8)
    assert len({C.picture_key(Image.fromarray(o))['pixels'] for o in (a, a.reshape(4,16,3), a.reshape(16,4,3))})==3

def test_copies_across_domains(tmp_path):
    x,y = pics(9),[scene(i, 'game', (64,128))[1] for i in range(9)]
    s,t,v = [*x[:3], x[6]],[*x[3:6], x[7], x[3], x[0]],x[6:9]
    said = told(lay(tmp_path, source=(s, y[:3]+y[6:7]), target=t, valid=(v, y[6:9])))
    assert [o for o,_ in said]==['target/005', 'source/003', 'target/004', 'target/003']
    for (_,w),words in zip(said, ('it is in source and in target', 'learned with its label', 'counts twice', 'seen in training')): assert words in w
    for (_,w),other in zip(said, ('source/images/000', 'valid/images/000', 'target/images/000', 'valid/images/001')): assert other in w

def test_three_of_a_kind_and_leaks_come_first(tmp_path):
    x = pics(2)
    ds = lay(tmp_path, source=[x[0]]*2+[x[1]], target=[x[0]], valid=[x[0]]*2)
    said = told(ds)
    assert sorted(o for o,_ in said)==['source/000', 'source/001', 'target/000', 'valid/001']
    assert all('part of the score' in w for o,w in said if o[0]!='v') and 'counts twice' in dict(said)['valid/001']

def test_same_picture_other_mask(tmp_path):
    x,y = pics(3),[scene(i, 'game', (64,128))[1] for i in range(3)]
    (d,) = lay(tmp_path, source=(x+[x[0], x[1]], y+[y[2], y[1]]))
    said = dict(told([d]))
    assert 'masks differ' in said['source/003'] and 'counts twice' in said['source/004']
    p = C.problems(d, C.inspect(d, n_workers=0))
    twins = p[p.what.str.contains('is the same mask as')]
    assert [o[-7:-4] for o in twins.file]==['003'], 'a copy of a picture with its own mask has no mask of another picture'

def test_pictures_without_anything(tmp_path):
    black = [Image.new('RGB', (40,30))]*4
    (d,) = lay(tmp_path, target=black+pics(1, (32,64)))
    assert not told([d])
    p = C.problems(d, C.inspect(d, n_workers=0))
    assert p.what.str.contains('one colour all over, and so have 3 more').sum()==1
    rng = np.random.default_rng(0)    # a covered lens: noise alone
    dark = [Image.fromarray(rng.integers(0, 3, (60,80,3)).astype(np.uint8)) for _ in range(4)]
    (d,) = lay(tmp_path/'dark', target=dark)
    assert not told([d])

def test_few_pictures_and_unreadable_ones(tmp_path):
    (d,) = lay(tmp_path, target=pics(1))
    assert not told([d]) and not told([])
    (d,) = lay(tmp_path/'more', target=pics(2)*2)
    for f in d.images[:2]: f.write_bytes(f.read_bytes()[:100])
    assert not told([d])

def test_many_pictures_against_the_loop():
    "60 pictures, 20 of them copies, 10 of these not exact; and 2000 that are all alike"
    xs = pics(40, (32,64)); ks = [C.picture_key(o) for o in xs]
    ks += ks[:10] + [C.picture_key(again(o, quality=85)) for o in xs[10:20]]
    g = C.same_pictures(ks)
    slow = [[C.alike(a, b) for b in ks[:i+1]] for i,a in enumerate(ks)]
    assert all([*(g[:i+1]==g[i])]==o for i,o in enumerate(slow)) and len({*g})==40
    rng = np.random.default_rng(0)
    frames = [C.picture_key(Image.fromarray((np.array(xs[0])^rng.integers(0, 2, (32,64,3)).astype(np.uint8)))) for _ in range(2000)]
    assert len({k['pixels'] for k in frames})==2000 and len({*C.same_pictures(frames)})<20

def test_records_of_before_are_not_taken(home):
    "Entries that an earlier version left in the cache lack the keys of the pictures"
    def examine(x, *_): return dict(image=[1,1])
    d = town(home)
    R.remember(examine, [(x,) for x in d.images], n_workers=0); R.remember(examine, [(x, y) for x,y in zip(d.images, d.masks)], n_workers=0)
    for o in (d, d.unlabelled()): assert all('small' in r and r['image']==[64,128] for r in C.inspect(o, n_workers=0))

def test_the_command_names_copies(tmp_path, capsys):
    x = pics(4)
    lay(tmp_path, source=(x[:2], [scene(i, 'game', (64,128))[1] for i in range(2)]), target=[x[2], x[3], x[2]], valid=(x[3:], [scene(3, 'game', (64,128))[1]]))
    (tmp_path/'codes.txt').write_text('minicity')
    cli.pipa_check(str(tmp_path), out=str(tmp_path/'out'), workers=0)
    out,t = capsys.readouterr().out,pd.read_csv(tmp_path/'out/problems.csv')
    assert out.count('strange:')==2 and 'Take it out of target' in out and [*t.domain]==['target']*2 and {*t.level}=={'strange'}
