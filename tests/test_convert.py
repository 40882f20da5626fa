"pipa_convert: other people's weights in, ours out, and what is said on the way"
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from pipa import checkpoints as ck
from pipa.cli import pipa_convert, pipa_predict
from pipa.labels import label_space
from pipa.models import daformer, light
from pipa.weights.names import to_hf
from apart import python

def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)

@pytest.fixture
def command(tmp_path):
    "The command as it is installed: a script of its name that calls it"
    (tmp_path/'pipa_convert').write_text('import sys\nfrom pipa.cli import pipa_convert\nif __name__=="__main__": sys.exit(pipa_convert())\n')
    return lambda *args: python(tmp_path/'pipa_convert', *args, cwd=tmp_path, timeout=900)

@pytest.fixture
def published(tmp_path):
    nets = dict(model=daformer('mit_b0', 2, 8), ema_model=daformer('mit_b0', 2, 8))
    state = {f'{o}.{k}':v for o,n in nets.items() for k,v in n.state_dict().items()} | {'model.cls_head.3.weight':torch.ones(1), 'project.0.bias':torch.ones(1)}
    torch.save(dict(state_dict=state, meta=dict(CLASSES=('road','car'))), tmp_path/'gta.pth')
    return nets

def test_a_published_teacher_becomes_ours(command, published, tmp_path):
    p = command('gta.pth', '--which', 'teacher', '--size', '64x128')
    assert p.returncode==0, p.stderr
    lines = p.stdout.splitlines()
    assert lines[0]=="gta.pth: daformer('mit_b0', n_out=2, dim=8)" and lines[-1]=='Written: gta.safetensors'
    n = len(published['model'].state_dict())
    assert f'{n:6} mapped' in p.stdout and f'{n+2:6} left out' in p.stdout and 'ema_model.backbone' in p.stdout
    net,meta = ck.load(tmp_path/'gta.safetensors')
    assert same(net.state_dict(), published['ema_model'].state_dict())
    assert ck.space_of(meta).codes==['road','car'] and (meta['size'], meta['which'], meta['spec']['make'])==('64x128', 'teacher', 'daformer')

def test_what_is_wrong_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path('x.pth').write_text('hello '*20)
    with pytest.raises(SystemExit) as e: pipa_convert('x.pth')
    assert str(e.value).startswith('pipa: `x.pth` is not a file of weights') and '\n' not in str(e.value) and not capsys.readouterr().out

@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = light('mit_b0', n_out=3)
    ck.save('w.safetensors', net, label_space(['a','b','c']), size='64x64', method='pipa', which='student')
    return net

@pytest.mark.parametrize('to,out', [('hf','w_hf'), ('official','w_official.pth')])
def test_ours_goes_out_and_comes_home(own, to, out, capsys):
    pipa_convert('w.safetensors', to=to)
    assert f'Written: {out}' in capsys.readouterr().out
    pipa_convert(out, out='back.safetensors')
    net,meta = ck.load('back.safetensors')
    assert same(net.state_dict(), own.state_dict()) and ck.space_of(meta).codes==['a','b','c']

def test_what_the_header_says_is_kept(own):
    pipa_convert('w.safetensors', out='v.safetensors')
    a,b = [ck.load(o)[1] for o in ('w.safetensors','v.safetensors')]
    assert b.pop('made_by')=='pipa_convert' and a==b and b['method']=='pipa'

def test_names_of_classes_can_be_told(own):
    torch.save(to_hf(own.state_dict()), 'hub.bin')
    Path('codes.txt').write_text('sky\nroad\ncar\n')
    pipa_convert('hub.bin', classes='codes.txt')
    assert ck.space_of(ck.load('hub.safetensors')[1]).codes==['sky','road','car']
    with pytest.raises(SystemExit, match='has 3 classes and `--classes cityscapes` names 19'): pipa_convert('hub.bin', classes='cityscapes')

@pytest.mark.parametrize('kw,word', [(dict(to='onnx'), '--to onnx'), (dict(), 'is the file that is read'), (dict(which='teacher'), 'holds the student alone'), (dict(size='12', out='x'), '--size 12'), (dict(classes='mars', out='x'), 'mars')])
def test_slips_of_the_pen(own, kw, word):
    before = Path('w.safetensors').read_bytes()
    with pytest.raises(SystemExit, match=word): pipa_convert('w.safetensors', **kw)
    assert Path('w.safetensors').read_bytes()==before and not Path('x').exists()

def test_transformers_has_no_daformer(published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match='only `segformer`'): pipa_convert('gta.pth', to='hf')
    assert not Path('gta_hf').exists()

def test_other_peoples_nets_label_pictures(published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (70,90,3), np.uint8)).save('street.png')
    with pytest.raises(SystemExit, match='give one, such as --size'): pipa_predict('street.png', 'gta.pth')
    pipa_predict('street.png', 'gta.pth', size='64x96')
    labels = [np.array(Image.open(p)) for p in Path('predictions').rglob('*.png')]
    assert labels and any(o.ndim==2 and o.shape==(70,90) and set(np.unique(o))<={0,1} for o in labels)

@pytest.mark.parametrize('names,says', [(None, 'numbers for names'), (['road','road'], 'the name `road` twice'), (['a','b','c'], '3 names, and the net 2 classes')])
def test_folders_without_names_say_what_to_do(names, says, tmp_path, monkeypatch, capsys):
    import json
    from pipa.cli import pipa_eval, pipa_export
    monkeypatch.chdir(tmp_path)
    ck.save_hf('hub', light('mit_b0', n_out=2))
    Path('hub/config.json').write_text(json.dumps(dict(id2label=dict(enumerate(names or ['LABEL_0','LABEL_1'])))))
    Image.fromarray(np.zeros((64,64,3), np.uint8)).save('a.png')
    for f in (lambda: pipa_predict('a.png', 'hub', size='64x64'), lambda: pipa_eval('hub'), lambda: pipa_export('hub', size='64x64')):
        with pytest.raises(SystemExit, match=f'`id2label` of `config.json` has.*{says}.*`pipa_convert hub --classes codes.txt`') as e: f()
        assert 'hub' in str(e.value) and '\n' not in str(e.value)
    Path('codes.txt').write_text('road\ncar\n')
    pipa_convert('hub', classes='codes.txt', size='64x64')
    pipa_predict('a.png', 'hub.safetensors')
    assert ck.space_of(ck.load('hub.safetensors')[1]).codes==['road','car'] and 'no_classes' not in ck.read('hub.safetensors')[1]
