"Inference: sizes, windows, scores and folders against slow and simple oracles"
import os
import numpy as np, pytest, torch, torch.nn.functional as F
from PIL import Image
from sklearn.metrics import confusion_matrix
from torch import nn
from pipa import infer as I
from pipa.data import Domain, eval_dl
from pipa.labels import label_space, space
from pipa.models import light

@pytest.fixture(scope='module')
def net():
    torch.manual_seed(0)
    return light('mit_b0', n_out=11).eval()

def picture(h, w, seed=0): return np.random.default_rng(seed).integers(0, 256, (h,w,3), dtype=np.uint8)

class Pixel(nn.Module):
    "Looks at single pixels; remembers the shapes that it was asked for"
    def __init__(self, k=3): super().__init__(); self.c = nn.Conv2d(3, k, 1); self.seen = []
    def forward(self, x): self.seen.append(tuple(x.shape)); return self.c(x)

# windows

@pytest.mark.parametrize('H,W,h,w,sh,sw', [(50,70,32,32,16,16), (33,32,32,32,32,32), (32,32,32,32,1,5), (100,37,40,37,13,1), (65,97,64,32,64,32)])
def test_windows_cover_all_and_stay_inside(H, W, h, w, sh, sw):
    n = np.zeros((H,W), int)
    for t,l in I.windows((H,W), (h,w), (sh,sw)):
        assert 0<=t<=H-h and 0<=l<=W-w
        n[t:t+h,l:l+w] += 1
    assert n.min()>=1
    rows = max(H-h+sh-1, 0)//sh+1; cols = max(W-w+sw-1, 0)//sw+1
    assert len(I.windows((H,W), (h,w), (sh,sw)))==len({(min(i*sh, H-h), min(j*sw, W-w)) for i in range(rows) for j in range(cols)})

@pytest.mark.parametrize('bs', [1,3,100])
def test_slide_is_the_mean_of_windows(net, bs):
    x = torch.randn(2,3,64,96)
    with torch.no_grad():
        z = torch.zeros(2,11,64,96, dtype=torch.double); n = torch.zeros(64,96)
        for t in (0,24,32):
            for l in (0,24,48,64):
                o = net(x[:,:,t:t+32,l:l+32])
                for i in range(32):
                    for j in range(32): n[t+i,l+j] += 1
                z[:,:,t:t+32,l:l+32] += o
        assert torch.allclose(I.slide(net, x, 32, 24, bs).double(), z/n, atol=1e-4)

def test_slide_needs_one_canvas_and_full_batches():
    net = Pixel()
    I.slide(net, torch.randn(1,3,96,96), 32, 32, bs=4)
    assert [s[0] for s in net.seen]==[4,4,1] and {s[1:] for s in net.seen}=={(3,32,32)}

@pytest.mark.parametrize('kw', [dict(crop=16), dict(crop=64, stride=65), dict(crop=64, stride=0), dict(crop=(64,32), stride=(32,64))])
def test_impossible_windows(kw):
    with pytest.raises(ValueError): I.slide(Pixel(), torch.randn(1,3,96,96), **kw)

# predict

@pytest.mark.parametrize('hw', [(1,1), (31,33), (64,64), (65,130), (200,40)])
@pytest.mark.parametrize('kw', [dict(), dict(size=64), dict(size=(32,96)), dict(mode='slide', crop=48, stride=20), dict(size=64, mode='slide', crop=(32,64))])
def test_own_size(net, hw, kw):
    y = I.predict(net, picture(*hw), **kw)
    assert y.shape==hw and y.dtype==np.uint8 and y.max()<11

def test_whole_by_hand(net):
    img = picture(70, 90)
    small = Image.fromarray(img).resize((96,64), Image.BILINEAR)
    x = (torch.tensor(np.array(small))/255-torch.tensor([.485,.456,.406]))/torch.tensor([.229,.224,.225])
    with torch.no_grad(): z = net(x.permute(2,0,1)[None])
    want = F.interpolate(z, (70,90), mode='bilinear', align_corners=False)[0].argmax(0)
    assert I.fit_size((70,90), (64,64))==(64,96)
    assert (I.predict(net, img, 64)==want.numpy()).mean()>.9999

def test_one_window_is_whole(net):
    img = picture(70, 90)
    for size in (None, 64): assert np.array_equal(I.predict(net, img, size), I.predict(net, img, size, mode='slide', crop=512))

@pytest.mark.parametrize('k', [1,2,3,4,5,11,19])
@pytest.mark.parametrize('hw', [(9,14), (20,40), (3,5)])
def test_best_class(k, hw):
    z = torch.randn(k,9,14)
    assert torch.equal(I.best_class(z, hw).long(), F.interpolate(z[None], hw, mode='bilinear')[0].argmax(0))
    assert I.best_class(torch.zeros(k,9,14), hw).max()==0

def test_best_class_of_many(): assert I.best_class(torch.arange(300.)[:,None,None].expand(-1,2,2), (4,4)).unique().tolist()==[299]

def test_size_is_that_of_the_validation_loader(tmp_path):
    img = picture(52, 91); Image.fromarray(img).save(tmp_path/'i.png'); Image.fromarray(np.zeros((52,91), np.uint8)).save(tmp_path/'m.png')
    dl = eval_dl(Domain([tmp_path/'i.png'], [tmp_path/'m.png'], label_space(['a','b'])), (64,128), bs=1)
    x = dl.one_batch()[0]
    z = I.to_input(I.as_image(img), I.fit_size((52,91), (64,128)))
    assert x.shape==z.shape and torch.allclose(x.cpu(), z, atol=1e-5)

def test_kinds_of_pictures(net, tmp_path):
    img = picture(40, 50); Image.fromarray(img).save(tmp_path/'a.png')
    want = I.predict(net, img)
    for o in (Image.fromarray(img), tmp_path/'a.png', str(tmp_path/'a.png'), np.dstack([img, img[...,:1]])): assert np.array_equal(I.predict(net, o), want)
    assert I.predict(net, img[...,0]).shape==(40,50)
    assert I.predict(net, Image.fromarray(img).convert('P')).shape==(40,50)
    for o in (img/255, img.astype(int), np.zeros((0,5,3), np.uint8), np.zeros((3,5,5), np.float32), np.zeros((4,4,2), np.uint8)):
        with pytest.raises(TypeError, match='uint8 array'): I.predict(net, o)
    (tmp_path/'b.png').write_bytes((tmp_path/'a.png').read_bytes()[:99])
    with pytest.raises(ValueError, match='b.png'): I.predict(net, tmp_path/'b.png')
    with pytest.raises(FileNotFoundError): I.predict(net, tmp_path/'c.png')

@pytest.mark.parametrize('o', range(1,9))
def test_orientation(tmp_path, o):
    img = np.zeros((32,64,3), np.uint8); img[:8,:8] = 255
    exif = Image.Exif(); exif[0x0112] = o
    Image.fromarray(img).save(tmp_path/'a.png', exif=exif)
    a = np.array(I.as_image(tmp_path/'a.png'))
    assert a.shape==((32,64,3) if o<5 else (64,32,3))
    corner = [a[:8,:8], a[:8,-8:], a[-8:,-8:], a[-8:,:8]][[0,1,2,3,0,1,2,3][o-1]]
    assert corner.min()==255 and np.array_equal(a, np.array(I.as_image(Image.open(tmp_path/'a.png'))))

def test_modes_and_gradients_come_back(net):
    net = light('mit_b0', n_out=2).train(); net.decode_head.eval()
    before = [m.training for m in net.modules()]
    I.predict(net, picture(32,32))
    with pytest.raises(TypeError): I.predict(net, 3.5)
    assert [m.training for m in net.modules()]==before and torch.is_grad_enabled() and all(p.grad is None for p in net.parameters())

def test_modes_come_back_after_an_error():
    class Bad(Pixel):
        def forward(self, x): raise RuntimeError('out of memory')
    net = Bad().train()
    with pytest.raises(RuntimeError): I.predict(net, picture(32,32))
    assert net.training and torch.is_grad_enabled()

def test_nets_that_answer_otherwise():
    class Dict(Pixel):
        def forward(self, x): return {'out': F.avg_pool2d(self.c(x), 4)}
    assert I.predict(Dict(), picture(48,64)).shape==(48,64)

def test_wrong_space_and_mode(net):
    with pytest.raises(ValueError, match='11 classes.*has 2'): I.predict(net, picture(32,32), space=label_space(['a','b']))
    with pytest.raises(ValueError, match='no mode'): I.predict(net, picture(32,32), mode='both')
    I.predict(net, picture(32,32), space=space('minicity'))

# evaluate

def folder_of(tmp_path, sizes, sp, seed=0):
    rng,xs,ys = np.random.default_rng(seed),[],[]
    for i,hw in enumerate(sizes):
        xs.append(tmp_path/f'{i}.png'); ys.append(tmp_path/f'{i}_m.png')
        y = rng.integers(0, sp.n, hw).astype(np.uint8); y[rng.random(hw)<.2] = 255
        Image.fromarray(picture(*hw, seed=i)).save(xs[-1]); Image.fromarray(y).save(ys[-1])
    return Domain(xs, ys, sp, 'here')

def test_evaluate_is_sklearn(tmp_path, net):
    sp = space('minicity'); dom = folder_of(tmp_path, [(40,50), (33,64), (50,40)], sp)
    ys,ps = np.concatenate([np.array(Image.open(m)).ravel() for m in dom.masks]),np.concatenate([I.predict(net, o, 64).ravel() for o in dom.images])
    cm = I.evaluate(net, dom, 64, progress=False)
    assert cm.dtype==torch.int64 and np.array_equal(cm.numpy(), confusion_matrix(ys[ys<255], ps[ys<255], labels=range(11)))

def test_evaluate_all_ignored_and_empty(tmp_path, net):
    sp = space('minicity'); dom = folder_of(tmp_path, [(32,32)], sp)
    Image.fromarray(np.full((32,32), 255, np.uint8)).save(dom.masks[0])
    assert I.evaluate(net, dom, progress=False).sum()==0 and I.evaluate(net, dom.take([]), progress=False).shape==(11,11)

def test_evaluate_refuses(tmp_path, net):
    sp = space('minicity'); dom = folder_of(tmp_path, [(32,32)], sp)
    with pytest.raises(ValueError, match='no masks'): I.evaluate(net, dom.unlabelled())
    Image.fromarray(np.zeros((16,16), np.uint8)).save(dom.masks[0])
    with pytest.raises(ValueError, match='belong together'): I.evaluate(net, dom, progress=False)
    with pytest.raises(ValueError, match='has 2'): I.evaluate(net, folder_of(tmp_path, [(32,32)], label_space(['a','b'])), progress=False)

# folders

def test_overlay():
    sp,img = label_space(['a','b']),picture(6,8)
    y = np.zeros((6,8), np.uint8); y[3:] = 1; y[:,7] = 255; y[0,0] = 9
    out = I.overlay(img, y, sp, .25)
    for i in range(6):
        for j in range(8):
            want = img[i,j] if y[i,j]>1 else .75*img[i,j]+.25*sp.palette[y[i,j]].astype(float)
            assert np.abs(out[i,j]-want).max()<=1
    assert np.array_equal(I.overlay(img, np.array([[0,1]]), sp, 1.), sp.color(np.array([[0,1]]).repeat(6,0).repeat(4,1)))
    assert I.overlay(img, y.astype(np.int64), sp).dtype==np.uint8

def test_predict_folder(tmp_path, net, capsys):
    sp = space('minicity'); root = tmp_path/'in'; (root/'x'/'y').mkdir(parents=True)
    for o in ('a.png', 'x/y/a.png', 'x/b.bmp', 'x/b.png'): Image.fromarray(picture(40,50)).save(root/o)
    (root/'.hidden.png').write_bytes(b'x'); (root/'notes.txt').write_text('x'); (root/'bad.jpg').write_bytes(b'\xff\xd8\xff'); (root/'empty.png').write_bytes(b'')
    out = tmp_path/'out'
    n,failed = I.predict_folder(net, root, out, sp, 64, alpha=.3, progress=False)
    done = ['a', 'x/b.bmp', 'x/b.png', 'x/y/a']
    assert n==6 and set(failed)=={'bad', 'empty'} and set(I.find_images(root))=={*done, *failed}
    said = capsys.readouterr().out
    assert 'bad.jpg' in said and 'empty.png' in said and '2 of 6 pictures' in said
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob('*') if p.is_file())==sorted(f'{o}_{k}.png' for o in done for k in ('labels','color','overlay'))
    lab,col,lay = [np.array(Image.open(out/f'x/y/a_{k}.png')) for k in ('labels','color','overlay')]
    y = I.predict(net, picture(40,50), 64)
    assert lab.dtype==np.uint8 and np.array_equal(lab, y) and np.array_equal(col, sp.color(y)) and np.array_equal(lay, I.overlay(picture(40,50), y, sp, .3))

def test_results_inside_of_the_pictures_folder(tmp_path, net):
    Image.fromarray(picture(32,32)).save(tmp_path/'a.png')
    for _ in range(2): assert I.predict_folder(net, tmp_path, tmp_path/'out', space('minicity'), progress=True)==(1, {})
    with pytest.raises(ValueError, match='another folder'): I.predict_folder(net, tmp_path, tmp_path, space('minicity'))

def test_single_file_and_nothing(tmp_path, net):
    Image.fromarray(picture(32,32)).save(tmp_path/'a.png'); (tmp_path/'e').mkdir()
    assert I.predict_folder(net, tmp_path/'a.png', tmp_path/'o', space('minicity'), progress=False)==(1, {})
    for p in ('e', 'none'):
        with pytest.raises(FileNotFoundError, match=p): I.predict_folder(net, tmp_path/p, tmp_path/'o', space('minicity'))

def test_files_are_whole_or_absent(tmp_path, net, monkeypatch):
    Image.fromarray(picture(32,32)).save(tmp_path/'a.png')
    def full(*a, **k): raise OSError('No space left on device')
    monkeypatch.setattr(os, 'replace', full)
    with pytest.raises(OSError): I.predict_folder(net, tmp_path/'a.png', tmp_path/'o', space('minicity'), progress=False)
    assert not [p for p in (tmp_path/'o').rglob('*') if p.is_file()]
