"Pixel embeddings against loops, scikit-learn and closed forms"
import numpy as np, pandas as pd, pytest, torch
from torch import nn
from sklearn.decomposition import PCA
from sklearn.metrics.pairwise import cosine_similarity
from matplotlib.path import Path as Outline
from pipa.look import measures as M, views as E
from pipa.callbacks import MeanTeacher, Mix, Pair
from pipa.models import add_heads
from pipa.labels import label_space
from pipa.models import light, adapt
from tiny import toy, fit

sp = label_space(['road', 'car', 'sky'])
def some(n=4, hw=(16,32), cells=(4,8), d=6, k=3, seed=0, **kw):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, k, (n, *cells)).repeat(hw[0]//cells[0], 1).repeat(hw[1]//cells[1], 2)
    return E.views(rng.integers(0, 256, (n,*hw,3), dtype=np.uint8), rng.normal(size=(n,*cells,d)), y, (y+1)%k, rng.random(y.shape),
                   kw.get('domain', ['s']*(n//2)+['t']*(n-n//2)))

def test_views_say_what_is_wrong():
    a,e = np.zeros((2,8,8,3), np.uint8),np.ones((2,2,2,3))
    for kw,what in ((dict(y=np.zeros((2,4,8))), 'y has shape'), (dict(domain=['a']), '1 domains'), (dict(conf=np.ones(3)), 'conf has shape')):
        with pytest.raises(ValueError, match=what): E.views(a, e, **kw)
    with pytest.raises(ValueError, match='uint8'): E.views(a.astype(float), e)
    v = E.views(a, e*0)
    assert np.isfinite(v.emb).all() and (v.y==255).all() and v.domain==['','']

@pytest.mark.parametrize('signs', [[1], [1,1], [1,-1], [-1], [1,1,-1,-1]])
def test_similarity_is_the_cosine_to_the_query(signs):
    v = some(); at = [(i%4, i%4, (3*i)%8, s) for i,s in enumerate(signs)]
    q = E.query(v.emb, at)
    pos,neg = ([v.emb[o[:3]] for o in at if o[3]*s>0] for s in (1,-1))
    mean = lambda a: 0 if not a else (m:=np.mean(a, 0))/np.linalg.norm(m)
    ref = cosine_similarity(v.emb.reshape(-1, 6), (mean(pos)-mean(neg))[None])
    np.testing.assert_allclose(E.similarity(v.emb, q).ravel(), ref[:,0], atol=1e-5)

def test_query_outside():
    for at in ((0,0,8), (4,0,0), (0,-1,0)):
        with pytest.raises(ValueError, match='no cell'): E.query(some().emb, [at])

@pytest.mark.parametrize('hw,cells', [((16,32),(4,8)), ((17,33),(4,8)), ((7,5),(7,5)), ((6,6),(4,4)), ((4,4),(8,8))])
def test_cells_against_a_loop(hw, cells):
    y = np.random.default_rng(0).integers(0, 2, (2,*hw))
    mid,pure = E.cell_labels(y, cells)
    (H,W),(h,w) = hw,cells
    for i in range(2):
        for r in range(h):
            for c in range(w):
                assert mid[i,r,c]==y[i, (2*r+1)*H//(2*h), (2*c+1)*W//(2*w)]
                if H>=h and W>=w:
                    a,b = [(k*N//n, (k+1)*N//n) for k,N,n in ((r,H,h), (c,W,w))]
                    assert pure[i,r,c]==(len(np.unique(y[i,a[0]:a[1],b[0]:b[1]]))==1)

def test_sample_is_even_pure_and_seeded():
    v = some(n=6, domain=['s']*2+['t']*4)
    v.y[0,:,:16] = 255; v.y[1,0,0] = 2-v.y[1,0,0]//2
    t = E.sample(v, 5)
    assert (t.groupby(['cls','domain']).size()==5).all() and t.groupby(['cls','domain']).ngroups==6
    _,pure = E.cell_labels(v.y, (4,8))
    assert pure[t.image,t.row,t.col].all() and (v.y[t.image,t.y,t.x]==t.label).all() and not (t.label==255).any()
    assert t.equals(E.sample(v, 5)) and not t.equals(E.sample(v, 5, seed=1))
    assert (t.conf==v.conf[t.image,t.y,t.x]).all() and not t.correct.any()
    assert set(E.sample(v, 5, classes=[1]).cls)=={1} and len(E.sample(v, 1000, pure=False))>len(E.sample(v, 1000))

def test_sample_without_labels_goes_by_prediction():
    v = some(); v.y[2:] = 255
    t = E.sample(v, 5); blind = t[t.domain=='t']
    assert (blind.cls==blind.pred).all() and blind.correct.isna().all() and len(blind)==15
    assert len(E.sample(v._replace(y=v.y*0+255, pred=v.pred*0+255)))==0

@pytest.mark.parametrize('n,d', [(50,6), (5,9), (3,3)])
def test_pca_is_that_of_sklearn(n, d):
    e = np.random.default_rng(0).normal(size=(n,d))*np.arange(1, d+1)
    mu,axes,share = E.pca(e); ref = PCA(2).fit(e)
    np.testing.assert_allclose(share, ref.explained_variance_ratio_, atol=1e-9)
    np.testing.assert_allclose(np.abs((e-mu)@axes), np.abs(ref.transform(e)), atol=1e-7)

def test_procrustes_undoes_rotation_and_mirror():
    b = np.random.default_rng(0).normal(size=(20,2)); c,s = np.cos(1.),np.sin(1.)
    for R in (np.array([[c,-s],[s,c]]), np.array([[c,s],[s,-c]])): np.testing.assert_allclose(E.procrustes(b@R+5, b), b, atol=1e-9)

def test_projections_stay_in_place():
    rng = np.random.default_rng(0)
    e = np.concatenate([rng.normal(size=(15,8))+m for m in (0,6,-6)])
    for method in ('pca', 'tsne'):
        (a,b),share = E.project([e, e+rng.normal(size=e.shape)*.01], method, perplexity=8)
        assert np.corrcoef(a.ravel(), b.ravel())[0,1]>.95 and (share is None)==(method=='tsne')
    with pytest.raises(ValueError, match='too few'): E.project([e[:4]], 'tsne')

def test_umap_stays_in_place():
    pytest.importorskip('umap', reason='UMAP is not installed: `pip install umap-learn`')
    rng = np.random.default_rng(0)
    e = np.concatenate([rng.normal(size=(15,8))+m for m in (0,6,-6)])
    (a,b),share = E.project([e, e+rng.normal(size=e.shape)*.01], 'umap', perplexity=8)
    assert a.shape==(45,2) and np.isfinite(a).all() and share is None and np.corrcoef(a.ravel(), b.ravel())[0,1]>.9
    mid = a.reshape(3,15,2).mean(1); near = ((a[:,None]-mid)**2).sum(-1).argmin(1)
    assert np.array_equal(near, np.repeat([0,1,2], 15))

def test_measures_against_loops():
    rng = np.random.default_rng(0)
    e,y,dom = E.unit(rng.normal(size=(60,5))+1),rng.integers(0, 3, 60),np.where(rng.random(60)<.5, 's', 't')
    d = M.cluster_table(e, pd.DataFrame(dict(cls=y, domain=dom)), ['a','b','c','d']).set_index('class')
    mu = {c: (m:=e[y==c].mean(0))/np.linalg.norm(m) for c in range(3)}
    for c,k in enumerate('abc'):
        tight = np.mean([o@mu[c] for o in e[y==c]]); near = min(1-mu[c]@mu[o] for o in range(3) if o!=c)
        s,t = ((m:=e[(y==c)&(dom==o)].mean(0))/np.linalg.norm(m) for o in 'st')
        np.testing.assert_allclose(d.loc[k, ['compactness','separability','ratio','gap']].astype(float), [tight, near, near/(1-tight), 1-s@t], rtol=1e-3)
    assert 'd' not in d.index
    m = M.class_cosines(e, y, 4)
    assert np.isnan(m[3]).all() and np.isclose(m[0,1], mu[0]@mu[1], atol=1e-5)

def test_lasso_is_that_of_matplotlib():
    rng = np.random.default_rng(0); poly,xy = rng.normal(size=(7,2)),rng.normal(size=(500,2))
    convex = np.array([[np.cos(a),np.sin(a)] for a in np.linspace(0, 6, 9)])
    assert np.array_equal(E.in_lasso(xy, convex), Outline(convex).contains_points(xy))
    assert not E.in_lasso(xy, []).any() and not E.in_lasso(xy, poly[:2]).any() and E.in_lasso(np.zeros((0,2)), poly).shape==(0,)

def test_figures():
    v = some(); t = E.sample(v, 4); e = E.embeddings_of(v, t)
    assert len(M.class_lines({'a': (d:=M.cluster_table(e, t, sp.codes)), 'b': d}, sp).axes)==4
    assert M.cosine_matrix(M.class_cosines(e, t.cls.values, 3), sp.codes)._repr_png_()[1:4]==b'PNG'
    assert len(E.scatter(E.project([e,e])[0], t, sp, ['x','y']).axes)==2

# --- nets -------------------------------------------------------------------------------------------------------------------------------
def test_looking_changes_nothing():
    net = add_heads(light('mit_b0', n_out=3), hidden=16).train(); net.decode_head.eval()
    modes,state = [m.training for m in net.modules()],{k:o.clone() for k,o in net.state_dict().items()}
    x = torch.randn(3,3,64,64)
    v = E.see(net, x, torch.zeros(3,64,64).long(), ['s','t','t'], bs=2)
    w = E.see(net, x, bs=3)
    np.testing.assert_allclose(v.emb, w.emb, atol=1e-5)
    assert v.emb.shape==(3,16,16,256) and [m.training for m in net.modules()]==modes
    assert all(torch.equal(o, state[k]) for k,o in net.state_dict().items())
    with torch.no_grad(): assert np.array_equal(v.pred, net.eval()(x).argmax(1).numpy())

def test_layers_by_name():
    net = light('mit_b0', n_out=3); x = torch.randn(1,3,64,64)
    with pytest.raises(ValueError, match='no head for `pixel`'): E.embedding(net, x, 'pixel')
    with pytest.raises(ValueError, match='decode_head'): E.embedding(net, x, 'decod_head')
    assert E.embedding(net, x)[1].shape==E.embedding(net, x, 'fused')[1].shape
    for k in E.map_layers(net): assert E.embedding(net, x, k)[1].ndim==4
    own = adapt(nn.Sequential(nn.Conv2d(3,5,3,2,1), nn.Conv2d(5,3,1)), '0')
    assert E.embedding(own, x)[1].shape==(1,5,32,32)
    assert E.embedding(nn.Sequential(nn.Conv2d(3,5,3,2,1), nn.Conv2d(5,3,1)), x, '0')[1].shape==(1,5,32,32)

def test_snapshots_of_student_and_teacher():
    learn = fit(toy([Pair(), MeanTeacher(), Mix(), E.Snapshots(2)]), 4)
    assert [*learn.snapshots.states]==['start', 'epoch 2', 'epoch 4']
    for who in ('student', 'teacher'):
        now,last,old = (E.at_snapshot(learn, k, who).state_dict() for k in ('now', 'epoch 4', 'start'))
        assert all(torch.equal(now[k], last[k]) for k in now) and any(not torch.equal(now[k], old[k]) for k in now)
    with pytest.raises(KeyError, match='epoch 2, epoch 4, now'): E.at_snapshot(learn, 'epoch 3')
    with pytest.raises(KeyError, match='no teacher'): E.at_snapshot(fit(toy([Pair()])), who='teacher')
    a = E.scenes(learn.dls, 2)
    assert a[0].shape==(4,3,64,64) and a[2]==['source','source','target','target']

def test_lr_find_takes_no_snapshot():
    learn = toy([Pair(), E.Snapshots()])
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=20, suggest_funcs=(), show_plot=False)
    assert not learn.snapshots.states
