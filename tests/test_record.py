"A run folder tells what it was made of, and a run is made again from it to the bit, with other workers, too"
import json, math, os, re, shutil, subprocess, sys, time
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from safetensors.torch import load_file
from pipa import basics, cli
from pipa.data import folder
from pipa.labels import LabelSpace
from pipa.runs import record, state
from pipa.runs.options import defaults
from test_bad_input import folder_of, said, shell, tiny

few = [o for o in tiny if o not in ('--epochs=1', '--steps=1')]

@pytest.fixture(scope='module')
def first(tmp_path_factory):
    home = tmp_path_factory.mktemp('record'); folder_of(home/'data', n=3)
    mp = pytest.MonkeyPatch(); mp.chdir(home); mp.setenv('XDG_CACHE_HOME', str(home/'xdg'))
    mp.setattr(sys, 'argv', ['pipa_train', '--epochs=2'])
    shell('pipa_train', *few, '--epochs=2', '--steps=2', '--seed=5', '--thresh=.1', f'--data={home/"data"}', '--out=a')
    yield home
    mp.undo()

def config(o): return json.loads((o/'config.json').read_text(encoding='utf8'))
def weights(o): return {f: load_file(o/f'{f}.safetensors') for f in ('weights', 'teacher')}
def same(a, b): return all(torch.equal(v, b[f][k]) for f in a for k,v in a[f].items())

def test_what_a_run_was_made_of(first):
    c = config(first/'a')
    assert {'versions', 'command', 'data_stamps', 'git', 'guard', 'deterministic', 'seed'}<={*c} and {*c['git']}=={'package', 'here'}
    assert {k: v['files'] for k,v in c['data_stamps'].items()}==dict(source=6, target=3, valid=6)
    assert all(len(v['hash'])==16 and v['bytes']>100 for v in c['data_stamps'].values())

def test_again_with_other_workers(first, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['pipa_train', '--config=a/config.json', '--workers=2', '--out=b'])
    shell('pipa_train', '--config=a/config.json', '--workers=2', '--out=b')
    a,b = config(first/'a'),config(first/'b')
    assert {k for k in a if a[k]!=b[k]}<={'workers', 'config', 'command', 'out'} and b['workers']==2 and b['epochs']==2
    assert same(weights(first/'a'), weights(first/'b')) and 'numbers may differ' not in capsys.readouterr().err
    ta,tb = (pd.read_csv(first/o/'metrics.csv').drop(columns='time') for o in 'ab'); assert len(ta)==2 and ta.equals(tb)

def test_options_besides_count_more_and_differences_are_said(first, monkeypatch, capsys):
    was = config(first/'a'); was['versions']['torch'] = '0.4'; was['data_stamps']['source']['hash'] = 'x'; (first/'old.json').write_text(json.dumps(was))
    monkeypatch.setattr(sys, 'argv', ['pipa_train', '--config=old.json', '--seed=0', '--epochs=1', '--out=c'])   # 0 is the default, and given
    shell('pipa_train', '--config=old.json', '--seed=0', '--epochs=1', '--out=c')
    c = config(first/'c'); assert (c['seed'], c['epochs'], c['steps'])==(0, 1, 2) and not same(weights(first/'a'), weights(first/'c'))
    err = capsys.readouterr().err.splitlines()
    assert any(l.startswith('pipa: versions torch: was 0.4, is') for l in err) and any(l.startswith('pipa: data_stamps source: was 6 files, x, is 6 files') for l in err)

@pytest.mark.parametrize('text,words', [(None, 'There is no file'), ('{', 'is no JSON'), ('[]', 'holds no options'), ('{"method":"pipa","magic":1}', 'the option `magic`'), ('{"method":"pipa","lr":-1}', '`lr` is -1')])
def test_wrong_files(first, text, words, tmp_path):
    f = tmp_path/'config.json'
    if text is not None: f.write_text(text)
    before = {*first.iterdir()}
    assert words in said(shell, 'pipa_train', f'--config={f}', f'--data={first/"data"}', '--out=d') and {*first.iterdir()}==before

def test_skip_has_a_column(first):
    shell('pipa_train', '--config=a', '--guard=skip', '--epochs=1', '--steps=1', '--out=e'); assert pd.read_csv('e/metrics.csv').skipped.tolist()==[0]

# the state of the code, without git

def git(home, *args):
    env = {k:v for k,v in os.environ.items() if not k.startswith('GIT_')} | dict(GIT_CONFIG_GLOBAL=os.devnull, GIT_CONFIG_NOSYSTEM='1')
    who = '-c', 'user.name=a', '-c', 'user.email=a@example.org', '-c', 'protocol.file.allow=always'
    return subprocess.run(['git', '-C', str(home), *who, *args], check=True, capture_output=True, text=True, env=env).stdout.strip()

@pytest.fixture
def repo(tmp_path):
    if not shutil.which('git'): pytest.skip('no git here')
    home = tmp_path/'repo'; (home/'sub').mkdir(parents=True)
    git(home, 'init', '-b', 'main')
    for i in range(3): (home/f'{i}.txt').write_text(f'{i}\n')
    (home/'sub/ü b.txt').write_text('deep\n'); (home/'link').symlink_to('0.txt')
    git(home, 'add', '.'); git(home, 'commit', '-m', 'first')
    return home

def add(d): (d/'3.txt').write_text('new\n'); git(d, 'add', '.')
states = dict(clean=lambda d: None, touched=lambda d: os.utime(d/'0.txt'), untracked=lambda d: (d/'other').write_text('x'),
    longer=lambda d: (d/'0.txt').write_text('longer\n'), same_size=lambda d: (d/'0.txt').write_text('9\n'), gone=lambda d: (d/'0.txt').unlink(),
    deep=lambda d: (d/'sub/ü b.txt').write_text('DEEP\n'), link=lambda d: ((d/'link').unlink(), (d/'link').symlink_to('1.txt')),
    link_is_file=lambda d: ((d/'link').unlink(), (d/'link').write_text('0.txt')), pipe=lambda d: ((d/'0.txt').unlink(), os.mkfifo(d/'0.txt')),
    staged=lambda d: add(d), staged_then_committed=lambda d: (add(d), git(d, 'commit', '-m', 'x')),
    version_4=lambda d: git(d, 'update-index', '--index-version', '4'), version_4_changed=lambda d: (git(d, 'update-index', '--index-version', '4'), (d/'2.txt').write_text('x\n')),
    packed=lambda d: (git(d, 'pack-refs', '--all'), git(d, 'gc')), detached=lambda d: git(d, 'checkout', '--detach'), branch=lambda d: git(d, 'checkout', '-b', 'a/b'),
    tag=lambda d: (git(d, 'tag', '-a', 'v1', '-m', 'x'), git(d, 'checkout', 'v1')))

@pytest.mark.parametrize('how', states)
def test_revision_is_what_git_says(repo, how):
    states[how](repo)
    want = git(repo, 'rev-parse', 'HEAD') + '+'*bool(git(repo, 'status', '--porcelain', '--untracked-files=no'))
    assert record.revision(repo)==want and record.revision(repo/'sub')==want

def test_revision_of_a_worktree(repo):
    git(repo, 'worktree', 'add', '../w', '-b', 'other'); w = repo.parent/'w'
    (w/'n').write_text('x'); git(w, 'add', '.'); git(w, 'commit', '-m', 'there')
    assert record.revision(w)==git(w, 'rev-parse', 'HEAD')!=record.revision(repo)==git(repo, 'rev-parse', 'HEAD')

def test_a_reset_is_a_change(repo):
    add(repo); git(repo, 'commit', '-m', 'x'); git(repo, 'reset', '--soft', 'HEAD~1')
    assert record.revision(repo)==git(repo, 'rev-parse', 'HEAD')+'+'

def test_nothing_of_a_repository_is_run(repo, monkeypatch):
    "Whatever its configuration, hooks and attributes name: no process is started at all"
    (repo/'.gitattributes').write_text('* filter=own diff=own\n')
    with open(repo/'.git/config', 'a') as f: f.write('[core]\n\tfsmonitor = touch ran\n\thooksPath = .\n\tpager = touch ran\n[filter "own"]\n\tclean = touch ran; cat\n\tprocess = touch ran\n[include]\n\tpath = /nowhere\n')
    (repo/'post-index-change').write_text('#!/bin/sh\ntouch ran\n'); (repo/'post-index-change').chmod(0o755); os.utime(repo/'0.txt')
    def no(*a, **kw): raise AssertionError(f'started: {a}')
    head = (repo/'.git/refs/heads/main').read_text().strip()
    with monkeypatch.context() as m:
        for o in ('Popen', 'run'): m.setattr(subprocess, o, no)
        m.setattr(os, 'system', no); m.setattr(os, 'posix_spawn', no)
        m.chdir(repo); assert record.revisions()['here']==head
    assert not (repo/'ran').exists()

@pytest.mark.parametrize('break_', [lambda g: (g/'HEAD').write_text('ref: ../../secret'), lambda g: (g/'HEAD').write_text('ref: refs/heads/none'), lambda g: (g/'HEAD').write_bytes(b'\xff\0'),
    lambda g: (g/'HEAD').write_text('ref: refs/heads/a\n') and (g/'refs/heads/a').write_text('ref: refs/heads/a'), lambda g: ((g/'HEAD').unlink(), os.mkfifo(g/'HEAD')),
    lambda g: ((g/'refs/heads/main').unlink(), os.mkfifo(g/'refs/heads/main')), lambda g: (shutil.rmtree(g), g.write_text('gitdir: nowhere'))])
def test_a_damaged_repository_is_none(repo, break_):
    break_(repo/'.git'); assert record.revision(repo) is None

@pytest.mark.parametrize('data', [b'', b'DIRC', b'DIRC'+b'\xff'*8, b'DIRC\0\0\0\2'+b'\xff'*4, b'DIRC\0\0\0\4\0\0\0\1'+b'\x80'*99])
def test_a_damaged_index_is_a_change(repo, data):
    (repo/'.git/index').write_bytes(data); assert record.revision(repo)==git(repo, 'rev-parse', 'HEAD')+'+'

def test_an_index_that_never_ends(repo):
    "Paths that grow with each entry, and one large file that is listed a million times, are given up"
    entry = bytes(62)
    grow = b'DIRC\0\0\0\4\0\1\0\0' + (entry+b'\0'+b'x'*999+b'\0')*65536
    big = (repo/'big'); big.write_bytes(bytes(1<<25)); s = os.stat(big)
    import hashlib, struct
    one = struct.pack('>10I', 0, 0, 1, 0, 0, 0, 0o100644, 0, 0, s.st_size)+hashlib.sha1(b'blob %d\0' % s.st_size+bytes(1<<25)).digest()+struct.pack('>H', 3)+b'big\0'
    one += bytes(-len(one)%8)
    for data in (grow, b'DIRC\0\0\0\2\0\1\0\0'+one*65536):
        (repo/'.git/index').write_bytes(data); t = time.process_time(); assert record.revision(repo).endswith('+') and time.process_time()-t<10

# what people write into config.json

usual = dict(epochs=1.5, steps=2.5, seed=1.5, seed_=True, workers=.5, bs='4', method=None, data=5, arch=5, lean='no', encoder=5, lr='fast', lr_=math.inf, weight='1', size=[64,64], versions=None, versions_=dict(threads='2'),
             versions__=dict(torch=2), command=5, git='x', data_stamps=[1], data_stamps_=dict(source='x'), ranks='2')

@pytest.mark.parametrize('k', usual)
@pytest.mark.parametrize('how', ['config', 'resume'])
def test_values_of_another_kind(tmp_path, monkeypatch, k, how):
    monkeypatch.chdir(tmp_path)
    was = {k:v for k,v in defaults().items() if k not in ('out','config','resume','pdb','xtra')} | dict(versions=dict(threads=1), command='pipa_train', ranks=1)
    Path('r').mkdir(); Path('r/config.json').write_text(json.dumps(was | {k.strip('_'): usual[k]}))
    text = said(shell, 'pipa_train', *(['--config=r', '--out=o'] if how=='config' else ['--resume', '--out=r']))
    name = 'threads' if k=='versions_' else 'torch' if k=='versions__' else 'source' if k=='data_stamps_' else k.strip('_')
    assert 'r/config.json' in text and f'`{name}`' in text and not Path('o').exists(), text

@pytest.mark.parametrize('text', ['', '{"method":', '[]', '['*10**5, '{"method": "pipa"}', '{"method": "pipa", "command": "pipa_train"}', '{"method": "pipa", "versions": {"threads": 1}}'])
def test_a_damaged_config_is_named(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path); Path('r').mkdir(); Path('r/config.json').write_text(text)
    assert 'config.json' in said(shell, 'pipa_train', '--resume', '--out=r')

def test_a_byte_order_mark_is_no_matter(tmp_path):
    (tmp_path/'config.json').write_text(json.dumps(dict(method='mic')), encoding='utf-8-sig'); assert record.read_config(tmp_path)==dict(method='mic')

# the data

def test_stamps_tell_content(tmp_path):
    for i in range(3):
        for k in ('images', 'masks'): (tmp_path/'a'/k).mkdir(parents=True, exist_ok=True); Image.fromarray(np.full((64,64,3), 50*i, np.uint8) if k=='images' else np.full((64,64), i, np.uint8)).save(tmp_path/f'a/{k}/{i}.bmp')
    own = lambda o, codes='xyz': record.data_stamp(folder(tmp_path/o/'images', tmp_path/o/'masks', [*codes], 'own'))
    s = own('a'); shutil.copytree(tmp_path/'a', tmp_path/'b', copy_function=shutil.copyfile); assert own('b')==s and s['classes']=='x, y, z'
    shutil.copyfile(tmp_path/'a/images/1.bmp', tmp_path/'b/images/2.bmp')
    t = own('b'); assert t['hash']==s['hash'] and t['content']!=s['content'] and record.stamp_change(s, t) and not record.stamp_change(s, s)
    assert record.stamp_change(s, own('a', 'xzy'))=='was x, y, z, is x, z, y' and 'is not there' in record.stamp_change(s, None)
    space = folder(tmp_path/'a/images', tmp_path/'a/masks', [*'xyz'], 'own').space
    void = LabelSpace(space.name, space.codes, ids={**space.ids, 77: space.ignore})
    u = record.data_stamp(folder(tmp_path/'a/images', tmp_path/'a/masks', void, 'own'))
    assert re.fullmatch(r'was 3 numbers are classes, void is 255 \(.{8}\), is 3 numbers are classes, void is 77 255 \(.{8}\)', record.stamp_change(s, u))
    assert not record.stamp_change({k: v for k,v in s.items() if k!='numbers'}, u), 'a stamp of before'

# to disk, before anything else goes

@pytest.fixture
def calls(monkeypatch):
    "What the system was asked for, in its order: `('disk', path)`, `('place', path)`, `('gone', path)`"
    seen,real = [],{k: getattr(os, k) for k in ('fsync', 'replace', 'unlink')}
    def fsync(fd): seen.append(('disk', os.path.realpath(f'/proc/self/fd/{fd}'))); return real['fsync'](fd)
    def replace(a, b): seen.append(('place', os.path.realpath(a), os.path.realpath(b))); return real['replace'](a, b)
    def unlink(a, *args, **kw): seen.append(('gone', os.path.realpath(a))); return real['unlink'](a, *args, **kw)
    for f in (fsync, replace, unlink): monkeypatch.setattr(os, f.__name__, f)
    return seen

linux = pytest.mark.skipif(not sys.platform.startswith('linux'), reason='names of open files come from /proc')

def safe(seen):
    "Files whose content was on disk before they got their name, and their name after it, before anything was removed"
    last = next((i for i,o in enumerate(seen) if o[0]=='gone' and 'checkpoint_' in o[1] and not Path(o[1]).name.startswith('.')), len(seen))
    res = set()
    for i,o in enumerate(seen[:last]):
        if o[0]=='place' and ('disk', o[1]) in seen[:i] and ('disk', os.path.dirname(o[2])) in seen[i:last]: res.add(os.path.basename(o[2]))
    return res

@linux
def test_a_file_is_on_disk_before_it_has_its_name(tmp_path, calls):
    basics.write_file(tmp_path/'a', lambda f: f.write(b'x')); tmp = calls[0][1]
    assert [o for o in calls if o[0]!='gone']==[('disk', tmp), ('place', tmp, str(tmp_path/'a')), ('disk', str(tmp_path))]
    calls.clear(); basics.write_file(tmp_path/'a', lambda f: f.write(b'x'), sync=False); assert [o[0] for o in calls if o[0]!='gone']==['place'] and calls[0][1]!=tmp

@linux
def test_a_finished_run_is_on_disk_before_its_checkpoints_go(first, calls):
    shell('pipa_train', '--config=a', '--epochs=1', '--out=f')
    assert {'weights.safetensors', 'teacher.safetensors', 'row.json', 'config.json', 'classes.csv', 'result.png', 'curves.png', 'checkpoint_001_000000.pt'}<=safe(calls)
    gone = next(i for i,o in enumerate(calls) if o[0]=='gone' and 'checkpoint_' in os.path.basename(o[1])[:11])
    assert ('disk', str((first/'f/metrics.csv').resolve())) in calls[:gone] and not state.checkpoints(first/'f')

def test_names_beside_never_meet(tmp_path, monkeypatch):
    "Two processes of one number, as in two containers"
    seen = []
    def nested(f): seen.append(f.name); f.write(b'a'); basics.write_file(tmp_path/'x', lambda g: (seen.append(g.name), g.write(b'b')))
    basics.write_file(tmp_path/'x', nested); assert len({*seen})==2 and (tmp_path/'x').read_bytes()==b'a' and len([*tmp_path.iterdir()])==1
    long = tmp_path/('ä'*120); basics.write_file(long, lambda f: f.write(b'x')); assert long.read_bytes()==b'x'

@pytest.mark.parametrize('where', ['write', 'fsync'])
def test_a_full_disk_names_the_file(tmp_path, monkeypatch, where):
    import errno
    def full(*a): raise OSError(errno.ENOSPC, 'No space left on device')
    if where=='fsync': monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError) as e: basics.write_file(tmp_path/'x', full if where=='write' else lambda f: f.write(b'x'))
    assert basics.one_line(e.value)==f'`{tmp_path/"x"}`: The disk is full: make room, or write elsewhere.' and not [*tmp_path.iterdir()]

# a cache is no need

def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path)); assert basics.cache_home()==tmp_path/'pipa'
    def nowhere(): raise RuntimeError('Could not determine home directory.')
    monkeypatch.setattr(Path, 'home', nowhere); assert basics.cache_home()==tmp_path/'pipa', 'nobody asks for a home'
    for o in ('', 'relative'): monkeypatch.setenv('XDG_CACHE_HOME', o); assert basics.cache_home().is_dir() and basics.cache_home().is_absolute()

def test_copies_are_made_again(tmp_path, capsys):
    from pipa.data import made_once
    (tmp_path/'x').write_bytes(b'x'); make = lambda p: np.arange(6)
    for text in (None, b'', b'\x93NUMPY', b'no array'):
        for f in (tmp_path/'c').glob('*'): f.write_bytes(text)
        assert made_once(tmp_path/'x', tmp_path/'c', make).tolist()==[*range(6)]
    f, = (tmp_path/'c').iterdir(); f.write_bytes(f.read_bytes()[:-9]); assert made_once(tmp_path/'x', tmp_path/'c', make).tolist()==[*range(6)]
    for i in range(2): assert made_once(tmp_path/'x', tmp_path/'x/c', make).tolist()==[*range(6)]
    assert capsys.readouterr().err.count('\n')==1
