"Names from files of strangers are text wherever they are shown, and no command replaces what it didn't write"
import json, re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree
import ipywidgets, matplotlib, numpy as np, pandas as pd, pytest, torch
from PIL import Image
from pipa import basics, check, cli, draw, show, widgets as X
from pipa.data import Domain
from pipa.labels import label_space
from pipa.look import measures, pixel_explorer, surface, views as E
from pipa.runs import tables

evil = ['<img src=x onerror="alert(1)">', '"\'><script>alert(1)</script>&amp;', '</script><!--<script>', '[a](javascript:alert(1)) `b`|c\\', '--></style><svg onload=alert(1)>', '\x1b[2J\u202e\udcff<b>']
plain = [f'name {c}' for c in 'abcdef']

class Page(HTMLParser):
    "Elements with the names of their attributes, texts, and what stands in scripts and attributes"
    def __init__(self, text):
        super().__init__()
        self.tags,self.texts,self.values,self.scripts = [],[],[],[]
        self.feed(text); self.close()
    def handle_starttag(self, tag, attrs): self.tags.append((tag, *[k for k,_ in attrs])); self.values += [(k, v or '') for k,v in attrs]
    def handle_data(self, data): (self.scripts if self.tags and self.tags[-1][0] in ('script', 'style') and self.cdata_elem else self.texts).append(data)
    def handle_comment(self, data): raise AssertionError(f'a comment: {data[:80]}')

def safe(text, known=()):
    p = Page(text)
    assert {t[0] for t in p.tags} <= set('table thead tbody tr th td i b span img div h1 h2 title style script meta'.split())
    assert not [k for k,v in p.values if k.startswith('on')] and all(v.startswith('data:image/png;base64,') for k,v in p.values if k in ('src', 'href'))
    return p

def walk(w):
    yield w
    for o in getattr(w, 'children', ()): yield from walk(o)

def world(names):
    "All widgets, with these names for classes, domains, checkpoints, titles"
    sp = label_space(names[:3])
    rng = np.random.default_rng(0)
    y = (np.arange(8).reshape(2,4)%3).repeat(8, 0).repeat(8, 1)[None].repeat(4, 0)
    mu = rng.normal(size=(3,6))
    def seen(noise): return E.views(rng.integers(0, 256, (4,16,32,3), dtype=np.uint8), mu[y]+noise*rng.normal(size=(4,16,32,6)), y, y, rng.random(y.shape), [names[3]]*2+[names[4]]*2)
    pixels = X.PixelEmbeddingExplorer({names[5]: seen(2.), names[1]: seen(.3)}, space=sp, n=10, queries=[(0,1,1,1)], lit=[1,2])
    x = torch.from_numpy(rng.normal(size=(2,3,64,128))).float().cumsum(3)/6
    def net(x): return (x.mean(1, keepdim=True)*torch.tensor([-3.,0,3]).view(1,3,1,1)), torch.nn.functional.avg_pool2d(x, 8)
    pairs = X.PatchConsistency({names[0]: net, names[2]: net}, x, space=sp, size=(32,64), at_1=(16,20), at_2=(24,44), conf=.5)
    z,lab = net(x)[0],torch.from_numpy(y[:2,:,:].repeat(4, 1).repeat(4, 2)).long()
    mix = X.mix_explorer(x, lab, x, z, sp, thresh=.4)
    own = X.Step(lambda k: {names[0]: np.zeros((8,8,3), np.uint8), names[1]: draw.grid([[np.zeros((8,8,3), np.uint8)]], [names[2]])}, names[3], k=surface.slider(names[4], 0, 1))
    return pixels,pairs,mix,own,X.rare_class_explorer([1,2,3], names[:3])

@pytest.fixture(scope='module')
def worlds(): return world(evil),world(plain)

@pytest.mark.parametrize('i', range(5), ids='pixels pairs mix step rare'.split())
def test_no_widget_takes_a_name_for_html(worlds, i):
    "Every piece of HTML of every widget has the elements that it has with harmless names"
    mine,theirs = worlds[0][i],worlds[1][i]
    for page in (mine, theirs):
        for k in range(len(page.tabs.children) if hasattr(page, 'tabs') else 0): page.tabs.selected_index = k
    n = 0
    for a,b in zip(walk(mine), walk(theirs), strict=True):
        assert type(a).__name__==type(b).__name__ and not getattr(a, 'description_allow_html', False)
        if isinstance(a, (ipywidgets.HTML, ipywidgets.HTMLMath)):
            assert isinstance(a, surface.Words); n += len(a.value)>0
            assert safe(a.value).tags==Page(b.value).tags
    assert n or i==2

@pytest.mark.parametrize('i', range(5), ids='pixels pairs mix step rare'.split())
def test_no_page_takes_a_name_for_html(worlds, i, tmp_path):
    a,b = (safe(o[i].to_html(tmp_path/'a.html')) for o in worlds)
    assert a.tags==b.tags and len([t for t in a.tags if t[0]=='script'])==1+len(worlds[0][i].surfaces())
    said = [json.loads(o) for o in a.scripts if o.startswith('{')]
    assert len(said)==len(worlds[0][i].surfaces()) and not any('<' in o for o in a.scripts if o.startswith('{'))
    if i==0: assert {o['text'] for o in said[0]['legend']}=={*evil[:3]} and evil[0] in ''.join(a.texts), 'the names are there, as they are'
    if i==1: assert any(evil[k] in ''.join(a.texts) for k in range(3))

def test_one_function_makes_html():
    "No page writes elements into strings or makes widgets of HTML itself, and the script of the surface sets no HTML but a constant"
    root = Path(basics.__file__).parent
    for p in [*(root/'look').glob('*.py'), root/'widgets.py', root/'show.py', root/'draw.py']:
        text = p.read_text('utf8')
        assert not re.findall(r'''['"]</?[a-z]|\}<|W\.HTML\w*\(|Markdown\(|display_html''', text) and len(re.findall(r'\)\.to_html\(', text))==(p.name=='surface.py'), p
    js = (root/'look/surface.js').read_text('utf8')
    set_ = re.findall(r'(?:inner|outer)HTML\s*\+?=\s*`([^`]*)`', js)
    assert len(set_)==len(re.findall('innerHTML|outerHTML|insertAdjacentHTML|document.write|eval', js))==1 and '${' not in set_[0]

def test_figures_as_svg(tmp_path):
    sp,rng = label_space(evil[:3]),np.random.default_rng(0)
    y,x,cm = rng.integers(0, 3, (16,16)).astype(np.uint8),rng.integers(0, 255, (16,16,3), dtype=np.uint8),torch.tensor([[3,1,0],[0,2,1],[1,0,4]])
    t = pd.DataFrame(dict(domain=evil[3], name=evil[:3], share=[.2,.3,.5], images=[1,2,3]))
    log = pd.DataFrame({'epoch': [0,1], evil[0]: [1.,2], 'miou': [.1,.2]})
    figs = [draw.show_seg(x, y, sp, title=evil[0]), show.result_picture([x], [y], {evil[1]: [y]}, sp), show.confusion_picture(cm, sp), show.iou_bars({evil[4]: cm}, sp.codes), show.curves(log),
            check.class_picture(t), measures.cosine_matrix(np.eye(3), sp.codes), tables.sentence(evil[2])]
    for kind in ('none', 'path'):
        with matplotlib.rc_context({'svg.fonttype': kind}):
            for f in figs:
                f.savefig(tmp_path/'a.svg', format='svg')
                found = [*ElementTree.parse(tmp_path/'a.svg').iter()]
                assert not {o.tag.rpartition('}')[2] for o in found} & {'script', 'img', 'b', 'foreignObject'} and not [k for o in found for k in o.attrib if k.startswith('on')]
                assert not re.search('<!--[^>]*<', (tmp_path/'a.svg').read_text('utf8')), 'what is said beside the letters is escaped, too'

def test_markdown_of_a_study(tmp_path):
    rows = [dict(benchmark=b, method='pipa', seed=0, epochs=1, miou_student=.5, miou_teacher=.5, settings='', **{evil[0]: .1, evil[3]: .2}) for b in evil[:2]]
    basics.no_formulas(pd.DataFrame(rows)).to_csv(tmp_path/'t.csv', index=False)
    for text in (tables.results_markdown(tmp_path/'t.csv'), tables.hosts_markdown(tmp_path/'t.csv'), tables.results_markdown(tmp_path/'<b>.csv')):
        assert not Page(text).tags and '](' not in text.replace('\\](', '')
    assert len({len(re.findall(r'(?<!\\)\|', l)) for l in tables.results_markdown(tmp_path/'t.csv').splitlines()})==1

# --- no command replaces a file of somebody else ------------------------------------------------------------------------------------------
def bytes_below(d): return {p.relative_to(d).as_posix(): p.read_bytes() for p in sorted(Path(d).rglob('*')) if p.is_file()}

@pytest.fixture
def shell(tmp_path, monkeypatch, capsys):
    "Run a command in an empty folder: its sentence, or nothing"
    monkeypatch.chdir(tmp_path)
    def f(name, *args, **kwargs):
        try: getattr(cli, name)(*map(str, args), **kwargs)
        except SystemExit as e: return str(e.code)
        finally: capsys.readouterr()
    return f

sp = label_space(['a','b','c'])

@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    from pipa.checkpoints import save
    from pipa.models import segformer
    torch.manual_seed(0)
    return save(tmp_path_factory.mktemp('w')/'theirs.safetensors', segformer('mit_b0', n_out=3), sp, size='64x64')

def picture(file, seed=0, hw=(32,64)):
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*hw,3), dtype=np.uint8)).save(file)
    return Path(file)

def test_prediction_leaves_pictures_and_labels_of_others(shell, weights, tmp_path):
    "Beside the pictures, over the picture itself, over labels drawn by hand, and through a link; the same command twice goes on to work"
    picture('a.png'); picture('a_labels.png', 1); picture('b/c.jpg'); Path('b/.c_color.png.0123456789abcdef').touch(); Path('b/.own.0123456789abcdef').touch()
    was = bytes_below('.')
    for args in (['a.png', '--ids=raw'], ['a.png'], ['b', '--out=b']):
        said = shell('pipa_predict', args[0], weights=weights, out='b' if args[0]=='b' else '.', ids='raw' if '--ids=raw' in args else 'train')
        assert re.search("wasn't written by pipa_predict: move it away|can't hold both", said) and bytes_below('.')==was, args
    for ids in ('train', 'raw'):
        for _ in range(2): assert shell('pipa_predict', 'b/c.jpg', weights=weights, out='b', ids=ids) is None
    assert {*bytes_below('b')}=={'c.jpg', 'c_labels.png', 'c_color.png', 'c_overlay.png', 'c.png', '.own.0123456789abcdef'}, 'what a killed one left is gone, what is somebody else\'s not'
    Path('c').mkdir(); Path('c/c.png').symlink_to(tmp_path/'a.png'); Path('d').mkdir(); Path('d/c.png').symlink_to('nowhere')
    for out in 'cd': assert "c.png` is there and wasn't written" in shell('pipa_predict', 'b/c.jpg', weights=weights, out=out, ids='raw') and Path(f'{out}/c.png').is_symlink()
    Image.open('b/c_labels.png').convert('L').save('b/c_labels.png')
    assert "c_labels.png` is there and wasn't" in shell('pipa_predict', 'b/c.jpg', weights=weights, out='b'), 'labels that were corrected by hand and saved'
    assert bytes_below('.')['a.png']==was['a.png']

def test_no_picture_takes_the_results_of_another(tmp_path):
    from pipa.infer import find_images
    files = [picture(tmp_path/o) for o in ('a.jpg', 'a.png', 'a.jpg.png', 'b.png', 'b.png.jpg', 'c.png')]
    found = find_images(tmp_path)
    assert sorted(found.values())==sorted(files) and found['c']==files[-1]

def test_names_that_get_too_long_are_named_before_the_work(shell, weights):
    picture(f'p/{"ä"*122}.png'); picture('p/a.png')
    assert 'bytes, and 255 are possible: rename' in shell('pipa_predict', 'p', weights=weights, out='o') and not Path('o').exists()

def test_a_new_folder_steps_over_whatever_is_there(tmp_path):
    from pipa.runs.run import new_folder
    (tmp_path/'r').mkdir(); (tmp_path/'r/x').touch(); (tmp_path/'r_2').write_text('mine'); (tmp_path/'r_3').symlink_to('nowhere')
    assert new_folder(tmp_path/'r').name=='r_4' and (tmp_path/'r_2').read_text()=='mine'

@pytest.mark.parametrize('to,out', [('safetensors', 'x.safetensors'), ('official', 'x.pth'), ('hf', 'x')])
def test_conversion_leaves_weights_of_others(shell, weights, to, out):
    convert = lambda: shell('pipa_convert', weights, to=to, out=out)
    assert convert() is None and convert() is None
    for f in [Path(out)] if to!='hf' else [*Path(out).iterdir()]:
        good = f.read_bytes()
        for theirs in (b'', b'{}', weights.read_bytes()):
            f.write_bytes(theirs)
            assert f"`{f}` is there and wasn't written by pipa_convert" in convert() and f.read_bytes()==theirs
        f.write_bytes(good)
    assert convert() is None
    if to!='official': return
    Path('x.safetensors').write_text('mine')
    assert "x.safetensors` is there and wasn't written" in shell('pipa_convert', 'x.pth', classes=Path('codes.txt').write_text('a\nb\nc') and 'codes.txt') and Path('x.safetensors').read_text()=='mine', 'the usual place'

def test_export_leaves_graphs_of_others(shell, weights, monkeypatch):
    from pipa import export
    monkeypatch.setattr(export, 'trace', lambda net, size, free: (torch.export.export(torch.nn.Linear(2,2), (torch.zeros(1,2),)), 'nothing'))
    monkeypatch.setattr(export, 'check_export', lambda file, net: pd.DataFrame([dict(images=1, size='x', max_diff=0., largest=1., agreement=1.)]))
    ends = ['pt2'] + ['onnx']*all(map(__import__('importlib.util').util.find_spec, ('onnx', 'onnxscript', 'onnxruntime')))
    for end in ends:
        for _ in range(2): assert shell('pipa_export', weights, out=f'x.{end}') is None, end
        Path(f'x.{end}').write_bytes(b'mine'); assert f'x.{end}` is there' in shell('pipa_export', weights, out=f'x.{end}') and Path(f'x.{end}').read_bytes()==b'mine'

def test_check_leaves_tables_and_pictures_of_others(shell):
    for i in range(2): picture(f'data/{i}.png', i); Image.fromarray(np.full((32,64), i, np.uint8)).save(Path('masks').mkdir(exist_ok=True) or f'masks/{i}.png')
    Path('codes.txt').write_text('a\nb')
    look = lambda: shell('pipa_check', 'data', masks='masks', codes='codes.txt', out='out', workers=0)
    known = look(); assert {o.suffix for o in Path('out').iterdir()}=={'.csv', '.png'} and len([*Path('out').iterdir()])==4 and look()==known
    for f in Path('out').iterdir():
        good = f.read_bytes(); f.write_bytes(theirs := picture('own.png').read_bytes() if f.suffix=='.png' else b'name,grade\nx,1\n')
        assert f"`{f}` is there and wasn't written by pipa_check" in look() and f.read_bytes()==theirs
        f.write_bytes(good)
    assert look()==known
    for out in ('data', 'data/new'): assert 'lies among the pictures' in shell('pipa_check', 'data', out=out, workers=0)
    assert {o.name for o in Path('data').iterdir()}=={'0.png', '1.png'}, 'sheets would be pictures for the next command'

@pytest.mark.parametrize('text', ['a,b\n1,2\n', 'method,grade\nx,1\n', 'dear diary'])
def test_tables_of_others_stay(shell, text):
    Path('t.csv').write_text(text)
    assert 'no column' in shell('pipa_study', 'source', '0', table='t.csv', runs='r', args='--data=x') and Path('t.csv').read_text()==text
    from pipa.bench.parts import rows_of
    with pytest.raises(ValueError, match='no column `part`'): rows_of('t.csv')
