"The check of a data set: the sentences of training, what is strange, tables, pictures, and a command that stops a script"
import re
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
    import shutil
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
    save(tmp_path/'i/a.png', np.zeros((9,9,3), np.uint8)); save(tmp_path/'i/b.png', np.random.default_rng(0).integers(0, 256, (9,19,3)).astype(np.uint8))
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
    import shutil
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
