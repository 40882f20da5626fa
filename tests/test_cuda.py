"What a card could do otherwise than the processor. Each test runs on the processor too, so that it is known to run; `.ci/gpu.sh` runs them on a card."
import random, warnings
import numpy as np, pytest, torch, torch.nn.functional as F
from pipa.bench.plain import block_pairs, our_step
from pipa.data import minicity, uda_dls
from pipa.export import export_net, load_graph
from pipa.infer import predict
from pipa.labels import space
from pipa.learner import inference_net, uda_learner
from pipa.losses import feat_dist, patch_contrast, pixel_contrast, same_shapes, weighted_ce
from pipa.minicity import scene
from pipa.models import add_heads, daformer, light
from pipa.runs.resume import Checkpoint
from pipa.test_utils import narrow

devices = pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.cuda)])

@pytest.fixture(autouse=True)
def exact():
    "Products of 32 bits, as the processor has them"
    old = torch.backends.cuda.matmul.allow_tf32,torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32,torch.backends.cudnn.allow_tf32 = old

def same(f, device, *args):
    "A loss and its gradients there, in the shapes of a card, and in double precision on the processor"
    def run(to):
        xs = [to(o) if o.is_floating_point() else o.to(to(torch.zeros(1)).device) for o in args]
        xs = [o.detach().requires_grad_(o.is_floating_point() and i<2) for i,o in enumerate(xs)]
        l = f(*xs)
        l.backward()
        return [l.detach().cpu().double(), *(o.grad.cpu().double() for o in xs if o.grad is not None)]
    want = run(lambda o: o.double())
    with same_shapes(): got = run(lambda o: o.to(device))
    assert len(got)==len(want)>1 and want[0]>0
    for a,b in zip(got, want): torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-6)

@devices
def test_losses_are_those_of_the_processor(device):
    g = torch.Generator().manual_seed(0)
    def unit(*s): return F.normalize(torch.randn(*s, generator=g), dim=1)
    def ids(k, *s): return torch.randint(k, s, generator=g)
    y = ids(5, 2,16,16); y[0,:4] = 255
    same(lambda z: weighted_ce(z, y.to(z.device)), device, torch.randn(2,5,16,16, generator=g))
    same(lambda a,b: feat_dist(a, b, ids_of(y, a), (0,1,2), min_ratio=0.), device, torch.randn(2,8,4,4, generator=g), torch.randn(2,8,4,4, generator=g))
    n,m = 40,90
    rest = unit(m, 16),ids(3, n),ids(3, n),torch.rand(n, generator=g),torch.rand(n, generator=g),ids(3, m)
    same(lambda a,b,neg,y_1,y_2,c_1,c_2,y_n: patch_contrast(a, b, y_1, y_2, c_1, c_2, neg, y_n, thresh=.3), device, unit(n, 16), unit(n, 16), *rest)
    few = ids(2, 1,8,8)   # every pixel is a sample: nothing is left to chance
    same(lambda e: pixel_contrast(e, few.to(e.device), max_samples=512, max_views=512, min_pixels=1), device, unit(1,16,8,8))

def ids_of(y, x): return y.to(x.device)

@devices
@pytest.mark.parametrize('method', ['daformer+pipa', pytest.param('mic+pipa', marks=pytest.mark.slow), pytest.param('advent+pipa', marks=pytest.mark.slow)])
def test_steps_learn_and_the_teacher_follows(device, method):
    torch.manual_seed(0)
    with torch.device(device):
        net,batch = add_heads(light('mit_b0', n_out=5, **narrow), hidden=16),block_pairs(2, (64,64), 5)
        learn,step = our_step(net, batch, (32,64), 0., method=method, pixel=dict(min_pixels=1), things=(1,), lr=1e-3)
    before = {k:v.clone() for k,v in learn.model.state_dict().items()}
    learn.n_epoch = 100
    step()
    seen,teacher = [],getattr(learn, 'mean_teacher', None)
    for _ in range(6):
        step()
        seen.append(float(learn.loss))
    assert np.isfinite(seen).all()
    now = learn.model.state_dict()
    assert all(v.device.type==device and v.isfinite().all() for v in now.values())
    assert any(not torch.equal(v, before[k]) for k,v in now.items() if k.startswith('backbone.'))
    if teacher: assert all(p.device.type==device and not p.requires_grad for p in teacher.teacher.parameters())

@pytest.mark.cuda
@pytest.mark.parametrize('method', ['daformer+pipa', 'mic+pipa', 'fda+pipa', 'advent+pipa'])
def test_no_step_waits_for_the_card(method):
    "The first steps may: buffers are made, kernels are chosen"
    with torch.device('cuda'):
        net,batch = add_heads(light('mit_b0', n_out=5), hidden=16),block_pairs(2, (64,64), 5)
        learn,step = our_step(net, batch, (32,64), 0., method=method, guard=None, pixel=dict(min_pixels=1), things=(1,))
    for _ in range(3): step()
    torch.cuda.set_sync_debug_mode('error')
    try: step()
    finally: torch.cuda.set_sync_debug_mode('default')

def small(device, root, path, n=4, **kw):
    more = dict(size=(64,128), root=root)
    dls = uda_dls(minicity('game', n=4, **more), minicity('real', n=4, **more), minicity('real', 'val', n=2, **more), bs=2, size=(64,128), n=n, device=device)
    return uda_learner(dls, daformer('mit_b0', n_out=11, dim=32, **narrow), 'pipa', crop=(32,64), hidden=16, path=path, lr=1e-3, **kw)

def fitted(learn, n=1):
    with learn.no_bar(), learn.no_logging(): learn.fit_poly(n)
    return learn

@devices
@pytest.mark.parametrize('half', ['bf16', pytest.param('fp16', marks=pytest.mark.cuda)])
def test_half_precision(device, half, shared, tmp_path):
    if half=='fp16' and device=='cpu': pytest.skip('a scaler of gradients is for cards')
    learn = small(device, shared, tmp_path, n=8)
    getattr(learn, f'to_{half}')()
    fitted(learn)
    assert np.isfinite(torch.stack(learn.recorder.losses).numpy()).all() and all(p.isfinite().all() for p in learn.model.parameters())

class Cut(Checkpoint):
    "End after an epoch, as a machine that is switched off"
    def after_epoch(self):
        super().after_epoch()
        if self.epoch==0: raise KeyboardInterrupt

@devices
def test_resume_is_no_interruption(device, shared, tmp_path, cache_home):
    def make(name, cb):
        torch.manual_seed(0); np.random.seed(0); random.seed(0)
        return small(device, shared, tmp_path/name, n=4, cbs=[cb])
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        whole = fitted(make('whole', Checkpoint()), 2)
        with pytest.raises(KeyboardInterrupt): fitted(make('cut', Cut()), 2)
        again = make('cut', Checkpoint())
        again.resume()
        fitted(again, 2)
    finally: torch.use_deterministic_algorithms(False)
    for k,v in whole.model.state_dict().items(): torch.testing.assert_close(again.model.state_dict()[k], v, rtol=1e-4, atol=1e-5, msg=k)

@devices
def test_answers_are_those_of_the_processor(device, shared, tmp_path):
    net = inference_net(fitted(small(device, shared, tmp_path)).model)
    img = scene(0, 'real', (64,128))[0]
    here = predict(net, img)
    assert next(net.parameters()).device.type==device
    assert (here==predict(net.cpu(), img)).mean()>.99
    with warnings.catch_warnings(action='ignore'): export_net(tmp_path/'n.pt2', net, space('minicity'), (64,128), 'nothing')
    graph = load_graph(tmp_path/'n.pt2')[0]
    assert (here==predict(graph, img)).mean()>.99
