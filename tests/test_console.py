"What is told ends nothing: code pages, closed and broken outputs, names that steer a terminal; a tilde is the home; no process that nobody asked for"
import configparser, contextlib, importlib, io, json, os, runpy, subprocess, sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from pipa import basics, cli
from pipa.bench import parts
from pipa.checkpoints import load, save
from pipa.labels import label_space, space
from pipa.models import light
from pipa.runs import plan, run as runs
from pipa.sets import named
from apart import forked, python
from tiny import city

root = Path(__file__).resolve().parents[1]
cfg = configparser.ConfigParser(delimiters=['=']); cfg.read(root/'settings.ini', encoding='utf8')
scripts = dict(o.split('=') for o in cfg['DEFAULT']['console_scripts'].split())
def function(name): mod,fn = scripts[name].split(':'); return getattr(importlib.import_module(mod), fn)

pytestmark = pytest.mark.filterwarnings('ignore:Glyph')   # fonts lack such names
tiny = dict(epochs=1, steps=1, bs=1, size='64x64', method='source', unlabelled=0, workers=0)
chinese = ['天空','道路','汽车','→','Straße',*'abcdef']   # as many as the city has
hostile = ['x\x1b]0;owned\x07\x1b[2J','y\x9b31mz','\u202egnp',*'abcdefgh']

def towns(home, codes):
    city(home, n=2, size=(64,64))
    for a,b in (('game','source'), ('real','target')): (home/a).rename(home/b)
    (home/'valid').symlink_to(home/'target')
    (home/'codes.txt').write_text('\n'.join(codes), encoding='utf8')
    return home

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    w = tmp_path_factory.mktemp('console')
    torch.manual_seed(0)
    for k,names in dict(cn=chinese, bad=hostile).items():
        towns(w/k, names); save(w/f'{k}.safetensors', light('mit_b0', n_out=len(names)), label_space(names), size='64x64')
    return w

@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch, own_cache):
    for o in ('here', 'home'): (tmp_path/o).mkdir()
    monkeypatch.chdir(tmp_path/'here'); monkeypatch.setenv('HOME', str(tmp_path/'home'))
    monkeypatch.delenv('PIPA_DEBUG', raising=False)

@pytest.fixture
def quick(monkeypatch):
    "Exports and studies that take no time"
    monkeypatch.setattr(cli.export, 'export_net', lambda dest, *a, **k: Path(dest).write_bytes(b'x'))
    monkeypatch.setattr(cli.export, 'check_export', lambda *a: pd.DataFrame([dict(images=1, size='64×64', max_diff=0., largest=1., agreement=1.)]))
    def train(cmd, **kw):
        out = Path(next(o for o in cmd if o.startswith('--out='))[6:])
        (out/'row.json').write_text(json.dumps(dict(benchmark='x', method='source', seed=0, epochs=1, miou_student=.5, command='pipa_train --method=source')))
        return SimpleNamespace(poll=lambda: 0, returncode=0)
    monkeypatch.setattr(plan, 'subprocess', SimpleNamespace(Popen=train, DEVNULL=None))

def calls(w, k, out=''):
    "All commands, and a file that each leaves"
    data,net = str(w/k),str(w/f'{k}.safetensors')
    return dict(
        pipa_train=(dict(tiny, data=data, out=f'{out}run'), 'run/row.json'), pipa_eval=(dict(weights=net, data=data, out=f'{out}eval'), 'eval/row.json'),
        pipa_predict=(dict(images=f'{data}/target/images', weights=net, out=f'{out}pred'), 'pred/0_labels.png'),
        pipa_convert=(dict(file=net, out=f'{out}new.safetensors'), 'new.safetensors'), pipa_export=(dict(weights=net, out=f'{out}net.pt2'), 'net.pt2'),
        pipa_study=(dict(methods='source', seeds='0', table=f'{out}t.csv', runs=f'{out}runs', args=f'--data={data}'), 't.csv'),
        pipa_check=(dict(data=data, out=f'{out}check', workers=0), 'check/classes.csv'),
        pipa_suggest=(dict(data=data, weights=net, n=1, out=f'{out}suggestions'), 'suggestions/suggestions.csv'), pipa_bench=(dict(parts='ema', turns=1, size=64, out=f'{out}b.csv'), 'b.csv'))

def test_all_commands_are_called(): assert calls(Path(), 'cn').keys()==scripts.keys()

# --- what is told ends nothing ----------------------------------------------------------------------------------------------------------
class Full(io.TextIOWrapper):
    def write(self, s): raise OSError(28, 'No space left on device')

def stream(kind):
    if kind=='none': return None
    if kind=='broken': r,w = os.pipe(); os.close(r); return open(w, 'w', buffering=1)
    if kind=='full': return Full(io.BytesIO())
    o = io.TextIOWrapper(io.BytesIO(), encoding='cp1252' if kind=='cp1252' else 'ascii', write_through=True)
    if kind=='closed': o.close()
    return o

@pytest.mark.parametrize('kind', ['cp1252', 'ascii', 'none', 'closed', 'broken', 'full'])
def test_no_output_ends_a_command(kind, world, quick, monkeypatch):
    for name,(kw,file) in calls(world, 'cn').items():
        out,err = stream(kind),stream(kind)
        with monkeypatch.context() as m:
            m.setattr(sys, 'stdout', out); m.setattr(sys, 'stderr', err)
            function(name)(**kw)
            if out is not None: assert (sys.stdout, sys.stderr)==(out, err), 'streams are as they were'
        assert Path(file).exists(), name
        if kind in ('cp1252', 'ascii'):
            said = out.buffer.getvalue().decode(out.encoding)
            assert said, name
            if name in ('pipa_train', 'pipa_eval'): assert r'\u9053\u8def' in said and ('Straße' if kind=='cp1252' else r'Stra\xdfe') in said
    assert json.loads(Path('run/row.json').read_text())['道路']>=0 and '道路' in Path('eval/classes.csv').read_text(encoding='utf8')

def test_a_console_says_what_it_can():
    for code,says in (('cp1252', r'a -> b... x \u9053 é'), ('ascii', r'a -> b... x \u9053 \xe9'), ('utf8', 'a → b… × 道 é')):
        o = io.TextIOWrapper(io.BytesIO(), encoding=code); print('a → b… × 道 é', file=basics.Console(o), flush=True)
        assert o.buffer.getvalue().decode(code).rstrip()==says
    o = io.TextIOWrapper(io.BytesIO(), encoding='utf8'); print('a \udcff.png', file=basics.Console(o), flush=True)   # a name of bytes that are no text
    assert o.buffer.getvalue().decode().rstrip()==r'a \udcff.png'

def test_helps_are_plain(capsys):
    "The shell's console may have 128 characters when it shows the options"
    from fastcore.script import anno_parser
    for name in scripts: assert anno_parser(function(name).__wrapped__, name).format_help().isascii(), name

def _closed(*args):
    "As a daemon: no file has the number of the output"
    os.close(1); sys.stdout = None
    _run(*args)

def _piped(*args):
    "Into a pipe whose reader is gone"
    r,w = os.pipe(); os.dup2(w, 1); os.close(w); os.close(r); sys.stdout = open(1, 'w', closefd=False)
    _run(*args)

def _run(file, home, err):
    import multiprocessing as mp
    fd = os.open(err, os.O_WRONLY|os.O_CREAT); os.dup2(fd, 2); os.close(fd); os.chdir(home)
    mp.set_start_method('fork', force=True)   # what a process of a user has
    os.environ.update(XDG_CACHE_HOME=f'{home}/xdg', OMP_NUM_THREADS='1')
    sys.argv = [file, *Path('args').read_text().splitlines()]
    runpy.run_path(file, run_name='__main__')

@pytest.mark.parametrize('how', [_closed, _piped])
def test_a_process_that_nobody_hears(how, world, tmp_path):
    "Two loaders too: what the process opens doesn't get the number of the closed output"
    f = tmp_path/'pipa_train'; f.write_text('import sys\nfrom pipa.cli import pipa_train\nif __name__=="__main__": sys.exit(pipa_train())\n')
    here = tmp_path/'here'; (here/'args').write_text('\n'.join(f'--{k}={v}' for k,v in dict(tiny, data=world/'cn', out='run', workers=2, epochs=2).items()))
    assert forked(how, str(f), str(here), str(tmp_path/'err'))==0, (tmp_path/'err').read_text()
    assert 'Error' not in (tmp_path/'err').read_text() and len(pd.read_csv(here/'run/metrics.csv'))==2
    assert load(here/'run/weights.safetensors')[1]['codes']==chinese

# --- names that steer a terminal --------------------------------------------------------------------------------------------------------
def steers(text): return [c for c in text if ord(c)<32 and c not in '\n\t\r' or 127<=ord(c)<160 or c in '\u202e\u2066']

def test_no_name_steers_the_terminal(world, quick, capsys):
    for name,(kw,_) in calls(world, 'bad').items():
        if name in ('pipa_study', 'pipa_bench'): continue
        with contextlib.suppress(SystemExit): function(name)(**kw)
        o = capsys.readouterr(); assert not steers(o.out+o.err), name
        assert name not in ('pipa_train', 'pipa_eval') or r'\x1b[2J' in o.out

def test_no_sentence_steers_the_terminal(world, capsys):
    for kw in (dict(weights=str(world/'bad.safetensors'), data=str(world/'cn')), dict(weights='x\x1b[2J'), dict(weights=str(world/'bad.safetensors'), data='a\rb\x9b')):
        with pytest.raises(SystemExit) as e: cli.pipa_eval(**kw)
        assert not steers(e.value.code) and '\r' not in e.value.code and e.value.code.startswith('pipa: ')

# --- the machine ------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('e,says', [(MemoryError('Unable to allocate 1 TiB'), 'The memory of this machine is full'), (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), 'The memory of this machine is full'),
    (torch.OutOfMemoryError('CUDA out of memory.'), 'The memory of the device is full'), (RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed.'), 'A process that loads or draws images was killed'), (OSError(12, 'Cannot allocate memory'), 'The memory of this machine is full'), (BrokenPipeError(32, 'Broken pipe'), 'A process that loads')], ids=lambda o: str(o)[:20])
def test_memory_that_is_full_is_a_sentence(e, says, monkeypatch):
    def fail(*a, **k): raise e
    monkeypatch.setattr(cli, 'open_net', fail)
    with pytest.raises(SystemExit) as x: cli.pipa_eval('x')
    assert x.value.code.startswith(f'pipa: {says}') and '\n' not in x.value.code

def test_faults_of_ours_keep_their_traceback(monkeypatch):
    def fail(*a, **k): raise TypeError('oops')
    monkeypatch.setattr(cli, 'open_net', fail)
    with pytest.raises(TypeError): cli.pipa_eval('x')

# --- a tilde is the home ----------------------------------------------------------------------------------------------------------------
def test_all_commands_are_made_in_one_place():
    for name in scripts: assert function(name).__wrapped__.__code__.co_filename==basics.__file__, name

def test_tildes_of_commands(world, quick, tmp_path):
    home = tmp_path/'home'
    for o in ('cn', 'cn.safetensors'): (home/o).symlink_to(world/o)
    for name,(kw,file) in calls(Path('~'), 'cn', '~/').items():
        function(name)(**kw)
        assert (home/file).exists(), name
    assert not [*Path('.').iterdir()], 'a folder called ~, or results in the wrong place'
    cli.pipa_train(**dict(tiny, method='self_training', config='~/run', out='~/again'))
    cli.pipa_eval('~/again', images='~/cn/target/images', masks='~/cn/target/masks', codes='~/cn/codes.txt', out='~/e2')
    assert (home/'again/row.json').exists() and (home/'e2/row.json').exists() and not [*Path('.').iterdir()]

def test_tildes_in_python(world, tmp_path):
    (tmp_path/'home/cn').symlink_to(world/'cn')
    assert len(named.domains('~/cn', 'pipa')[0])==2
    assert basics.writable('~/x')==tmp_path/'home/x' and runs.new_folder('~/x')==tmp_path/'home/x'
    parts.add_rows(pd.DataFrame([dict(part='ema', way='a', ms=1)]), '~/b.csv'); parts.add_rows(pd.DataFrame([dict(part='ema', way='a', ms=2)]), '~/b.csv'); assert len(pd.read_csv(tmp_path/'home/b.csv'))==2
    for o in ('~nobody-of-this-name', '~nobody-of-this-name/x'):
        with pytest.raises(ValueError, match='nobody knows which home'): basics.writable(o)
    Path('~$lock.png').write_text('x'); assert basics.at_home('~$lock.png')==Path.cwd()/'~$lock.png'

# --- no process that nobody asked for ---------------------------------------------------------------------------------------------------
plain = '''
import multiprocessing; multiprocessing.set_start_method({!r}, force=True)
from pipa.data import folder, uda_dls
d = folder('images', 'masks', ['sky','road','car'])
dls = uda_dls(d, d.unlabelled(), d, bs=2, size=(64,64), n=4, device='cpu')
x,y,z = dls.one_batch()
open('said', 'w').write(f'{{dls.counts.sum()}} {{len(x)}} {{len(multiprocessing.active_children())}}')
'''
@pytest.mark.parametrize('method', ['spawn', 'forkserver'])
def test_a_script_without_a_guard(method, tmp_path):
    "230 masks are enough that helpers count them"
    here = tmp_path/'here'
    for o in ('images', 'masks'): (here/o).mkdir()
    y = np.zeros((32,64), np.uint8); y[16:] = 1
    Image.fromarray(np.stack([y*99]*3, -1)).save(here/'images/0.png'); Image.fromarray(y).save(here/'masks/0.png')
    for i in range(1, 230):
        for o in ('images', 'masks'): os.link(here/o/'0.png', here/f'{o}/{i}.png')
    (tmp_path/'s.py').write_text(plain.format(method))
    p = python(tmp_path/'s.py', cwd=here, XDG_CACHE_HOME=tmp_path/'xdg', HOME=tmp_path/'home')
    assert not p.returncode and (here/'said').read_text()==f'{230*32*64} 2 0', p.stderr

def test_helpers_are_threads_where_nothing_forks(tmp_path, monkeypatch):
    from pipa.sets import rare
    seen = []
    monkeypatch.setattr(rare, 'parallel', lambda f, xs, threadpool, **kw: seen.append(threadpool) or [*map(f, xs)])
    (tmp_path/'a').write_text('x')
    for method,threads in ((None,None), ('fork',False), ('spawn',True), ('forkserver',True)):
        if method: monkeypatch.setattr(basics, 'get_start_method', lambda allow_none=False: method)
        rare.remember(_one, [(tmp_path/'a',)], tmp_path/f'c{method}', n_workers=2)
        if method: assert seen[-1]==threads
    from pipa.runs.options import loaders
    assert not basics.forks() and loaders(None, cores=8)==0 and loaders(3)==3

def _one(p): return dict(a=1)

# --- refused before anything is drawn, read or rendered ---------------------------------------------------------------------------------
@pytest.mark.parametrize('kw,says', [(dict(crop='256x256'), "doesn't fit into `--size 128x256`"), (dict(net='unet'), 'no net `unet`'), (dict(arch='mit_b9'), 'mit_b9'), (dict(encoder='no.pth'), 'no file `no.pth`'),
    (dict(preset='foo'), 'no preset'), (dict(steps=0), '`--steps` is 0'), (dict(method='hrda', size='64x96', crop='32x32'), '`--crop 32x32`')], ids=str)
def test_nothing_is_drawn_for_what_cannot_be(kw, says, monkeypatch):
    monkeypatch.setattr(runs, 'domains', lambda *a: pytest.fail('something was drawn'))
    with pytest.raises(SystemExit) as e: cli.pipa_train(**kw)
    assert says in e.value.code and not [*Path('.').iterdir()]

@pytest.mark.parametrize('kw,says', [(dict(mode='x'), "`--mode` is 'x'"), (dict(mode='slide', crop='64x64', stride='64x65'), 'would leave gaps'), (dict(bs=0), '`--bs` is 0'), (dict(crop='64x64'), 'add `--mode slide`')], ids=str)
def test_nothing_is_drawn_for_a_score_that_cannot_be(kw, says, world, monkeypatch):
    monkeypatch.setattr(cli, 'eval_domain', lambda *a: pytest.fail('something was drawn'))
    with pytest.raises(SystemExit) as e: cli.pipa_eval(str(world/'cn.safetensors'), **kw)
    assert says in e.value.code

# --- a run that goes on says what is other ----------------------------------------------------------------------------------------------
def test_what_a_resumed_run_is_given(world, capsys, monkeypatch):
    "A default that was typed counts; other threads are said; what the run knows itself is left alone"
    args = dict(tiny, bs=2, data=str(world/'cn'), out='run')
    def shell(*more):
        words = [f'--{k}={v}' for k,v in args.items() if k not in ('out', 'data')] if not more else []
        words += [f'--data={args["data"]}']*(not more) + ['--out=run', *more]
        monkeypatch.setattr(sys, 'argv', ['pipa_train', *words])
        o = vars(basics_parser().parse_args(words)); o = {k:v for k,v in o.items() if k not in ('pdb', 'xtra')}
        return cli.pipa_train(**o)
    from pipa.runs.options import parser as basics_parser
    shell()
    (Path('run')/'row.json').unlink()
    with pytest.raises(SystemExit, match='begun with --bs=2 and not 4'): shell('--resume', '--bs=4')
    with pytest.raises(SystemExit, match='begun with --bs=2 and not 3'): shell('--resume', '--bs=3')
    with pytest.raises(SystemExit, match='begun with --method=source and not pipa'): shell('--resume', '--method=pipa')
    n = torch.get_num_threads()
    capsys.readouterr(); shell('--resume', '--bs=2', '--precision=auto', f'--threads={n+1}'); torch.set_num_threads(n)
    assert f'pipa: Begun with --threads={n}, going on with {n+1}: last digits may differ.' in capsys.readouterr().err and Path('run/row.json').exists()
    Path('run/row.json').unlink(); shell('--resume'); assert 'last digits' not in capsys.readouterr().err
