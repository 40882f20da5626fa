"The check of a data set: the sentences of training, what is strange, copies, tables, pictures, and a command that stops a script"
import io, re, shutil
import numpy as np, pandas as pd, pytest
from PIL import Image
from pipa import check as C, cli
from pipa.sets import rare as R
from pipa.data import folder, uda_dls
from pipa.hints.clicks import Click, click_masks
from pipa.hints.tools import hints_of
from pipa.labels import space
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
    save(tmp_path/'i/a.png', 200*np.eye(9, dtype=np.uint8)[...,None].repeat(3, 2)); save(tmp_path/'i/b.png', np.random.default_rng(0).integers(0, 256, (9,19,3)).astype(np.uint8))
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

def lots(n, hw=(48,96)):
    "Pictures and masks of scenes"
    return [tuple(Image.fromarray(o) for o in scene(i, 'game', hw)) for i in range(n)]

def paired(xys):
    def record(x, y): y = np.array(y); v = np.unique(y); return dict(values=v.tolist(), fields=C.fields(x, y, v))
    return C.pairing([record(*o) for o in xys], space('minicity'))

def test_exchanged_masks_are_found_and_right_ones_let_be():
    xys = lots(40); xs,ys = zip(*xys)
    t = paired(xys); assert (t.gap>-1).all() and (t.fit>0).all()
    for a,b in ((3,20), (7,8), (0,39)):
        p = [*range(40)]; p[a],p[b] = b,a
        t = paired([*zip(xs, [ys[i] for i in p])])
        assert {*np.flatnonzero(t.gap<-1)}=={a,b} and (t.better[a], t.better[b])==(b,a)

def test_fits_against_loops():
    "The mean log of how often a word was this class in the other pairs; rows and columns without their means"
    sp = space('minicity'); rs = [dict(values=np.unique(y).tolist(), fields=C.fields(x, np.array(y), np.unique(y))) for x,y in lots(6)]
    a,labels = (np.stack(o) for o in zip(*[C._read(r, sp) for r in rs])); k = 40; words,n,kinds = C._words(a, k),6,2*sp.n+2
    s = np.zeros((n,n)); usual = np.array([(labels==c).sum()+1 for c in range(kinds)]); usual = 4*usual/usual.sum()
    for i in range(n):
        seen = np.zeros((k,kinds))
        for j in range(n):
            if j!=i: np.add.at(seen, (words[j], labels[j]), 1)
        for j in range(n): s[i,j] = np.mean([np.log((seen[w,c]+usual[c])/(seen[w].sum()+4)) for w,c in zip(words[i], labels[j])])
    z = s-s.mean(0)-s.mean(1)[:,None]+s.mean()
    sd = lambda i,j: ((z[i]**2).sum()-z[i,i]**2)*((z[:,j]**2).sum()-z[j,j]**2)
    want = [[z[i,j]/(sd(i, j)**.25/5**.5) for j in range(n)] for i in range(n)]
    assert np.allclose(C.fits(rs, sp, k), want)

def test_pairs_that_say_nothing():
    "One class all over, a flat picture, too many numbers, very few pairs: no number, or none that is far off"
    xys = lots(12); x,y = xys[0]
    xys[3] = xys[3][0],Image.fromarray(np.full((48,96), 1, np.uint8)); xys[4] = Image.new('RGB', (96,48)),y
    t = paired(xys); assert (t.gap.drop([3,4])>-1).all() and np.isfinite(t.gap).all()
    t = paired(xys[5:]+[(x, Image.fromarray((np.arange(48*96)%200).reshape(48,96).astype(np.uint8)))]); assert np.isnan(t.gap[7]) and t.gap[:7].notna().all()
    assert paired(xys[:2]).gap.isna().all() and not len(paired([]))

def test_parts_of_a_large_set():
    t = C.pairing([dict(values=np.unique(y).tolist(), fields=C.fields(x, np.array(y), np.unique(y))) for x,y in lots(30)], space('minicity'), part=10)
    assert t.gap.notna().all() and all(b%3==i%3 for i,b in enumerate(t.better))

def test_an_exchanged_pair_is_named(tmp_path):
    xys = lots(24); home = tmp_path/'game'
    for i,(x,y) in enumerate(xys): save(home/f'images/{i:02d}.png', np.array(x)); save(home/f'masks/{i:02d}.png', np.array(y))
    d = folder(home/'images', home/'masks', 'minicity')
    assert not len(C.problems(d, C.inspect(d, n_workers=0)))
    a,b = d.masks[5].read_bytes(),d.masks[17].read_bytes(); d.masks[5].write_bytes(b); d.masks[17].write_bytes(a)
    p = C.problems(d, C.inspect(d, n_workers=0))
    assert [o[-6:-4] for o in p.file]==['05', '17'] and {*p.level}=={'strange'} and "don't follow" in p.what[0] and f'`{d.masks[17]}` fits better' in p.what[0]

@pytest.mark.parametrize('make,found', [
    (lambda rng: np.zeros((60,80,3)), 'one colour all over'), (lambda rng: np.where(rng.random((60,80,1))<.005, 255, np.full((60,80,3), 17)), 'nearly one value'),
    (lambda rng: 100+rng.integers(0, 3, (60,80,3)), 'nearly one value'), (lambda rng: np.where(rng.random((60,80,1))<.05, 255, np.zeros((60,80,3))), None),
    (lambda rng: rng.integers(0, 9, (60,80,3)), None)])
def test_pictures_of_nearly_one_value(tmp_path, make, found):
    rng = np.random.default_rng(0)
    for i in range(3): save(tmp_path/f'i/{i}.png', make(rng).astype(np.uint8))
    p = C.problems(d := folder(tmp_path/'i'), C.inspect(d, n_workers=0))
    assert [*p.what.str.contains(found or 'x')]==[True]*bool(found) and (not found or 'and ' in p.what[0])

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

@pytest.mark.parametrize('kind,near', [
    (lambda x: x.convert('RGBA'), False), (lambda x: Image.merge('RGBA', [*x.split(), Image.linear_gradient('L').resize(x.size)]), False),
    (lambda x: x.convert('CMYK'), False), (lambda x: again(x, 'WEBP', quality=80), True), (lambda x: x.quantize(200), True), (lambda x: x.resize((200,100), Image.LANCZOS), True)])
def test_forms_of_a_copy(tmp_path, kind, near):
    "Alpha, inks, a palette, lossy WebP, another size: in the target it is a leak of the validation"
    x,y = pics(5),[scene(i, 'game', (64,128))[1] for i in range(5)]
    ds = lay(tmp_path, source=(x[:2], y[:2]), target=x[2:4], valid=(x[4:], y[4:]))
    o = kind(x[4]); o.save(tmp_path/('target/images/other.tif' if o.mode=='CMYK' else 'target/images/other.png'))
    ds[1] = folder(tmp_path/'target/images', codes='minicity', name='target')
    p = C.repeats(ds, [C.inspect(d, n_workers=0) for d in ds])
    assert len(p)==1 and 'other' in p.file[0] and 'seen in training' in p.what[0] and ('nearly' in p.what[0])==near

def test_a_mask_is_known_in_any_type(tmp_path):
    "The same numbers in 8 and in 16 bits are the same mask"
    x,y = pics(2),scene(0, 'game', (64,128))[1]
    (d,) = lay(tmp_path, source=([x[0],x[0]], [y,y.astype(np.uint16)]))
    assert 'counts twice' in told([d])[0][1]

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

# --- hints of the target ----------------------------------------------------------------------------------------------------------------
def own_folder(to, home, clicks):
    "Folders for a run; `clicks` are lines of clicks.csv, None for no such file"
    for a,b in (('game','source'), ('real','target')): shutil.copytree(home/a, to/b)
    for sub in ('images', 'masks'):
        (to/'valid'/sub).mkdir(parents=True)
        (to/f'target/{sub}/7.png').rename(to/f'valid/{sub}/7.png')
    (to/'codes.txt').write_text('minicity')
    if clicks is not None: (to/'target/clicks.csv').write_text('\n'.join(['image,x,y,class,r', *clicks]))
    return to

def checked(to, capsys):
    "Exit code and what is said"
    try: cli.pipa_check(str(to), out=str(to.parent/'check'), workers=0)
    except SystemExit as e: return str(e),capsys.readouterr().out
    return None,capsys.readouterr().out

def test_hints_are_looked_at(home, tmp_path, capsys):
    to = own_folder(tmp_path/'d', home, ['0.png,5,5,sky,2', '3.png,60,60,road,2'])
    y = np.full((64,128), 255, np.uint8); y[20:50,20:60] = 1
    save(to/'target/hints/5.png', y)
    code,said = checked(to, capsys)
    assert code is None and 'hints: 2 clicks and 1 mask on 3 of 7 target images; none: pole,' in said
    pic = np.array(Image.open(tmp_path/'check/sheet_hints.png').convert('RGB'))
    assert 'sheet_hints.png' in said and pic.shape[1]>500

@pytest.mark.parametrize('clicks,says', [(None, ''), ([], 'hints: `clicks.csv` holds no click yet')])
def test_no_hints(home, tmp_path, capsys, clicks, says):
    code,said = checked(own_folder(tmp_path/'d', home, clicks), capsys)
    assert code is None and says in said and ('hints:' in said)==bool(says) and not (tmp_path/'check/sheet_hints.png').exists()

def test_each_wrong_hint_has_its_sentence(home, tmp_path, capsys):
    to = own_folder(tmp_path/'d', home, ['0.png,5,5,sky,2', '9.png,1,1,sky,2', '1.png,200,5,sky,2', '7.png,5,5,sky,2', '2.png,5,64,sky,2'])
    save(to/'target/hints/5.png', np.zeros((32,128), np.uint8))
    code,said = checked(to, capsys)
    assert 'training would refuse' in code
    lines = [o for o in said.splitlines() if o.startswith('  wrong: ')]
    for o,words in zip(lines, ('`9.png`, and the target has no such image', '`1.png`, which is 128 wide', '`7.png`, which is an image of validation', '`2.png`, which is 128 wide', 'bring both to one size')): assert words in o
    p = pd.read_csv(tmp_path/'check/problems.csv')
    assert len(lines)==5==(p.domain=='hints').sum() and not (tmp_path/'check/sheet_hints.png').exists()
    with pytest.raises(ValueError) as e: hints_of(C.domains_of(str(to))[1], to/'target', C.domains_of(str(to))[2])
    assert str(e.value) in lines[0], 'the words of a training'
    (to/'target/clicks.csv').write_text('image,x,y,class,r\n0.png,5,5,raod,2\n')
    src,tgt,val = C.domains_of(str(to))
    assert [[o in s for o in ('line 2: there is no class `raod`: do you mean `road`?', 'bring both')] for s in C.heard(tgt, to/'target', val)[1]]==[[True,False],[False,True]]

def test_spots_against_a_flood(home):
    "Discs of clicks are found where they were drawn; what is large is none, touching discs are one"
    sp,rng = space('minicity'),np.random.default_rng(0)
    for _ in range(20):
        at = [(int(x), int(y)) for x in rng.permutation(np.arange(8, 120, 12))[:4] for y in [rng.integers(5, 59)]]
        cs = [Click('a', x, y, sp.codes[k]) for k,(x,y) in enumerate(at)]
        y = click_masks(cs, (64,128), sp)
        assert sorted(C.spots(y))==sorted((o.y, o.x, k) for k,o in enumerate(cs))
    y[:,40:60] = 7
    assert not [o for o in C.spots(y) if o[2]==7] and C.spots(np.full((9,9), 255))==[]
    assert C.spots(click_masks([Click('a', 9, 9, 'road'), Click('a', 12, 9, 'road')], (64,128), sp))==[(9, 10.5, sp.codes.index('road'))]
