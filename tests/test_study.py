"Tables of a study, differences with their intervals, sweeps, and pictures, also of tables with holes"
import json, multiprocessing as mp, os, shlex, signal, subprocess, sys, textwrap, time
from pathlib import Path
import numpy as np, pandas as pd, pytest
from scipy.stats import ttest_rel
from pipa.runs import plan, state, study, tables
from pipa.learner import method_name
from pipa.metrics import rank_correlation

def row(host='self_training', terms='none', seed=0, v=.4, **kw):
    return dict(benchmark='minicity', method=method_name(host, terms), seed=seed, epochs=8, miou_student=v, miou_teacher=v, road=v, command='…', version='0.1.0') | kw
def table(tmp_path, rows, name='t.csv'): pd.DataFrame(rows).to_csv(tmp_path/name, index=False); return tmp_path/name

@pytest.mark.parametrize('n,level', [(2,.95), (3,.95), (5,.9), (30,.99)])
def test_interval_against_scipy(n, level):
    a,b = np.random.default_rng(n).normal(size=(2,n))
    ci = ttest_rel(a, b).confidence_interval(level); o = study.paired(a, b, level)
    np.testing.assert_allclose([o['lo'], o['hi'], o['gain']], [ci.low, ci.high, (a-b).mean()], rtol=1e-9); assert o['n']==n

def test_interval_of_nearly_nothing():
    assert study.paired([], [])['n']==0 and np.isnan(study.paired([], [])['gain'])
    o = study.paired([1., np.nan, 5.], [np.nan, 1., 2.]); assert (o['n'], o['gain'], o['lo'], o['hi'])==(1, 3., -np.inf, np.inf)
    assert study.paired([1,1], [0,0])==dict(n=2, gain=1., lo=1., hi=1.)

def test_gains_pair_by_seed(tmp_path):
    "Only seeds that both have count; other settings, and the old form without columns host and terms, don't disturb"
    v = {('none',0):.4, ('none',1):.5, ('none',2):.45, ('pixel',0):.43, ('pixel',1):.55, ('pixel',7):.99, ('both',2):.5}
    rows = [row('mic', t, s, o) for (t,s),o in v.items()] + [row('mic', 'pixel', s, .1, settings='w_pixel=9') for s in (0,1)]
    g = study.gains(table(tmp_path, rows)).set_index('terms')
    ci = ttest_rel([43,55], [40,50]).confidence_interval()
    assert g.loc['pixel','n']==2 and g.index.tolist()==['pixel','both'] and g.loc['both','n']==1
    np.testing.assert_allclose(g.loc['pixel', ['gain','lo','hi']].astype(float), [4, ci.low, ci.high])
    assert np.isclose(g.loc['both','gain'], 5) and np.isinf(g.loc['both','hi'])
    fig = study.gains_picture(tmp_path/'t.csv'); assert len(fig.axes[0].get_yticklabels())==1 and len(fig._repr_png_())>1000

def test_old_form(tmp_path):
    csv = table(tmp_path, [row(seed=s, v=.4+s/50) for s in range(3)] + [row(terms='both', seed=s, v=.5+s/40) for s in range(3)] + [row('source', seed=s) for s in range(3)])
    assert 'host' not in pd.read_csv(csv)
    t = tables.hosts_table(csv)
    assert t.loc['self_training'].tolist()==['42.0 ± 2.0', '52.5 ± 2.5'] and t.loc['source'].tolist()==['40.0 ± 0.0', '–']
    assert study.gains(csv).host.tolist()==['self_training']

def test_benchmarks_and_lengths_stay_apart(tmp_path):
    rows = [row(terms=t, seed=s, v=.4+.1*(t=='both')+.2*(b=='camvid'), benchmark=b, epochs=e) for t in ('none','both') for s in (0,1) for b in ('minicity','camvid') for e in (8,20)]
    g = study.gains(table(tmp_path, rows))
    assert len(g)==4 and np.allclose(g.gain, 10) and {'benchmark','epochs'}<={*g} and len(tables.hosts_table(tmp_path/'t.csv'))==4

def test_sweep_takes_rows_that_differ_in_one_setting(tmp_path):
    rows = [row(terms='both', seed=s) for s in (0,1)] + [row(terms='both', seed=0, v=.3, settings=o) for o in ('w_patch=0.01', 'w_patch=1.0', 'w_patch=1.0 temp=0.2', 'crop=64x64', 'crop=96x192')]
    csv = table(tmp_path, rows + [row(terms='pixel', settings='w_patch=5.0')])
    assert study.sweep_rows(csv, 'w_patch', .1).w_patch.tolist()==[.01,.1,.1,1.]
    assert study.sweep_rows(csv, 'crop', '64x128').crop.tolist()==['64x128','64x128','64x64','96x192']
    assert study.sweep_rows(csv, 'w_patch', .1, 'pixel').w_patch.tolist()==[5.]
    words,numbers = (study.sweep_picture(csv, *o).axes[0] for o in (('crop', '64x128'), ('w_patch', .1)))
    assert [o.get_text() for o in words.get_xticklabels()]==['64x128','64x64','96x192']
    assert [ax.lines[-1].get_linestyle() for ax in (words, numbers)]==['None','-'], 'nothing lies between two words'
    assert numbers.lines[-1].get_xdata().tolist()==[.01,.1,1.] and numbers.get_xscale()=='log'
    for ax,shown in ((words, [40,40,30,30]), (numbers, [30,40,40,30])): assert np.allclose(ax.lines[0].get_ydata(), shown)

def test_nothing_to_show_is_said(tmp_path):
    csv = table(tmp_path, [row(), row(seed=1)])
    for fig,says in ((study.gains_picture(csv), 'with and without a term'), (study.sweep_picture(csv, 'temp', .1), 'no sweep of temp'), (study.validators_picture(csv), 'No row')):
        assert not fig.axes and says in fig.texts[0].get_text()

def test_validators_picture(tmp_path):
    rng = np.random.default_rng(0)
    csv = table(tmp_path, [row(h, t, s, v:=rng.random(), entropy=1-v, overlap=v if h=='mic' else np.nan, density=np.nan) for h in ('mic','source') for t in ('none','pixel') for s in range(2)])
    fig = study.validators_picture(csv)
    assert [ax.get_title() for ax in fig.axes]==['ρ = -1.00 (8 runs)', 'ρ = 1.00 (4 runs)']
    assert rank_correlation(tables.read_results(csv)).n.tolist()==[8,4,0]

def test_label_free_scores_are_no_classes(tmp_path):
    csv = table(tmp_path, [row(seed=s, entropy=.3, info_max=.2, agreement=.9, overlap=.8, density=3., host='self_training', terms='none', settings='') for s in (0,1)])
    assert tables.results_table(csv).columns.tolist()==['seeds','mIoU','mIoU, teacher','road']

# tables of results

def results(tmp_path, rows):
    cols = ['benchmark','method','seed','epochs','miou_student','miou_teacher','sky','car','command','version']
    pd.DataFrame(rows, columns=cols).to_csv(tmp_path/'s.csv', index=False); return tmp_path/'s.csv'

def result(m, s, v, t=None, e=10, b='minicity'): return [b, m, s, e, v, t, v, None, 'pipa_train', '0.1']

def test_results_table(tmp_path):
    v = [.401,.455,.43]
    csv = results(tmp_path, [result('oracle', 0, .8)] + [result('pipa', i, o, o+.1) for i,o in enumerate(v)] + [result('mine', 0, .1), result('source', 0, .2)])
    t = tables.results_table(csv)
    assert t.index.tolist()==['source','pipa','mine','oracle'] and t.columns.tolist()==['seeds','mIoU','mIoU, teacher','sky','car']
    assert t.loc['pipa','mIoU']==f'{100*np.mean(v):.1f} ± {100*np.std(v, ddof=1):.1f}' and t.loc['source','mIoU']=='20.0'
    assert t.loc['source','mIoU, teacher']=='–' and t.loc['pipa','car']=='–' and t.loc['pipa','seeds']==3
    assert tables.results_table(csv, spread=False).loc['pipa','mIoU']=='42.9'

def test_last_run_counts_and_lengths_are_kept_apart(tmp_path):
    csv = results(tmp_path, [result('pipa', 0, .9), result('pipa', 0, .5), result('pipa', 0, .1, e=1), result('pipa', 0, .3, b='own')])
    t = tables.results_table(csv)
    assert t.index.names==['benchmark','epochs','method'] and t['mIoU'].tolist()==['10.0','50.0','30.0']
    md = tables.results_markdown(csv).splitlines()
    assert md[0].startswith('| benchmark | epochs | method | seeds |') and len({l.count('|') for l in md})==1 and len(md)==5
    assert len(tables.results_picture(csv).axes[0].get_yticklabels())==3

def test_markdown(tmp_path):
    md = tables.results_markdown(results(tmp_path, [result('source', 0, .2), result('source', 1, .3), result('pipa', 0, .5, .6), result('oracle', 0, .8)])).splitlines()
    assert md==['| method | seeds | mIoU | mIoU, teacher | sky | car |', '| --- | --- | ---: | ---: | ---: | ---: |', '| source | 2 | 25.0 ± 7.1 | – | 25.0 | – |',
                '| pipa | 1 | **50.0** | **60.0** | **50.0** | – |', '| oracle | 1 | 80.0 | – | 80.0 | – |']

def test_no_results(tmp_path):
    (tmp_path/'empty.csv').write_text(''); (tmp_path/'alien.csv').write_text('a,b\n1,2\n')
    for f,k in ((tmp_path/'none.csv', 'no results yet'), (tmp_path/'empty.csv', 'no results yet'), (results(tmp_path, []), 'no results yet'), (tmp_path/'alien.csv', 'no column `benchmark`')):
        with pytest.raises((FileNotFoundError, ValueError), match=k): tables.results_table(f)
        assert k in tables.results_markdown(f) and '\n' not in tables.results_markdown(f)
        assert k in tables.results_picture(f).texts[0].get_text()

def test_results_picture_shows_each_run(tmp_path):
    csv = results(tmp_path, [result('source', i, .2+.01*i) for i in range(3)] + [result('pipa', i, .5, .6) for i in range(2)])
    ax = tables.results_picture(csv).axes[0]
    dots = np.concatenate([c.get_offsets().data for c in ax.collections if len(c.get_offsets())])
    assert len(dots)==7 and sorted(dots[:,0].round(4))==[20,21,22,50,50,60,60]
    assert [t.get_text() for t in ax.get_yticklabels()]==['source','pipa']

# a table goes through many hands

head = 'benchmark,method,seed,epochs,miou_student,miou_teacher,road,command\n'
line = 'city,source,0,5,.4,,.4,pipa_train --method=source\n'

@pytest.mark.parametrize('text,says', [(head+line+'city,so', 'line 3 has 2 cells under 8 columns: was it cut off?'), (head+line+'city,source,1,5,.4,,.4,"pipa_tr', 'line 3'),
    (head+line.replace(',0,5', ',0.5,5'), "line 2: `seed` is '0.5'"), (head+line.replace(',0,5', ',x,5'), "line 2: `seed` is 'x'"), (head+line.replace(',0,5', ',-1,5'), "`seed` is '-1'"),
    (head+line.replace(',0,5', ',1e999,5'), "`seed` is '1e999'"), (head+line.replace(',0,5', ',nan,5'), "`seed` is 'nan'"), (head+line.replace('.4,,', '"0,4",,'), "line 2: `miou_student` is '0,4'"),
    (head.replace('road', 'seed')+line, 'the column `seed` twice'), (head+line+'\0', 'line 3'), ((head+line).encode('utf-16').decode('latin1'), '')])
def test_a_bad_line_is_named(tmp_path, text, says):
    f = tmp_path/'t.csv'; f.write_text(text, encoding='latin1' if says=='' else 'utf8'); old = f.read_bytes()
    for do in (plan.keys_of, tables.read_results, lambda f: plan.add_row(f, row())):
        with pytest.raises(ValueError) as e: do(f)
        assert 't.csv`' in str(e.value) and says in str(e.value)
    assert f.read_bytes()==old and [*tmp_path.iterdir()]==[f]

@pytest.mark.parametrize('text', [head+line.replace(',0,5', ',0.0,5.00'), '\ufeff'+head+line, (head+line).replace('\n', '\r\n'), head+line+',,,,,,,\n\n'], ids=['whole','bom','crlf','blank'])
def test_what_a_spreadsheet_wrote_back(tmp_path, text):
    (tmp_path/'t.csv').write_text(text, encoding='utf8', newline=''); assert plan.keys_of(tmp_path/'t.csv')=={plan.quiet_key(['--method=source'])}

def test_cells_stay_as_they_are(tmp_path):
    "Versions, seeds and empty cells keep their letters when a row is added, however often; a formula is text, and a number is none"
    f = tmp_path/'t.csv'; f.write_text(head.replace('road', 'version')+'city,source,007,5,0.40,,1e5,"a, ""b"""\n')
    for i in range(2): plan.add_row(f, row(seed=i, v=-.5, command='=1+1', version='0.10', **{'@x': 1}))
    assert f.read_text().splitlines()[1:]==['city,source,7,5,0.40,,1e5,"a, ""b""",,', *[f"minicity,self_training,{i},8,-0.5000,-0.5000,0.10,'=1+1,-0.5000,1" for i in range(2)]]
    assert pd.read_csv(f).columns[-1]=="'@x"

def test_no_row_is_lost(tmp_path):
    "Four processes add to one table at once; what each reads is whole"
    def work(k):
        for i in range(12): plan.add_row(tmp_path/'t.csv', dict(method='m', seed=100*k+i)); assert len(pd.read_csv(tmp_path/'t.csv'))
    ps = [mp.get_context('fork').Process(target=work, args=(k,)) for k in range(4)]
    for p in ps: p.start()
    for p in ps: p.join(60)
    assert [p.exitcode for p in ps]==[0]*4
    assert sorted(pd.read_csv(tmp_path/'t.csv').seed)==[100*k+i for k in range(4) for i in range(12)] and [o.name for o in tmp_path.iterdir()]==['t.csv']

def test_no_row_is_lost_where_there_are_no_locks(tmp_path, monkeypatch):
    "Nor is any where the disk has none; a lock that a killed process left counts for a minute"
    import errno, fcntl
    def no(*a): raise OSError(errno.ENOLCK, 'No locks available')
    monkeypatch.setattr(fcntl, 'lockf', no)
    (tmp_path/'.t.csv.locks').mkdir()
    with pytest.raises(ValueError, match='Another process has held'):
        with state.turn(tmp_path/'t.csv', wait=.1): pass
    os.utime(tmp_path/'.t.csv.locks', (1, 1)); test_no_row_is_lost(tmp_path)

# a study that is stopped, killed, called twice

@pytest.fixture
def fake(tmp_path, monkeypatch):
    "A `pipa_train` whose runs of `mic` last until they're told to end, then keep their state; those of `fda` fail"
    f = tmp_path/'bin/pipa_train'; f.parent.mkdir(); monkeypatch.chdir(tmp_path)
    f.write_text(f'#!{sys.executable}\n' + textwrap.dedent("""
        import json, shlex, signal, sys, time
        from pathlib import Path
        o = dict(a[2:].partition('=')[::2] for a in sys.argv[1:]); out = Path(o['out'])
        def kept(*a): (out/'kept').touch(); sys.exit(143)
        signal.signal(signal.SIGTERM, kept); signal.signal(signal.SIGINT, lambda *a: (out/'twice').touch())
        (out/'config.json').write_text(json.dumps(dict(method=o['method'], command=shlex.join(['pipa_train', *sys.argv[1:]]))))
        with open(Path(__file__).with_name('calls'), 'a') as c: c.write(out.name+'\\n')
        if o['method']=='fda': sys.exit('pipa: no luck')
        while o['method']=='mic' and not Path('go').exists(): time.sleep(.02)
        (out/'row.json').write_text(json.dumps(dict(benchmark='x', method=o['method'], seed=int(o['seed']), epochs=5, miou_student=.5, command=shlex.join(['pipa_train', *sys.argv[1:]]))))
        """)); f.chmod(0o755); monkeypatch.setattr(sys, 'executable', str(f.with_name('python')))
    return lambda: (tmp_path/'bin/calls').read_text().split() if (tmp_path/'bin/calls').exists() else []

def study_of(methods, seeds='0', jobs=1):
    todo = [(n,a) for n,a in plan.plan(methods, seeds) if plan.quiet_key(a) not in plan.keys_of('t.csv')]
    plan.run_all(todo, 't.csv', 'r', jobs)

def begun(*args, **kw):
    "A study in a process of its own"
    def go():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for s in (signal.SIGTERM, signal.SIGHUP): signal.signal(s, signal.SIG_DFL)   # what a shell gives; a job of `nohup` ignores one
        sys.stdout = sys.stderr = open('said', 'w', buffering=1)
        study_of(*args, **kw)
    p = mp.get_context('fork').Process(target=go); p.start(); return p

def wait(f, most=20):
    end = time.time()+most
    while not f(): assert time.time()<end, 'it takes too long'; time.sleep(.02)

@pytest.mark.parametrize('sig,code', [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_a_study(fake, sig, code):
    "Runs under way keep their state, and nothing else is begun"
    p = begun('source,mic', '0,1', jobs=2); wait(lambda: [o for o in fake() if 'mic' in o]); os.kill(p.pid, sig); p.join(20)
    assert p.exitcode==code and Path('r/mic_seed0/kept').exists() and not Path('r/mic_seed0/twice').exists() and 'mic_seed1' not in fake()
    assert 'Stopped' in Path('said').read_text() and 'Traceback' not in Path('said').read_text() and not [*Path('r').glob('.*')]

def test_a_second_signal_kills(fake):
    (Path('bin')/'pipa_train').write_text((Path('bin')/'pipa_train').read_text().replace("sys.exit(143)", "pass"))
    p = begun('mic'); wait(fake); os.kill(p.pid, signal.SIGINT); wait(lambda: Path('r/mic_seed0/kept').exists()); os.kill(p.pid, signal.SIGINT); p.join(20)
    assert p.exitcode==130

def test_a_run_that_outlived_its_study_is_taken(fake, capsys):
    p = begun('mic'); wait(fake); p.kill(); p.join(); Path('go').touch(); wait(lambda: Path('r/mic_seed0/row.json').exists())
    study_of('mic')
    assert fake()==['mic_seed0'] and pd.read_csv('t.csv').method.tolist()==['mic'] and 'taken from' in capsys.readouterr().out
    study_of('mic'); assert len(pd.read_csv('t.csv'))==1

def test_two_studies_make_no_run_twice(fake):
    p = begun('mic'); wait(fake)
    with pytest.raises(SystemExit, match='another process is working on mic_seed0'): study_of('source,mic')
    assert fake()==['mic_seed0', 'source_seed0']; Path('go').touch(); p.join(20); assert p.exitcode==0
    study_of('source,mic'); assert sorted(pd.read_csv('t.csv').method)==['mic', 'source'] and len(fake())==2

def test_failed_runs_are_no_success(fake, capsys):
    with pytest.raises(SystemExit, match='1 of 2 runs failed'): study_of('source,fda')
    assert 'failed, see r/fda_seed0.log' in capsys.readouterr().out and pd.read_csv('t.csv').method.tolist()==['source']

@pytest.mark.parametrize('name', ['config.json', 'row.json'])
@pytest.mark.parametrize('text', ['', '{"method": "mi', '[]', '['*10**5, '{"method": 5, "command": 7}', '\xff'])
def test_a_damaged_namesake_stands_in_nobodys_way(fake, capsys, name, text):
    d = Path('r/source_seed0'); d.mkdir(parents=True); (d/name).write_text(text, encoding='latin1'); old = (d/name).read_bytes()
    study_of('source'); assert fake()==['source_seed0_2'] and (d/name).read_bytes()==old

def test_help_ends_no_study(fake, tmp_path):
    for o in ('--help', '-h', '--epochs=2 --hel'):
        with pytest.raises(ValueError, match='asks for help'): plan.words(o)
    with pytest.raises(ValueError): plan.quiet_key(['--help'])
    Path('t.csv').write_text('method,seed,command\nsource,0,pipa_train --help --method=source\n'); study_of('source', '1'); assert fake()==['source_seed1']

@pytest.mark.parametrize('name', ['seed', 'miou_student', 'entropy', 'version', 'accuracy'])
def test_a_class_called_as_a_column(tmp_path, name):
    from pipa.runs.record import class_columns
    c, = class_columns([name]); csv = table(tmp_path, [row(seed=s, v=.4, **{c: .1}) for s in range(2)])
    assert tables.results_table(csv).columns.tolist()==['seeds', 'mIoU', 'mIoU, teacher', 'road', c]
