"Learner: groups, rates, methods, and everything that a fastai learner can do with the callbacks on"
import json, math
from copy import deepcopy
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from fastai.callback.core import Callback
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientClip
import fastai.callback.all # lr_find, fit_one_cycle, to_bf16, summary
import pipa.show
from pipa.callbacks import *
from pipa.models import add_heads
from pipa.data import folder, uda_dls
from pipa.labels import LabelSpace
from pipa.learner import *
from pipa.losses import weighted_ce
from pipa.metrics import confusion, miou
from pipa.models import Feats, adapt, daformer, light
from tiny import city, seed

golden = Path(__file__).parent/'golden'
small = dict(hidden=16, crop=(32,32), thresh=.1, patch=dict(thresh=.05), pixel=dict(min_pixels=4))

@pytest.fixture(scope='module')
def home(tmp_path_factory): return city(tmp_path_factory.mktemp('city'), n=4, size=(64,64))

pytestmark = pytest.mark.usefixtures('cache_home')

def loaders(home, n=2, **kw):
    g,r = [folder(home/d/'images', home/d/'masks', 'minicity') for d in ('game', 'real')]
    return uda_dls(g, r.unlabelled(), r.take([0,1]), **{**dict(bs=2, size=(64,64), n=n, device='cpu'), **kw})

def make(home, path='.', method='pipa', s=0, n=2, **kw):
    seed(s)
    return uda_learner(loaders(home, n), 'light', method, path=path, **{**(dict(hidden=16) if isinstance(method, list) else small), **kw})

@pytest.fixture(scope='module')
def fitted(tmp_path_factory):
    "One learner with everything, after an epoch of one step; tests may go on with it"
    tmp = tmp_path_factory.mktemp('learner')
    learn = make(city(tmp/'city', n=4, size=(64,64)), tmp)
    learn.tmp = tmp
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    return learn

def state(m): return {k:v.clone() for k,v in m.state_dict().items()}
def same(a, b): return a.keys()==b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())
def quiet(f, learn, *args, **kw):
    with learn.no_bar(), learn.no_logging(): return f(*args, **kw)

# groups

def test_groups_against_golden():
    """Rates and decay as published, name by name. Known differences: the patch head, which the release leaves at the rate of the encoder,
    is a head here"""
    g = json.loads((golden/'param_groups_b0.json').read_text())
    net = add_heads(daformer('mit_b0', n_out=19))
    opt = adamw(param_groups(net), lr=g['base_lr'], wd=g['base_wd'])
    opt.set_hypers(lr=[6e-5, 6e-5, 6e-4])
    mine = {id(p):(h['lr'], h['wd']) for ps,h in zip(opt.param_lists, opt.hypers) for p in ps}
    want = {k.removeprefix('model.'):v for k,v in g['param_to_[lr,wd]'].items()}
    shared,odd = 0,[]
    for k,p in net.named_parameters():
        if k not in want: assert k.startswith(('proj_head.', 'project.')), k; continue
        shared += 1
        if not np.allclose(mine[id(p)], want[k]): odd.append(k)
    assert shared>200 and not [k for k in odd if not k.startswith(('project.', 'proj_head.'))], odd
    missing = [k for k in want if k not in dict(net.named_parameters())]
    assert not [k for k in missing if k.startswith(('backbone.', 'decode_head.'))], missing

def test_every_parameter_once():
    for net in (light('mit_b0', n_out=3), add_heads(light('mit_b0', n_out=3)), adapted(), add_heads(adapted())):
        ids = [id(p) for g in param_groups(net) for p in g]
        assert len(ids)==len(set(ids))==len([*net.parameters()])
        opt = adamw(param_groups(net), 1e-3, .05)
        norms = {id(p) for m in net.modules() if type(m).__name__.startswith(('LayerNorm', 'BatchNorm')) for p in m.parameters()}
        for ps,h in zip(opt.param_lists, opt.hypers):
            assert h['wd'] in (0, .05)
            if h['wd']==0: assert {id(p) for p in ps} <= norms
        assert sum(h['wd']==0 for h in opt.hypers)==1

def adapted():
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large
    return adapt(lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=11), 'classifier.cbr')

def test_frozen_parameters_stay_out():
    net = light('mit_b0', n_out=3)
    for p in net.backbone.parameters(): p.requires_grad_(False)
    assert sum(map(len, param_groups(net)))==len([*net.decode_head.parameters()])

def test_adamw_steps_like_torch():
    seed()
    a = torch.nn.Sequential(torch.nn.Linear(3,3), torch.nn.LayerNorm(3)); b = deepcopy(a)
    opt = adamw([[*a[0].parameters()], [*a[1].parameters()]], lr=.1, wd=.3)
    ref = torch.optim.AdamW([dict(params=b[0].parameters(), weight_decay=.3), dict(params=b[1].parameters(), weight_decay=0)], lr=.1)
    x = torch.randn(5,3)
    for net,o in ((a,opt), (b,ref)):
        for _ in range(3): o.zero_grad(); net(x).pow(3).sum().backward(); o.step()
    for p,q in zip(a.parameters(), b.parameters()): torch.testing.assert_close(p, q)

# rates

def test_poly_against_golden():
    n = 0
    for k,rows in json.loads((golden/'misc.json').read_text())['poly_lr']['lr'].items():
        steps,base = k.removeprefix('max').split('_base')
        for t,lr in rows.items(): n += 1; assert math.isclose(float(base)*poly_lr(int(t), int(steps)), lr, rel_tol=1e-6), (k, t)
    assert n>20

def test_poly_power_and_end():
    assert poly_lr(50, 100, 10, power=2)==.25 and poly_lr(100, 100, 10)==0 and poly_lr(101, 100, 10)==0

class Rates(Callback):
    order = 99
    def before_fit(self): self.seen = []
    def before_step(self): self.seen.append([h['lr'] for h in self.opt.hypers])

def test_rates_of_fit_poly(home, tmp_path):
    learn = make(home, tmp_path, 'source', n=6, cbs=[r := Rates()])
    quiet(learn.fit_poly, learn, 2, 1e-3, head_mult=7., warmup=.5)
    want = [1e-3*poly_lr(t, 6, 3) for t in range(6)]
    assert len(r.seen)==6
    for got,w in zip(r.seen, want): np.testing.assert_allclose(got, [w, w, 7*w], rtol=1e-9)
    assert want[0]<1e-8 and max(want)==want[3]

def test_a_compiled_net_has_the_same_groups():
    net = add_heads(light('mit_b0', n_out=3))
    want = [[id(p) for p in g] for g in param_groups(net)]
    assert len(want)==3 and [[id(p) for p in g] for g in param_groups(torch.compile(net))]==want

def test_a_net_in_wrappers_has_the_same_groups():
    net = add_heads(light('mit_b0', n_out=3))
    want = [[id(p) for p in g] for g in param_groups(net)]
    for o in (torch.nn.DataParallel(net), torch.nn.DataParallel(torch.compile(net))): assert [[id(p) for p in g] for g in param_groups(o)]==want
    net.backbone = torch.compile(net.backbone)
    assert [[id(p) for p in g] for g in param_groups(net)]==want

def test_what_predicts_of_a_net_in_wrappers():
    net = light('mit_b0', n_out=3); x = torch.randn(1,3,64,64)
    with torch.no_grad(): want = net.eval()(x)
    names = list(net.state_dict())
    net.train(); add_heads(net)
    part = deepcopy(net); part.backbone = torch.compile(part.backbone)
    for o in (torch.compile(net), torch.nn.DataParallel(torch.compile(net)), part):
        got = inference_net(o)
        assert list(got.state_dict())==names and not got.training
        with torch.no_grad(): assert torch.equal(got(x), want)
    assert hasattr(net, 'project') and '_orig_mod' in str([*part.state_dict()])

def test_rates_of_a_net_from_elsewhere(home, tmp_path):
    "Its decoder learns faster than its encoder, though no head is ours"
    learn = uda_learner(loaders(home), adapted(), 'source', path=tmp_path, cbs=[r := Rates()])
    quiet(learn.fit_poly, learn, 1, 1e-3, warmup=0)
    assert len(r.seen[0])==3 and r.seen[0][2]==pytest.approx(10*r.seen[0][0])==pytest.approx(10*r.seen[0][1])

def test_rate_of_the_learner_is_the_default(home, tmp_path):
    learn = make(home, tmp_path, 'source', lr=5e-4, cbs=[r := Rates()])
    quiet(learn.fit_poly, learn, 1, warmup=0)
    base = 5e-4*poly_lr(0, 1, 1)
    np.testing.assert_allclose(r.seen[0], [base, base, 10*base])

def test_lean_after_a_fit_that_was_interrupted(home, tmp_path):
    "Terms that were waiting when it stopped count from the start of the next fit, and `lr_find` puts their steps back"
    class Out(Callback):
        order = 95
        def after_loss(self):
            if self.train_iter==1 and self.training: raise KeyboardInterrupt
    learn = make(home, tmp_path, 'pipa', n=6, lean=True)
    with pytest.raises(KeyboardInterrupt), learn.added_cbs(Out()): quiet(learn.fit, learn, 1)
    steps = learn.mix.steps
    quiet(learn.lr_find, learn, num_it=3, show_plot=False, stop_div=False)
    assert learn.mix.steps==steps
    quiet(learn.fit, learn, 1)
    assert learn.mix.n==3 and learn.mix.steps==steps+3

# methods

@pytest.mark.parametrize('method,want', dict(source=[], oracle=[], self_training=['mix'], pixel=['mix','pixel_contrast'], patch=['mix','patch_contrast'],
    pipa=['mix','pixel_contrast','patch_contrast'], daformer=['mix','feature_distance'], mic=['mix','mic'], hrda=['mix','feature_distance'], minent=['min_ent'], advent=['adv_ent'], advseg=['adv_seg'],
    fda=['fda','min_ent']).items())
def test_methods(method, want):
    cbs = method_cbs(method, alpha=.9, thresh=.5, trust='pixel', start=7, w_pixel=.3, w_patch=.4, crop=(32,64), things=(1,2), pixel=dict(temp=.2), patch=dict(thresh=.6), mix=dict(p_blur=0))
    got = {cb.name:cb for cb in cbs}
    assert [*got]==['pair']+['mean_teacher']*(method not in ('source','oracle','minent','advent','advseg','fda'))+want
    for k in ('min_ent','adv_ent','adv_seg','mic'): assert k not in got or got[k].start==7
    if 'mean_teacher' in got: t = got['mean_teacher']; assert (t.alpha, t.thresh, t.trust)==(.9, .5, 'pixel')
    if 'mix' in got: assert got['mix'].start==7 and got['mix'].aug==dict(p_blur=0) and got['mix'].w==1
    if 'pixel_contrast' in got: p = got['pixel_contrast']; assert (p.w, p.start, p.temp)==(.3, 0, .2)
    if 'patch_contrast' in got: p = got['patch_contrast']; assert (p.w, p.start, p.size, p.thresh)==(.4, 7, (32,64), .6)
    if 'feature_distance' in got: assert got['feature_distance'].classes==[1,2]

@pytest.mark.parametrize('said', [('mic','both'), ('mic+pipa',), ('mic+pixel+patch',), ('pixel+mic','patch'), ('mic+both',)], ids=str)
def test_ways_to_say_it(said):
    assert [cb.name for cb in method_cbs(*said)]==['pair','mean_teacher','mix','mic','pixel_contrast','patch_contrast'] and host_terms(*said)==('mic','both')

def test_switches():
    cbs = {cb.name:cb for cb in method_cbs('mic', 'both', start=3, host=dict(ratio=.5), teacher=dict(buffers='copy'), pixel=dict(form='paper'), patch=dict(keep=2, form='paper'))}
    px,pt = cbs['pixel_contrast'],cbs['patch_contrast']
    assert (cbs['mic'].ratio, cbs['mean_teacher'].buffers, px.form, pt.keep, pt.form)==(.5, 'copy', 'paper', 2, 'paper')
    for bad,says in (('mic+nothing','no method `mic\\+nothing`'), ('','no method ``')):
        with pytest.raises(ValueError, match=says): method_cbs(bad)
    with pytest.raises(ValueError, match='no terms `all`'): method_cbs('mic', 'all')

def test_methods_share_nothing():
    a,b = method_cbs('pipa'),method_cbs('pipa')
    assert not {id(o) for o in a} & {id(o) for o in b} and method_cbs('patch')[-1].bank is not method_cbs('patch')[-1].bank

def test_mistakes(home, tmp_path):
    with pytest.raises(ValueError, match='no method `pippa`: choose one of source'): method_cbs('pippa')
    with pytest.raises(ValueError, match='no net `unet`: choose one of light'): make_net('unet', 3)
    net = light('mit_b0', n_out=3)
    assert make_net(net, 11) is net

def test_things_come_from_the_data(home, tmp_path):
    "The feature distance is about things, and the data knows which those are"
    things = list(loaders(home).space.things)
    assert things and all(make(home, tmp_path, o).feature_distance.classes==things for o in ('daformer', 'daformer+mic'))
    assert make(home, tmp_path, 'daformer', things=(1,)).feature_distance.classes==[1]
    with pytest.warns(UserWarning, match='No class of this data is known as a thing'): make(home, tmp_path, 'daformer', things=())

def test_the_host_of_two_scales_brings_its_net(home, tmp_path):
    dls = loaders(home)
    learn = uda_learner(dls, method='hrda', path=tmp_path, net=dict(crop=(32,32), dim=16))
    assert type(learn.model).__name__=='HRDANet' and learn.feature_distance.classes==list(dls.space.things)
    assert type(uda_learner(dls, method='mic', path=tmp_path).model).__name__==type(light('mit_b0', n_out=3)).__name__
    with pytest.raises(ValueError, match='`hrda` is a net of two scales, and `light` has one'): uda_learner(dls, 'light', 'hrda+mic', path=tmp_path)

def test_arguments_of_several_hosts():
    w = lambda *a, **k: {cb.name:cb.w for cb in method_cbs(*a, **k) if hasattr(cb, 'w')}
    assert [w('minent+mic', host=dict(mic=dict(w=.5)))[k] for k in ('min_ent','mic')]==[.001, .5]
    assert w('daformer+mic', host=dict(w=.5))['mic']==.5 and method_cbs('minent', host=dict(start=3))[1].start==3
    for method,host,says in (('minent+mic', dict(w=.5), 'has 2 terms of its own, minent and mic'), ('mic', dict(fda=dict(beta=.1)), 'arguments for `fda`, and the terms of `mic` are mic'),
                             ('fda+minent', {}, 'both bring a penalty on entropy'), ('minent+mic', dict(mic=dict(w=-1)), '`weight` is -1')):
        with pytest.raises(ValueError, match=says): method_cbs(method, host=host)

def test_what_needs_a_teacher_says_so(home, tmp_path):
    for cb in (Mix(), PatchContrast(size=(32,32))):
        learn = make(home, tmp_path, [cb])
        with pytest.raises(ValueError, match=f'{type(cb).__name__} asks a teacher for labels, and there is none: add `MeanTeacher'): quiet(learn.fit, learn, 1)

def test_crops_larger_than_the_target(home, tmp_path):
    for kw,says in ((dict(crop=(96,64)), "Crops of 96x64 don't fit into target images of 64x64: take smaller"),
                    (dict(crop=(64,64), patch=dict(scale=(.8,2.))), "of 64x64, which are scaled by 0.8 at the least")):
        learn = make(home, tmp_path, 'patch', **kw)
        with pytest.raises(ValueError, match=says): quiet(learn.fit, learn, 1)

def test_released_margins_fit_any_height(home, tmp_path):
    learn = make(home, tmp_path, 'self_training', released=True, thresh=0., trust='pixel')
    quiet(learn.fit, learn, 1)
    rows = learn.mean_teacher.labels[1][0].mean(1)
    assert (rows[:2]==0).all() and (rows[2:49]==1).all() and (rows[49:]==0).all(), '2 and 15 of 64 rows, as 15 and 120 of 512'

def test_columns_count_what_was_scored(home, tmp_path):
    "Pixels and places of a step: what the loss functions say they drew"
    learn = make(home, tmp_path, 'pipa', n=4)
    said = []
    for cb in (learn.pixel_contrast, learn.patch_contrast):
        f = cb.score
        def score(f=f): l,n = f(); said.append(int(n)); return l,n
        cb.score = score
    quiet(learn.fit, learn, 1)
    at = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[0]))
    assert at['pixel_n']==np.mean(said[::2])>0 and at['patch_n']==np.mean(said[1::2])

def test_agreement_needs_a_teacher(home, tmp_path):
    names = [[m.name for m in make(home, tmp_path, o, n_unlabelled=2).metrics] for o in ('source', 'self_training')]
    assert 'agreement' not in names[0] and 'entropy' in names[0] and 'agreement' in names[1]

def test_heads_only_where_needed(home, tmp_path):
    for method,heads in dict(source=False, self_training=False, pixel=True, patch=True).items():
        assert hasattr(make(home, tmp_path, method).model, 'project')==heads

def test_list_of_callbacks(home, tmp_path):
    learn = make(home, tmp_path, 'source')
    learn = uda_learner(learn.dls, 'light', [MeanTeacher(), Mix(w=.5)], path=tmp_path)
    assert [m.name for m in learn.metrics]==['pair', 'mix', 'miou', 'teacher_miou'] and len([c for c in learn.cbs if isinstance(c, Pair)])==1

# columns

def test_columns_and_their_numbers(home, tmp_path):
    learn = make(home, tmp_path, 'pipa', n=4, start=2, cbs=CSVLogger('m.csv'))
    rows = []
    with learn.no_bar():
        learn.logger = rows.append
        learn.fit_poly(2)
    names = ['epoch','train_loss','valid_loss','pair','mix','pixel_contrast','patch_contrast','miou','teacher_miou','pixel_n','patch_n','time']
    df = pd.read_csv(tmp_path/'m.csv')
    assert [*df]==[*learn.recorder.metric_names]==names and len(df)==len(rows)==2
    assert df[['mix','patch_contrast']].isna().to_numpy().tolist()==[[True]*2, [False]*2], 'before a term begins it is not a number'
    assert df[['train_loss','valid_loss','pair','pixel_contrast','miou','teacher_miou']].notna().all().all()
    assert math.isnan(rows[0][4]) and math.isnan(learn.recorder.values[0][3]) and math.isfinite(rows[1][4])
    for col,net in (('miou', learn.model), ('teacher_miou', learn.mean_teacher.teacher)):
        cm = torch.zeros(11,11, dtype=torch.long); net.eval()
        with torch.no_grad():
            for x,y in learn.dls.valid: cm += confusion(net(x).argmax(1), y, 11)
        assert math.isclose(miou(cm), learn.recorder.values[1][{'miou':6, 'teacher_miou':7}[col]], abs_tol=1e-6)

def test_same_seed_same_bits(home, tmp_path):
    def run(s):
        learn = make(home, tmp_path, s=s, n=4)
        quiet(learn.fit_poly, learn, 1, 1e-3)
        return state(learn.model),state(learn.mean_teacher.teacher),learn.recorder.values
    a,b,c = run(1),run(1),run(2)
    assert same(a[0], b[0]) and same(a[1], b[1]) and a[2]==b[2]
    assert not same(a[0], c[0])

# the loss

def test_loss_per_image_and_readings():
    seed()
    f,z,y = SegLoss(),torch.randn(3,4,8,8),torch.randint(0,4,(3,16,16)); y[1] = 255
    assert math.isclose(f(z, y), weighted_ce(z, y)) and f((z, None), y)==f(z, y)
    f.reduction = 'none'
    each = f(z, y)
    assert each.shape==(3,) and each[1]==0 and math.isclose(each[2], weighted_ce(z[2:], y[2:]), rel_tol=1e-6)
    assert torch.equal(f.decodes(f.activation(z)), z.argmax(1))
    torch.testing.assert_close(f.activation(z).sum(1), torch.ones(3,8,8))

# fastai

def test_lr_find_leaves_no_trace(fitted):
    mt = fitted.mean_teacher
    a,b,t,steps = state(fitted.model),state(mt.teacher),mt.t,fitted.mix.steps
    with fitted.no_bar(): r = fitted.lr_find(num_it=6, show_plot=False, stop_div=False)
    assert 0<r.valley<10 and same(state(fitted.model), a) and same(state(mt.teacher), b) and (mt.t, fitted.mix.steps)==(t, steps)

def test_validate_and_preds(fitted):
    with fitted.no_bar():
        v = fitted.validate()
        p,y,loss = fitted.get_preds(with_loss=True)
        p2,none = fitted.get_preds(dl=fitted.dls.test_dl([fitted.dls.train.dataset.source.images[0]]))
    assert p.shape==(2,11,64,64) and y.shape==(2,64,64) and loss.shape==(2,) and p2.shape==(1,11,64,64) and none is None
    torch.testing.assert_close(p.sum(1), torch.ones(2,64,64))
    assert math.isclose(float(loss.mean()), v[0], rel_tol=1e-4)
    by_hand = torch.stack([-p[i].gather(0, y[i].clamp(max=10)[None])[0].log()[y[i]!=255].sum()/y[i].numel() for i in range(2)])
    torch.testing.assert_close(torch.Tensor(loss), torch.Tensor(by_hand), rtol=1e-4, atol=1e-5)
    assert len(v)==len(fitted.metrics)+1

def test_predict_on_another_size(fitted, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0,256,(90,200,3),dtype=np.uint8)).save(tmp_path/'a.png')
    with fitted.no_bar(): label,i,p = fitted.predict(tmp_path/'a.png')
    assert p.shape==(11,64,128) and torch.equal(torch.Tensor(label).long(), p.argmax(0)) and torch.equal(torch.as_tensor(i).long(), p.argmax(0))
    with fitted.no_bar(): label,*_ = fitted.predict(str(tmp_path/'a.png'))
    assert label.shape==(64,128)

def test_show_results_and_batch(fitted):
    with fitted.no_bar(): fitted.show_results(max_n=1)
    assert fitted.dls.train.show_batch(max_n=1).axes and fitted.dls.valid.show_batch(max_n=1).axes

def test_summary(fitted):
    s = fitted.summary()
    assert all(o in s for o in ('SegNet', 'x 11 x 16 x 16', 'MeanTeacher', 'PatchContrast'))
    assert 'adamw' in s

def test_save_and_load(fitted, tmp_path):
    file = fitted.save(tmp_path/'w')
    a = state(fitted.model)
    with torch.no_grad():
        for p in fitted.model.parameters(): p.add_(1)
    fitted.load(tmp_path/'w')
    assert same(state(fitted.model), a)

def test_model_can_be_copied(fitted):
    net = deepcopy(fitted.model).eval()
    x = torch.randn(1,3,64,64)
    with torch.no_grad(): assert torch.equal(net(x), fitted.model.eval()(x))
    assert not {p.data_ptr() for p in net.parameters()} & {p.data_ptr() for p in fitted.model.parameters()}

def test_one_cycle_and_freezing(fitted):
    a = state(fitted.model)
    fitted.freeze()
    quiet(fitted.fit_one_cycle, fitted, 1, 1e-2)
    b = state(fitted.model)
    body = [k for k,_ in fitted.model.named_parameters() if k.startswith('backbone.')]
    heads = [k for k,_ in fitted.model.named_parameters() if not k.startswith('backbone.')]
    assert all(torch.equal(a[k], b[k]) for k in body) and any(not torch.equal(a[k], b[k]) for k in heads)
    assert all(p.requires_grad==(k in heads) for k,p in fitted.model.named_parameters())
    fitted.unfreeze()
    quiet(fitted.fit_one_cycle, fitted, 1, 1e-2)
    assert sum(not torch.equal(b[k], v) for k,v in fitted.model.state_dict().items() if k in body) > .9*len(body)
    assert not any(p.requires_grad for p in fitted.mean_teacher.teacher.parameters())

def test_bf16_on_this_machine(fitted):
    "Without a GPU fastai's context does nothing; it must not get in the way"
    fitted.to_bf16()
    try: quiet(fitted.fit, fitted, 1, 1e-4)
    finally: fitted.to_fp32()
    assert all(torch.isfinite(v).all() for v in fitted.model.state_dict().values())
    assert math.isfinite(fitted.recorder.values[-1][0])

def test_gradient_clip(fitted):
    norms = []
    class Norm(Callback):
        order = GradientClip.order+1
        def before_step(self): norms.append(torch.stack([p.grad.norm() for p in self.model.parameters() if p.grad is not None]).norm().item())
    quiet(fitted.fit, fitted, 1, 1e-4, cbs=[GradientClip(.01), Norm()])
    assert norms and norms[0]<.0101

def test_save_model_and_csv(fitted):
    with fitted.no_bar():
        fitted.logger = lambda o: None
        fitted.fit(2, 1e-3, cbs=[SaveModelCallback(monitor='miou', fname='best', with_opt=False), CSVLogger('two.csv')])
    df = pd.read_csv(fitted.tmp/'two.csv')
    assert len(df)==2 and (fitted.tmp/'models/best.pth').exists()
    with fitted.no_bar(): v = fitted.validate()
    i = [m.name for m in fitted.metrics].index('miou')+1
    assert math.isclose(v[i], df.miou.max(), abs_tol=1e-5), 'the best of the two is loaded at the end'

def test_validation_of_another_size(home, tmp_path):
    "Scores are taken at the size of the masks"
    dls = loaders(home, size=(32,32))
    learn = uda_learner(dls, 'light', 'self_training', path=tmp_path)
    with learn.no_bar(): v = learn.validate()
    x,y = dls.valid.one_batch()
    assert x.shape[-2:]==(32,32) and y.shape[-2:]==(64,64) and len(v)==5 and math.isnan(v[1])
    with torch.no_grad(): z = learn.model.eval()(x)
    want = miou(confusion(torch.nn.functional.interpolate(z, (64,64), mode='bilinear').argmax(1), y, 11))
    assert math.isclose(v[3], want, abs_tol=1e-6) and math.isclose(v[4], want, abs_tol=1e-6), 'the teacher starts as a copy'

# net and data

class Plain(torch.nn.Module):
    "A net that doesn't say how many classes it has"
    widths,fused_dim = (8,),8
    def __init__(self, k): super().__init__(); self.backbone,self.c = torch.nn.Conv2d(3, 8, 1, 4),torch.nn.Conv2d(8, k, 1)
    def forward(self, x):
        f = self.backbone(x); z = self.c(f)
        return (z, Feats([f], f)) if self.training else torch.nn.functional.interpolate(z, x.shape[-2:])

@pytest.mark.parametrize('n', [1, 5, 12])
def test_a_net_of_other_classes_is_refused_at_once(n, home, tmp_path):
    says = 'has 1 logit a pixel and `minicity` 11 classes' if n==1 else f'The net has {n} classes and `minicity` has 11: build the net with n_out=11'
    net = light('mit_b0', n_out=n)
    for o in (net, torch.compile(net), torch.nn.DataParallel(net), adapt(net, 'decode_head.linear_fuse.bn')):
        with pytest.raises(ValueError, match=says): uda_learner(loaders(home), o, 'source', path=tmp_path)

@pytest.mark.parametrize('n', [1, 5, 12])
@pytest.mark.parametrize('method', ['source', 'self_training', 'daformer', 'minent', 'mic'])
def test_a_net_that_says_nothing_is_refused_with_its_first_prediction(n, method, home, tmp_path):
    says = 'has 1 logit a pixel and `minicity` 11 classes' if n==1 else f'The net has {n} classes and `minicity` has 11'
    for f in (lambda l: l.fit(1), lambda l: l.validate(), lambda l: l.predict(l.dls.train.dataset.target.images[0])):
        learn = uda_learner(loaders(home), Plain(n), method, path=tmp_path)
        with pytest.raises(ValueError, match=says): quiet(f, learn, learn)

def test_comparing_net_and_data_draws_nothing(home, tmp_path):
    dls,net = loaders(home),light('mit_b0', n_out=11)
    torch.manual_seed(5); want = torch.get_rng_state()
    uda_learner(dls, net, 'source', path=tmp_path)
    assert torch.equal(torch.get_rng_state(), want)
    loss,z,y = SegLoss(n_out=3),torch.randn(2,3,4,4),torch.zeros(2,4,4).long()
    assert torch.equal(loss(z, y), SegLoss()(z, y)) and torch.equal(SegLoss()(z, y), weighted_ce(z, y))

def test_one_class_is_nothing_to_tell_apart(home, tmp_path):
    g,r = [folder(home/d/'images', home/d/'masks', LabelSpace('thing', ['thing'], ids={i:0 if i==3 else 255 for i in range(11)})) for d in ('game', 'real')]
    with pytest.raises(ValueError, match='has 1 logit a pixel and `thing` 1 class: .*name what is not of that class'):
        uda_learner(uda_dls(g, r.unlabelled(), r, bs=2, size=(64,64), n=2, device='cpu'), 'light', 'source', path=tmp_path)
