"Commands: a run folder that tells everything, pictures of any size, a study that goes on, and errors of one line"
import io, json, os, stat, subprocess, sys, textwrap
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from pipa import cli
from pipa.learner import method_cbs
from pipa.runs import options, plan, record, run as runs, score
from pipa.sets import named
from pipa.checkpoints import load, space_of
from pipa.labels import space
from apart import python
from tiny import city

codes = space('minicity').codes
env = dict(os.environ, OMP_NUM_THREADS='1', MPLBACKEND='agg')
small = ['--epochs=1', '--unlabelled=0', '--steps=1', '--bs=2', '--size=64x64', '--crop=64x64', '--start=0', '--thresh=.1', '--recipe=off']
opts = dict(epochs=1, unlabelled=0, steps=1, bs=2, size='64x64', crop='64x64', start=0, thresh=.1)

def script(name):
    f = Path(sys.executable).with_name(name)
    if not f.exists(): pytest.skip(f'the command {name} is not installed beside {sys.executable}: pip install -e .')
    return str(f)

def xdg(cwd): return str(Path(cwd).parent/'xdg')
def run(name, *args, cwd): return python(script(name), *args, cwd=cwd, OMP_NUM_THREADS=1, MPLBACKEND='agg', XDG_CACHE_HOME=xdg(cwd))

@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "A folder as the manual describes it"
    home = city(tmp_path_factory.mktemp('cli')/'city', n=3, size=(64,64))
    for a,b in (('game','source'), ('real','target')): (home/a).rename(home/b)
    (home/'valid').mkdir()
    for sub in ('images', 'masks'):
        (home/'valid'/sub).mkdir()
        for i in (1,2): (home/'valid'/sub/f'{i}.png').write_bytes((home/'target'/sub/f'{i}.png').read_bytes())
    (home/'codes.txt').write_text('\n'.join(codes))
    return home

@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'xdg'))
    monkeypatch.delenv('PIPA_DEBUG', raising=False)
    (tmp_path/'here').mkdir(); monkeypatch.chdir(tmp_path/'here')

@pytest.fixture(scope='module')
def done(data, tmp_path_factory):
    "The main command, once, as a user calls it"
    cwd = tmp_path_factory.mktemp('run')
    p = subprocess.run([script('pipa_train'), f'--data={data}', '--seed=3', *small, '--patch=.25'], cwd=cwd, env=dict(env, XDG_CACHE_HOME=xdg(cwd)), capture_output=True, text=True, timeout=300)
    return p,cwd/f'runs/{data.name}_pipa_seed3'

def files(out): return {p.absolute() for p in Path(out).rglob('*') if p.is_file()}

# pipa_train

def test_run_folder(done):
    p,out = done
    assert p.returncode==0, p.stderr
    names = {o.name for o in out.iterdir()}
    assert names=={'weights.safetensors', 'teacher.safetensors', 'metrics.csv', 'config.json', 'classes.csv', 'result.png', 'curves.png', 'row.json'}
    tail = p.stdout.splitlines()
    assert f'In {out.resolve()}:' in tail and all(f'  {n}' in tail for n in names)
    assert all(c in p.stdout for c in ('teacher_miou', 'patch_contrast', *codes))

def test_files_of_a_run(done, data):
    out = done[1]
    df = pd.read_csv(out/'metrics.csv')
    assert [*df]==['epoch','train_loss','valid_loss','pair','mix','pixel_contrast','patch_contrast','miou','teacher_miou','pixel_n','patch_n','time'] and len(df)==1
    c = json.loads((out/'config.json').read_text())
    assert (c['seed'], c['method'], c['data'], c['epochs'], c['steps'], c['bs'], c['size'], c['patch'], c['arch'])==(3, 'pipa', str(data), 1, 1, 2, '64x64', .25, 'mit_b0')
    assert c['versions']['torch']==torch.__version__.split('+')[0] or c['versions']['torch']==torch.__version__
    assert c['versions']['python'].startswith('3.') and c['versions']['fastai'] and c['versions']['pipa'] and c['command'].startswith('pipa_train --data')
    t = pd.read_csv(out/'classes.csv')
    assert t['class'].tolist()==codes and {'iou', 'share'}<=set(t) and abs(t.share.sum()-1)<1e-6
    r = json.loads((out/'row.json').read_text())
    assert (r['method'], r['seed'], r['epochs'], r['version'])==('pipa', 3, 1, record.made_of()) and r['version'].startswith(f"pipa {c['versions']['pipa']}") and abs(r['miou_student']-df.miou[0])<1e-5 and abs(r['miou_teacher']-df.teacher_miou[0])<1e-5
    np.testing.assert_allclose([r[k] for k in codes], t.iou)
    assert abs(np.nanmean(t.iou)-r['miou_student'])<1e-6
    for f in ('result.png', 'curves.png'):
        a = np.array(Image.open(out/f).convert('RGB'))
        assert a.shape[0]>100 and a.shape[1]>200 and a.std()>5

def test_weights_give_the_numbers_again(done, data):
    net,meta = load(done[1]/'weights.safetensors')
    assert space_of(meta).codes==codes and meta['size']=='64x64' and meta['method']=='pipa'
    assert not any(k.startswith(('proj_head.', 'project.')) for k in net.state_dict())
    from pipa.data import folder
    from pipa.infer import evaluate
    from pipa.metrics import miou
    valid = folder(data/'valid/images', data/'valid/masks', data/'codes.txt')
    r = json.loads((done[1]/'row.json').read_text())
    for f,k in (('weights', 'miou_student'), ('teacher', 'miou_teacher')):
        assert abs(miou(evaluate(load(done[1]/f'{f}.safetensors')[0], valid, (64,64), progress=False))-r[k])<1e-5

@pytest.mark.parametrize('method', ['source', 'oracle'])
def test_methods_without_teacher(data, method, capsys, placed):
    cli.pipa_train(method, str(data), out='o', **opts)
    out = Path('o')
    assert files(out)-placed=={(out/'metrics.csv').absolute()}, 'all but the log, which grows, is whole or not there'
    assert not (out/'teacher.safetensors').exists() and (out/'weights.safetensors').exists()
    assert [*pd.read_csv(out/'metrics.csv')]==['epoch','train_loss','valid_loss','pair','miou','time']
    assert np.isnan(json.loads((out/'row.json').read_text())['miou_teacher'])
    assert str(out.resolve()) in capsys.readouterr().out

def test_oracle_reads_the_targets_labels_and_nobody_else_does(data, tmp_path):
    for o in ('oracle', 'oracle+fda'): assert named.domains(str(data), o)[0].masks==[*sorted((data/'target/masks').iterdir())]
    src,tgt,val = named.domains(str(data), 'pipa')
    assert tgt.masks is None and 'source' in str(src.masks[0]) and 'valid' in str(val.masks[0])

def test_a_run_never_overwrites_another(tmp_path):
    (tmp_path/'r').mkdir(); (tmp_path/'r/old').write_text('x')
    assert runs.new_folder(tmp_path/'r').name=='r_2'
    assert runs.new_folder(tmp_path/'r').name=='r_2', 'an empty folder is taken'
    (tmp_path/'r_2/old').write_text('x')
    assert runs.new_folder(tmp_path/'r').name=='r_3' and (tmp_path/'r/old').read_text()=='x'

# errors

def test_wrong_argument_from_the_shell(data, tmp_path):
    p = run('pipa_train', f'--data={data}', '--size=100x100', cwd=tmp_path/'here')
    assert p.returncode!=0 and p.stderr.strip().splitlines()==['pipa: `--size 100x100`: both sides must be multiples of 32, at least 64.']
    assert not p.stdout.strip() and not [*(tmp_path/'here').iterdir()]

def broken(data, what, tmp_path):
    import shutil
    home = tmp_path/'broken'; shutil.copytree(data, home)
    if what=='no codes': (home/'codes.txt').unlink()
    if what=='no source': shutil.rmtree(home/'source')
    if what=='no mask': (home/'source/masks/1.png').unlink()
    if what=='cut mask': (home/'source/masks/1.png').write_bytes((home/'source/masks/1.png').read_bytes()[:90])
    if what=='few codes': (home/'codes.txt').write_text('a\nb')
    return home

@pytest.mark.parametrize('kw,says', [(dict(method='pippa'), 'no method `pippa`'), (dict(size='64'), 'write it as 128x256'), (dict(size='32x64'), 'at least 64'),
    (dict(crop='60x64'), 'multiples of 32'), (dict(net='unet'), 'no net `unet`'), (dict(arch='mit_b9'), 'mit_b9'), (dict(data='nowhere'), 'neither `minicity` nor a folder')],
    ids=str)
def test_wrong_arguments(data, kw, says, tmp_path):
    with pytest.raises(SystemExit) as e: cli.pipa_train(**{'data':str(data), **opts, **kw})
    assert says in e.value.code and e.value.code.startswith('pipa: ') and '\n' not in e.value.code
    assert not [*(tmp_path/'here').iterdir()]

@pytest.mark.parametrize('what,says', [('no codes', 'has no `codes.txt`'), ('no source', 'is not a folder'), ('no mask', 'have no mask'), ('cut mask', "can't be read as a mask"),
    ('few codes', 'holds the value')])
def test_wrong_folders(data, what, says, tmp_path):
    with pytest.raises(SystemExit) as e: cli.pipa_train(data=str(broken(data, what, tmp_path)), **opts)
    assert says in e.value.code and '\n' not in e.value.code and not [*(tmp_path/'here').iterdir()]

def test_debug_shows_all(data, monkeypatch):
    monkeypatch.setenv('PIPA_DEBUG', '1')
    with pytest.raises(ValueError, match='no method'): cli.pipa_train(method='pippa', data=str(data))

# pipa_predict

def test_predict_from_the_shell(done, tmp_path):
    rng = np.random.default_rng(0)
    for name,hw in {'a.png':(37,91), 'b/c.jpg':(130,64), 'd.png':(64,64)}.items():
        (tmp_path/'pics'/name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*hw,3), dtype=np.uint8)).save(tmp_path/'pics'/name)
    p = run('pipa_predict', tmp_path/'pics', '--weights', done[1]/'weights.safetensors', '--out=seg', cwd=tmp_path/'here')
    assert p.returncode==0, p.stderr
    out,sp = tmp_path/'here/seg',space('minicity')
    assert len([*out.rglob('*.png')])==9
    for name,hw in {'a':(37,91), 'b/c':(130,64), 'd':(64,64)}.items():
        y,c = (np.array(Image.open(out/f'{name}_{k}.png')) for k in ('labels', 'color'))
        assert y.shape==hw and y.dtype==np.uint8 and y.max()<11 and (c==sp.color(y)).all()
        assert np.array(Image.open(out/f'{name}_overlay.png')).shape==(*hw,3)

def test_predict_one_image_whole_and_by_windows(done, tmp_path):
    w = str(done[1]/'weights.safetensors')
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (70,150,3), dtype=np.uint8)).save(tmp_path/'a.png')
    cli.pipa_predict(str(tmp_path/'a.png'), w, 'whole'); cli.pipa_predict(str(tmp_path/'a.png'), w, 'slid', slide=True)
    a,b = (np.array(Image.open(f'{k}/a_labels.png')) for k in ('whole', 'slid'))
    assert a.shape==b.shape==(70,150)
    from pipa.infer import predict
    net = load(w)[0]
    assert (a==predict(net, tmp_path/'a.png', (64,64))).all() and (b==predict(net, tmp_path/'a.png', mode='slide', crop=(64,64))).all()

def test_predict_says_what_is_wrong(done, tmp_path):
    w = str(done[1]/'weights.safetensors')
    for args,says in (((str(tmp_path/'no.png'), w), 'no file or folder'), ((str(tmp_path), 'no.safetensors'), 'no.safetensors')):
        with pytest.raises(SystemExit) as e: cli.pipa_predict(*args)
        assert says in e.value.code and '\n' not in e.value.code
    (tmp_path/'pics').mkdir(); (tmp_path/'pics/bad.png').write_bytes(b'no picture')
    Image.fromarray(np.zeros((64,64,3), np.uint8)).save(tmp_path/'pics/good.png')
    with pytest.raises(SystemExit, match='1 of 2 images could not be read'): cli.pipa_predict(str(tmp_path/'pics'), w, 'o')
    assert Path('o/good_labels.png').exists() and not Path('o/bad_labels.png').exists()

def test_predict_for_a_server(done, tmp_path):
    from pipa.checkpoints import save
    from pipa.models import light
    net = light('mit_b0', n_out=19); save(tmp_path/'city.safetensors', net, space('synthia'), size='64x64')
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (70,150,3), dtype=np.uint8)).save(tmp_path/'a_leftImg8bit.png')
    p = run('pipa_predict', tmp_path/'a_leftImg8bit.png', '--weights', tmp_path/'city.safetensors', '--ids=raw', '--out=server', '--amp', '--flip', cwd=tmp_path/'here')
    assert p.returncode==0, p.stderr
    assert [o.name for o in (tmp_path/'here/server').iterdir()]==['a_leftImg8bit.png'] and f'1 images labelled, in {tmp_path/"here/server"}' in p.stdout
    from pipa.infer import predict
    y = space('cityscapes').encode(Image.open(tmp_path/'here/server/a_leftImg8bit.png'))
    assert (y==predict(net.eval(), tmp_path/'a_leftImg8bit.png', (64,64), amp=True, flip=True)).mean()>.999
    with pytest.raises(SystemExit, match='no `id` ids'): cli.pipa_predict(str(tmp_path/'a_leftImg8bit.png'), str(tmp_path/'city.safetensors'), ids='id')

def test_folder_of_a_run_and_its_teacher(done, tmp_path):
    for teacher,name in ((False, 'weights'), (True, 'teacher')):
        for o in (done[1], done[1]/'weights.safetensors'):
            if not o.is_dir() and not teacher: continue
            net,meta,sp,file = score.open_net(str(o), teacher)
            want = load(done[1]/f'{name}.safetensors')[0].state_dict()
            assert file==done[1]/f'{name}.safetensors' and sp.codes==codes and all(torch.equal(v, want[k]) for k,v in net.state_dict().items())
    with pytest.raises(FileNotFoundError, match='teacher.safetensors'): score.open_net(str(tmp_path), True)

# pipa_eval

def test_eval_from_the_shell_gives_the_numbers_of_training(done, data, tmp_path):
    p = run('pipa_eval', done[1], f'--data={data}', '--teacher', cwd=tmp_path/'here')
    assert p.returncode==0, p.stderr
    out = tmp_path/f'here/runs/eval_{data.name}_teacher'
    assert {o.name for o in out.iterdir()}=={'classes.csv', 'confusion.csv', 'confusion.png', 'row.json'} and f'In {out}:' in p.stdout
    r,trained = (json.loads((o/'row.json').read_text()) for o in (out, done[1]))
    assert abs(r['miou']-trained['miou_teacher'])<1e-5 and r['images']==2 and r['method']=='pipa' and r['command'].startswith('pipa_eval') and r['version']
    t,cm = pd.read_csv(out/'classes.csv'),pd.read_csv(out/'confusion.csv', index_col='truth')
    assert [*t]==['class', 'iou', 'acc', 'pixels', 'predicted', 'share', 'note'] and t['class'].tolist()==codes==[*cm]==[*cm.index]
    c = cm.to_numpy()
    assert (t.pixels==c.sum(1)).all() and (t.predicted==c.sum(0)).all()
    with np.errstate(invalid='ignore'): iou = np.diag(c)/(c.sum(0)+c.sum(1)-np.diag(c))
    np.testing.assert_allclose(t.iou, iou); np.testing.assert_allclose([r[k] for k in codes], iou)
    assert f"miou {100*np.nanmean(iou):.2f}, mean accuracy" in p.stdout and f'over {np.isfinite(iou).sum()} classes' in p.stdout
    absent = [k for k,v in zip(codes, iou) if np.isnan(v)]
    assert ('absent and left out: '+', '.join(absent) in p.stdout)==bool(absent)
    a = np.array(Image.open(out/'confusion.png').convert('RGB')); assert a.shape[0]>300 and a.std()>5

def test_eval_by_windows_of_two_folders(done, data, capsys, placed):
    from pipa.data import folder
    from pipa.infer import evaluate
    w = str(done[1]/'weights.safetensors')
    cli.pipa_eval(w, images=str(data/'source/images'), masks=str(data/'source/masks'), mode='slide', crop='64x64', stride='32x32', bs=2, out='o')
    net = load(w)[0]; dom = folder(data/'source/images', data/'source/masks', codes)
    cm = pd.read_csv('o/confusion.csv', index_col='truth').to_numpy()
    assert (cm==evaluate(net, dom, mode='slide', crop=64, stride=32, progress=False).numpy()).all() and cm.sum()>0
    assert 'miou' in capsys.readouterr().out
    cli.pipa_eval(w, data=str(data), out='o')
    assert Path('o_2/row.json').exists(), 'an earlier result is kept'
    assert len(files('o'))==4 and files('o')|files('o_2')<=placed, 'whole or not there'

def test_eval_with_a_label_space_of_its_own(tmp_path, capsys):
    from pipa.checkpoints import save
    from pipa.labels import LabelSpace
    from pipa.models import light
    sp = LabelSpace('mine', ['low', 'high', 'none'], ids={40:0, 200:1, 9:2, 5:255}, subsets=dict(two=(0,1)))
    save(tmp_path/'w.safetensors', light('mit_b0', n_out=3), sp, size='64x64')
    for o in ('images', 'masks', 'train'): (tmp_path/o).mkdir()
    for i,hw in enumerate([(64,64), (50,90)]):
        y = np.random.default_rng(i).choice([40, 200, 5], hw).astype(np.uint8)
        Image.fromarray(np.repeat(y[...,None], 3, -1)).save(tmp_path/f'images/{i}.png'); Image.fromarray(y).save(tmp_path/f'masks/{i}.png')
        Image.fromarray(sp.encode(y)).save(tmp_path/f'train/{i}.png')
    kw = dict(weights=str(tmp_path/'w.safetensors'), images=str(tmp_path/'images'))
    cli.pipa_eval(masks=str(tmp_path/'masks'), out='raw', **kw)
    said = capsys.readouterr().out
    cli.pipa_eval(masks=str(tmp_path/'train'), trainids=True, out='train', **kw)
    a,b = (pd.read_csv(f'{o}/confusion.csv', index_col='truth').to_numpy() for o in ('raw', 'train'))
    assert (a==b).all() and a.sum()==sum((np.array(Image.open(o))!=5).sum() for o in (tmp_path/'masks').iterdir()) and a[2].sum()==0
    r = json.loads(Path('raw/row.json').read_text())
    assert 'two ' in said and r['two']==pytest.approx((r['low']+r['high'])/2)

def test_eval_on_minicity(done, tmp_path, monkeypatch):
    from pipa import data as D
    asked = {}
    def few(*a, **kw): asked.update(kw); return D.minicity(*a, n=2, root=tmp_path, **kw)
    monkeypatch.setattr(score, 'minicity', few)
    cli.pipa_eval(str(done[1]), out='o')
    assert asked['size']==(64,64) and json.loads(Path('o/row.json').read_text())['images']==2

def test_eval_on_a_published_set_by_name(tmp_path, monkeypatch, capsys):
    from pipa.checkpoints import save
    from pipa.models import light
    monkeypatch.setenv('PIPA_DATA', str(tmp_path/'root')); rng = np.random.default_rng(0)
    for i in range(2):
        name = f'ulm/ulm_00000{i}_000019'
        for kind,end,a in (('leftImg8bit', 'leftImg8bit', rng.integers(0, 256, (64,128,3))), ('gtFine', 'gtFine_labelIds', rng.integers(0, 34, (64,128)))):
            f = tmp_path/f'root/cityscapes/{kind}/val/{name}_{end}.png'; f.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(a.astype(np.uint8)).save(f)
    save(tmp_path/'w.safetensors', light('mit_b0', n_out=19), space('synthia'), size='64x64')
    cli.pipa_eval(str(tmp_path/'w.safetensors'), data='cityscapes', out='o')
    ys = [space('cityscapes').encode(Image.open(f)) for f in (tmp_path/'root/cityscapes/gtFine').rglob('*.png')]
    t,r = pd.read_csv('o/classes.csv'),json.loads(Path('o/row.json').read_text())
    assert t.pixels.tolist()==sum(np.bincount(y.ravel(), minlength=256)[:19] for y in ys).tolist() and r['images']==2 and r['benchmark']=='cityscapes'
    for k in ('miou16', 'miou13'): assert r[k]==pytest.approx(t.iou[list(space('synthia').subsets[k])].mean())
    assert 'miou16' in capsys.readouterr().out

def test_student_or_teacher_of_other_peoples_files(tmp_path):
    from pipa.checkpoints import save_official
    from pipa.models import daformer
    nets = {k: daformer('mit_b0', n_out=19) for k in ('model', 'ema_model')}
    states = {k: torch.load(save_official(tmp_path/f'{k}.pth', n), weights_only=True)['state_dict'] for k,n in nets.items()}
    both = {f'{k}.{n}':v for k,s in states.items() for n,v in s.items()}
    torch.save(dict(state_dict=both, meta=dict(CLASSES=tuple(space('cityscapes').codes))), tmp_path/'both.pth')
    for teacher,k in ((False, 'model'), (True, 'ema_model')):
        net,_,sp,file = score.open_net(str(tmp_path/'both.pth'), teacher)
        assert file.name=='both.pth' and sp.codes==space('cityscapes').codes
        want = nets[k].state_dict()
        assert all(torch.equal(v, want[n]) for n,v in net.state_dict().items())

def test_eval_says_what_is_wrong(done, data, tmp_path):
    w = str(done[1]/'weights.safetensors'); (tmp_path/'c.txt').write_text('a\nb'); (tmp_path/'m').mkdir()
    for i in (1,2): Image.fromarray(np.full((64,64), 255, np.uint8)).save(tmp_path/f'm/{i}.png')
    valid = str(data/'valid/images')
    for kw,says in ((dict(data='nowhere'), 'neither `minicity` nor a folder'), (dict(data=str(tmp_path)), 'is not a folder'), (dict(images='x'), 'belong together'),
                    (dict(data=str(data), codes=str(tmp_path/'c.txt')), 'the same classes'), (dict(images=valid, masks=str(tmp_path/'m')), 'nothing to score'),
                    (dict(data=str(data), mode='slice'), "`--mode` is 'slice': choose one of whole, slide"), (dict(data=str(data), crop='64x64'), 'add `--mode slide`'),
                    (dict(data=str(data), mode='slide', stride='0x9'), '`--stride 0x9`'), (dict(data=str(data), mode='slide', crop='9'), '`--crop 9` is not'), (dict(data=str(data), size='100x100'), 'multiples of 32')):
        with pytest.raises(SystemExit) as e: cli.pipa_eval(w, **kw)
        assert says in e.value.code and e.value.code.startswith('pipa: ') and '\n' not in e.value.code, kw
    assert not [*Path('.').iterdir()], 'nothing is left behind'

# pipa_export

@pytest.mark.slow
def test_export_from_the_shell(done, data, tmp_path):
    pytest.importorskip('onnxruntime')
    p = run('pipa_export', done[1]/'weights.safetensors', '--out', tmp_path/'net.onnx', '--free=batch', cwd=tmp_path/'here')
    assert p.returncode==0, p.stderr
    assert 'max_diff' in p.stdout and f'Written: {tmp_path/"net.onnx"}' in p.stdout and '64×64 alone' in p.stdout
    from pipa.export import load_graph
    from pipa.infer import predict
    net,meta = load_graph(tmp_path/'net.onnx')
    img = np.random.default_rng(0).integers(0, 256, (64,64,3), dtype=np.uint8)
    assert meta['codes']==codes and meta['method']=='pipa' and (predict(net, img)==predict(load(done[1]/'weights.safetensors')[0], img)).mean()>.999
    cli.pipa_eval(str(tmp_path/'net.onnx'), str(data), out='a'); cli.pipa_eval(str(done[1]), str(data), out='b')
    a,b = (json.loads(Path(f'{o}/row.json').read_text()) for o in 'ab')
    assert a['miou']==pytest.approx(b['miou'], abs=1e-3)
    for kw,says in ((dict(weights=str(tmp_path/'net.onnx')), 'exported already'), (dict(weights=str(done[1]), out='x.pth'), 'neither `.onnx` nor `.pt2`'), (dict(weights='no'), 'no file')):
        with pytest.raises(SystemExit, match=says): cli.pipa_export(**kw)

def test_export_that_differs_is_not_passed_over(done, monkeypatch, capsys):
    monkeypatch.setattr(cli.export, 'export_net', lambda dest, *a, **k: Path(dest).write_bytes(b'pipa_export'))
    for diff,largest,bad in ((.01, .5, True), (.01, 2000., False)):
        monkeypatch.setattr(cli.export, 'check_export', lambda *a: pd.DataFrame([dict(images=1, size='64×64', max_diff=diff, largest=largest, agreement=1.)]))
        if not bad: cli.pipa_export(str(done[1]), out='x.onnx'); continue
        with pytest.raises(SystemExit, match="don't use it"): cli.pipa_export(str(done[1]), out='x.onnx')
    assert '1.0e-02' in capsys.readouterr().out

def test_export_without_its_packages(done, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    with pytest.raises(SystemExit, match=r"pip install .*\[onnx\]"): cli.pipa_export(str(done[1]), out='x.onnx')
    assert not Path('x.onnx').exists()

# validation images of several sizes

def test_train_with_validation_images_of_several_sizes(data, tmp_path):
    import shutil
    home = tmp_path/'mixed'; shutil.copytree(data, home)
    for sub,how in (('images', Image.BILINEAR), ('masks', Image.NEAREST)):
        for f,size in (('2', (128,64)), ('3', (80,200))): Image.open(home/f'valid/{sub}/1.png').resize(size, how).save(home/f'valid/{sub}/{f}.png')
    cli.pipa_train('pipa', str(home), out='o', **opts)
    r = json.loads(Path('o/row.json').read_text())
    from pipa.data import folder
    from pipa.infer import evaluate
    from pipa.metrics import miou
    dom = folder(home/'valid/images', home/'valid/masks', home/'codes.txt')
    from pipa.data import eval_dl
    assert len(dom)==3 and [eval_dl(o, (64,64), usual=3).bs for o in (dom, dom.take([0]))]==[1,3]
    assert miou(evaluate(load('o/weights.safetensors')[0], dom, (64,64), progress=False))==pytest.approx(r['miou_student'], abs=1e-3)
    assert np.array(Image.open('o/result.png')).shape[0]>300, 'a row for each of the three'

# pipa_study

@pytest.fixture
def fake(tmp_path, monkeypatch):
    "A `pipa_train` that takes notes instead of hours; patch with seed 1 always fails"
    (tmp_path/'bin').mkdir()
    f = tmp_path/'bin/pipa_train'
    f.write_text(f'#!{sys.executable}\n' + textwrap.dedent("""
        import json, shlex, sys
        from pathlib import Path
        o = dict(a[2:].split('=', 1) for a in sys.argv[1:])
        open(Path(__file__).with_name('calls'), 'a').write(' '.join(sys.argv[1:])+'\\n')
        if (o['method'], o['seed'])==('patch', '1'): sys.exit('pipa: out of luck')
        Path(o['out'], 'row.json').write_text(json.dumps(dict(benchmark='minicity', method=o['method'], seed=int(o['seed']), epochs=2, miou_student=.123456, miou_teacher=float('nan'), command=shlex.join(['pipa_train', *sys.argv[1:]]))))
        """))
    f.chmod(f.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, 'executable', str(tmp_path/'bin/python'))
    return lambda: (tmp_path/'bin/calls').read_text().splitlines() if (tmp_path/'bin/calls').exists() else []

@pytest.mark.parametrize('jobs', [1,2])
def test_study(fake, jobs, capsys):
    study = lambda **kw: cli.pipa_study('source,patch', '0,1', table='t/r.csv', runs='runs/s', jobs=jobs, args='--epochs=2 --data=x', **kw)
    with pytest.raises(SystemExit, match='1 of 4 runs failed'): study()
    df = pd.read_csv('t/r.csv')
    assert sorted(map(tuple, df[['method', 'seed']].values.tolist()))==[('patch',0), ('source',0), ('source',1)]
    assert (df.miou_student==.1235).all() and df.miou_teacher.isna().all() and len(fake())==4
    assert all('--epochs=2 --data=x' in c and '--threads=' in c for c in fake())
    assert 'patch with seed 1 failed' in capsys.readouterr().out and 'out of luck' in Path('runs/s/patch_seed1.log').read_text()
    with pytest.raises(SystemExit, match='1 of 1 runs failed'): study()
    assert len(fake())==5 and 'patch' in fake()[-1] and len(pd.read_csv('t/r.csv'))==3, 'only what is missing is run again'

def test_study_with_nothing_to_do(fake):
    Path('t.csv').write_text('method,seed\nsource,0\n')
    cli.pipa_study('source', '0', table='t.csv', runs='r')
    assert not fake() and Path('t.csv').read_text()=='method,seed\nsource,0\n'

def test_add_row_whole_or_not_at_all(tmp_path, monkeypatch):
    f = tmp_path/'a/t.csv'
    plan.add_row(f, dict(method='a', seed=0, x=.5))
    plan.add_row(f, dict(method='b', seed=1, x=float('nan'), extra='yes'))
    df = pd.read_csv(f)
    assert df.method.tolist()==['a','b'] and df.seed.tolist()==[0,1] and df.seed.dtype.kind=='i' and df.extra.isna().tolist()==[True,False]
    old = f.read_bytes()
    def cut(self, o, **kw): o.write(b'half'); raise OSError('disk full')
    monkeypatch.setattr(pd.DataFrame, 'to_csv', cut)
    with pytest.raises(OSError): plan.add_row(f, dict(method='c', seed=2))
    assert f.read_bytes()==old and [p.name for p in f.parent.iterdir()]==['t.csv']

@pytest.mark.parametrize('text,size', [('128x256', (128,256)), ('64X96', (64,96))])
def test_sizes(text, size): assert options.parse_size(text)==size

def test_study_of_hosts_terms_and_sweeps(fake):
    study = lambda **kw: cli.pipa_study('source,mic', '0,1', table='t.csv', runs='s', args='--epochs=2 --data=x', **kw)
    study(terms='none,both')
    df = pd.read_csv('t.csv')
    assert sorted(df.method)==sorted(['source','source+pipa','mic','mic+pipa']*2) and len(fake())==8
    study(terms='both,none'); assert len(fake())==8, 'nothing is missing'
    study(terms='both', sweep='patch=.01,.1,1 temp=.10,.2')
    assert len(fake())==8+2*2*3, 'the defaults .1 are in the table already'
    assert [c for c in fake() if '--patch=.01' in c and '--method=mic+pipa' in c and '--seed=1' in c] and Path('s/mic+pipa_seed0_patch=.01.log').exists()
    cli.pipa_study('pipa+mic', '1', table='t.csv', runs='s', args='--data=x --epochs=3'); assert len(fake())==21, 'three epochs are another run'
    cli.pipa_study('mic+pipa', '1', table='t.csv', runs='s', args='--data x --epochs 3 --patch 0.1 --threads 7'); assert len(fake())==21, 'the same in other words'

def test_study_reads_the_table_of_the_repository(fake):
    "Rows of the old form, without the columns host and terms, count"
    root = Path(__file__).resolve().parents[1]
    Path('t.csv').write_bytes((root/'data/results/minicity.csv').read_bytes())
    df,keys = pd.read_csv('t.csv'),plan.keys_of('t.csv')
    assert len(df) and len(keys)==len({*zip(df.method, df.seed, df.epochs)})
    for m,s,e in zip(df.method, df.seed, df.epochs): assert options.key(options.settings([f'--method={m}', f'--seed={s}', '--size=128x256', f'--epochs={e}'])) in keys
    assert options.key(options.settings(['--method=source', '--seed=0', '--epochs=77'])) not in keys

def test_study_goes_on_where_a_switch_is_gone(fake, monkeypatch):
    "Rows of a switch that was tried and taken out stay in the table, and stand in nobody's way"
    root,args = Path(__file__).resolve().parents[1],'--crop=64x64 --epochs=2 --steps=200 --start=150'
    Path('t.csv').write_bytes(old := (root/'data/results/knobs.csv').read_bytes())
    assert b'target=.968' in old and None in plan.keys_of('t.csv')
    monkeypatch.setattr(cli, 'domains', lambda *_: None)   # no city is drawn
    cli.pipa_study('daformer+pipa', '0,1,2', table='t.csv', runs='s', size='64x128', args=args)
    assert not fake() and Path('t.csv').read_bytes()==old
    cli.pipa_study('daformer+pipa', '77', table='t.csv', runs='s', size='64x128', args=args)
    assert len(fake())==1 and len(pd.read_csv('t.csv'))==len(pd.read_csv(io.BytesIO(old)))+1

@pytest.mark.parametrize('kw,says', [(dict(methods='mick'), 'no method `mick`'), (dict(methods='mic', terms='all'), 'no terms `all`'), (dict(methods='mic', sweep='temp'), 'names no values'), (dict(methods='mic', sweep='temp=cold'), 'cold')], ids=str)
def test_study_says_what_is_wrong_before_it_starts(fake, capsys, kw, says):
    with pytest.raises(SystemExit) as e: cli.pipa_study(**kw, table='t.csv', runs='s', args='--data=x')
    assert says in f'{e.value.code}{capsys.readouterr().err}' and not fake() and not Path('s').exists()

def test_study_knows_no_such_setting(fake, capsys):
    with pytest.raises(SystemExit): cli.pipa_study('mic', '0', table='t.csv', runs='s', sweep='w_pach=.1', args='--data=x')
    assert '--w_pach' in capsys.readouterr().err and not fake()

def test_settings_are_what_counts():
    a = options.settings('pipa_train --method=pipa --seed=0 --size=128x256 --threads=1')
    assert a==options.settings(['--terms', 'both', '--method', 'self_training', '--workers=3', '--out=there'])
    assert a['host']=='self_training' and a['terms']=='both' and a['pixel']==.1 and 'threads' not in a
    for o in ('--seed=1', '--lr=1e-3', '--temp=.2', '--data=x', '--form=paper'): assert options.settings(f'pipa_train {o}')!=options.settings('pipa_train')
    with pytest.raises(SystemExit): options.settings('pipa_train --from_the_future=3')
    with pytest.raises(ValueError, match='from_the_future=3` has an option that there isn.t any more'): plan.quiet_key(['--from_the_future=3'])

def test_host_under_terms(data):
    "A run of another host with PiPa on top, with every option that goes with the others: columns, row and settings"
    cli.pipa_train('mic', str(data), terms='both', out='o', temp=.2, form='paper', weight=.5, **opts | dict(unlabelled=2))
    r,cols = json.loads(Path('o/row.json').read_text()),[*pd.read_csv('o/metrics.csv')]
    assert (r['method'], r['host'], r['terms'])==('mic+pipa', 'mic', 'both')
    assert cols[3:-1]==['pair','mix','mic','pixel_contrast','patch_contrast','miou','teacher_miou','pixel_n','patch_n','entropy','info_max','agreement','overlap','density']
    for k in ('entropy','info_max','agreement','overlap','density'): assert abs(r[k]-pd.read_csv('o/metrics.csv')[k][0])<1e-4
    assert all(o in r['settings'].split() for o in ('temp=0.2', 'form=paper', 'weight=0.5', 'crop=64x64'))
    assert not [o for o in r['settings'].split() if o.split('=')[0] in ('method','terms','data','seed','epochs','unlabelled')]

def test_a_study_that_no_run_could_begin(data, capsys):
    with pytest.raises(SystemExit, match='`--crop 48x64`: both sides must be multiples of 32'):
        cli.pipa_study('pipa', '0', 't.csv', 'runs', size='64x64', args=f'--data={data} --crop=48x64')
    assert not Path('t.csv').exists() and not Path('runs').exists()

def test_hrda_as_a_host(data):
    "The name brings the net, with a detail box of half the image"
    cli.pipa_train('hrda+mic', str(data), terms='pixel', out='o', **opts)
    r,net = json.loads(Path('o/row.json').read_text()),load('o/weights.safetensors')[0]
    assert (r['method'], r['host'], r['terms'])==('hrda+mic+pixel', 'hrda+mic', 'pixel') and type(net).__name__=='HRDANet' and tuple(net.crop)==(32,32)

def test_discriminating_host_without_teacher(data):
    cli.pipa_train('advent', str(data), out='o', **opts)
    assert [*pd.read_csv('o/metrics.csv')][3:-1]==['pair','adv_ent','miou'] and 'entropy' not in json.loads(Path('o/row.json').read_text())

def test_pairs_of_published_sets(data, monkeypatch):
    from pipa.data import folder
    asked = []
    def game(path=None, labels=None): asked.append(('game', labels)); return folder(data/'source/images', data/'source/masks', data/'codes.txt')
    def town(path=None, split='train', labels=None):
        asked.append(('town', split, labels)); return folder(data/'valid/images', data/'valid/masks' if labels else None, data/'codes.txt')
    monkeypatch.setattr(named.layouts, 'game', game, raising=False); monkeypatch.setattr(named.layouts, 'town', town, raising=False)
    s,t,v = named.domains('game:town', 'mic')
    assert asked==[('game',True), ('town','train',False), ('town','val',True)] and t.masks is None and s.masks and v.masks
    assert named.domains('game:town', 'oracle')[0].masks
    for bad in ('game:nowhere', 'os:town', 'uda_dls:town', ':town', 'game:'):
        with pytest.raises(ValueError, match='no data set of `pipa.data`'): named.domains(bad, 'mic')

def test_preset_takes_the_published_numbers(monkeypatch):
    from fastcore.basics import AttrDict
    o = AttrDict(method='daformer', **options.settings('pipa_train --method=daformer --terms=both --preset=pipa_daformer --alpha=.999 --epochs=15 --steps=4000'))
    assert options.data_args(o, None, None)['size']==(640,640)
    kw = options.method_args(o); assert options.fit_args(o)==dict(head_mult=10., warmup=1500/60_000)
    cbs = {c.name:c for c in method_cbs('daformer', **kw)}
    pt,px = cbs['patch_contrast'],cbs['pixel_contrast']
    assert (pt.size, pt.thresh, pt.start, pt.scale, px.max_views, px.min_pixels)==((720,720), .9, 10_000, (1.28,3.2), 100, None)
    for p,scale in dict(daformer=(1.6,4.), hrda=(.8,2.), pipa_hrda=(.8,2.)).items():   # 1638 to 4096 of 2048 columns
        assert {c.name:c for c in method_cbs('daformer', **options.method_args(AttrDict(o, preset=p)))}['patch_contrast'].scale==pytest.approx(scale), p

def test_before_looks_at_images_that_are_far_apart(tmp_path):
    from fastai.data.core import Datasets
    from pipa.data import EvalDL
    def dl(n, bs): return EvalDL(Datasets(list(range(n)), tfms=[[], []]), bs=bs)
    def seen(n, bs): return [int(o) for b in runs.Before(dl(n, bs)).batches for o in b[0]]
    assert seen(101, 3)==[0,33,67,100] and seen(4, 1)==[0,1,2,3] and seen(2, 4)==[0,1]
