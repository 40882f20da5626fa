"Winograd's convolution: against torch's in double precision, in value and gradient, and where nets use it"
import numpy as np, pytest, torch, torch.nn.functional as F
import pipa.models as M
from pipa.models import ConvBN
from pipa.fast import pays, toom_cook, winograd

def grads(f, x, w, g):
    x,w = x.clone().requires_grad_(),w.clone().requires_grad_()
    y = f(x, w)
    return y.detach(),*torch.autograd.grad(y, (x,w), g)

def direct(x, w): return F.conv2d(x, w, padding=1)

@pytest.mark.parametrize('m,r,points', [(4,3,(0,.5**.5,-.5**.5,2**.5,-2**.5)), (2,3,(0,1,-1)), (6,3,(0,1,-1,2,-2,.5,-.5)), (2,5,(0,1,-1,2,-2))])
def test_matrices_are_those_of_sliding(m, r, points):
    A,G,B = (o.numpy() for o in toom_cook(m, r, points))
    assert A.shape==(m,m+r-1) and G.shape==(m+r-1,r) and B.shape==(m+r-1,m+r-1)
    rng = np.random.default_rng(0); g,d = rng.normal(size=r),rng.normal(size=m+r-1)
    np.testing.assert_allclose(A @ ((G@g)*(B@d)), np.correlate(d, g, 'valid'), atol=1e-10)

@pytest.mark.parametrize('n,c,o,h,w', [(1,1,1,1,1), (2,3,5,4,4), (3,2,129,5,7), (1,4,3,3,131), (1,3,2,67,45), (5,2,2,8,16), (1,2,256,6,2)])
def test_value_and_gradients(n, c, o, h, w):
    "Odd sizes, one row, several strips, a part of the channels with one channel"
    torch.manual_seed(0)
    x,k,g = (torch.randn(*s, dtype=torch.double) for s in ((n,c,h,w), (o,c,3,3), (n,o,h,w)))
    for a,b in zip(grads(winograd, x, k, g), grads(direct, x, k, g)): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)

def test_layouts():
    "Channels last, a part of a map, a gradient that isn't contiguous"
    torch.manual_seed(0)
    x,k,g = torch.randn(2,6,12,14),torch.randn(4,6,3,3),torch.randn(2,4,14,12).mT
    want = grads(direct, x.double(), k.double(), g.double())
    for form in (x, x.contiguous(memory_format=torch.channels_last), torch.cat([x,x], 1)[:,6:], F.pad(x, (1,2))[..., 1:-2]):
        for a,b in zip(grads(winograd, form, k, g), want): torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=2e-5)

def test_error_in_32_bits():
    torch.manual_seed(0)
    x,k,g = torch.randn(2,512,24,20).relu(),torch.randn(128,512,3,3)*.02,torch.randn(2,128,24,20)
    for a,b in zip(grads(winograd, x, k, g), grads(direct, x.double(), k.double(), g.double())): assert (a-b).norm()<2e-6*b.norm()

def test_nan_and_infinity_stay_visible():
    x = torch.randn(1,2,9,9); x[0,0,4,4] = float('nan')
    assert torch.isnan(winograd(x, torch.randn(2,2,3,3))[0,:,3:6,3:6]).all()

def test_nets_use_it_in_training_alone(monkeypatch):
    used,wide,x = [],ConvBN(128,128,3),torch.randn(2,128,40,36)
    monkeypatch.setattr(M, 'winograd', lambda x, w: used.append(1) or winograd(x, w))
    y = wide.run(x); assert used==[1] and (y-direct(x, wide.conv.weight)).norm()<3e-6*y.norm()
    with torch.autocast('cpu', torch.bfloat16): wide.run(x)
    wide.run(x[...,:8]); wide.eval().run(x); wide.double().train().run(x.double())
    ConvBN(128,128,3,dilation=2).run(x); ConvBN(128,128).run(x); ConvBN(128,128,3,groups=128).run(x); ConvBN(128,64,3).run(x)
    assert used==[1] and pays(x, torch.empty(128,128,3,3))
    assert torch.equal(wide.float().eval().run(x), direct(x, wide.conv.weight))
