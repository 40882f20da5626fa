"Winograd's convolution: against torch's in double precision, in value and gradient, and where nets use it"
import numpy as np, pytest, torch, torch.nn.functional as F
import pipa.fast as W
from pipa.models import ConvBN, SepConvBN, daformer
from pipa.fast import fast, pays, toom_cook, winograd

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
    used,wide,x = [],fast(ConvBN(128,128,3)),torch.randn(2,128,40,36)
    monkeypatch.setattr(W, 'winograd', lambda x, w: used.append(1) or winograd(x, w))
    y,want = wide(x),wide.act(direct(x, wide.conv.weight)); assert used==[1] and (y-want).norm()<3e-6*want.norm()
    with torch.autocast('cpu', torch.bfloat16): wide(x)
    wide(x[...,:8]); wide.eval()(x); wide.double().train()(x.double())
    for o in (ConvBN(128,128,3,dilation=2), ConvBN(128,128), ConvBN(128,128,3,groups=128), ConvBN(128,64,3)): fast(o)(x)
    assert used==[1] and pays(x, torch.empty(128,128,3,3))
    assert torch.equal(wide.float().eval()(x), wide.act(direct(x, wide.conv.weight)))

def test_only_what_the_commands_made_fast_is(monkeypatch):
    "The net itself takes torch's ways, whoever trains it"
    for k in ('winograd', 'dilated'): monkeypatch.setattr(W, k, lambda *_: pytest.fail('a plain net took the fast way'))
    net = daformer('mit_b0', n_out=3).train(); net(torch.randn(2,3,64,64))
    with pytest.raises(pytest.fail.Exception, match='the fast way'): fast(net)(torch.randn(2,3,64,64))

@pytest.mark.parametrize('d', [2,6,18])
@pytest.mark.parametrize('hw', [(7,16),(20,33),(1,1)])
def test_dilated_depthwise_gradients(d, hw):
    "As torch's own, in a module that trains, for maps smaller than the reach of the kernel, too"
    torch.manual_seed(0)
    m = fast(ConvBN(8, 8, 3, d, groups=8)).double()
    x = torch.randn(2, 8, *hw, dtype=torch.double, requires_grad=True)
    y = F.relu(m.bn(m.conv(x))); g = torch.randn_like(y)
    want = torch.autograd.grad(y, (x, m.conv.weight), g)
    for a,b in zip(torch.autograd.grad(m(x), (x, m.conv.weight), g), want): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)

def test_dilated_depthwise_under_autocast_and_without_grad():
    torch.manual_seed(0)
    m,x = fast(SepConvBN(8, 4, 6)),torch.randn(2, 8, 16, 16)
    want = m(x); want.sum().backward(); g = m.depthwise_conv.conv.weight.grad.clone(); m.zero_grad()
    with torch.autocast('cpu', torch.bfloat16): got = m(x)
    got.float().sum().backward()
    assert m.depthwise_conv.conv.weight.grad.dtype==torch.float32 and torch.isfinite(g).all()
    assert (got.float()-want).norm()<.02*want.norm()
    with torch.no_grad(): assert not m(x).requires_grad
