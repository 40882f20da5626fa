"Inference: sizes, windows, scores and folders against slow and simple oracles"
import os, subprocess, sys
import numpy as np, pytest, torch, torch.nn.functional as F
from PIL import Image
from sklearn.metrics import confusion_matrix, jaccard_score, recall_score
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from pipa import draw as D, infer as I
from pipa.data import Domain, eval_dl
from pipa.labels import LabelSpace, label_space, space
from pipa.models import light
from pipa.show import confusion_picture

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

class Edgy(nn.Module):
    "Sees the edge of its window: what a pixel gets depends on where the window is"
    def __init__(self, k=3): super().__init__(); torch.manual_seed(1); self.c = nn.Conv2d(3, k, 9, padding=4)
    def forward(self, x): return self.c(x).cumsum(-1).cumsum(-2)/100

def by_hand(net, x, crop, stride):
    "Sliding as the published evaluation does it, in double precision: a window at the end is moved back, a large one is cut"
    (H,W),(h,w),(sh,sw) = x.shape[-2:],crop,stride
    z,n = 0,np.zeros((H,W))
    for i in range(max(H-h+sh-1, 0)//sh+1):
        for j in range(max(W-w+sw-1, 0)//sw+1):
            y2,x2 = min(i*sh+h, H),min(j*sw+w, W)
            y1,x1 = max(y2-h, 0),max(x2-w, 0)
            with torch.no_grad(): o = net(x[..., y1:y2, x1:x2]).double()
            z = z+F.pad(o, (x1, W-x2, y1, H-y2))
            n[y1:y2,x1:x2] += 1
    return z/torch.from_numpy(n)

@pytest.mark.parametrize('hw', [(64,64), (63,130), (31,33), (32,100), (100,32), (47,48), (1,200), (20,20)], ids=str)
@pytest.mark.parametrize('crop,stride,bs', [((48,64),(24,32),4), ((32,32),(32,32),3), ((64,32),(17,31),1), ((48,64),(48,1),50)], ids=str)
def test_slide_as_published_for_any_size(hw, crop, stride, bs):
    net,x = Edgy(),torch.randn(2,3,*hw, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z,want = I.slide(net, x, crop, stride, bs=bs),by_hand(net, x, crop, stride)
        bands = [*I.slide_bands(net, x, crop, stride, bs)]
    assert torch.allclose(z.double(), want, atol=1e-4) and z.dtype==torch.float32
    assert [t for t,_ in bands]==[0, *np.cumsum([o.shape[-2] for _,o in bands])[:-1]] and torch.equal(torch.cat([o for _,o in bands], -2), z)

@pytest.mark.parametrize('hw', [(20,90), (90,20), (33,35), (1,1), (64,65)], ids=str)
@pytest.mark.parametrize('size', [None, 64, (96,32)])
def test_predict_by_windows_for_any_size(hw, size):
    net,img = Edgy(),picture(*hw)
    x = I.to_input(Image.fromarray(img), I.fit_size(hw, size))
    z = F.interpolate(by_hand(net, x, (48,64), (24,32)), hw, mode='bilinear')[0]
    y = I.predict(net, img, size, mode='slide', crop=(48,64))
    top = z.topk(2, 0).values
    assert y.shape==hw and ((torch.from_numpy(y).long()==z.argmax(0)) | (top[0]-top[1]<1e-4)).all()
    assert (top[0]-top[1]<1e-4).float().mean()<.05 or hw==(1,1)

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

@pytest.mark.parametrize('hw', [(9,14), (9,30), (50,14), (23,31), (4,5), (1,1), (9,7)], ids=str)
@pytest.mark.parametrize('cuts', [[], [1], [8], [2,3,7], [*range(1,9)]], ids=str)
@pytest.mark.parametrize('n', [1, 700, 2**20])
def test_label_rows_band_by_band(hw, cuts, n):
    z = torch.randn(2,5,9,14, generator=torch.Generator().manual_seed(len(cuts)))
    bands = [(a, z[..., a:b, :].clone()) for a,b in zip([0]+cuts, cuts+[9])]
    big = F.interpolate(z.double(), hw, mode='bilinear')
    y,top = I.label_rows(iter(bands), 9, hw, n),big.topk(2, 1).values
    assert y.dtype==torch.uint8 and y.shape==(2,*hw) and ((y.long()==big.argmax(1)) | (top[:,0]-top[:,1]<1e-5)).all()

def test_no_classes():
    with pytest.raises(ValueError, match='no classes'): I.best_class(torch.zeros(0,4,4), (8,8))

def test_best_class_of_many(): assert I.best_class(torch.arange(300.)[:,None,None].expand(-1,2,2), (4,4)).unique().tolist()==[299]

@pytest.mark.parametrize('hw', [(1,20000), (20000,1), (3,5000), (1,1), (30,900), (2000,3), (1,129)], ids=str)
@pytest.mark.parametrize('size', [(512,1024), 64, (64,32)], ids=str)
def test_a_strip_is_not_blown_up(hw, size):
    h,w = (size,size) if isinstance(size, int) else size
    a,b = I.fit_size(hw, size)
    s = max(h/hw[0], w/hw[1])
    assert a%32==b%32==0 and max(a, b)<=max(4*max(h, w), max(hw)+16) and min(a, b)>=32
    if max(h/hw[0], w/hw[1])<=4*min(h/hw[0], w/hw[1]): assert (a,b)==tuple(max(32, 32*round(o*s/32)) for o in hw)   # only strips are special

def test_strips_are_labelled_and_scored(tmp_path):
    sp,net = label_space(['a','b','c']),Pixel()
    dom = folder_of(tmp_path, [(1,3000), (3000,2)], sp)
    assert I.evaluate(net, dom, (512,1024), progress=False).sum()>0 and I.predict(net, picture(1,3000), (512,1024)).shape==(1,3000)
    assert max(np.prod(s[2:]) for s in net.seen)<=32*4096

def test_size_is_that_of_the_validation_loader(tmp_path):
    img = picture(52, 91); Image.fromarray(img).save(tmp_path/'i.png'); Image.fromarray(np.zeros((52,91), np.uint8)).save(tmp_path/'m.png')
    dl = eval_dl(Domain([tmp_path/'i.png'], [tmp_path/'m.png'], label_space(['a','b'])), (64,128), bs=1)
    x = dl.one_batch()[0]
    z = I.to_input(D.as_image(img), I.fit_size((52,91), (64,128)))
    assert x.shape==z.shape and torch.allclose(x.cpu(), z, atol=1e-5)

def test_kinds_of_pictures(net, tmp_path):
    img = picture(40, 50); Image.fromarray(img).save(tmp_path/'a.png')
    want = I.predict(net, img)
    for o in (Image.fromarray(img), tmp_path/'a.png', str(tmp_path/'a.png'), np.dstack([img, img[...,:1]])): assert np.array_equal(I.predict(net, o), want)
    assert I.predict(net, img[...,0]).shape==(40,50)
    assert I.predict(net, Image.fromarray(img).convert('P')).shape==(40,50)
    for o in (img, torch.from_numpy(img)): assert np.array_equal(I.predict(net, o), want)
    t = torch.from_numpy(img).permute(2,0,1)
    for o,cure in ((img/255, "`(a*255).round().astype('uint8')`"), (img.astype(int), "`.astype('uint8')`"), (img.astype(np.int32), "`.astype('uint8')`"), (img.astype(np.uint16)*257, "`(a/257).round().astype('uint8')`"), (img>99, 'not bool'),
                   (np.zeros((0,5,3), np.uint8), '(0, 5, 3)'), (np.zeros((3,5,5), np.float32), '`.transpose(1,2,0)`'), (img.transpose(2,0,1), '`.transpose(1,2,0)`'), (np.zeros((4,4,2), np.uint8), '(4, 4, 2)'), (t, '`.permute(1,2,0)`'),
                   (t.float(), 'pipa.draw.denorm'), (t[None], 'one picture at a time'), (img.tolist(), 'int64'), (t.float().requires_grad_(), '`.permute(1,2,0)`'), (t.bfloat16(), 'not bfloat16'), (None, 'not a NoneType'), (3.5, 'not a float'), (b'x', 'not a bytes'), ({}, 'not a dict'), ([None], 'not a list')):
        with pytest.raises(TypeError, match='uint8 array of shape H×W×3, not') as e: I.predict(net, o)
        assert cure in str(e.value) and '\n' not in str(e.value)
    for mode in ('I', 'F'):
        with pytest.raises(ValueError, match='`the picture` holds .*, and nothing says which'): I.predict(net, Image.new(mode, (40,50)))
    assert np.array_equal(I.predict(net, Image.fromarray(img[...,0].astype(np.uint16)*257)), I.predict(net, img[...,0]))
    (tmp_path/'b.png').write_bytes((tmp_path/'a.png').read_bytes()[:99])
    with pytest.raises(ValueError, match='b.png'): I.predict(net, tmp_path/'b.png')
    with pytest.raises(FileNotFoundError): I.predict(net, tmp_path/'c.png')

@pytest.mark.parametrize('o', range(1,9))
def test_orientation(tmp_path, o):
    img = np.zeros((32,64,3), np.uint8); img[:8,:8] = 255
    exif = Image.Exif(); exif[0x0112] = o
    Image.fromarray(img).save(tmp_path/'a.png', exif=exif)
    a = np.array(D.as_image(tmp_path/'a.png'))
    assert a.shape==((32,64,3) if o<5 else (64,32,3))
    corner = [a[:8,:8], a[:8,-8:], a[-8:,-8:], a[-8:,:8]][[0,1,2,3,0,1,2,3][o-1]]
    assert corner.min()==255 and np.array_equal(a, np.array(D.as_image(Image.open(tmp_path/'a.png'))))

def test_what_the_cures_of_a_wrong_array_give():
    img = picture(40, 50)
    for a in ((img/255*255).round().astype('uint8'), img.astype(int).astype('uint8'), (img.astype(np.uint16)*257/257).round().astype('uint8'), img.transpose(2,0,1).transpose(1,2,0)): assert np.array_equal(np.array(D.as_image(a)), img)

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

# amp, flip, memory

class Asked(Pixel):
    "Remembers the type in which it calculated"
    def forward(self, x): z = self.c(x); self.seen.append(z.dtype); return z

@pytest.mark.parametrize('amp,dtype', [(False,torch.float32), (True,torch.bfloat16), (torch.bfloat16,torch.bfloat16)])
@pytest.mark.parametrize('kw', [dict(), dict(mode='slide', crop=32)])
def test_amp(amp, dtype, kw):
    net,img = Asked(),picture(64, 80)
    z = I.logits(net, img, amp=amp, **kw)
    assert set(net.seen)=={dtype} and z.dtype==torch.float32 and not torch.is_autocast_enabled('cpu')
    assert (z-I.logits(net, img, **kw)).abs().max()<(.1 if amp else 1e-7)
    assert I.predict(net, img, amp=amp, **kw).dtype==np.uint8

def test_amp_of_somebody_else_is_left_alone():
    net = Asked()
    with torch.autocast('cpu', torch.bfloat16): I.predict(net, picture(32,32))
    assert net.seen==[torch.bfloat16]

def test_flip_is_the_mean_with_the_mirror(net):
    img = picture(64, 96)
    x = I.to_input(Image.fromarray(img), (64,96))
    with torch.no_grad(): want = (net(x)+net(x.flip(-1)).flip(-1))/2
    assert torch.allclose(I.logits(net, img, flip=True), want[0], atol=1e-5)
    a = I.logits(net, img[:,::-1].copy(), mode='slide', crop=32, flip=True).flip(-1)
    assert torch.allclose(a, I.logits(net, img, mode='slide', crop=32, flip=True), atol=1e-4)

class Largest(TorchDispatchMode):
    "Size of the largest float tensor that was made"
    n = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_floating_point(): self.n = max(self.n, out.numel())
        return out

@pytest.mark.parametrize('kw', [dict(mode='slide', crop=32, bs=2), dict(mode='slide', crop=64, stride=64), dict(mode='slide', crop=(32,64), stride=20, flip=True)], ids=str)
@pytest.mark.parametrize('size', [None, 'double'])
def test_floats_dont_grow_with_the_image(kw, size):
    def largest(h):
        with Largest() as seen: y = I.predict(Pixel(19), picture(h, 96), (h*2,192) if size else None, **kw)
        assert y.shape==(h,96)
        return seen.n
    a,b = largest(192),largest(480)
    assert a==b<19*192*96*(4 if size else 1)

@pytest.mark.slow
def test_memory_of_a_large_photo():
    if not os.path.exists('/proc/self/clear_refs'): pytest.skip('the peak is read from /proc')
    code = """
import numpy as np, torch
from torch import nn
from pipa.infer import predict
def kb(k): return int(next(l for l in open('/proc/self/status') if l.startswith(k)).split()[1])
net = nn.Conv2d(3, 19, 4, 4)
predict(net, np.zeros((300,300,3), np.uint8), mode='slide', crop=256)
img = np.zeros((4000,6000,3), np.uint8)
open('/proc/self/clear_refs', 'w').write('5')
before = kb('VmRSS')
predict(net, img, mode='slide', crop=256, stride=256)
print((kb('VmHWM')-before)//1024)"""
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=280)
    assert p.returncode==0, p.stderr
    assert int(p.stdout.split()[-1]) < 19*4000*6000*4/2**20/3

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

def test_evaluate_takes_images_of_one_size_together(tmp_path):
    sp,net = label_space(['a','b','c']),Pixel()
    dom = folder_of(tmp_path, [(40,50)]*5+[(50,40)]*2+[(40,50)], sp)
    cm = I.evaluate(net, dom, 64, bs=3, progress=False)
    assert [s[0] for s in net.seen]==[3,2,2,1] and torch.equal(cm, I.evaluate(net, dom, 64, bs=1, progress=False))
    assert torch.equal(I.evaluate(net, dom, 64, mode='slide', crop=96, bs=2, progress=True), cm)

def test_evaluate_turns_a_mask_with_its_image(tmp_path):
    sp,net = label_space(['a','b','c']),Pixel()
    dom = folder_of(tmp_path, [(32,48)], sp)
    exif = Image.Exif(); exif[0x0112] = 6
    img = Image.open(dom.images[0]); img.load()
    want = I.evaluate(net, dom, progress=False)
    img.save(dom.images[0], exif=exif)
    assert I.predict(net, dom.images[0]).shape==(48,32) and torch.equal(I.evaluate(net, dom, progress=False), want)

def test_tables_are_sklearn():
    sp,rng = space('synthia'),np.random.default_rng(0)
    have = [i for i in range(19) if i not in (9,14,16)]
    y = rng.choice(have, 4000); p = np.where(rng.random(4000)<.6, y, rng.choice(have, 4000)); y[y==18] = 17
    cm = torch.from_numpy(confusion_matrix(y, p, labels=range(19)))
    t,m = I.score_table(cm, sp),I.mean_table(cm, sp).set_index('mean')
    iou = jaccard_score(y, p, labels=have, average=None, zero_division=0); acc = recall_score(y, p, labels=have[:-1], average=None)
    np.testing.assert_allclose(t.iou[have], iou); np.testing.assert_allclose(t.acc[have[:-1]], acc)
    assert t['class'].tolist()==sp.codes and t.pixels.tolist()==np.bincount(y, minlength=19).tolist() and t.predicted.tolist()==np.bincount(p, minlength=19).tolist()
    assert t.iou[18]==0 and np.isnan(t.acc[18]) and t.note[18].startswith('predicted, but absent') and t.iou[[9,14,16]].isna().all()
    np.testing.assert_allclose(m.iou['miou'], iou.mean()); np.testing.assert_allclose(m.iou['miou16'], iou.mean())
    thirteen = [i for i in have if i not in (3,4,5)]
    np.testing.assert_allclose(m.iou['miou13'], np.mean([iou[have.index(i)] for i in thirteen]))
    np.testing.assert_allclose(m.acc['miou13'], np.mean([acc[have.index(i)] for i in thirteen[:-1]]))
    assert m.classes.tolist()==[16,16,13] and m.absent['miou']=='terrain, truck, train' and m.absent['miou16']==''

def test_tables_of_nothing():
    sp = label_space(['a','b'])
    t,m = I.score_table(torch.zeros(2,2).long(), sp),I.mean_table(torch.zeros(2,2).long(), sp)
    assert t.iou.isna().all() and t.pixels.sum()==0 and m.classes[0]==0 and np.isnan(m.iou[0]) and m.absent[0]=='a, b'

def test_confusion_picture_of_nineteen():
    sp,rng = space('cityscapes'),np.random.default_rng(0)
    cm = torch.from_numpy(rng.integers(0, 99, (19,19))+np.diag(np.full(19, 1000))); cm[16] = 0; cm[:,16] = 0
    fig = confusion_picture(cm, sp)
    left,right = fig.axes[:2]
    drawn = left.collections[0].get_array().reshape(19,19)
    np.testing.assert_allclose(drawn[0].sum(), 100, rtol=1e-5)
    assert drawn.mask[16].all() and drawn.mask.sum()==19 and right.collections[0].get_array().mask.sum()==1
    assert [t.get_text() for t in left.get_yticklabels()]==sp.codes==[t.get_text() for t in left.get_xticklabels()]
    fig.canvas.draw()
    boxes = [t.get_window_extent() for t in left.get_yticklabels()]
    assert all(a.y0>=b.y1-1 for a,b in zip(boxes, boxes[1:])), 'names of classes overlap'
    cell = left.get_window_extent().width/19
    assert all(t.get_window_extent().width<cell for t in left.texts if t.get_text()), 'a number is wider than its field'

def test_one_logit_says_nothing(tmp_path):
    "The largest of one is always the first: refused everywhere, with both numbers; the cure is the threshold at 0"
    class Two(nn.Module):
        def __init__(self, net): super().__init__(); self.net = net
        def forward(self, x): z = self.net(x); return torch.cat([0*z, z], 1)
    net,sp,img = Pixel(1),label_space(['no','yes']),picture(40,50)
    dom = folder_of(tmp_path, [(32,32)], sp)
    for f,n in ((lambda: I.predict(net, img), ':'), (lambda: I.predict(net, img, space=sp), ' and `own` 2 classes'), (lambda: I.predict(net, img, mode='slide', crop=32), ':'), (lambda: I.evaluate(net, dom, progress=False), ' and `.*` 2 classes'),
                (lambda: I.predict_folder(net, dom.images[0], tmp_path/'o', sp, progress=False), ' and `.*` 2 classes'), (lambda: I.predict(net, img, space=label_space(['crack'])), ' and `.*` 1 class:.*name what is not')):
        with pytest.raises(ValueError, match=f'The net has 1 logit a pixel{n}.*torch.cat') as e: f()
    assert not (tmp_path/'o').exists() and I.logits(net, img).shape==(1,40,50)
    assert np.array_equal(I.predict(Two(net), img, space=sp), (I.logits(net, img)[0]>0).numpy())

@pytest.mark.parametrize('k', [2,4])
def test_other_classes_than_the_data(k, tmp_path):
    sp = label_space(['a','b','c']); dom = folder_of(tmp_path, [(32,32)], sp)
    for f in (lambda: I.predict(Pixel(k), picture(40,50), space=sp), lambda: I.evaluate(Pixel(k), dom, progress=False), lambda: I.predict_folder(Pixel(k), dom.images[0], tmp_path/'o', sp, progress=False)):
        with pytest.raises(ValueError, match=f'The net has {k} classes and `.*` has 3'): f()
    assert not (tmp_path/'o').exists()

@pytest.mark.parametrize('share', ['all','one'])
@pytest.mark.parametrize('kw', [dict(), dict(mode='slide', crop=32), dict(size=64), dict(flip=True)], ids=str)
def test_logits_that_are_nan(share, kw, tmp_path):
    class Ill(Pixel):
        def forward(self, x): z = self.c(x); z[..., 3, 5] = np.nan; return z
    net = Ill(3)
    if share=='all': net.c.bias.data[:] = np.nan
    dom = folder_of(tmp_path, [(40,50)], label_space(['a','b','c']))
    for f in (lambda: I.predict(net, picture(40,50), **kw), lambda: I.evaluate(net, dom, progress=False, **kw)):
        with pytest.raises(ValueError, match="logits are NaN or infinite: its weights"): f()

def test_a_class_that_is_masked_by_infinity():
    class Masked(Pixel):
        def forward(self, x): z = self.c(x).clone(); z[:,1] = -np.inf; return z
    assert 1 not in I.predict(Masked(3), picture(40,50))

def test_evaluate_refuses(tmp_path, net):
    sp = space('minicity'); dom = folder_of(tmp_path, [(32,32)], sp)
    with pytest.raises(ValueError, match='no masks'): I.evaluate(net, dom.unlabelled())
    Image.fromarray(np.zeros((16,16), np.uint8)).save(dom.masks[0])
    with pytest.raises(ValueError, match='is 32x32, but its mask'): I.evaluate(net, dom, progress=False)
    with pytest.raises(ValueError, match='has 2'): I.evaluate(net, folder_of(tmp_path, [(32,32)], label_space(['a','b'])), progress=False)

# folders

def test_overlay():
    sp,img = label_space(['a','b']),picture(6,8)
    y = np.zeros((6,8), np.uint8); y[3:] = 1; y[:,7] = 255; y[0,0] = 9
    out = D.overlay(img, y, sp, .25)
    for i in range(6):
        for j in range(8):
            want = img[i,j] if y[i,j]>1 else .75*img[i,j]+.25*sp.palette[y[i,j]].astype(float)
            assert np.abs(out[i,j]-want).max()<=1
    assert np.array_equal(D.overlay(img, np.array([[0,1]]), sp, 1.), sp.color(np.array([[0,1]]).repeat(6,0).repeat(4,1)))
    assert D.overlay(img, y.astype(np.int64), sp).dtype==np.uint8

@pytest.mark.parametrize('name', ['cityscapes', 'gta', 'synthia'])
def test_raw_ids_are_those_of_the_server(name):
    y = np.random.default_rng(0).integers(0, 19, (7,9)).astype(np.uint8)
    raw = I.raw_ids(y, space(name))
    assert raw.dtype==np.uint8 and np.array_equal(space('cityscapes').encode(raw), y)
    table = dict(road=7, sidewalk=8, building=11, wall=12, fence=13, pole=17, person=24, rider=25, car=26, truck=27, bus=28, train=31, motorcycle=32, bicycle=33)
    for k,v in table.items(): assert I.raw_ids(np.uint8([space(name).codes.index(k)]), space(name))[0]==v

def test_raw_ids_of_other_spaces():
    assert np.array_equal(I.raw_ids(np.arange(11, dtype=np.uint8), space('minicity')), np.arange(11))
    with pytest.raises(ValueError, match='no raw id in 0..255 for b'): I.raw_ids(np.uint8([0]), LabelSpace('x', ['a','b'], ids={1:0, 300:1}))
    with pytest.raises(ValueError, match='for a'): I.raw_ids(np.uint8([0]), LabelSpace('x', ['a','b'], ids={1:1}))

def test_folder_for_a_server(tmp_path):
    root = tmp_path/'bilder \u00fc'; (root/'berlin').mkdir(parents=True)
    for o in ('berlin/b_000_leftImg8bit.png', '\u6771\u4eac.jpg'): Image.fromarray(picture(40,50)).save(root/o)
    net = Pixel(19)
    assert I.predict_folder(net, root, tmp_path/'out', space('gta'), 32, ids='raw', progress=False)==(2, {})
    assert sorted(p.relative_to(tmp_path/'out').as_posix() for p in (tmp_path/'out').rglob('*') if p.is_file())==['berlin/b_000_leftImg8bit.png', '\u6771\u4eac.png']
    im = Image.open(tmp_path/'out/berlin/b_000_leftImg8bit.png')
    assert im.mode=='L' and im.size==(50,40) and np.array_equal(space('cityscapes').encode(np.array(im)), I.predict(net, picture(40,50), 32))
    with pytest.raises(ValueError, match='no `id` ids'): I.predict_folder(net, root, tmp_path/'o', space('gta'), ids='id')
    assert not (tmp_path/'o').exists()

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
    assert lab.dtype==np.uint8 and np.array_equal(lab, y) and np.array_equal(col, sp.color(y)) and np.array_equal(lay, D.overlay(picture(40,50), y, sp, .3))

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

# --- how sure the net is ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('kw', [dict(), dict(size=64), dict(mode='slide', crop=64, stride=48), dict(flip=True)], ids=str)
def test_confidence_is_the_softmax_of_the_class(kw):
    "At the picture's own size, against all logits at once; the labels are those without it"
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3, 2, 1)).eval()
    image = np.random.default_rng(0).integers(0, 255, (70,93,3), np.uint8)
    y,c = I.predict(net, image, sure=True, **kw)
    p = I.resize(I.logits(net, image, **kw)[None], (70,93))[0].softmax(0).amax(0)
    assert np.abs(c-255*p.numpy()).max()<.51 and (y==I.predict(net, image, **kw)).all()

def test_confidence_from_the_command(tmp_path, monkeypatch):
    from pipa import cli
    from pipa.checkpoints import save
    monkeypatch.chdir(tmp_path)
    save('w.safetensors', light(n_out=3), label_space(['a','b','c']), size='64x64')
    Image.new('RGB', (80,50), (9,99,200)).save('a.png')
    cli.pipa_predict('a.png', 'w.safetensors', out='plain')
    cli.pipa_predict('a.png', 'w.safetensors', out='o', confidence=True)
    cli.pipa_predict('a.png', 'w.safetensors', out='o', confidence=True)   # its own files are written again
    assert {p.name for p in (tmp_path/'o').iterdir()}-{p.name for p in (tmp_path/'plain').iterdir()}=={'a_confidence.png'}
    o = np.array(Image.open('o/a_confidence.png'))
    assert o.shape==(50,80) and o.dtype==np.uint8 and o.min()>=85-1   # the best of three has a third at least
