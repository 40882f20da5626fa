"Figures: what they hold, and that nothing global remembers them"
import re
import matplotlib, numpy as np, pandas as pd, pytest, torch
matplotlib.use('agg')
import matplotlib._pylab_helpers as state
from matplotlib.colors import to_rgb
from PIL import Image
from pipa import draw as D, show as S
from pipa.data import Domain, uda_dls
from pipa.labels import label_space, space
from fastai.vision.core import TensorImage, TensorMask

mean,std = [torch.tensor(o)[:,None,None] for o in ((.485,.456,.406), (.229,.224,.225))]
def norm(a): return (torch.from_numpy(a).movedim(-1,-3)/255-mean)/std
def picture(h=32, w=64, seed=0): return np.random.default_rng(seed).integers(0, 256, (h,w,3), dtype=np.uint8)
def shown(fig): return [ax.images[0].get_array() for ax in fig.axes if ax.images]
def legend(fig): return [t.get_text() for l in fig.legends for t in l.get_texts()]

@pytest.fixture(autouse=True)
def no_global_state():
    n = len(state.Gcf.get_all_fig_managers())
    yield
    assert len(state.Gcf.get_all_fig_managers())==n

def test_denorm():
    a = np.stack([picture(seed=i) for i in range(2)])
    for t in (norm(a), TensorImage(norm(a)), norm(a).double(), norm(a).requires_grad_()): assert np.array_equal(D.denorm(t), a)
    assert np.array_equal(D.denorm(norm(a)[0]), a[0])
    odd = torch.tensor([float('nan'), float('inf'), -float('inf'), 1e9])[None,None].expand(3,1,4)
    assert D.denorm(odd).dtype==np.uint8

def test_rgb(tmp_path):
    a = picture(); Image.fromarray(a).save(tmp_path/'a.png')
    for o in (a, norm(a), Image.fromarray(a), tmp_path/'a.png', torch.from_numpy(a)): assert np.array_equal(D.rgb(o), a)

def test_show_seg_legend_and_void():
    sp,a = label_space(['sky','road','car']),picture()
    y = np.full((32,64), 255, np.uint8); y[:4] = 2
    fig = D.show_seg(norm(a), torch.from_numpy(y).long(), sp, alpha=1.)
    img = shown(fig)[0]
    assert legend(fig)==['car'] and np.array_equal(img[4:], a[4:]) and (img[:4]==sp.palette[2]).all()
    assert np.allclose(to_rgb(fig.legends[0].get_patches()[0].get_facecolor()), sp.palette[2]/255)
    assert legend(D.show_seg(a, np.full((32,64), 255), sp))==[] and np.array_equal(shown(D.show_seg(a))[0], a)
    with pytest.raises(ValueError, match='space'): D.show_seg(a, y)

def test_show_seg_of_other_size():
    sp = label_space(['a','b']); y = np.array([[0,1]])
    img = shown(D.show_seg(picture(), y, sp, alpha=1.))[0]
    assert (img[:,:32]==sp.palette[0]).all() and (img[:,32:]==sp.palette[1]).all()

def test_grid_holes_and_shapes():
    fig = D.grid([[picture(), None], [picture(50,10), picture(3,3), picture(1,1)]], ['a','b'])
    assert len(fig.axes)==6 and len(shown(fig))==4 and [ax.get_title() for ax in fig.axes[:3]]==['a','b','']
    for rows in ([], [[]], [[None]]):
        with pytest.raises(ValueError, match='no picture'): D.grid(rows)

def test_figures_are_pictures(tmp_path):
    fig = D.show_seg(picture(), np.zeros((32,64), int), label_space(['a']))
    assert fig._repr_png_()[1:4]==b'PNG'
    fig.savefig(tmp_path/'a.png', dpi=100); assert Image.open(tmp_path/'a.png').size[0]>100

def test_result_picture():
    sp = space('minicity'); xs = torch.stack([norm(picture(seed=i)) for i in range(3)])
    ys = torch.randint(0, 11, (3,32,64)); ys[0] = 255
    fig = S.result_picture(xs, ys, {'first': ys[:,::4,::4], 'last': [y.numpy() for y in ys]}, sp)
    im = shown(fig)
    assert len(im)==12 and [a.get_title() for a in fig.axes[:4]]==['image','truth','first','last'] and legend(fig)==sp.codes
    assert np.array_equal(im[0], picture(seed=0)) and np.array_equal(im[1], picture(seed=0)) and np.array_equal(im[5], sp.color(ys[1]))
    assert len(shown(S.result_picture(xs, None, {}, sp)))==3

@pytest.fixture(scope='module')
def dls(tmp_path_factory):
    tmp,sp,rng = tmp_path_factory.mktemp('d'),space('minicity'),np.random.default_rng(0)
    def dom(k):
        xs,ys = [tmp/f'{k}{i}.png' for i in range(3)],[tmp/f'{k}{i}_m.png' for i in range(3)]
        for x,y in zip(xs, ys):
            Image.fromarray(picture(64,128)).save(x); Image.fromarray(rng.integers(0, 11, (64,128)).astype(np.uint8)).save(y)
        return Domain(xs, ys, sp, k)
    return uda_dls(dom('s'), dom('t').unlabelled(), dom('v'), bs=2, size=(64,128), device='cpu', n=4)

def test_show_batch(dls):
    fig = dls.show_batch(max_n=9)
    assert len(shown(fig))==6 and [a.get_title() for a in fig.axes[:3]]==['source','its labels','target']
    b = dls.one_batch()
    assert np.array_equal(shown(dls.show_batch(b, max_n=1))[2], D.denorm(b[2][0])) and len(shown(S.show_batch(dls.train, b)))==6
    assert len(shown(dls.valid.show_batch()))==4
    assert len(shown(dls.valid.new(shuffle=True).show_batch(max_n=1)))==2

def test_show_results(dls):
    b = dls.valid.one_batch()
    for preds in (b[1], TensorMask(b[1][:,::2,::2]), b[1].numpy()):
        fig = S.show_results(dls.valid, b, preds, max_n=9)
        assert len(shown(fig))==6 and [a.get_title() for a in fig.axes[:3]]==['image','truth','prediction']
    assert len(shown(dls.valid.show_results(b, b[1], max_n=1, ctxs=None)))==3
    assert len(shown(S.show_results(dls.valid, b[:1], b[1])))==4

# curves and bars

def metrics(n=4): return pd.DataFrame(dict(epoch=range(n), train_loss=1., valid_loss=2., pair=1., mix=np.nan, pixel_contrast=['']+['0.5']*(n-1), miou=.25, time='00:01'))

def test_curves(tmp_path):
    metrics().to_csv(tmp_path/'m.csv', index=False)
    for o in (tmp_path/'m.csv', str(tmp_path/'m.csv'), metrics()):
        l,r = S.curves(o).axes
        assert [a.get_label() for a in l.lines]==['train_loss','valid_loss','pair','pixel_contrast'] and [a.get_label() for a in r.lines]==['miou']
        assert np.isnan(l.lines[3].get_ydata()[0]) and r.lines[0].get_ydata()[0]==25
    assert len(S.curves(metrics(1).drop(columns=['miou','epoch'])).axes)==2
    for e,n in (('', 2), ('0.2', 3)): assert len(S.curves(metrics().assign(entropy=['',e,'','0.1'])).axes)==n
    assert all(t==int(t) for ax in S.curves(metrics(3)).axes for t in ax.get_xticks())
    with pytest.raises(ValueError, match='no epoch'): S.curves(metrics()[:0])

def test_iou_bars():
    cm = np.array([[5,5,0],[0,10,0],[0,0,0]])
    fig = S.iou_bars({'a': cm, 'b': torch.from_numpy(cm).T}, ['x','y','z'])
    hs = [p.get_height() for p in fig.axes[0].patches if p.get_width()>0][:6]
    assert np.allclose(sorted(h for h in hs if h>0), [50,50,100*10/15,100*10/15])
    with pytest.raises(ValueError): S.iou_bars({}, ['x'])
    with pytest.raises(ValueError): S.iou_bars({'a': cm}, ['x','y'])

# names from elsewhere

hostile = [r'$\frac{$', '$x$', '_hidden', r'$\mathdefault{\frac{}$', '%s {0} \\', 'a\nb', '-1', '\U0001f697']

@pytest.mark.filterwarnings('ignore:Glyph')
@pytest.mark.parametrize('usetex', [False, True])
def test_names_are_text_in_every_picture(tmp_path, usetex):
    "Formulas, TeX and what matplotlib hides: in legends, titles, at axes, and in a sentence"
    from pipa.look.measures import cosine_matrix
    from pipa.runs.tables import sentence
    sp = label_space(hostile); k = sp.n; y = np.arange(k).repeat(32*64//k).reshape(32, 64); cm = torch.eye(k).long()*9+1
    with matplotlib.rc_context({'text.usetex': usetex}):
        figs = [D.show_seg(picture(), y, sp, title=hostile[0]), S.result_picture([picture()], [y], {hostile[0]: y}, sp), S.iou_bars({hostile[0]: cm}, sp.codes), S.confusion_picture(cm, sp), sentence(hostile[0]),
                D.grid([[picture()]], [hostile[3]]), cosine_matrix(np.eye(k), sp.codes)]
        for i,f in enumerate(figs): f.to_png(tmp_path/f'{i}.png'); assert f._repr_png_()[1:4]==b'PNG'
    assert legend(figs[0])==legend(figs[1])==hostile
    assert [t.get_text() for t in figs[3].axes[0].get_yticklabels()]==hostile
    texts = [t for f in figs for t in f.findobj(matplotlib.text.Text)]
    assert not [t for t in texts if t.get_usetex() or t.get_parse_math() and not re.fullmatch(r'\$\\mathdefault\{-?[\d.]*\}\$', t.get_text())]

def test_bytes_that_are_no_text_stand_as_a_mark():
    fig = D.grid([[picture()]], ['\udce9.png']); assert fig._repr_png_()[1:4]==b'PNG' and fig.axes[0].get_title()=='?.png'

def test_powers_of_ten_stay_formulas():
    fig = D.Fig(); ax = fig.subplots(); ax.loglog([1e-3,1e6], [1,1e3]); fig._repr_png_()
    assert any(t.get_parse_math() and '10^{' in t.get_text() for t in ax.get_xticklabels())
