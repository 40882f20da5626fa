"Masks with other numbers: void elsewhere, classes from 1, no data, types of every width; what is said, and what is learned"
import re, struct
import numpy as np, pytest
from PIL import Image
from pipa import check as C, cli
from pipa.data import class_counts, codes_space, folder, read_mask, uda_dls
from pipa.labels import LabelSpace, cityscapes19, label_space, space
from pipa.sets.domains import complaint, Domain
from pipa.sets.rare import absent, look
from tiny import city

pytestmark = pytest.mark.usefixtures('own_cache')
abc = ['sky', 'road', 'car']
scene = np.zeros((32,64), np.int64); scene[16:] = 1; scene[20:28,10:30] = 2

def tif(a, path):
    "A TIFF of one channel in the type and the order of bytes of `a`, written here: PIL writes only some of them"
    kind,e = {'u':1, 'i':2, 'f':3}[a.dtype.kind],'>' if a.dtype.str[0]=='>' else '<'
    tags = [(256,a.shape[1]), (257,a.shape[0]), (258,8*a.dtype.itemsize), (259,1), (262,1), (273,8+2+12*10+4), (277,1), (278,a.shape[0]), (279,a.nbytes), (339,kind)]
    head = (b'MM' if e=='>' else b'II') + struct.pack(e+'HI', 42, 8) + struct.pack(e+'H', len(tags))
    def tag(k, v): return struct.pack(e+'HHI', k, 4 if k in (273,279) else 3, 1) + (struct.pack(e+'I', v) if k in (273,279) else struct.pack(e+'HH', v, 0))
    path.write_bytes(head + b''.join(tag(*t) for t in tags) + struct.pack(e+'I', 0) + a.tobytes())
    return path

def lay(home, y, lines=None, n=3, ext='png'):
    "A folder for `pipa_train` whose source has masks `y`"
    rng = np.random.default_rng(0)
    for d in ('source', 'target', 'valid'):
        for o in ('images', 'masks')[:1+(d!='target')]: (home/d/o).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            Image.fromarray(rng.integers(0, 256, (*y.shape,3)).astype(np.uint8)).save(home/d/f'images/{i}.png')
            if d!='target': Image.fromarray(y).save(home/d/f'masks/{i}.{ext}')
    (home/'codes.txt').write_text('\n'.join(lines or abc), encoding='utf8')
    return home

def source(home): return folder(home/'source/images', home/'source/masks', home/'codes.txt', 'source')

# --- what the file holds is what is read ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('dt', ['u1', '<u2', '>u2', '<i2', '>i2', '<i4', '>i4', '<u4'])
def test_every_type_of_number(tmp_path, dt):
    none = -1 if 'i' in dt else np.iinfo(dt).max
    y = scene.copy(); y[:2] = none
    f = tif(y.astype(dt), tmp_path/'1.tif')
    sp = LabelSpace.from_lines([*abc, *(f'void: {o}' for o in {-1, none}-{255})])
    assert (read_mask(f, sp)==np.where(np.arange(32)[:,None]<2, 255, scene)).all()
    Image.new('RGB', (64,32)).save(tmp_path/'1.png')
    r = look(tmp_path/'1.png', f)
    assert 'error' not in r and np.bincount(sp.encode(np.array(r['values'])), r['counts'], 256)[[0,1,2,255]].tolist()==[14*64, 16*64-160, 160, 128]

@pytest.mark.parametrize('mode,dt', [('L', np.uint8), ('P', np.uint8), ('I;16', np.uint16), ('1', bool)])
def test_every_kind_of_png(tmp_path, mode, dt):
    y = (scene>0).astype(dt) if mode=='1' else scene.astype(dt)
    im = Image.fromarray(y)
    if mode=='P': im.putpalette([*range(256)]*3)
    im.save(f := tmp_path/'1.png')
    assert (read_mask(f, label_space(abc))==y).all()
    Image.new('RGB', (64,32)).save(tmp_path/'x.png')
    assert dict(zip(*[look(tmp_path/'x.png', f)[k] for k in ('values','counts')]))==dict(zip(*[o.tolist() for o in np.unique(y.astype(int), return_counts=True)]))

# --- what is said ---------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('values,sp,words', [
    ([1,2,3,255], abc, 'numbered from 1: subtract 1 .*`void: 0`'),
    ([0,1,2,3], abc, '0 is void, and the classes are numbered from 1: then add the line `void: 0`.*3 is void: .*`void: 3`.*List every class'),
    ([0,1,2,4], abc, '4 seems to be void: add the line `void: 4`'),
    ([0,1,2,65535], abc, r'65535 seems to be void \(no data\): add the line `void: 65535`'),
    ([-1,0,1,2], abc, r'-1 seems to be void \(no data\): add the line `void: -1`'),
    ([0,1,2,2**32-1], abc, '4294967295 seems to be void'), ([-32768,0,2], abc, '-32768 seems to be void'),
    ([1,2,3,65535], abc, '65535 seems to be void .*numbered from 1'),
    ([0,128,255], abc, 'look stretched'), ([0,127,254], abc, 'look stretched.*`127: name`'), ([0,85,170,255], ['a','b','c','d'], 'look stretched'),
    ([0,1,5,6], abc, 'holds the value 5.*List every class'),
    ([7,26003], cityscapes19, 'instance ids'), ([7,24,26001], cityscapes19.as_train(), 'instance ids'), ([7,65535], cityscapes19, '65535 seems to be void'),
    ([7,99000], cityscapes19, 'holds the value 99000.*List every class'), ([0,5000], abc, '5000 seems to be void'), ([1,1001,2002], abc, 'instance ids'),
    ([0,7,26], cityscapes19.as_train(), 'raw ids of Cityscapes'), ([-1,0,18], cityscapes19.as_train(), '-1 seems to be void')])
def test_what_numbers_look_like(values, sp, words):
    sp = label_space(sp) if isinstance(sp, list) else sp
    why = complaint(values, sp)
    assert re.search(words, why) and ('instance' in why)==('instance' in words), why
    assert complaint(np.array([values]*2), sp)==why, 'the same of a whole mask'

def test_right_numbers_have_no_complaint():
    for v,sp in (([0,1,2,255], label_space(abc)), ([-1,0,7,33], cityscapes19), ([0,10,11,255], space('camvid')), ([0,3,255], LabelSpace.from_lines(['void: 0', *abc]))):
        assert complaint(v, sp) is None

def test_the_numbers_that_are_meant_are_named():
    assert 'has the classes 1-3 and 0, 255 for pixels to ignore' in complaint([9], LabelSpace.from_lines(['void: 0', *abc]))
    assert 'has the raw ids 7, 8, 26 and -1, 255 for' in complaint([9], LabelSpace.from_lines(['ground: 7 8', 'thing: 26']))
    assert 'has the classes 0-2 and 255 for' in complaint([9], label_space(abc))

# --- codes.txt ------------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('lines,y,want', [
    (['void: 0', *abc], [0,1,2,3], [255,0,1,2]), (['0: void', *abc], [0,1,2,3], [255,0,1,2]), (['void', *abc], [0,1,2,3,255], [255,0,1,2,255]),
    ([*abc, 'void: 4'], [0,1,2,4], [0,1,2,255]), ([*abc, 'void'], [0,1,2,3], [0,1,2,255]), (['sky', 'void', 'road', 'car'], [0,1,2,3], [0,255,1,2]),
    ([*abc, 'void = 65535, -1'], [0,2,65535,-1], [0,2,255,255]), (['1: sky', '2: road', '3: car', '0: no data'], [0,1,2,3], [255,0,1,2]),
    (['void 0', 'car: 30', 'road: 7, 8', 'sky=23'], [0,30,7,8,23], [255,0,1,1,2]), (['0: sky', '255: road'], [0,255], [0,1]), ([*abc, 'void: 255'], [0,255], [0,255]),
    (['camvid', 'void: 65535'], [0,11,65535], [0,255,255])])
def test_codes_that_name_numbers(tmp_path, lines, y, want):
    (f := tmp_path/'codes.txt').write_text('\n'.join(lines)+'\n')
    sp = codes_space(f)
    assert sp.encode(np.array(y)).tolist()==want and sp.known(y).all() and not sp.known([99]).any()
    from pipa.checkpoints import space_meta, space_of
    back = space_of(space_meta(sp))
    assert (back.codes, back.ids, back.void)==(sp.codes, sp.ids, sp.void), 'weights remember it'

def test_codes_of_names_alone_are_as_before(tmp_path):
    (f := tmp_path/'codes.txt').write_text('\n'.join(['living thing', 'lane: left', 'voids', '3 lanes', 'void (unknown)']))
    assert codes_space(f).codes==['living thing', 'lane: left', 'voids', '3 lanes', 'void (unknown)'] and codes_space(f).ids=={i:i for i in range(5)}
    assert codes_space(['void', 'road']).codes==['void', 'road'], 'a list holds names'
    (f := tmp_path/'codes.txt').write_text('\n'.join(space('camvid').codes)); assert (codes_space(f).palette==space('camvid').palette).all()
    f.write_text('\n'.join(['void: 11', *space('camvid').codes])); assert (codes_space(f).palette==space('camvid').palette).all() and codes_space(f).things==space('camvid').things

@pytest.mark.parametrize('lines,words', [(['sky: 1', 'road'], r'the line `road` has no number'), (['sky: 1', 'void'], 'the line `void` has no number'), (['1: a', '1: b'], 'number 1 appears'),
    (['1: a', 'void: 1'], 'number 1 appears'), (['void: 0', '4: void'], 'no line names'), (['camvid', 'void: 3'], '3 is the class road of `camvid`'), (['a', 'a', 'void: 9'], 'a appears more')])
def test_codes_that_contradict_themselves(tmp_path, lines, words):
    (f := tmp_path/'codes.txt').write_text('\n'.join(lines))
    with pytest.raises(ValueError, match=f'codes.txt`: .*{words}'): codes_space(f)

def test_counted_and_learned_alike(tmp_path):
    "The same set, numbered from 0 and from 1 with void as 0: one count, one batch"
    y = scene.copy(); y[:4] = 255
    a = source(lay(tmp_path/'a', y.astype(np.uint8)))
    b = source(lay(tmp_path/'b', np.where(y==255, 0, y+1).astype(np.uint16), ['void: 0', *abc]))
    assert class_counts(a).tolist()==class_counts(b).tolist() and class_counts(a).sum()==3*28*64
    one,two = [next(iter(uda_dls(d, d, bs=2, size=(32,32), seed=3, device='cpu').train)) for d in (a, b)]
    for p,q in zip(one, two): assert (p==q).all()

# --- classes without a pixel ----------------------------------------------------------------------------------------------------------------
def test_absent():
    d = Domain([], [], label_space(abc), 'town')
    assert not absent([1,1,1], d) and not absent([0,0,0], d), 'a set without any label has its own sentence'
    first,rest = absent([[0,0,3],[0,0,1]], d)
    assert 'class `sky` (number 0)' in first and 'numbered from 1' in first and 'class `road` (number 1) has' in rest
    assert 'numbered from 1' not in absent([0,1,1], Domain([], [], LabelSpace.from_lines(['void: 0', *abc]), 'town'))[0]
    assert '`terrain` (number 16), `truck` (number 18)' in absent([i not in (9,14) for i in range(19)], Domain([], [], space('synthia'), 'SYNTHIA'))[0]

def test_numbered_from_1_without_the_last_class(tmp_path, capsys):
    y = np.where(scene==2, 1, scene)+1
    home = lay(tmp_path/'b', y.astype(np.uint8)); ds = C.domains_of(str(home))
    p = C.report(ds, tmp_path/'out', n_workers=0)
    said = p[p.what.str.contains('no pixel')]
    assert [*said.domain]==['source'] and [*said.level]==['strange'] and 'class `sky` (number 0)' in said.what.iloc[0], 'those of the validation are as they are'
    capsys.readouterr(); uda_dls(ds[0], ds[1], bs=2, size=(32,32), device='cpu')
    assert capsys.readouterr().out==said.what.iloc[0]+'\n'
    (home/'codes.txt').write_text('\n'.join(['void: 0', *abc])); ds = C.domains_of(str(home))
    assert [o for o in C.report(ds, tmp_path/'out', n_workers=0).what if 'no pixel' in o]==["The class `car` (number 3) has no pixel in the masks of `source`: a net can't learn it from there."]
