"Guards of `pipa.metrics`: scikit-learn, loops, streams, a real learner, awkward cases"
import math
from types import SimpleNamespace as NS
import numpy as np, pytest, torch, torch.nn.functional as F
from torch import nn, tensor
from sklearn.metrics import confusion_matrix, jaccard_score, accuracy_score
from fastai.torch_core import TensorMask, TensorImage
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from pipa.metrics import *

def labels(seed, shape, n, void=.1):
    g = torch.Generator().manual_seed(seed)
    y,p = (torch.randint(0, n, shape, generator=g) for _ in range(2))
    p = torch.where(torch.rand(shape, generator=g) < .5, y, p)
    return p, y.masked_fill(torch.rand(shape, generator=g) < void, 255)

# ---- confusion
@pytest.mark.parametrize('n,shape', [(2,(1,5,7)), (11,(3,33,47)), (19,(2,64,64)), (300,(40000,))])
def test_confusion_sklearn(n, shape):
    p,y = labels(n, shape, n); on = y!=255
    cm = confusion(p, y, n)
    assert (cm.numpy() == confusion_matrix(y[on], p[on], labels=range(n))).all() and cm.dtype == torch.long

def test_confusion_loop():
    p,y = labels(0, (2,9,11), 5); want = [[0]*5 for _ in range(5)]
    for a,b in zip(y.flatten().tolist(), p.flatten().tolist()):
        if a != 255: want[a][b] += 1
    assert confusion(p, y, 5).tolist() == want

def test_confusion_types():
    p,y = labels(1, (2,8,8), 4); want = confusion(p, y, 4)
    assert torch.equal(want, confusion(p.byte(), y.byte(), 4))
    got = confusion(TensorMask(p), TensorMask(y), 4)
    assert torch.equal(want, got) and type(got) is torch.Tensor
    assert torch.equal(want, confusion(p.transpose(1,2), y.transpose(1,2), 4))

def test_confusion_other_ignore():
    p,y = labels(2, (2,8,8), 4, 0)
    assert confusion(p, y.masked_fill(y==3, 11), 4, ignore=11).sum() == (y!=3).sum()
    cm = confusion(p, y, 4, ignore=0)                            # a class may be the one to ignore
    assert cm[0].sum() == 0 and torch.equal(cm[1:], confusion(p, y, 4)[1:])
    assert confusion(p, y-1, 4, ignore=-1).sum() == (y!=0).sum()

def test_confusion_empty():
    assert confusion(torch.zeros(0), torch.zeros(0), 3).tolist() == [[0]*3]*3
    p,y = labels(0, (4,4), 3)
    assert confusion(p, torch.full_like(y, 255), 3).sum() == 0
    assert confusion(p+99, torch.full_like(y, 255), 3).sum() == 0        # what is predicted on ignored pixels is no one's business

@pytest.mark.parametrize('bad', [3, 254, 256, -1, -7])
def test_confusion_strangers(bad):
    p,y = labels(0, (4,4), 3)
    with pytest.raises(ValueError, match=f"label {bad} is not one of the classes 0..2"): confusion(p, y.index_fill(0, tensor([1]), bad), 3)
    p[y!=255] = bad
    with pytest.raises(ValueError, match=f"prediction {bad} is not one"): confusion(p, y, 3)

def test_confusion_sizes():
    with pytest.raises(ValueError, match='resize the logits'): confusion(torch.zeros(2,4,4), torch.zeros(2,8,8), 3)

# ---- what is read off the matrix
@pytest.mark.parametrize('seed', range(4))
def test_iou_sklearn(seed):
    p,y = labels(seed, (2,20,30), 7); on = y!=255
    cm = confusion(p, y, 7)
    assert iou(cm).tolist() == pytest.approx(jaccard_score(y[on], p[on], labels=range(7), average=None).tolist())
    assert miou(cm) == pytest.approx(jaccard_score(y[on], p[on], average='macro'))
    assert miou(cm, [1,3]) == pytest.approx(jaccard_score(y[on], p[on], labels=[1,3], average='macro'))
    assert pixel_acc(cm) == pytest.approx(accuracy_score(y[on], p[on]))
    assert isinstance(miou(cm), float) and isinstance(pixel_acc(cm), float)

def test_absent_classes():
    cm = torch.zeros(5,5).long(); cm[0,0],cm[0,2],cm[1,1] = 8,2,10        # 2 only predicted, 3 and 4 nowhere
    v = iou(cm)
    assert v[:3].tolist() == [.8,1.,0.] and v[3:].isnan().all()
    assert miou(cm) == pytest.approx(.6) and miou(cm, [0,1,3]) == pytest.approx(.9) and math.isnan(miou(cm, [3,4]))
    t = iou_table(cm, list('abcde'))
    assert t.note.str.split(':').str[0].tolist() == ['','','predicted, but absent from the truth','absent','absent']
    assert t.share.tolist() == [.5,.5,0,0,0] and list(t.columns) == ['class','iou','share','note']

def test_synthia_means():
    "mIoU of 16 classes is that of 19 times 19/16 if the three others count 0, as the papers have it"
    p,y = labels(0, (64,64), 19)
    sub = [0,1,2,3,4,5,6,7,8,10,11,12,13,15,17,18]
    y = torch.where(torch.isin(y, tensor([9,14,16])), 255, y)
    cm = confusion(p, y, 19)
    assert miou(cm, sub) == pytest.approx(miou(cm)*19/16)

def test_many_pixels_stay_exact():
    cm = torch.full((3,3), 2**40); cm[0,0] += 1
    assert iou(cm)[0].item() == (2**40+1)/(5*2**40+1)

# ---- metrics
@pytest.mark.parametrize('cuts', [[9], [1]*9, [4,4,1]])
def test_stream_equals_whole(cuts):
    torch.manual_seed(0)
    z,(_,y) = torch.randn(9,6,8,10), labels(0, (9,8,10), 6)
    m = MIoU(6, classes=[0,2,5]); m.reset()
    for a,b in zip(z.split(cuts), y.split(cuts)): m.accumulate(NS(pred=a, y=b))
    on = y!=255
    assert m.value == pytest.approx(jaccard_score(y[on], z.argmax(1)[on], labels=[0,2,5], average='macro'))
    m.reset(); assert m.cm.sum() == 0 and math.isnan(m.value)

def test_coarse_logits_are_resized():
    torch.manual_seed(0)
    z,(_,y) = torch.randn(2,4,4,5).half(), labels(0, (2,16,20), 4)
    m = MIoU(4); m.accumulate(NS(pred=z, y=TensorMask(y)))
    up = F.interpolate(z.float(), (16,20), mode='bilinear', align_corners=False)
    assert torch.equal(m.cm, confusion(up.argmax(1), y, 4))

class Keeper(Callback):
    "A stand-in for the mean teacher"
    teacher = None
    def before_fit(self):
        if self.teacher is None: self.teacher = nn.Conv2d(3,4,1)

def learner(metrics, cbs=()):
    torch.manual_seed(0)
    items = [(TensorImage(torch.randn(3,8,8)), TensorMask(labels(i, (8,8), 4)[1])) for i in range(7)]
    dl = lambda: DataLoader(items, bs=3, num_workers=0)
    ce = lambda p,y: F.cross_entropy(p, y, ignore_index=255)
    return Learner(DataLoaders(dl(), dl()), nn.Conv2d(3,4,1), loss_func=ce, metrics=metrics, cbs=list(cbs), lr=.1), items

def test_in_a_learner():
    term = NS(mean=.5); ms = [MIoU(4), TeacherMIoU(4), TermColumn(term, 'patch')]
    learn,items = learner(ms, [Keeper()])
    with learn.no_logging(): learn.fit(2)
    assert list(learn.recorder.metric_names) == ['epoch','train_loss','valid_loss','miou','teacher_miou','patch','time']
    x,y = (torch.stack([torch.as_tensor(o[i]).as_subclass(torch.Tensor) for o in items]) for i in (0,1))
    for m,net in zip(ms, (learn.model,learn.keeper.teacher)):
        with torch.no_grad(): assert torch.equal(m.cm, confusion(net(x).argmax(1), y, 4))
    assert learn.recorder.values[-1][2:] == [ms[0].value, ms[1].value, .5] and ms[0].value != ms[1].value
    assert learn.validate()[1] == ms[0].value

def test_teacher_is_asked_politely():
    seen = []
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.bn,self.drop = nn.BatchNorm2d(3),nn.Dropout2d(.9)
        def forward(self, x): seen.append((self.training, torch.is_inference_mode_enabled())); return self.drop(self.bn(x))
    t = Net(); t.drop.eval(); before = {k:v.clone() for k,v in t.state_dict().items()}
    TeacherMIoU(3).accumulate(NS(x=torch.randn(2,3,4,4), y=torch.zeros(2,4,4).long(), cbs=[NS(teacher=t)]))
    assert seen == [(False,True)] and t.training and t.bn.training and not t.drop.training
    assert all(torch.equal(v, before[k]) for k,v in t.state_dict().items())

def test_teacher_survives_an_error():
    class Net(nn.Module):
        def forward(self, x): raise RuntimeError('out of memory')
    t = Net()
    with pytest.raises(RuntimeError): TeacherMIoU(3).accumulate(NS(x=0, y=torch.zeros(2,4,4), cbs=[NS(teacher=t)]))
    assert t.training

def test_no_teacher_is_a_sentence():
    for cbs in ([], [NS()], [NS(teacher=None)]):
        with pytest.raises(ValueError, match='MeanTeacher'): TeacherMIoU(3).accumulate(NS(x=0, y=torch.zeros(2,4,4), cbs=cbs))

# ---- validators
def test_entropy_loop():
    z = torch.randn(2,5,3,4, dtype=torch.double)*3; es,ps = [],[]
    for b in range(2):
        for r in range(3):
            for c in range(4):
                e = [math.exp(v) for v in z[b,:,r,c].tolist()]; p = [v/sum(e) for v in e]
                es.append(-sum(v*math.log(v) for v in p)); ps.append(p)
    mean = np.mean(ps, 0)
    assert entropy(z).item() == pytest.approx(np.mean(es), abs=1e-6)
    assert info_max(z).item() == pytest.approx(-(mean*np.log(mean)).sum() - np.mean(es), abs=1e-6)

def test_validators_extreme():
    z = torch.zeros(1,3,4,4); z[:,1] = 1e4
    assert entropy(z) == 0 and info_max(z) == pytest.approx(0, abs=1e-6) and agreement(z, -z) == 0 and agreement(z, z) == 1
    assert entropy(z*0).item() == pytest.approx(math.log(3)) and torch.isfinite(info_max(z.half()))

def test_agreement_loop():
    a,b = torch.randn(2,2,4,5,6)
    same = [int(a[i,:,r,c].argmax() == b[i,:,r,c].argmax()) for i in range(2) for r in range(5) for c in range(6)]
    assert agreement(a, b).item() == pytest.approx(np.mean(same))

# without labels

@pytest.mark.parametrize('k,hw,n', [(3,(4,5),512), (7,(9,9),20), (2,(1,2),512)])
def test_density_against_scipy(k, hw, n):
    from scipy.special import softmax
    from scipy.stats import entropy as H
    torch.manual_seed(0); z = 3*torch.randn(2, k, *hw)
    want = []
    for o in z:
        p = softmax(o.flatten(1).numpy().T.astype(float), 1); p = p[np.linspace(0, len(p)-1, min(n, len(p))).round().astype(int)]
        s = p@p.T/np.outer(*[np.linalg.norm(p, axis=1)]*2)/.05
        want.append(np.mean([H(softmax(np.delete(s[i], i))) for i in range(len(p))]))
    assert abs(float(density(z, n))-np.mean(want))<1e-4

def test_overlap_counts_what_both_windows_see():
    class Net(torch.nn.Module):
        "Class of a pixel: is it brighter than the window's mean?"
        def forward(self, x): d = x[:,:1]-x[:,:1].mean((2,3), keepdim=True); return torch.cat([d, -d], 1)
    torch.manual_seed(0); x,net = torch.randn(3,3,16,80),Net(); x[...,60:] += 3
    l,r = (x[:,0,:,:60]>x[:,0,:,:60].mean((1,2), keepdim=True)), (x[:,0,:,16:]>x[:,0,:,16:].mean((1,2), keepdim=True))
    a = overlap_agreement(net, x, shift=.2)
    r0 = x[:,0,:,16:]; l0 = x[:,0,:,:64]
    want = ((l0>l0.mean((1,2), keepdim=True))[...,16:]==(r0>r0.mean((1,2), keepdim=True))[...,:48]).float().mean()
    assert torch.equal(a, want) and 0<a<1

def test_spearman_against_scipy():
    from scipy.stats import spearmanr
    rng = np.random.default_rng(0)
    for _ in range(20):
        a,b = rng.integers(0, 6, (2,12)); assert abs(spearman(a, b)-spearmanr(a, b).statistic)<1e-9
    assert np.isnan(spearman(['x',1,2], [1,2,3]))

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    from tiny import city
    with pytest.MonkeyPatch.context() as m:
        m.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('xdg')))
        yield city(tmp_path_factory.mktemp('city'), n=4, size=(64,64))

def tiny_learner(home, path, n=0, **kw):
    from pipa.data import folder, uda_dls
    from pipa.learner import uda_learner
    from tiny import seed
    seed()
    g,r = [folder(home/d/'images', home/d/'masks', 'minicity') for d in ('game', 'real')]
    dls = uda_dls(g, r.unlabelled(), r.take([0]), bs=2, size=(64,64), n=2, device='cpu')
    return uda_learner(dls, 'light', 'self_training', hidden=16, thresh=.1, n_unlabelled=n, path=path, **kw)

def test_validators_in_the_table_and_as_monitor(home, tmp_path):
    "On the target's training images, not on the validation set; a checkpoint is chosen and training stopped by them"
    from fastai.callback.tracker import SaveModelCallback, EarlyStoppingCallback
    best = SaveModelCallback(monitor='info_max', fname='best'); stop = EarlyStoppingCallback(monitor='entropy', comp=np.less, patience=1, min_delta=99.)
    learn = tiny_learner(home, tmp_path, 3, cbs=[best, stop])
    with learn.no_bar(), learn.no_logging(): learn.fit(5, 1e-3)
    assert [m.name for m in learn.metrics][-5:]==['entropy','info_max','agreement','overlap','density']
    rows = learn.recorder.values; i = learn.recorder.metric_names.index('entropy')-1
    assert len(rows)==2, 'an improvement of 99 nats is asked for, so training ends after the second epoch'
    x = torch.cat([b[0] for b in learn.dls.test_dl([learn.dls.train.dataset.target.images[j] for j in (0,2,3)])])
    with torch.no_grad(): z = learn.model.eval()(x); t = learn.mean_teacher.teacher(x)
    want = dict(entropy=entropy(z), info_max=info_max(z), overlap=overlap_agreement(learn.model, x), density=density(z))
    best_row = max(rows, key=lambda r: r[i+1])
    for k,v in want.items(): assert abs(best_row[learn.recorder.metric_names.index(k)-1]-float(v))<1e-4, k
    assert (tmp_path/'models/best.pth').exists()

def test_validators_change_nothing_in_training(home, tmp_path):
    def run(n):
        learn = tiny_learner(home, tmp_path, n)
        with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-3)
        return learn.model.state_dict(),[r[:3] for r in learn.recorder.values]
    a,b = run(0),run(4)
    assert a[1]==b[1] and all(torch.equal(v, b[0][k]) for k,v in a[0].items())

def test_label_free_scores_in_each_epoch_or_in_the_last():
    "A callback that watches a column finds it in each epoch, unless the column is for the end; then the net is asked in the end alone"
    x,asked = torch.randn(3, 3, 16, 16),[]
    class Net(nn.Module):
        def forward(self, x): asked.append(len(x)); return x
    def run(last, dl, n=3):
        cols,seen = validators(dl, ['entropy', 'density'], last),[]
        for epoch in range(n):
            for c in cols: c.reset()
            for _ in range(2): [c.accumulate(NS(model=Net(), x=x, pred=x, cbs=[], epoch=epoch, n_epoch=n)) for c in cols]
            seen.append([c.value for c in cols])
        return seen
    for dl,n in (([(x,)], 3), (None, 0)):
        each = run(False, dl); assert asked==[3]*n and not np.isnan(each).any() and each[0]==each[1]==each[2]; asked.clear()
        end = run(True, dl); assert asked==[3]*(n//3) and end==[['','']]*2 + each[2:]; asked.clear()
