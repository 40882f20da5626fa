"Nothing of strangers is run, nothing leaves the data root, nothing calls home"
import ast, socket
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from pipa import cli
from pipa.runs.plan import plan
from pipa.sets.layouts import camvid, named
from pipa.labels import label_space

root = Path(__file__).resolve().parents[1]
modules = [p for p in (root/'pipa').rglob('*.py') if p.name[0]!='_']

def test_tests_ask_nobody_outside():
    for f in (lambda: socket.create_connection(('192.0.2.1', 80), timeout=1), lambda: socket.getaddrinfo('example.org', 80), lambda: socket.socket().connect_ex(('192.0.2.1', 80))):
        with pytest.raises(RuntimeError, match='asks the network'): f()
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0)); s.listen(1)
        socket.create_connection(('localhost', s.getsockname()[1]), timeout=5).close()

@pytest.mark.parametrize('p', modules, ids=lambda p: p.stem)
def test_no_module_opens_a_connection_or_a_pickle(p):
    "But for the hub's cache in `weights.convert`, which downloads what was asked for by name"
    tree = ast.parse(p.read_text(encoding='utf8'))
    used = {a.name for o in ast.walk(tree) if isinstance(o, ast.Import) for a in o.names} | {o.module or '' for o in ast.walk(tree) if isinstance(o, ast.ImportFrom) and not o.level}
    used = {o.split('.')[0] for o in used-{'urllib.parse'}}   # takes an address apart, and goes nowhere
    assert not used & {'socket', 'urllib', 'http', 'requests', 'httpx', 'pickle', 'dill', 'joblib', 'shelve', 'tarfile', 'marshal'} | (used & {'huggingface_hub'} if p.stem!='convert' else set())
    calls = [o for o in ast.walk(tree) if isinstance(o, ast.Call)]
    names = [ast.unparse(o.func) for o in calls]
    assert not {'eval', 'exec', 'load_learner', 'os.system', 'torch.hub.load'} & {*names} and not [o for o in names if o.endswith('.extractall')]
    for o in calls:
        if ast.unparse(o.func)=='torch.load': assert any(k.arg=='weights_only' and k.value.value is True for k in o.keywords)
        if ast.unparse(o.func)=='np.load': assert not any(k.arg=='allow_pickle' for k in o.keywords)

@pytest.fixture
def trees(tmp_path):
    def png(f, v=0): f.parent.mkdir(parents=True, exist_ok=True); Image.fromarray(np.full((4,4,3) if 'images' in f.parts else (4,4), v, np.uint8)).save(f); return f
    for k in 'ab': png(tmp_path/f'set/images/{k}.png'); png(tmp_path/f'set/labels/{k}_P.png')
    png(tmp_path/'secret/images/a.png'); png(tmp_path/'secret.png')
    return tmp_path

@pytest.mark.parametrize('line', ['../secret.png', '../../etc/passwd', '{t}/secret.png', '..\\secret.png', '~/x.png', '.', '..', '/', 'x\x00b.png'])
def test_lists_name_what_is_there_and_nothing_else(trees, line):
    (trees/'set/valid.txt').write_text('b.png\n'+line.format(t=trees)+'\n')
    for split in ('train', 'val'):
        d = camvid(trees/'set', split)
        assert all((trees/'set') in p.resolve().parents for p in (*d.images, *d.masks)) and len(d)==1

def test_results_stay_in_their_folder(trees):
    names = [n for n,_ in plan('pipa', sweep='encoder=../../x,/etc/x arch=mit_b0')]
    assert len(names)==3 and not any('/' in n or '\\' in n for n in names)
    with pytest.raises(SystemExit, match='no data set'): cli.pipa_train(data='os:system')
    with pytest.raises(SystemExit, match='no data set'): cli.pipa_train(data='write_file:kept')
