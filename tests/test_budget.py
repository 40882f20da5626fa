"A run that has so many minutes, and a run that goes on from the net of another"
import json, time
from pathlib import Path
import pytest, torch
from pipa import budget, cli
from pipa.checkpoints import load, save
from pipa.labels import space
from pipa.learner import make_net
from pipa.runs import run as runs
from pipa.runs.options import defaults, settings
from tiny import own_data

opts = dict(unlabelled=0, bs=2, size='64x64', crop='64x64', thresh=.1, workers=0)

@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch, own_cache): monkeypatch.chdir(tmp_path); monkeypatch.setattr('sys.argv', ['pipa_train'])

@pytest.fixture(scope='module')
def data(tmp_path_factory): return own_data(tmp_path_factory.mktemp('budget'), size=(64,64))

def state(out, which='student'): return {k:v for k,v in load(out, which=which)[0].state_dict().items()}
def config(out): return json.loads((Path(out)/'config.json').read_text())

@pytest.fixture
def paces(monkeypatch):
    "A machine that is always as fast: half a second, a second, and two for a validation"
    seen = []
    def f(learn, n=3): seen.append(learn); return dict(early=.5, late=1., look=2.)
    monkeypatch.setattr(runs, 'pace', f); monkeypatch.setattr(runs.time, 'monotonic', lambda: 100.)
    return seen

def test_a_time_becomes_steps_that_are_kept(data, paces, capsys):
    cli.pipa_train('self_training', str(data), time='18s', out='a', epochs=2, **opts)
    out,c = capsys.readouterr().out,config('a')
    want = budget.steps_in(18-2-5, .5, 1., 2., epochs=2, share=500/(2*260))
    assert {k:c[k] for k in want}==want and c['time']=='18s' and f"{want['epochs']} epochs of {want['steps']} steps" in out
    row = json.loads(Path('a/row.json').read_text())
    assert settings(row['command'])['steps']==want['steps'] and '--time' not in row['command'] and len(paces)==1
    cli.pipa_train(config='a', out='b')
    assert len(paces)==1 and all(torch.equal(v, state('b')[k]) for k,v in state('a').items()), 'repeated, and not measured again'

@pytest.mark.slow
def test_what_the_measurement_does_leaves_no_trace(data, monkeypatch):
    "The same steps, planned or said, give the same weights"
    monkeypatch.setattr(runs, 'pace', lambda learn: budget.pace(learn, 1) and dict(early=1., late=1., look=1.))
    monkeypatch.setattr(runs.time, 'monotonic', lambda: 0.)
    cli.pipa_train('self_training', str(data), time='9s', out='a', epochs=1, start=1, **opts)
    assert config('a')['steps']==2 and config('a')['start']==1
    cli.pipa_train('self_training', str(data), out='b', epochs=1, steps=2, start=1, **opts)
    assert all(torch.equal(v, state('b')[k]) for k,v in state('a').items())

@pytest.mark.parametrize('kw,says', [(dict(time='soon'), '`soon` is no time'), (dict(time='20'), 'write 90s, 20m'), (dict(time='20m', steps=5), 'leave `--steps` out'),
                                     (dict(time='8s'), 'nothing fits into the')])
def test_times_that_are_none(data, kw, says, paces, capsys):
    with pytest.raises((SystemExit, ValueError)) as e: cli.pipa_train('self_training', str(data), out='o', **kw, **opts)
    assert says in capsys.readouterr().err + str(e.value) and not Path('o').exists()

def test_going_on_begins_where_the_other_run_ended(data):
    "One step at a rate of nothing: student and teacher are those of the run, and so are its settings"
    cli.pipa_train('pipa', str(data), out='a', epochs=1, steps=3, start=1, alpha=.5, seed=3, **opts)
    cli.pipa_train(fromrun='a', out='b', epochs=1, steps=1, lr=1e-12)
    a,b = config('a'),config('b')
    fresh = {'epochs','steps','start','seed','lr','out','fromrun','command','data_stamps','versions','git','loaded','workers'}
    assert {k:v for k,v in a.items() if k not in fresh}=={k:v for k,v in b.items() if k not in fresh} and (b['start'], b['seed'])==(0, 0)
    for which in ('student', 'teacher'):
        for k,v in state('a', which).items():
            if v.is_floating_point() and 'running' not in k: torch.testing.assert_close(state('b', which)[k], v if which=='student' else .5*(v+state('a')[k]), atol=1e-7, rtol=1e-5)
    assert b['loaded']['sha256'] and b['loaded']['file']=='weights.safetensors'
    assert any(not torch.equal(v, state('a', 'teacher')[k]) for k,v in state('a').items()), 'student and teacher are not the same'

@pytest.mark.slow
def test_going_on_from_a_file_and_resumed(data):
    cli.pipa_train('self_training', str(data), out='a', epochs=1, steps=2, start=0, **opts)
    cli.pipa_train('source', str(data), fromrun='a/weights.safetensors', out='b', epochs=1, steps=1, **opts)
    assert config('b')['method']=='source' and not Path('b/teacher.safetensors').exists()
    cli.pipa_train(config='b', out='c')
    assert all(torch.equal(v, state('c')[k]) for k,v in state('b').items())

def test_going_on_is_refused(data, tmp_path, capsys):
    save('other.safetensors', make_net('light', 3), None, size='64x64')
    def says(text, **kw):
        with pytest.raises((SystemExit, ValueError)) as e: cli.pipa_train('source', str(data), out='o', **kw, **opts)
        assert text in capsys.readouterr().err + str(e.value) and not Path('o').exists()
    says('There is no file `nowhere`', fromrun='nowhere')
    says('`--arch` beside `--from`', fromrun='other.safetensors', arch='mit_b1')
    says('3 classes', fromrun='other.safetensors')
    from pipa.labels import LabelSpace
    names = [f'class {i}' for i in range(11)]
    save('named.safetensors', make_net('light', 11), LabelSpace('own', names), size='64x64')
    says('go on with data of the same classes', fromrun='named.safetensors')

def test_from_is_a_word_of_the_command(data, monkeypatch):
    monkeypatch.setattr('sys.argv', ['pipa_train', '--from', 'x', '--time=5m'])
    o = settings('pipa_train --from x --steps=7')
    assert o['fromrun']=='x' and o['steps']==7 and 'time' not in o
    assert runs.without(['--time', '5m', '--epochs=3', '--out=o'], 'time epochs')==['--out=o']

def test_a_net_of_one_scale_is_no_host_of_two(data, capsys):
    save('light.safetensors', make_net('light', 11), space('minicity'), size='64x64')
    with pytest.raises((SystemExit, ValueError)) as e: cli.pipa_train('hrda+pipa', str(data), fromrun='light.safetensors', out='o', **opts)
    assert 'a net of two scales' in capsys.readouterr().err + str(e.value)

def test_a_study_counts_steps():
    from pipa.runs.options import idle, key
    from pipa.runs.plan import plan
    for more,sweep in ((['--time=5m'], ''), ([], 'time=5m,6m')):
        with pytest.raises(ValueError, match='give --steps'): plan('source', sweep=sweep, more=more)
    assert key(settings('pipa_train --net hrda'))!=key(settings('pipa_train')) and 'net' not in idle(defaults() | dict(net='hrda'))

def test_what_stays_of_a_net_that_goes_on(data, capsys):
    save('light.safetensors', make_net('light', 11, 'timm:vit_tiny_patch16_224'), space('minicity'), size='64x64')
    def says(text, **kw):
        with pytest.raises((SystemExit, ValueError)) as e: cli.pipa_train('source', str(data), fromrun='light.safetensors', out='o', **kw, **opts)
        err = capsys.readouterr().err
        assert text in err + str(e.value) and 'random weights' not in err
    says('no norm of this encoder keeps statistics', frozen='norms')
    says('all of the encoder is frozen', frozen='all', decay=.5)
