"What makes a run quick is chosen before it begins, is said in its record, and changes nothing that it shouldn't"
import configparser, json, os, subprocess, sys
from pathlib import Path
import pandas as pd, pytest, torch
from safetensors.torch import load_file
from pipa import basics
from pipa.runs import options, run as runs
from test_bad_input import folder_of, said, shell, tiny

root = Path(__file__).resolve().parents[1]
cfg = configparser.ConfigParser(delimiters=['=']); cfg.read(root/'settings.ini', encoding='utf8')
modules = sorted({o.split('=')[1].split(':')[0].strip() for o in cfg['DEFAULT']['console_scripts'].split('\n') if o.strip()})
few = [o for o in tiny if o not in ('--epochs=1', '--steps=1', '--unlabelled=0')] + ['--epochs=2', '--steps=2', '--unlabelled=2', '--thresh=.1']

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A run in bf16 of two epochs"
    o = tmp_path_factory.mktemp('hour'); folder_of(o/'data', n=3)
    with pytest.MonkeyPatch.context() as mp:
        mp.chdir(o); mp.setenv('XDG_CACHE_HOME', str(o/'xdg')); mp.setattr(sys, 'argv', ['pipa_train'])
        shell('pipa_train', *few, '--data=data', '--precision=bf16', '--out=half')
        yield o

def config(o): return json.loads((Path(o)/'config.json').read_text(encoding='utf8'))
def weights(o): return {(f,k): v for f in ('weights', 'teacher') for k,v in load_file(f'{o}/{f}.safetensors').items()}
def same(a, b): return a.keys()==b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())

# how threads wait

def test_what_the_user_said_is_left_alone():
    own = basics.waiting({})
    assert own and all(k.startswith('GOMP_') and v.isdecimal() for k,v in own.items())
    for k in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT'): assert basics.waiting({k: '7'})=={}

def test_nothing_is_set_once_torch_is_there(monkeypatch):
    for k in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT'): monkeypatch.delenv(k, raising=False)
    old = dict(os.environ); basics.wait_briefly(); assert dict(os.environ)==old
    monkeypatch.delitem(sys.modules, 'torch'); basics.wait_briefly(); new = dict(os.environ)
    for k in basics.waiting({}): monkeypatch.delenv(k)
    assert new==old | basics.waiting({})

spy = '''
import os, sys
class Spy:
    def find_spec(self, name, *args):
        if name=='torch': print(os.environ.get('GOMP_SPINCOUNT')); sys.stdout.flush(); os._exit(0)
sys.meta_path.insert(0, Spy())
'''
def at_torch(code, **more):
    env = {k:v for k,v in os.environ.items() if k not in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')} | more
    return subprocess.run([sys.executable, '-c', spy+code], env=env, cwd=root, capture_output=True, text=True, check=True).stdout.strip()

@pytest.mark.parametrize('module', modules)
def test_commands_choose_before_torch_is_loaded(module):
    assert at_torch(f'import {module}')==basics.waiting({})['GOMP_SPINCOUNT']

def test_others_are_not_disturbed():
    assert at_torch('import pipa.learner')=='None' and at_torch('import pipa.cli', GOMP_SPINCOUNT='5')=='5' and at_torch('import pipa.cli', OMP_WAIT_POLICY='active')=='None'
    assert at_torch('import pipa.basics; print("no torch")')=='no torch'

# precision

def test_a_batch_must_be_large_for_bf16(monkeypatch):
    monkeypatch.setattr(options, 'default_device', lambda: torch.device('cpu'))
    for has,want in ((True, ['fp32', 'bf16']), (False, ['fp32']*2)):
        monkeypatch.setattr(options, 'has_bf16', lambda: has)
        assert [options.arithmetic('auto', n) for n in (4*64*128, 4*128*256)]==want
        assert [options.arithmetic(o, n) for o in ('fp32', 'bf16') for n in (1, 10**7)]==['fp32']*2+['bf16']*2
    monkeypatch.setattr(options, 'has_bf16', lambda: True); monkeypatch.setattr(options, 'default_device', lambda: torch.device('cuda'))
    assert options.arithmetic('auto', 10**7)=='fp32'

def test_another_precision_is_a_sentence(home): assert 'choose one of auto, fp32, bf16' in said(shell, 'pipa_train', *few, '--data=data', '--precision=fp8', '--out=no')

def test_the_record_says_what_was_taken(home):
    shell('pipa_train', *few, '--data=data', '--out=full')
    a,b = config('full'),config('half')
    assert (a['precision'], b['precision'], a['workers'])==('fp32', 'bf16', 0) and not same(weights('full'), weights('half'))
    row = lambda o: json.loads((Path(o)/'row.json').read_text())['settings'].split()
    assert 'precision=bf16' in row('half') and not [o for o in row('full') if o.startswith('precision')], 'fp32 is what older rows have'

def test_a_repeated_run_has_the_same(home):
    shell('pipa_train', '--config=half', '--workers=1', '--out=again')
    assert (config('again')['precision'], config('again')['workers'])==('bf16', 1) and same(weights('again'), weights('half'))

def test_a_record_of_before_there_was_a_choice(home, monkeypatch):
    old = config('half'); del old['precision']; Path('old').mkdir(); Path('old/config.json').write_text(json.dumps(old))
    seen = []; monkeypatch.setattr(runs, 'run', lambda **o: seen.append(o) or Path('half'))
    for more in ([], ['--precision=bf16']): shell('pipa_train', '--config=old', *more)
    assert [o['precision'] for o in seen]==['fp32', 'bf16']
    assert runs.resumed('old', dict(vars(options.parser().parse_args(['--resume'])), out='old'))[0]['precision']=='fp32'

def test_an_interrupted_run_goes_on_in_bf16(home, monkeypatch):
    def stop(self):
        if self.epoch==1: raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(runs.Before, 'before_epoch', stop, raising=False)
        with pytest.raises(SystemExit): shell('pipa_train', *few, '--data=data', '--precision=bf16', '--out=two')
    assert not Path('two/row.json').exists()
    with pytest.raises(SystemExit): shell('pipa_train', '--resume', '--precision=fp32', '--out=two')
    shell('pipa_train', '--resume', '--out=two')
    assert config('two')['precision']=='bf16' and same(weights('two'), weights('half'))

# what runs beside, and later

def test_half_of_the_cores_load():
    linux = sys.platform.startswith('linux')
    assert [options.loaders(None, w, n) for w,n in ((1,1), (1,2), (1,4), (1,64), (2,8), (8,8))]==[o*linux for o in (0, 1, 2, 4, 2, 0)]
    assert [options.loaders(n, 1, 2) for n in (0, 3)]==[0, 3]

def test_label_free_scores_come_last(home, capsys):
    t,row = pd.read_csv('half/metrics.csv'),json.loads(Path('half/row.json').read_text())
    cols = ['entropy', 'info_max', 'agreement', 'overlap', 'density']
    assert t[cols].iloc[0].isna().all() and t[cols].iloc[1].notna().all() and t.miou.notna().all()
    for k in cols: assert abs(row[k]-t[k].iloc[1])<1e-4
    shell('pipa_train', *few, '--data=data', '--method=source', '--out=quiet')
    assert 'not finite' not in capsys.readouterr().err, 'the guard takes an empty cell for what it is'
