"Tables of a study, differences with their intervals, sweeps, and pictures, also of tables with holes"
import numpy as np, pandas as pd, pytest
from scipy.stats import ttest_rel
from pipa.runs import study, tables
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
