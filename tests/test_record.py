"A run folder tells what it was made of, and a run is made again from it to the bit, with other workers, too"
import json, sys
from pathlib import Path
import pandas as pd, pytest, torch
from safetensors.torch import load_file
from pipa import cli
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
