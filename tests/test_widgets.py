"The explorers without a browser: traits, events, tables, pictures"
import base64, io, json, re, sys
import numpy as np, pytest, torch
import matplotlib._pylab_helpers as pyplot_state
from PIL import Image
from pipa.look import views as E, patches as P, surface as S
from pipa import widgets as X
from pipa.data import folder, uda_dls
from pipa.learner import uda_learner
from pipa.callbacks import MeanTeacher, Mix, PatchContrast, Pair, PixelContrast
from pipa.labels import label_space
from tiny import toy, fit

sp = label_space(['road', 'car', 'sky'])
def arrays(seed=0, noise=.3):
    rng = np.random.default_rng(seed)
    y = (np.arange(8).reshape(2,4)%3).repeat(8, 0).repeat(8, 1)[None].repeat(4, 0)
    mu = np.random.default_rng(9).normal(size=(3,6))
    return E.views(rng.integers(0, 256, (4,16,32,3), dtype=np.uint8), mu[y]+noise*rng.normal(size=(4,16,32,6)), y, (y+(rng.random(y.shape)<.2))%3,
                   rng.random(y.shape), ['s','s','t','t'])
def explorer(**kw): return X.PixelEmbeddingExplorer({'a': arrays(0, 2.), 'b': arrays(0)}, space=sp, **dict(n=20)|kw)
def u8(b): return np.frombuffer(b, np.uint8)
def f32(b): return np.frombuffer(b, np.float32)

@pytest.fixture(autouse=True)
def no_pyplot():
    n = len(pyplot_state.Gcf.get_all_fig_managers())
    yield
    assert len(pyplot_state.Gcf.get_all_fig_managers())==n

# --- pixels -----------------------------------------------------------------------------------------------------------------------------
def test_click_shift_and_undo():
    p = explorer(); ev = p.surface.event
    ev(dict(type='click', panel=1, x=3.7, y=2.2, n=1)); assert p.queries==[(1,2,3,1)] and p.surface.done==1
    ev(dict(type='click', panel=2, x=31.9, y=15.9, add=True)); ev(dict(type='click', panel=0, x=0, y=0, neg=True))
    assert p.queries==[(1,2,3,1), (2,15,31,1), (0,0,0,-1)] and [m['sign'] for m in p.surface.marks]==[1,1,-1]
    heat = u8(p.surface.heat).reshape(4,16,32)
    assert np.array_equal(heat, np.rint(p.similarities().clip(-1,1)*127.5+127.5).astype(np.uint8))
    ev(dict(type='undo')); assert len(p.queries)==2
    ev(dict(type='click', panel=3, x=1, y=1)); assert p.queries==[(3,1,1,1)]
    ev(dict(type='clear')); assert not p.queries and not p.surface.heat and p.similarities() is None

def test_hover_previews_and_click_stays():
    p = explorer()
    p.surface.event(dict(type='hover', panel=0, x=5, y=5)); assert u8(p.surface.heat).reshape(4,16,32)[0,5,5]==255 and not p.queries
    assert 'is road' in p.surface.said and 'similarity 1.00' in p.surface.said and ' s ' in f'{p.surface.said} '.replace('·', '')
    p.surface.event(dict(type='leave')); assert not p.surface.heat
    p.queries = [(0,0,0,1)]; h = p.surface.heat
    p.surface.event(dict(type='hover', panel=0, x=20, y=5)); assert p.surface.heat==h

def test_lasso_area_and_legend():
    p = explorer(); z = f32(p.surface.xy).reshape(-1, 2)
    assert len(z)==len(p.table)==len(p.surface.tips) and np.abs(z).max()<=1.001
    p.surface.event(dict(type='lasso', poly=[(-2,-2),(0,-2),(0,2),(-2,2)]))
    assert p.lit==np.flatnonzero(z[:,0]<0).tolist() and np.array_equal(u8(p.surface.state)==2, z[:,0]<0)
    assert len(p.selection)==len(p.lit) and p.surface.said.startswith(f'{len(p.lit)} pixels')
    n = len(p.lit); p.surface.event(dict(type='lasso', poly=[(0,-2),(2,-2),(2,2),(0,2)], add=True)); assert len(p.lit)>n
    p.surface.event(dict(type='area', panel=3, x=0, y=0, w=16, h=16)); t = p.selection
    assert len(t) and (t.image==3).all() and (t.x<=16).all()
    p.lit = []; p.surface.event(dict(type='legend', text='car')); assert p.shown==[0,2]
    assert np.array_equal(u8(p.surface.state)==0, p.table.cls==1) and [l['on'] for l in p.surface.legend]==[True,False,True]
    p.surface.event(dict(type='lasso', poly=[(-2,-2),(2,-2),(2,2),(-2,2)])); assert 1 not in set(p.selection.cls)
    p.surface.event(dict(type='legend', text='car')); assert p.shown==[]
    at = f32(p.surface.at).reshape(-1, 3); assert np.array_equal(at, p.table[['image','x','y']])
    p.surface.event(dict(type='point', i=7)); r = p.table.loc[7]; assert p.queries==[(r.image, r.row, r.col, 1)]

@pytest.mark.parametrize('by', ['class', *(pytest.param(o, marks=pytest.mark.slow) for o in ('prediction', 'domain', 'confidence', 'correct'))])
def test_colours(by):
    p = explorer(color_by=by); c = u8(p.surface.rgb).reshape(-1, 3); t = p.table
    key = dict(zip(('class','prediction','domain','correct'), (t.cls, t.pred, t.domain, t.correct))).get(by)
    if key is None: assert len(np.unique(c, axis=0))>20
    else: assert len({(k,tuple(o)) for k,o in zip(key, c.tolist())})==key.nunique()==len(np.unique(c, axis=0))
    if by=='class':
        assert np.array_equal(c, sp.palette[t.cls])
        p.blind = True; assert np.array_equal(u8(p.surface.rgb).reshape(-1,3), S.palette(sp, True)[t.cls])

def test_checkpoints_keep_pixels_and_change_what_is_said():
    p = explorer(queries=[(0,1,1,1)]); assert p.checkpoint==1
    t,h,z = p.table,p.surface.heat,p.surface.xy
    p.checkpoint = 0
    assert p.table[['image','row','col']].equals(t[['image','row','col']]) and p.surface.heat!=h and p.surface.xy!=z and p.surface.at==S.f32(t[['image','x','y']])
    m = p.measures(); assert [*m]==['a','b'] and m['b'].compactness.iloc[-1]>m['a'].compactness.iloc[-1]
    p.trails = True; assert [len(o['xy']) for o in p.surface.trails]==[2]*3
    p.n = 5; assert len(p.table)==5*3*2 and not p.lit
    p.seed = 4; assert 'seed 4' in p.surface.caption

@pytest.mark.parametrize('over', ['nothing', 'labels', 'prediction', 'errors'])
def test_overlays(over):
    p = explorer(over=over); a = u8(p.surface.over)
    if over=='nothing': assert not len(a); return
    a = a.reshape(4,16,32,4); v = p.views
    if over=='labels': assert np.array_equal(a[...,:3], sp.palette[v.y])
    if over=='prediction': assert np.array_equal(a[...,:3], sp.palette[v.pred])
    if over=='errors': assert len(np.unique(a[v.y==v.pred], axis=0))==1 and len(np.unique(a[v.y!=v.pred], axis=0))==1

def test_every_control_is_a_trait():
    p = explorer()
    for k in 'method color_by over over_alpha heat_alpha threshold n pure seed hover trails blind checkpoint'.split(): assert p.has_trait(k)
    p.threshold = .9; assert p.surface.heat_range[0]==.9 and p.surface.heat_range[1]>.9
    p.heat_alpha,p.over_alpha,p.hover = .3,.2,False
    assert (p.surface.heat_alpha, p.surface.over_alpha, p.surface.hover)==(.3,.2,False)
    p.tabs.selected_index = 3; assert 'Click a pixel' in p.panes[3].children[0].value
    p.queries = [(0,0,0,1)]; assert '<table' in p.panes[3].children[0].value
    for i in range(3): p.tabs.selected_index = i; assert p.panes[i].children

@pytest.mark.parametrize('from_a_hand', [False, True])
def test_what_cannot_be_shown_is_taken_back(from_a_hand, monkeypatch):
    monkeypatch.setitem(sys.modules, 'umap', None)  # as if it weren't installed
    p = explorer(); xy = p.surface.xy
    with pytest.raises(ImportError, match='pip install umap-learn'):
        if from_a_hand: p.handles['method'].value = 'umap'
        else: p.method = 'umap'
    assert (p.method, p.handles['method'].value, p.surface.busy, p.surface.xy)==('pca', 'pca', False, xy) and 'umap-learn' in p.surface.said
    with pytest.raises(ImportError, match='umap-learn'): explorer(method='umap')

def test_numbers_stand_in_for_names_and_one_class_is_enough():
    a = np.zeros((1,8,8,3), np.uint8)
    p = X.PixelEmbeddingExplorer(a, np.random.default_rng(0).normal(size=(1,4,4,3)), y=np.zeros((1,8,8)))
    assert p.space.codes==['class 0'] and p.surface.panels[0]['title']=='image 1' and len(p.table)==16
    p = X.PixelEmbeddingExplorer(a, np.ones((1,4,4,3)))
    assert len(p.table)==0 and not p.surface.xy and p.to_png()[1:4]==b'PNG'
    p.surface.event(dict(type='click', panel=0, x=1, y=1)); assert p.queries

def test_a_saved_notebook_has_a_picture(tmp_path):
    p = explorer(queries=[(0,1,1,1)], lit=[0,1,2]); b = p._repr_mimebundle_()
    im = Image.open(io.BytesIO(base64.b64decode(b['image/png'])))
    assert 'application/vnd.jupyter.widget-view+json' in b and im.size[0]>400 and len(np.unique(np.array(im)))>50
    assert p.to_png(tmp_path/'ä.png')[1:4]==b'PNG' and Image.open(tmp_path/'ä.png').size[0]>400
    html = p.to_html(tmp_path/'a.html'); assert 'compactness' in html
    state = json.loads(re.search(r'class="state">(.*?)</script>', html, re.S)[1])
    assert base64.b64decode(state['xy']['b64'])==p.surface.xy and state['hover'] is False
    assert not [u for u in re.findall(r'https?://[^"\'\s)]+', html) if 'w3.org' not in u]

def test_a_learner_is_explored():
    learn = fit(toy([Pair(), MeanTeacher(), Mix(), PixelContrast(min_pixels=2), E.Snapshots()], n=4), 2)
    p = X.PixelEmbeddingExplorer(learn, n_images=2, n=10)
    assert p.looks.names==['start','epoch 1','epoch 2'] and p.checkpoint==2 and p.layer=='pixel' and p.views.domain==['source']*2+['target']*2
    e = p.views.emb; p.who = 'teacher'; assert not np.array_equal(p.views.emb, e)
    p.layer = 'fused'; assert p.views.emb.shape[-1]==128
    p.checkpoint = 0; assert p.surface.caption.startswith('PCA') and len(p.measures())==3

# --- emptiness, pages, what is sent --------------------------------------------------------------------------------------------------------
def test_what_cannot_be_explored_is_told():
    with pytest.raises(TypeError, match='There is nothing to explore: give a learner'): X.PixelEmbeddingExplorer(None)
    with pytest.raises(TypeError, match=r'a Linear to explore.*see\(net, x\)'): X.PixelEmbeddingExplorer(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match='give its learner'): X.PixelEmbeddingExplorer(arrays(), clicks='a.csv')
    with pytest.raises(TypeError, match='nothing to compare'): X.PatchConsistency(None)

def test_emptiness_has_words():
    v = arrays(); p = X.PixelEmbeddingExplorer(v._replace(y=v.y*0+255, pred=v.y*0+255), space=sp)
    assert 'no cell has a label' in p.surface.empty and 'no cell has a label' in p.panes[0].children[0].value
    p.threshold = .999; p.surface.event(dict(type='click', panel=0, x=1, y=1)); assert p.surface.said.endswith('% lie above 1.00')

def test_thirty_images_come_in_pages():
    rng = np.random.default_rng(0)
    v = E.views(rng.integers(0, 256, (10,16,32,3), dtype=np.uint8), rng.normal(size=(10,4,8,5)), domain=['s']*5+['t']*5)
    p = X.PixelEmbeddingExplorer(v, space=sp)
    assert p.here==[0,1,2,5,6,7] and len(p.surface.panels)==6 and len(u8(p.surface.base))==6*16*32*4
    p.surface.event(dict(type='page', to=1))
    assert p.here==[3,4,8,9] and [o['title'] for o in p.surface.panels]==['s 4', 's 5', 't 4', 't 5'] and p.surface.pages[:2]==[1,2]
    p.surface.event(dict(type='click', panel=2, x=31, y=15)); assert p.queries==[(8,3,7,1)] and p.surface.marks[0]['panel']==2
    assert np.array_equal(u8(p.surface.heat).reshape(4,4,8), u8(S.heat_bytes(p.similarities()[[3,4,8,9]])).reshape(4,4,8))
    p.page = 0; assert not p.surface.marks and len(p.surface.heat)==6*32

def test_large_images_are_sent_at_the_size_of_the_screen():
    rng = np.random.default_rng(0)
    v = E.views(rng.integers(0, 256, (1,512,1024,3), dtype=np.uint8), rng.normal(size=(1,4,8,5)), rng.integers(0, 3, (1,512,1024)))
    p = X.PixelEmbeddingExplorer(v, space=sp, over='labels')
    o = p.surface.panels[0]; assert (o['w'], o['h'], o['W'], o['H'])==(1024, 512, 720, 360)
    assert len(p.surface.base)==len(p.surface.over)==720*360*4 and p.surface.fine==-1
    p.surface.event(dict(type='fine', panel=0))
    assert p.surface.fine==0 and np.array_equal(u8(p.surface.fine_base).reshape(512,1024,4)[...,:3], v.images[0])
    assert np.array_equal(u8(p.surface.fine_over).reshape(512,1024,4)[...,:3], sp.palette[v.y[0]])

def test_similarity_colours_the_cloud():
    p = explorer(color_by='similarity'); c = u8(p.surface.rgb).reshape(-1, 3); assert (c==150).all()
    p.queries = [(0,1,1,1)]; c = u8(p.surface.rgb).reshape(-1, 3).sum(1).astype(int); sim = p.similarities()[p.table.image, p.table.row, p.table.col]
    assert c[sim.argmax()]==c.max() and len(np.unique(c[sim<p.threshold]))==1

def test_selection_has_names():
    p = explorer(lit=[0,1]); p.tabs.selected_index = 2
    html = p.panes[2].children[1].value; assert 'road' in html and '<th>cls' not in html

def test_the_projection_that_is_shown_comes_first():
    p = explorer(method='tsne', n=5); known = p.cache[next(k for k in p.cache if k[0]==('xy','tsne'))]
    assert [*known]==[1]
    z = p.points_at(1); p.checkpoint = 0; assert [*known]==[1,0] and np.array_equal(p.points_at(1), z) and not np.array_equal(p.points_at(0), z)

# --- the pen ----------------------------------------------------------------------------------------------------------------------------
def town(root, poison=None):
    "Folders of pictures: a source, a target of 128×192 of which picture 0 is in validation, too"
    rng = np.random.default_rng(0)
    def save(file, a): file.parent.mkdir(parents=True, exist_ok=True); Image.fromarray(a).save(file)
    def picture(): return rng.integers(0, 256, (128,192,3), dtype=np.uint8)
    for i in range(4):
        save(root/f'source/images/{i}.png', picture()); save(root/f'source/labels/{i}.png', rng.integers(0, 3, (128,192), dtype=np.uint8))
        save(root/f'target/images/a/{i}.png', picture())
        if poison is not None: save(root/f'target/labels/a/{i}.png', np.full((128,192), poison, np.uint8))
    (root/'val/images').mkdir(parents=True)
    (root/'val/images/z.png').write_bytes((root/'target/images/a/0.png').read_bytes()); save(root/'val/labels/z.png', rng.integers(0, 3, (128,192), dtype=np.uint8))
    two = [folder(root/k/'images', root/k/'labels', sp) for k in ('source', 'val')]
    target = folder(root/'target/images', None if poison is None else root/'target/labels', sp)
    torch.manual_seed(0)
    return uda_learner(uda_dls(two[0], target, two[1], bs=2, size=(64,96), seed=0), 'light')
def pen_page(tmp_path, **kw): return X.PixelEmbeddingExplorer(town(tmp_path), clicks=tmp_path/'clicks.csv', **dict(n=5)|kw)
def press(p, panel, x, y, c): p.surface.event(dict(type='click', panel=panel, x=x, y=y, pen=c))

def test_a_click_is_a_row_a_mark_and_another_net(tmp_path):
    p = pen_page(tmp_path); s = p.surface
    assert s.pens and [o['title'] for o in s.panels]==['target 1', 'target 2', 'target 3'] and (p.views.y==255).all()
    s.event(dict(type='pen', i=1)); assert s.pen==1 and '0 of 3 classes have clicks; none: road, car, sky' in s.said
    before = p.pen.last(None, p._net_key).W.clone(); press(p, 0, 10.2, 20.7, 1)
    assert (tmp_path/'clicks.csv').read_text()=='image,x,y,class,r\n1.png,20,41,car,4\n'
    assert s.said.startswith('car 1 of 9 · the net said ') and s.said.endswith('saved') and s.legend[1]['note']=='1/9' and s.legend[1]['key']=='2'
    (m,) = s.marks; assert m['color']==S.css(sp.palette[1]) and (m['panel'], m['x'], m['y'])==(0, 10.25, 20.75)
    assert not torch.equal(p.pen.last(None, p._net_key).W, before)
    press(p, 2, 50, 50, 0); press(p, 2, 50.2, 50.2, 2); assert [o.label for o in p.pen.clicks]==['car', 'sky'], 'one pixel has one class'
    again = X.PixelEmbeddingExplorer(p.looks.learn, clicks=tmp_path/'clicks.csv', n=5)
    assert again.pen.clicks==p.pen.clicks and again.pen.names[again.pen.which[0]]=='1.png' and len(again.surface.marks)==2

def test_clicks_are_taken_back_and_deleted(tmp_path):
    p = pen_page(tmp_path); s = p.surface; was = p.views.pred.copy()
    for i,c in enumerate((0,1,2)): press(p, i, 30, 30, c)
    s.event(dict(type='undo')); assert [o.label for o in p.pen.clicks]==['road', 'car'] and s.said=='2 clicks · saved'
    s.event(dict(type='drop', panel=0, x=60, y=60, k=.2)); assert len(p.pen.clicks)==2 and s.said=='There is no click here.'
    s.event(dict(type='drop', panel=0, x=31, y=30, k=.2)); assert [o.label for o in p.pen.clicks]==['car'] and len(s.marks)==1
    s.event(dict(type='undo')); assert np.array_equal(p.views.pred, was) and (tmp_path/'clicks.csv').read_text().count('\n')==1
    s.event(dict(type='undo')); assert s.said=='There is no click here.'

def test_space_next_and_disagree(tmp_path):
    p = pen_page(tmp_path, n_images=3, per_page=2); s = p.surface
    said = int(p.views.pred[p.here[0],30,40]); s.event(dict(type='accept', panel=0, x=40.5, y=30.5))
    assert p.pen.clicks[0].label==sp.codes[said] and 'too' in s.said
    s.event(dict(type='differs')); first = s.said
    s.event(dict(type='next')); assert p.at!=0 and s.go['panel']==p.here.index(p.at) and 'none:' in s.said
    at = p.at; s.event(dict(type='next')); assert p.at not in (0, at)
    for k in range(3): press(p, p.here.index(p.at), 30+.5*k, 20, (said+1)%3)
    i,x,y,c = p.pen.marks()[-1]; off = p._off()[1]
    s.event(dict(type='differs')); assert s.said.startswith('1 of') if off.any() else s.said.startswith('The net agrees')
    assert first.startswith('The net agrees')

def test_validation_cannot_be_clicked(tmp_path):
    p = pen_page(tmp_path); assert sorted(p.pen.names[i] for i in p.pen.which)==['1.png', '2.png', '3.png']
    for name,why in (('0.png', 'is an image of validation'), ('z.png', 'is an image of validation'), ('q.png', 'no such image')):
        (tmp_path/'b.csv').write_text(f'image,x,y,class,r\n{name},1,1,road,2\n')
        with pytest.raises(ValueError, match=why): X.PixelEmbeddingExplorer(p.looks.learn, clicks=tmp_path/'b.csv')

def test_poisoned_masks_of_the_target_change_nothing(tmp_path):
    def run(poison):
        root = tmp_path/str(poison); p = X.PixelEmbeddingExplorer(town(root, poison), clicks=root/'c.csv', n=5)
        press(p, 0, 10, 20, 1); press(p, 1, 50, 20, 2)
        return p.pen.which,p.views.pred,p.pen.last(None, p._net_key).W,p.surface.said
    a = run(None)
    for poison in (0, 2, 77):
        b = run(poison); assert a[0]==b[0] and np.array_equal(a[1], b[1]) and torch.equal(a[2], b[2]) and a[3]==b[3]

def test_a_net_that_ends_in_another_way_keeps_clicks(tmp_path):
    learn = town(tmp_path); learn.model.decode_head.linear_pred = torch.nn.Conv2d(128, 3, 3, padding=1)
    p = X.PixelEmbeddingExplorer(learn, clicks=tmp_path/'c.csv', n=5); was = p.views.pred.copy()
    press(p, 0, 10, 20, 1)
    assert np.array_equal(p.views.pred, was) and len(p.pen.clicks)==1 and 'when it is trained on' in p.surface.said and len(p.surface.marks)==1

def test_kept_layer_is_in_the_net(tmp_path):
    p = pen_page(tmp_path); press(p, 0, 10, 20, 1); press(p, 1, 60, 20, 2)
    want = p.views.pred[p.here].copy(); p.keep()
    v = E.see(p.looks.learn.model, p.pen.x); assert (v.pred[p.here]==want).mean()>.999

# --- patches ----------------------------------------------------------------------------------------------------------------------------
def bright(x): return (x.mean(1, keepdim=True)*torch.tensor([-3.,3]).view(1,2,1,1)).softmax(1), torch.nn.functional.avg_pool2d(x, 8)
xs = torch.randn(2,3,64,128, generator=torch.Generator().manual_seed(0)).cumsum(3)/4
def pairs(**kw): return X.PatchConsistency(bright, xs, **dict(size=(32,64), at_1=(16,20), at_2=(24,44), conf=.5)|kw)

def test_pair_is_scored_as_in_training():
    p = pairs(); s = p.scores()
    assert s['cells']==0 and np.isnan(s['loss']) and s['agreement']==1 and 'loss of the training' in p.side.value
    learn = fit(toy([Pair(), MeanTeacher(), PatchContrast(size=(32,32), thresh=.3), E.Snapshots()], n=4), 2)
    p = X.PatchConsistency(learn, n_images=2, size=(32,32), at_1=(0,0), at_2=(16,16), conf=.3)
    c = P.crops_at(p.nets.x[:1], (0,0), (16,16), (32,32)); l = P.pair_looks(learn.model, c, learn.mean_teacher.teacher)
    assert p.scores()['loss']==pytest.approx(P.patch_loss(l, c, thresh=.3)[0], rel=1e-4)
    assert len(p.history())==6 and set(p.sweeps(k=6))=={'student','teacher'}
    p.go(0); assert p.scores()['agreement']==pytest.approx(p.hardest().agreement[0], abs=1e-3)

@pytest.mark.parametrize('box,at', [(dict(x=0, y=0), (0,4)), (dict(x=500, y=500), (32,60)), (dict(x=33, y=13), (16,36))])
def test_dragged_boxes_end_on_whole_cells_inside(box, at):
    p = pairs(); b = [dict(o) for o in p.surface.boxes]; b[0].update(box)
    p.surface.event(dict(type='box', boxes=b, active=0, final=True, n=3))
    assert p.at_1==at and p.surface.done==3 and [p.surface.boxes[0][k] for k in 'yx']==list(at)

def test_resize_keeps_both_inside():
    p = pairs(); b = [dict(o) for o in p.surface.boxes]; b[0].update(w=128, h=64)
    p.surface.event(dict(type='box', boxes=b, active=0, final=True)); assert (p.size, p.at_1, p.at_2)==((64,128), (0,0), (0,0))
    b[0].update(w=3, h=3); p.surface.event(dict(type='box', boxes=b, active=0, final=True)); assert p.size==(32,32)

def test_state_may_be_set_one_by_one():
    p = pairs()
    for k,v in dict(at_1=(3,5), at_2=(40,99), size=(40,64), image=1, at_2_=(0,0)).items():
        setattr(p, k.rstrip('_'), v)
        assert all((a-b)%8==0 for a,b in zip(p.at_1, p.at_2)) and all(0<=o<=N-n for at in (p.at_1, p.at_2) for o,N,n in zip(at, (64,128), p.size))
    assert p.image==1 and np.array_equal(u8(p.surface.base).reshape(64,128,4)[...,:3], X.denorm(xs[1]))

def test_live_and_not():
    p = pairs(live=False); b = [dict(o) for o in p.surface.boxes]; b[1].update(x=4., y=8.); was = p.at_2
    p.surface.event(dict(type='box', boxes=b, active=1, final=False)); assert p.at_2==was
    p.surface.event(dict(type='box', boxes=b, active=1, final=True)); assert p.at_2!=was
    p.live = True; b[1].update(x=44., y=24.); p.surface.event(dict(type='box', boxes=b, active=1, final=False)); assert p.at_2==was

def test_random_pairs_keep_the_overlap():
    p = pairs(min_iou=.5)
    for s in range(1, 8): p.seed = s; assert p.scores()['iou']>=.5
    a = p.at_1,p.at_2; p.seed = 1; b = p.at_1,p.at_2; p.seed = 7; assert (p.at_1,p.at_2)==a!=b

def test_apart_is_no_error_and_pictures_are_made():
    p = pairs(at_1=(0,0), at_2=(32,64)); assert 'share no pixel' in p.side.value and len(p.maps.panels)==2 and p.to_png()[1:4]==b'PNG'
    p = pairs(); assert 'image/png' in p._repr_mimebundle_() and 'loss of the training' in p.to_html()
    for i in (1,2,3): p.tabs.selected_index = i; assert p.panes[i].children
    with pytest.raises(ValueError, match='nothing to look at'): X.PatchConsistency(bright)

# --- steps ------------------------------------------------------------------------------------------------------------------------------
def test_steps_show_what_the_functions_give():
    learn = fit(toy([Pair(), MeanTeacher(), Mix()])); x_s,y_s,x_t,y_t,z = X.step_batch(learn)
    pages = [X.trust_explorer(x_t, z, sp, y_t), X.mix_explorer(x_s, y_s, x_t, z, sp), X.augment_explorer(x_t), X.mask_explorer(x_t, block=8),
             X.rare_class_explorer([9,1,0], sp.codes), X.ema_explorer(.9)]
    for p in pages:
        assert p.to_png()[1:4]==b'PNG' and 'image/png' in p._repr_mimebundle_() and p.title in p.to_html()
        p.surface.event(dict(type='theme', dark=True)); assert p.dark
    trust,mix,_,mask,_,ema = pages
    for t in (0., .5, 1.): trust.turn(trust='pixel', thresh=t); assert f'mean {float((z.softmax(1).amax(1)[0]>=t).float().mean()):.2f}' in [*trust.seen][2]
    mix.classes = ('road',); m = (y_s[0]==0).numpy(); assert np.array_equal(mix.seen['mixed'][m], X.denorm(x_s[0])[m])
    mask.turn(ratio=.5); a = mask.seen; mask.seed = 5; assert [*a.values()][1].shape==[*mask.seen.values()][1].shape

def test_an_error_is_said_and_the_browser_freed():
    s = S.Surface(dict(click=lambda ev: {}['nothing']))
    with pytest.raises(KeyError): s.event(dict(type='click', n=4))
    assert s.done==4 and 'KeyError' in s.said and not s.busy

def test_steps_without_validation_show_the_target(tmp_path):
    learn = town(tmp_path, 1); pairs = learn.dls.train.dataset
    own = uda_learner(uda_dls(pairs.source, pairs.target, bs=2, size=(64,96), seed=0), 'light')
    x_s,y_s,x_t,y_t,z = X.step_batch(own)
    assert (y_t==255).all() and x_t.shape==x_s.shape and not any(torch.equal(a, b) for a in x_t for b in x_s)
    assert X.trust_explorer(x_t, z, sp, y_t).to_png()[1:4]==b'PNG'
    x,y,domain = E.scenes(own.dls, 2); assert domain==['source']*2+['target']*2 and (y[2:]==255).all() and (y[:2]!=255).any()
    files = [np.array(Image.open(f).resize((96,64), Image.BILINEAR)) for f in pairs.target.images]
    for o in X.denorm(x[2:]): assert min(np.abs(o.astype(int)-f).max() for f in files)<=1, 'an image of the target, not a renamed one of the source'

@pytest.mark.parametrize('hw,n', [((128,192), 24), ((512,1024), 24), ((1024,2048), 6), ((768,1536), 11)])
def test_the_pen_takes_fewer_of_large_images(hw, n, monkeypatch):
    from pipa.look import pen as L
    monkeypatch.setattr(L, 'target_images', lambda dls, which: [torch.zeros(1, 3, *hw)])
    p = object.__new__(L.Pen); p.learn = type('O', (), dict(dls=None)); assert p._few()==n
